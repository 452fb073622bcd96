import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.boxes import paired_iou
from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import CODECS, BoxCodec

CODEC = BoxCodec()
coordinate = st.floats(0, 1, allow_nan=False)


def test_the_written_form():
    assert CODEC.encode(torch.tensor([0.0125, 0.3451, 0.6785, 1.0])) == "[012, 345, 678, 999]"
    assert CODEC.encode(torch.tensor([-0.2, 0.0, 1.2, 0.5])) == "[000, 000, 999, 500]"
    box = torch.tensor([0.0126, 0.3451, 0.6787, 1.2], dtype=torch.float64)
    assert BoxCodec("float2").encode(box) == "[0.01, 0.35, 0.68, 1.00]"
    assert BoxCodec("float3").encode(box) == "[0.013, 0.345, 0.679, 1.000]"
    assert BoxCodec("loc_tokens").encode(box) == "<loc_12><loc_345><loc_678><loc_999>"
    points = [BoxCodec(name).encode_point(torch.tensor([0.25, 1.0])) for name in CODECS]
    assert points == ["[250, 999]", "[0.25, 1.00]", "[0.250, 1.000]", "<loc_250><loc_999>"]


@pytest.mark.parametrize("name", CODECS)
def test_points_are_read_beside_boxes_and_not_out_of_them(name):
    codec, point = BoxCodec(name), torch.tensor([0.25, 0.75])
    box = codec.encode(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    found = codec.decode_points(f"Is {box} beside {codec.encode_point(point)} or {codec.encode_point(point / 2)}, {box}?")
    assert len(found) == 2 and codec.decode_points(f"{box}{box}") == []
    torch.testing.assert_close(torch.stack(found), torch.stack([point, point / 2]), rtol=0, atol=ERRORS[name] + 1e-6)


ERRORS = {"int1000": 0.0005, "float2": 0.005, "float3": 0.0005, "loc_tokens": 0.0005}  # as the docstring says


@pytest.mark.parametrize("name", CODECS)
@given(st.lists(coordinate, min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_decode_undoes_encode_to_half_a_step(name, corners):
    codec = BoxCodec(name)
    assert codec.quantisation_error == ERRORS[name]
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    box = torch.tensor([x1, y1, x2, y2], dtype=torch.float64)
    decoded, reason = codec.decode(f"It is at {codec.encode(box)}.")
    assert reason is None
    step = 2 * ERRORS[name]
    thin = x2 - x1 < step or y2 - y1 < step  # widened to one step
    assert (decoded - box).abs().max() <= ERRORS[name] * (3 if thin else 1) + 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_the_stated_error_is_reached_and_every_step_comes_back(name):
    codec = BoxCodec(name)
    fine = torch.linspace(0, 0.5, 5001, dtype=torch.float64)
    moved = torch.stack([codec.decode(codec.encode(torch.stack([c, c, c + 0.25, c + 0.5])))[0] for c in fine])[:, 0] - fine
    assert 0.9 * ERRORS[name] < moved.abs().max() <= ERRORS[name] + 1e-6
    for c in fine[::7]:
        text = codec.encode(torch.stack([c, c, c + 0.25, c + 0.5]))
        assert codec.encode(codec.decode(text)[0]) == text


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["pad", "squash"]))
@settings(max_examples=50, deadline=None)
def test_pixels_to_words_and_back_on_odd_sizes(width, height, mode):
    geometry = Geometry(mode, width, height, 80)
    box_px = torch.tensor([0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height])
    decoded, reason = CODEC.decode(CODEC.encode(geometry.boxes_to_model(box_px)))
    assert reason is None
    longest = max(width, height) if mode == "pad" else 0
    ratio = min(width, height) / longest if longest else 1.0
    if ratio > 0.1:  # a strip thinner than that is a few bins wide
        assert paired_iou(geometry.boxes_to_image(decoded), box_px) > 0.95


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("red heart", "no box"),
        ("[12, 345, 678, 999]", "no box"),
        ("[012,345,678,999]", "no box"),
        ("[0.1, 0.2, 0.3, 0.4]", "no box"),
        ("[012, 345, 678, 9999]", "no box"),
        ("[500, 100, 400, 200]", "left edge 500"),
        ("[500, 100, 500, 200]", "left edge 500"),
        ("[100, 300, 400, 300]", "top edge 300"),
        ("[900, 0", "no box"),
    ],
)
def test_a_form_that_is_not_exact_is_refused_with_its_reason(text, reason):
    box, why = CODEC.decode(text)
    assert box is None and reason in why


def test_the_first_well_formed_box_counts():
    box, reason = CODEC.decode("at [1, 2] then [100, 200, 300, 400] or [000, 000, 999, 999]")
    assert reason is None
    torch.testing.assert_close(box, torch.tensor([0.1005, 0.2005, 0.3005, 0.4005]))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("float2", "[0.1, 0.2, 0.3, 0.4]", "no box of the form [0.00, 0.00, 1.00, 1.00]"),
        ("float2", "[0.100, 0.200, 0.300, 0.400]", "no box"),
        ("float2", "[0.10, 0.20, 1.30, 0.40]", "no box"),
        ("float3", "[012, 345, 678, 999]", "no box"),
        ("float3", "[0.500, 0.100, 0.500, 0.200]", "left edge 0.500 is not left of right edge 0.500"),
        ("float3", "[0.100, 0.300, 0.400, 0.200]", "top edge 0.300 is not above bottom edge 0.200"),
        ("loc_tokens", "<loc_1><loc_2><loc_3>", "no box"),
        ("loc_tokens", "<loc_1><loc_2><loc_3><loc_1000>", "no box"),
        ("loc_tokens", "<loc_01><loc_2><loc_3><loc_4>", "no box"),
        ("loc_tokens", "<loc_9><loc_2><loc_3><loc_4>", "left edge 9 is not left of right edge 3"),
    ],
)
def test_the_other_forms_are_as_strict(name, text, reason):
    box, why = BoxCodec(name).decode(text)
    assert box is None and reason in why


def test_unknown_codec():
    with pytest.raises(DataError, match="box codec 'float4'"):
        BoxCodec("float4")

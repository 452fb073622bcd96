import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.boxes import paired_iou
from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec

CODEC = BoxCodec()
coordinate = st.floats(0, 1, allow_nan=False)


def test_the_written_form():
    assert CODEC.encode(torch.tensor([0.0125, 0.3451, 0.6785, 1.0])) == "[012, 345, 678, 999]"
    assert CODEC.encode(torch.tensor([-0.2, 0.0, 1.2, 0.5])) == "[000, 000, 999, 500]"


@given(st.lists(coordinate, min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_decode_undoes_encode_to_half_a_bin(corners):
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    box = torch.tensor([x1, y1, x2, y2], dtype=torch.float64)
    decoded, reason = CODEC.decode(CODEC.encode(box))
    assert reason is None
    thin = x2 - x1 < 1e-3 or y2 - y1 < 1e-3  # widened to one bin
    assert (decoded - box).abs().max() <= CODEC.quantisation_error * (3 if thin else 1) + 1e-6


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


def test_unknown_codec():
    with pytest.raises(DataError, match="box codec 'float3'"):
        BoxCodec("float3")

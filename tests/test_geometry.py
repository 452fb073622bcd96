"""Geometry: boxes and pixels move together, forward and back, on any size of image."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder.errors import DataError
from encoder.geometry import DETECTOR_MODES, MODES, Geometry

sides = st.integers(1, 2000)
inputs = st.sampled_from([32, 80, 224, 336, 37])
unit = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["pad", "pad_first", "squash", "pad_corner"]), sides, sides, inputs, st.tuples(unit, unit, unit, unit))
@example("pad", 1, 2000, 32, (0.0, 0.0, 1.0, 1.0))
@example("pad", 1999, 3, 37, (0.0, 0.1, 1.0, 0.9))
def test_boxes_round_trip(mode, width, height, size, corners):
    x1, x2, y1, y2 = *sorted(corners[:2]), *sorted(corners[2:])
    boxes_px = torch.tensor([[x1 * width, y1 * height, x2 * width, y2 * height]], dtype=torch.float64)
    geometry = Geometry(mode, width, height, size)
    inside = geometry.boxes_to_model(boxes_px)
    assert (inside >= -1e-9).all() and (inside <= 1 + 1e-9).all()
    torch.testing.assert_close(geometry.boxes_to_image(inside), boxes_px, rtol=1e-9, atol=1e-7)
    # float32, the precision of training, loses less than a hundredth of a pixel
    back = geometry.boxes_to_image(geometry.boxes_to_model(boxes_px.float()))
    assert (back - boxes_px.float()).abs().max() < 0.01


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*MODES, *DETECTOR_MODES]), sides, sides, inputs, unit, unit)
def test_points_round_trip_in_every_mode(mode, width, height, size, u, v):
    geometry = Geometry(mode, width, height, size)
    points_px = torch.tensor([[u * width, v * height]], dtype=torch.float64)
    torch.testing.assert_close(geometry.points_to_image(geometry.points_to_model(points_px)), points_px, rtol=1e-9, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(sides, sides, inputs)
def test_pad_fills_the_long_side_and_centres(width, height, size):
    geometry = Geometry("pad", width, height, size)
    assert max(geometry.resized) == size and min(geometry.resized) >= 1
    left, top, right, bottom = geometry.boxes_to_model(torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64))[0].tolist()
    pixel = 1.0001 / size  # the margin is split in whole pixels
    assert abs(left - (1 - right)) <= pixel and abs(top - (1 - bottom)) <= pixel
    full = (left, right) if width >= height else (top, bottom)
    assert full == pytest.approx((0, 1), abs=1e-12)


@pytest.mark.parametrize("mode", ["pad", "pad_first", "squash", "pad_corner"])
@pytest.mark.parametrize("width, height", [(61, 37), (37, 61), (50, 50), (200, 33)])
def test_a_painted_box_lies_where_its_numbers_say(mode, width, height):
    """The pixels and the coordinates agree: a bright box is found again in the resized picture."""
    box = [round(0.3 * width), round(0.25 * height), round(0.75 * width), round(0.8 * height)]
    image = Image.new("RGB", (width, height), (0, 0, 0))
    image.paste((255, 255, 255), box)
    geometry = Geometry(mode, width, height, 96)
    square = geometry.apply(image)
    assert square.size == (96, 96) and square.mode == "RGB"
    bright = square.convert("L").point(lambda value: 255 * (value > 160)).getbbox()
    expected = 96 * geometry.boxes_to_model(torch.tensor([box]))[0]
    assert (torch.tensor(bright) - expected).abs().max() <= 1.0


def test_padding_is_the_mean_colour():
    image = Image.new("RGB", (40, 20), (10, 10, 10))
    image.paste((110, 210, 60), (0, 0, 20, 20))
    square = Geometry("pad", 40, 20, 40).apply(image)
    assert square.getpixel((20, 2)) == square.getpixel((20, 38)) == (60, 110, 35)


def test_center_crop_keeps_the_middle_and_refuses_boxes():
    image = Image.new("RGB", (90, 30), (0, 0, 0))
    image.paste((255, 0, 0), (30, 0, 60, 30))
    geometry = Geometry("center_crop", 90, 30, 30)
    assert geometry.apply(image).getcolors() == [(900, (255, 0, 0))]
    with pytest.raises(DataError, match="cuts boxes off; use 'pad' or 'squash'"):
        geometry.boxes_to_model(torch.zeros(1, 4))


def test_boxes_to_image_is_clipped_and_empty_is_fine():
    geometry = Geometry("pad", 100, 50, 64)
    assert geometry.boxes_to_image(torch.tensor([[-0.5, 0.0, 1.5, 1.0]]))[0].tolist() == [0, 0, 100, 50]
    assert geometry.boxes_to_image(torch.zeros(0, 4)).shape == geometry.boxes_to_model(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("colours", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_any_colour_mode_becomes_rgb(colours):
    square = Geometry("pad", 20, 10, 16).apply(Image.new(colours, (20, 10)))
    assert square.mode == "RGB" and square.size == (16, 16)


def test_bad_input_is_one_sentence():
    with pytest.raises(DataError, match="geometry 'crop' is not known; choose one of pad, squash, center_crop"):
        Geometry("crop", 10, 10, 32)
    with pytest.raises(DataError, match="sizes must be positive"):
        Geometry("pad", 0, 10, 32)
    with pytest.raises(DataError, match="is of a 20x10 image, the image given is 10x20"):
        Geometry("pad", 20, 10, 32).apply(Image.new("RGB", (10, 20)))

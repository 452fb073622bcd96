"""LLaVA-NeXT's tiles against transformers' own processor, token by token and pixel by pixel, on odd shapes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from encoder.errors import DataError
from encoder.geometry import ANYRES, Geometry
from encoder.processor import OPENAI_MEAN, OPENAI_STD
from mllm.image_input import ImageInput, no_picture
from mllm.tiles import GRIDS, choose_grid, num_tokens, read_grids

SIZE, PATCH, SIDE = 40, 8, 5
IMAGE = ImageInput(ANYRES, SIZE, OPENAI_MEAN, OPENAI_STD, GRIDS)
SHAPES = [(60, 40), (41, 97), (97, 41), (40, 40), (30, 30), (200, 33), (33, 200), (7, 90), (640, 480), (333, 500), (39, 41)]


def stock_images() -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[[rows * SIZE, columns * SIZE] for rows, columns in GRIDS],
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_squares_are_the_stock_processors(width, height):
    image = picture(width, height)
    stock = stock_images()(image, return_tensors="pt")
    ours = IMAGE.inputs([image])
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"][0], rtol=0, atol=1e-5)
    assert ours["image_sizes"].tolist() == [[height, width]] == stock["image_sizes"].tolist()


def test_grids_and_tokens_are_transformers_over_many_shapes(tokenizer):
    """At the size of CLIP L/14-336, where rounding and ties matter, and at ours."""
    rng = random.Random(0)
    for size, patch in ((336, 14), (40, 8)):
        points = [[rows * size, columns * size] for rows, columns in GRIDS]
        images = LlavaNextImageProcessorPil(size={"shortest_edge": size}, image_grid_pinpoints=points)
        stock = LlavaNextProcessor(
            images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        shapes = [(rng.randrange(40, 1200), rng.randrange(40, 1200)) for _ in range(500)]
        shapes += [(size, size), (size // 2, size // 2), (2 * size, size), (size, 3 * size), (640, 480), (500, 375)]
        for width, height in shapes:
            grid = choose_grid(width, height, size, GRIDS)
            best = select_best_resolution((height, width), points)
            assert (grid[0] * size, grid[1] * size) == best, (width, height)
            expected = stock._get_number_of_features(height, width, size, size) - 1
            assert num_tokens(width, height, grid, size // patch) == expected, (width, height)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("weights/mllm_clip")


def test_boxes_are_of_the_whole_picture():
    """On whichever tile an object lies, its box is in [0, 1] of the picture, as of a squashed one."""
    boxes = torch.tensor([[0.0, 0, 60, 40], [15, 10, 45, 30]])
    geometry = IMAGE.geometry(60, 40)
    torch.testing.assert_close(geometry.boxes_to_model(boxes), torch.tensor([[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75]]))
    torch.testing.assert_close(geometry.boxes_to_image(geometry.boxes_to_model(boxes)), boxes)
    assert geometry.apply(picture(60, 40)).tobytes() == Geometry("squash", 60, 40, SIZE).apply(picture(60, 40)).tobytes()


def test_the_blank_picture_has_its_own_tiles():
    blank = no_picture(IMAGE)
    assert blank.shape == (3, 3, SIZE, SIZE) and not blank.any()
    assert IMAGE.num_tokens(SIZE, SIZE, SIDE**2) == 25 + 5 * (6 + 1)  # 5 of 10 columns are padding: 4, since it is cut evenly


def test_settings_are_written_and_read():
    assert ImageInput.from_dict(IMAGE.as_dict()) == IMAGE
    squash = ImageInput("squash", SIZE, OPENAI_MEAN, OPENAI_STD)
    assert ImageInput.from_dict(squash.as_dict()) == squash and "tile_grids" not in squash.as_dict()


def test_grids_are_read_from_words():
    assert read_grids(["1x2", "3x3"]) == ((1, 2), (3, 3)) and read_grids([]) == GRIDS
    for word in ("1x1", "2", "2x-1", "0x4", "9x9", "axb"):
        with pytest.raises(DataError, match=f"tile_grids has '{word}'; write 2x3"):
            read_grids([word])


def test_a_picture_too_thin_for_tiles_is_named():
    with pytest.raises(DataError, match="a picture of 3000x1 px is too thin"):
        IMAGE.num_tokens(3000, 1, 25)

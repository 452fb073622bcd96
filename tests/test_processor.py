"""`ClocProcessor`: pixels by the written formula, boxes by the same geometry, and folders through AutoProcessor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessor, LlavaImageProcessorPil

from encoder.errors import DataError
from encoder.processor import OPENAI_MEAN, OPENAI_STD, ClocImageProcessor, ClocProcessor


def test_pixels_are_normalised_square_and_carry_their_geometry(tiny_processor, painted):
    images = [painted(i)[0] for i in (0, 3, 4)]
    batch, geometries = tiny_processor.images(images)
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    for image, pixels, geometry in zip(images, batch["pixel_values"], geometries, strict=True):
        assert (geometry.width, geometry.height, geometry.size, geometry.mode) == (*image.size, 32, "pad")
        square = np.asarray(geometry.apply(image), dtype=np.float64) / 255
        expected = (square - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_one_image_or_a_list_and_no_image(tiny_processor, painted):
    image = painted(1)[0]
    assert torch.equal(tiny_processor(images=image)["pixel_values"], tiny_processor(images=[image])["pixel_values"])
    both = tiny_processor(images=[image], text="Red Square")
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (48, 96)])
def test_center_crop_equals_the_stock_clip_processor(size):
    """The same mode in transformers, its files included, so that an exported folder sees what ours saw."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size[0] // 8, size[1] // 8)).resize(size)
    stock = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = stock(image, return_tensors="pt")["pixel_values"]
    got = ClocImageProcessor(size=32, geometry="center_crop")(image)["pixel_values"]
    assert (got - expected).abs().max() < 0.05  # a grey level or two: resizing libraries differ


def test_texts_are_lower_cased_padded_and_end_with_the_end_token(tiny_processor):
    batch = tiny_processor.texts(["Small RED square", "blue dot", "small red square " * 30])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape and ids.shape[1] <= 32
    for row, real in zip(ids, mask.bool(), strict=True):
        assert row[real][-1] == 1 and (row[real][:-1] != 1).all() and (row[~real] == 0).all()
    again = tiny_processor.texts(["small red SQUARE"])
    assert torch.equal(again["input_ids"][0], ids[0][mask[0].bool()])
    empty = tiny_processor.texts([])
    assert empty["input_ids"].shape == (0, 1) and empty["input_ids"].dtype == torch.long


def test_case_is_kept_where_asked(tiny_processor):
    plain = ClocProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, lowercase=False)
    seen = []
    tokenizer, plain.tokenizer = plain.tokenizer, lambda texts, **kwargs: seen.extend(texts) or tokenizer(texts, **kwargs)
    plain.texts(["Red Square"])
    assert seen == ["Red Square"]


def test_auto_classes_round_trip(tiny_folder, tiny_processor, painted, tmp_path):
    image = painted(3)[0]
    loaded = AutoProcessor.from_pretrained(tiny_folder)
    assert type(loaded) is ClocProcessor and loaded.lowercase is True
    expected, got = (processor(images=[image], text=["Small red square"]) for processor in (tiny_processor, loaded))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert type(AutoImageProcessor.from_pretrained(tiny_folder)) is ClocImageProcessor

    image_processor = ClocImageProcessor(size=48, geometry="squash", image_mean=[0.5] * 3, image_std=[0.25] * 3)
    ClocProcessor(image_processor, tiny_processor.tokenizer, lowercase=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cloc"}))
    again = AutoProcessor.from_pretrained(tmp_path)
    ours = again.image_processor
    assert (ours.size, ours.geometry, ours.image_mean, ours.image_std) == (48, "squash", [0.5] * 3, [0.25] * 3)
    assert again.lowercase is False


def test_bad_geometry_is_one_sentence():
    with pytest.raises(DataError, match="geometry is 'fit'; choose one of pad, squash, center_crop"):
        ClocImageProcessor(geometry="fit")


@pytest.mark.parametrize("width, height", [(61, 37), (37, 60), (50, 50), (200, 33), (500, 375)])
def test_padding_first_is_pixel_for_pixel_that_of_llava(width, height):
    """transformers' processor with LLaVA's padding, whose colour is the mean that pixels are normalised by."""
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    stock = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    image = Image.fromarray(noise.numpy())
    ours = ClocImageProcessor(size=40, geometry="pad_first")
    expected = torch.as_tensor(stock(image, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(ours(image)["pixel_values"], expected, rtol=0, atol=1e-6)

"""Captioners of three families: a batch says what one image after the other does, and what plain `generate` says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vesl_fixtures import noise_image, save_blip, save_llava, save_owl, save_qwen

from encoder.errors import DataError
from encoder.vesl.captioner import CHAT_PROMPT, Captioner

SAVE = {"llava": save_llava, "qwen2_vl": save_qwen, "blip": save_blip}
ALT_TEXTS = ["w1", "", "w2 w3 w4 w5 w6", "a picture of w7"]
TOKENS = 8


@pytest.fixture(scope="module")
def images():
    return [noise_image(*size, seed) for seed, size in enumerate([(60, 33), (33, 60), (48, 48), (64, 20)])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in SAVE.items()}


@pytest.mark.parametrize("prompt", [None, "found as {alt_text} . describe"])
@pytest.mark.parametrize("kind", SAVE)
def test_a_batch_equals_one_by_one(folders, images, kind, prompt):
    """Images of other sizes and prompts of other lengths beside it change nothing of a caption."""
    captioner = Captioner.from_pretrained(folders[kind], prompt=prompt, max_new_tokens=TOKENS)
    together = captioner.caption(images, ALT_TEXTS)
    alone = [captioner.caption([image], [alt_text])[0] for image, alt_text in zip(images, ALT_TEXTS, strict=True)]
    assert together == alone
    assert len(set(together)) > 2  # a random model may also end at once
    assert captioner.caption([], []) == []


@pytest.mark.parametrize("kind", ["llava", "blip"])
def test_captions_are_what_plain_generate_writes(folders, images, kind):
    prompt = "describe this image" if kind == "llava" else "a picture of"
    ours = Captioner.from_pretrained(folders[kind], prompt=prompt, max_new_tokens=TOKENS).caption(images[:1], [""])
    model, processor = AutoModelForImageTextToText.from_pretrained(folders[kind]), AutoProcessor.from_pretrained(folders[kind])
    text = f"user : <image> {prompt} assistant :" if kind == "llava" else prompt
    inputs = processor(images=images[0], text=text, return_tensors="pt")
    read = inputs["input_ids"].shape[1] - (kind == "blip")  # BLIP's separator is taken off
    with torch.no_grad():
        written = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, read:]
    assert ours == [processor.decode(written, skip_special_tokens=True)] and ours[0]


def test_blip_without_a_prompt_is_unconditional(folders, images):
    captioner = Captioner.from_pretrained(folders["blip"], max_new_tokens=TOKENS)
    assert captioner.prompt == ""
    model, processor = captioner.model, captioner.processor
    with torch.no_grad():
        written = model.generate(**processor(images=images[0], return_tensors="pt"), do_sample=False, max_new_tokens=TOKENS)
    assert captioner.caption(images[:1], ["anything"]) == [processor.decode(written[0], skip_special_tokens=True)]


def test_the_prompt_goes_into_the_template_and_padding_to_the_left(folders):
    captioner = Captioner.from_pretrained(folders["llava"], prompt="found as {alt_text} .")
    assert captioner._text("w1 {x}") == "user : <image> found as w1 {x} . assistant :"
    assert captioner.processor.tokenizer.padding_side == "left"
    captioner.has_template = False
    assert captioner._text("w1") == "<image>\nfound as w1 ."


def test_describe_names_what_decides(folders):
    captioner = Captioner.from_pretrained(folders["qwen2_vl"], max_new_tokens=5, num_beams=2)
    described = captioner.describe()
    assert described.pop("weights").isalnum() and described == {
        "captioner": "qwen2_vl",
        "checkpoint": str(folders["qwen2_vl"]),
        "dtype": "float32",
        "prompt": CHAT_PROMPT,
        "max_new_tokens": 5,
        "num_beams": 2,
    }


def test_bad_input_is_one_sentence(folders, images, tmp_path, tiny_folder):
    with pytest.raises(DataError, match="holds a 'cloc' model, which writes no text about images"):
        Captioner.from_pretrained(tiny_folder)
    with pytest.raises(DataError, match="holds a 'owlv2' model, which writes no text about images"):
        Captioner.from_pretrained(save_owl(tmp_path / "owl"))
    with pytest.raises(DataError, match="holds no model that transformers can read"):
        Captioner.from_pretrained(tmp_path)
    captioner = Captioner.from_pretrained(folders["blip"])
    with pytest.raises(DataError, match="1 images came with 2 texts"):
        captioner.caption(images[:1], ["a", "b"])
    with pytest.raises(DataError, match="max_new_tokens is 0; give at least 1"):
        Captioner(captioner.model, captioner.processor, max_new_tokens=0)


def test_our_own_mllm_is_a_stock_llava(images):
    """The shipped MLLM, read by transformers alone, writes what our own generation writes."""
    from mllm.captioner import MllmCaptioner

    folder = Path(__file__).parents[1] / "weights" / "mllm_cloc"
    square = [image.resize((80, 80)) for image in images]  # no padding: its filling is rounded differently
    prompt = "What is [{alt_text}, 200, 600, 900]?"
    numbers = ["100", "050", "300", "400"]
    ours = MllmCaptioner.from_pretrained(folder, prompt, TOKENS)
    stock = Captioner.from_pretrained(folder, prompt, TOKENS)
    captions = ours.caption(square, numbers)
    assert stock.caption(square, numbers) == captions and all(captions)
    assert ours.describe()["prompt"] == prompt and ours.describe()["captioner"] == "mllm" and ours.caption([], []) == []

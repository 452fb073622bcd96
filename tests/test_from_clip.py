"""A CLOC from a CLIP at another resolution, from a folder like VeCap-DFN's, and with every parameter accounted for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, T5Tokenizer

from encoder import ClocModel, RegionPredictor
from encoder.config import tiny
from encoder.errors import DataError
from encoder.from_clip import POSITIONS, from_clip, resize_positions
from encoder.pretrained import load_encoder, load_processor, load_vision_tower


@pytest.fixture(scope="module")
def clip_folder(tiny_processor, tmp_path_factory):
    """A stock random CLIP of 32 px, patch 8, whose learned temperature is not its configuration's initial one."""
    folder = tmp_path_factory.mktemp("clip")
    config = tiny(vocab_size=len(tiny_processor.tokenizer))
    torch.manual_seed(5)
    clip = CLIPModel(
        CLIPConfig(text_config=config.text_config.to_dict(), vision_config=config.vision_config.to_dict(), projection_dim=16)
    )
    with torch.no_grad():
        clip.logit_scale.fill_(4.5)
        clip.vision_model.embeddings.position_embedding.weight.normal_()
    clip.save_pretrained(folder)
    tiny_processor.tokenizer.save_pretrained(folder)
    return folder


def resized_by_pillow(table: torch.Tensor, grid: int, classes: int) -> torch.Tensor:
    """Pillow's antialiased bicubic on each channel's map of 32-bit floats: another implementation of the same filter."""
    side = round((len(table) - classes) ** 0.5)
    maps = table[classes:].T.reshape(-1, side, side).numpy()
    images = (Image.fromarray(channel, mode="F").resize((grid, grid), Image.Resampling.BICUBIC) for channel in maps)
    return torch.cat([table[:classes], torch.from_numpy(np.stack(list(images))).flatten(1).T])


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("grid", [3, 5, 7, 12, 21])
def test_positions_are_interpolated_as_pillow_does(grid, classes):
    table = torch.randn(classes + 49, 6, generator=torch.Generator().manual_seed(grid))
    got = resize_positions(table, grid, classes)
    assert got.shape == (classes + grid**2, 6) and torch.equal(got[:classes], table[:classes])
    torch.testing.assert_close(got, resized_by_pillow(table, grid, classes), rtol=1e-5, atol=2e-6)
    if grid == 7:
        assert torch.equal(got, table)


def test_interpolation_keeps_rows_and_columns_apart():
    """A table that holds each patch's own place still does, at the new centres, away from the border."""
    centres = (torch.arange(8) + 0.5) / 8
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    got = resize_positions(torch.stack([x, y], -1).reshape(-1, 2), 16, 0).reshape(16, 16, 2)
    new = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(got[4:-4, 4:-4, 0], new[None, 4:-4].expand(8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[4:-4, 4:-4, 1], new[4:-4, None].expand(8, 8), rtol=0, atol=1e-5)


def test_a_table_of_no_square_is_refused():
    with pytest.raises(DataError, match="the position table has 12 patches, no square"):
        resize_positions(torch.zeros(13, 4), 8, 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 32, 56])
def test_from_clip_at_another_resolution(clip_folder, size, tmp_path, painted):
    stock = CLIPModel.from_pretrained(clip_folder).eval()
    model = ClocModel.from_clip(clip_folder, image_size=size).eval()
    table = stock.state_dict()[POSITIONS]
    expected = resized_by_pillow(table, size // 8, 1) if size != 32 else table
    torch.testing.assert_close(model.state_dict()[POSITIONS], expected, rtol=1e-5, atol=2e-6)
    others = {name: value for name, value in stock.state_dict().items() if name != POSITIONS}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in others.items())

    # The saved folder is all that a tower, a predictor or an evaluation needs to know of the size.
    model.save_pretrained(tmp_path)
    load_processor(clip_folder, image_size=size).save_pretrained(tmp_path)
    assert load_encoder(tmp_path).config.vision_config.image_size == size
    pixels = load_processor(tmp_path)(images=painted(0)[0])["pixel_values"]
    assert pixels.shape == (1, 3, size, size)
    output = load_vision_tower(tmp_path)(pixel_values=pixels)
    assert output.last_hidden_state.shape == (1, 1 + (size // 8) ** 2, 32)
    if size == 32:
        assert torch.equal(output.pooler_output, stock.vision_model(pixel_values=pixels).pooler_output)
    predictor = RegionPredictor.from_pretrained(tmp_path)
    predictor.set_image(painted(0)[0])
    assert predictor.embed_boxes([[2, 3, 20, 30]]).shape == (1, 16)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(clip_folder):
    with pytest.raises(DataError, match="image_size 60 is no multiple of .*'s patch of 8 px"):
        from_clip(clip_folder, image_size=60)


def test_an_own_temperature_starts_at_the_learned_one(clip_folder):
    model = from_clip(clip_folder, region_temperature="own")
    assert float(model.logit_scale) == float(model.region_logit_scale) == 4.5


def edited(source, target, edit):
    """A copy of a folder whose parameters went through `edit`."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_and_unused_parameters_are_named(clip_folder, tmp_path):
    more = edited(
        clip_folder, tmp_path / "more", lambda state: state.update({"vision_model.register_tokens": torch.zeros(4, 32)})
    )
    with pytest.raises(DataError, match=r"1 unexpected keys \(vision_model.register_tokens\)"):
        from_clip(more)
    less = edited(clip_folder, tmp_path / "less", lambda state: state.pop("text_projection.weight"))
    with pytest.raises(DataError, match=r"1 missing keys \(text_projection.weight\)"):
        from_clip(less)
    # A buffer that older transformers saved, and that holds 0, 1, 2, ...
    old = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    from_clip(edited(clip_folder, tmp_path / "old", lambda state: state.update(old)))


def test_open_clip_options_of_a_hugging_face_folder_are_refused(clip_folder):
    with pytest.raises(DataError, match="whose config.json says everything; drop the open_clip options"):
        from_clip(clip_folder, quick_gelu=True)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """T5's tokenizer in small: sentencepiece pieces, then 100 extra ids, pad 0, end 1, a limit of 512."""
    folder = tmp_path_factory.mktemp("t5")
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in ("a", "photo", "of", "two", "cats"))]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)] + [(letter, -20.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=vocab, extra_ids=100, model_max_length=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vecap_folder(t5_folder, tmp_path_factory):
    """Laid out as Apple's VeCap-DFN zips: model.safetensors and a short config.json, no tokenizer, no image processor.

    The tower is small; every field that the released B/16's config leaves to transformers' defaults is left out here too.
    """
    folder = tmp_path_factory.mktemp("vecap")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {**sizes, "vocab_size": 136, "pad_token_id": 0, "eos_token_id": 1},
        "vision_config": {**sizes, "patch_size": 16, "image_size": 32},
    }
    torch.manual_seed(8)
    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_vecap_dfn_with_its_t5_tokenizer(vecap_folder, t5_folder):
    model = ClocModel.from_clip(vecap_folder).eval()
    stock = CLIPModel.from_pretrained(vecap_folder).eval()
    assert model.config.vision_config.hidden_act == "quick_gelu"
    with pytest.raises(DataError, match=r"has no tokenizer; name the folder of the one it was trained with \(VeCap-DFN: T5's\)"):
        load_processor(vecap_folder)
    processor = load_processor(vecap_folder, tokenizer=t5_folder)
    assert (processor.image_processor.size, processor.image_processor.geometry) == (32, "pad")
    texts = processor.texts(["A photo of two cats", "a", "cats " * 100])
    ids = texts["input_ids"]
    assert ids.shape == (3, 77) and ids[2, -1] == 1  # cut to the position table, and still ended
    assert ids[0, :6].tolist() == [3, 4, 5, 6, 7, 1] and ids[0, 6:].eq(0).all()
    assert torch.equal(model.encode_text(**texts), stock.get_text_features(**texts).pooler_output)
    # The feature is read at </s>, wherever padding begins.
    torch.testing.assert_close(model.encode_text(ids[:1, :6]), model.encode_text(**texts)[:1], rtol=1e-5, atol=1e-6)


def test_a_tokenizer_larger_than_the_text_tower_is_refused(clip_folder, t5_folder):
    with pytest.raises(DataError, match=r"has 13\d ids, the text tower \d+; name the tokenizer that the tower was trained with"):
        load_processor(clip_folder, tokenizer=t5_folder)


def test_a_tokenizer_with_another_end_is_refused(vecap_folder, t5_folder, tmp_path):
    for path in vecap_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="ends a text with id 1, the text tower reads its feature at 99"):
        load_processor(tmp_path, tokenizer=t5_folder)

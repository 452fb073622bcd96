"""Box classification: crops against naive references, the command on a tiny CLOC and a tiny CLIP."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from encoder.errors import DataError
from encoder.export import export_clip
from encoder.pretrained import load_encoder, load_processor
from eval import region_classification
from eval.embedding import name_classifier
from eval.predictions import load_evaluation
from eval.prompt_templates import OPENAI80, templates_named
from eval.region_features import RegionFeatures, crop_boxes, dense_features

NAMES = ["apple", "bus", "red heart"]
# As OpenAI lists them, each with " {}." behind it.
OPENAI_LIST = """
a bad photo of a, a photo of many, a sculpture of a, a photo of the hard to see, a low resolution photo of the,
a rendering of a, graffiti of a, a bad photo of the, a cropped photo of the, a tattoo of a, the embroidered,
a photo of a hard to see, a bright photo of a, a photo of a clean, a photo of a dirty, a dark photo of the,
a drawing of a, a photo of my, the plastic, a photo of the cool, a close-up photo of a, a black and white photo of the,
a painting of the, a painting of a, a pixelated photo of the, a sculpture of the, a bright photo of the,
a cropped photo of a, a plastic, a photo of the dirty, a jpeg corrupted photo of a, a blurry photo of the,
a photo of the, a good photo of the, a rendering of the, a photo of one, a doodle of a, a close-up photo of the,
a photo of a, the origami, a sketch of a, a doodle of the, a origami, a low resolution photo of a, the toy,
a rendition of the, a photo of the clean, a photo of a large, a rendition of a, a photo of a nice, a photo of a weird,
a blurry photo of a, a cartoon, art of a, a sketch of the, a embroidered, a pixelated photo of a, itap of the,
a jpeg corrupted photo of the, a good photo of a, a plushie, a photo of the nice, a photo of the small,
a photo of the weird, the cartoon, art of the, a drawing of the, a photo of the large, a black and white photo of a,
the plushie, a dark photo of a, itap of a, graffiti of the, a toy, itap of my, a photo of a cool, a photo of a small,
a tattoo of the
"""


def test_crops_round_outwards_and_stay_inside():
    pixels = np.arange(20 * 10 * 3, dtype=np.uint8).reshape(10, 20, 3)
    image = Image.fromarray(pixels)
    tight, wide, whole = crop_boxes(image, [(3.2, 2.7, 7.1, 5.0)], 1.0) + crop_boxes(
        image, [(4, 4, 8, 8), (-0.5, 0, 20.4, 10.2)], 1.5
    )
    np.testing.assert_array_equal(np.asarray(tight), pixels[2:5, 3:8])
    np.testing.assert_array_equal(np.asarray(wide), pixels[3:9, 3:9])
    np.testing.assert_array_equal(np.asarray(whole), pixels)


def test_templates_are_the_80_of_openai_and_a_sentence_needs_one_gap():
    listed = [f"{words.strip()} {{}}." for words in OPENAI_LIST.replace("\n", " ").split(",")]
    assert len(OPENAI80) == 80
    assert set(OPENAI80) == {*listed, "a {} in a video game.", "the {} in a video game."}
    assert templates_named("a photo of a {}") == ("a photo of a {}",)
    with pytest.raises(DataError, match="one {} for the name"):
        templates_named("openai")


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    """Folders of a tiny random CLOC and of the CLIP in it."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    export_clip(load_encoder(tiny_folder), folder, load_processor(tiny_folder))
    return {"cloc": tiny_folder, "clip": folder}


@pytest.fixture
def boxes(tmp_path):
    """Two pictures, five boxes of which one is a crowd, in COCO's layout."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    sizes = {1: (40, 24), 2: (30, 50)}
    for image_id, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{image_id}.png")
    rows = [(11, 2, 1, [1, 2, 12, 20]), (12, 1, 2, [5, 5, 10, 10]), (13, 1, 3, [20, 3, 18.5, 20])]
    rows += [(14, 2, 3, [10, 20, 20, 30]), (15, 2, 2, [0, 0, 30, 50])]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in sizes.items()],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)],
        "annotations": [{"id": a, "image_id": i, "category_id": c, "bbox": b, "iscrowd": int(a == 15)} for a, i, c, b in rows],
    }
    (tmp_path / "seen.json").write_text(json.dumps(content))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["region_classification.py", *map(str, arguments)])
    region_classification.main()


def common(boxes):
    return ["--annotations", boxes / "seen.json", "--images", boxes / "images", "--out", boxes / "run"]


def test_command_names_boxes_by_the_nearest_class_whatever_the_batch(models, boxes, monkeypatch, capsys):
    run(monkeypatch, "--model", models["cloc"], "--batch-size", 1, *common(boxes))
    assert "n 4  (own data)" in capsys.readouterr().out
    evaluation = load_evaluation(boxes / "run/region_classification/seen/prompter")
    assert [target.id for target in evaluation.targets] == ["12", "13", "11", "14"]
    assert evaluation.protocol["crowds_left_out"] == 1 and evaluation.protocol["candidates"] == 3

    model, processor = load_encoder(models["cloc"]), load_processor(models["cloc"])
    texts = processor.texts(NAMES)
    classes = torch.nn.functional.normalize(model.encode_text(**texts), dim=-1)
    for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
        inputs, (geometry,) = processor.images([Image.open(boxes / "images" / target.image)])
        box = geometry.boxes_to_model(torch.tensor([target.box]))
        feature = model.embed_boxes(model.encode_image(**inputs).tokens, box, torch.tensor([0]))
        assert prediction.raw == NAMES[(feature @ classes.T).argmax().item()]

    scores = json.loads((boxes / "run/region_classification/seen/prompter/scores.json").read_text())
    right = [t.category == p.raw for t, p in zip(evaluation.targets, evaluation.predictions, strict=True)]
    assert scores["micro"]["value"] == pytest.approx(sum(right) / 4)


def test_features_do_not_depend_on_the_batch_and_layers_differ(models, boxes):
    model, processor = load_encoder(models["clip"]), load_processor(models["clip"])
    images = [Image.open(boxes / "images" / f"{i}.png").convert("RGB") for i in (1, 2)]
    of_images = [[(5.0, 5.0, 15.0, 15.0), (20.0, 3.0, 38.5, 23.0)], [(1.0, 2.0, 13.0, 22.0)]]
    embedded = {}
    for feature, layer in (("roialign", -1), ("roialign", -2), ("crop", -1)):
        features = RegionFeatures(model, processor, feature, layer)
        together = features.embed(images, of_images)
        apart = torch.cat([features.embed([i], [b]) for i, b in zip(images, of_images, strict=True)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
        embedded[feature, layer] = together
    assert not torch.allclose(embedded["roialign", -1], embedded["roialign", -2], atol=1e-2)

    crop = images[1].crop((1, 2, 13, 22))
    pooled = model.get_image_features(**processor.images([crop])[0]).pooler_output
    torch.testing.assert_close(embedded["crop", -1][2:], torch.nn.functional.normalize(pooled, dim=-1), rtol=0, atol=1e-5)


def test_several_templates_average_unit_embeddings(models):
    model, processor = load_encoder(models["clip"]), load_processor(models["clip"])
    one, two = (name_classifier(model, processor, NAMES, (t,)) for t in ("{}", "a photo of a {}"))
    both = name_classifier(model, processor, NAMES, ("{}", "a photo of a {}"))
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))


def test_variants_share_a_run_folder_and_resume_by_id(models, boxes, monkeypatch, capsys):
    for arguments in (["--feature", "roialign", "--layer", -2], ["--feature", "crop", "--crop-scale", 1.5]):
        run(monkeypatch, "--model", models["clip"], *arguments, *common(boxes))
    folder = boxes / "run/region_classification/seen"
    assert sorted(path.name for path in folder.iterdir()) == ["crop1.5", "roialign-2"]

    answers = folder / "crop1.5/predictions.jsonl"
    whole = answers.read_text()
    answers.write_text(whole[: len(whole) // 2])  # a kill in the middle of a line
    run(monkeypatch, "--model", models["clip"], "--feature", "crop", "--crop-scale", 1.5, *common(boxes))
    assert "half-written" in capsys.readouterr().out
    assert answers.read_text() == whole
    answers.unlink()
    with pytest.raises(DataError, match="predictions.jsonl is not there"):
        run(monkeypatch, "--out", boxes / "run", "--score-only")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 20]), r"annotation 11 has bbox \[1, 2, 0, 20\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 12, 200]), "needs a positive size and a place inside"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 12, 200]), "or leave out all 1 such with --max-unusable 1"),
        (lambda c: c["annotations"][1].pop("category_id"), "KeyError.'category_id'"),
        (lambda c: c["annotations"][1].update(image_id=9), "annotation 12 names an image_id or category_id"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "1 of 2 images are not in .*gone.png"),
        (lambda c: c["images"][0].update(file_name="../1.png"), "seen.json: image .*: image file '../1.png' leaves the folder"),
        (lambda c: c["images"][0].update(width=41), "is 40x24 px, the annotations say 41x24"),
        (lambda c: c["categories"][0].update(name="bus"), "a category name occurs twice"),
        (lambda c: c.update(annotations=[]), "holds no box outside crowds"),
    ],
)
def test_bad_annotations_get_one_sentence(models, boxes, monkeypatch, change, message):
    path = boxes / "seen.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        run(monkeypatch, "--model", models["cloc"], *common(boxes))


def test_unusable_boxes_are_left_out_on_request_and_counted(models, boxes):
    content = json.loads((boxes / "seen.json").read_text())
    content["annotations"][0]["bbox"] = [1, 2, 0, 20]
    (boxes / "seen.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "--model", models["cloc"], "--max-unusable", 1, *common(boxes))
    evaluation = load_evaluation(boxes / "run/region_classification/seen/prompter")
    assert [target.id for target in evaluation.targets] == ["12", "13", "14"]
    assert evaluation.protocol["unusable_left_out"] == 1 and evaluation.protocol["crowds_left_out"] == 1


def test_dense_features_of_a_siglip_are_its_head_on_each_patch_alone():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    config = SiglipConfig(text_config={**sizes, "vocab_size": 9}, vision_config=vision)
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    tower, head = model.vision_model, model.vision_model.head
    with torch.no_grad():
        maps = dense_features(model, pixels, -1)
        tokens = tower(pixel_values=pixels).last_hidden_state  # after the final LayerNorm
        # With one key the softmax is 1, and attention hands its value on.
        weight, bias = head.attention.in_proj_weight[32:], head.attention.in_proj_bias[32:]
        value = head.attention.out_proj(tokens @ weight.T + bias)
        expected = value + head.mlp(head.layernorm(value))
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_prompter_is_refused_for_a_plain_clip(models, boxes, monkeypatch):
    with pytest.raises(DataError, match="this is a plain CLIP; use roialign or crop"):
        run(monkeypatch, "--model", models["clip"], *common(boxes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", -2], "--layer -2 is for roialign and maskpool, prompter does not read it"),
        (["--feature", "roialign", "--crop-scale", 1.5], "--crop-scale 1.5 is for crop, roialign does not read it"),
        (["--feature", "crop", "--crop-scale", -1], "--crop-scale is -1; give a positive number"),
        (["--masks", "pngs"], "--masks is for --feature maskpool, prompter does not read it"),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(models, boxes, monkeypatch, flags, message):
    with pytest.raises(DataError, match=message):
        run(monkeypatch, "--model", models["cloc"], *flags, *common(boxes))

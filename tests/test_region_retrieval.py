"""Region retrieval on GRIT, Visual Genome and RefCOCO in their official forms: pools, places and recall against loops."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from dataset_fixtures import write_grit_tars, write_refcoco, write_visual_genome
from eval_fixtures import naive_recall, run, save_stock_clip
from PIL import Image

from encoder.errors import DataError
from encoder.pretrained import load_encoder, load_processor
from eval import region_retrieval
from eval.predictions import load_evaluation
from eval.region_retrieval import draw

DIRECTIONS = ("text_to_region", "region_to_text")
HANGER = "a wire hanger with a paper cover that reads we heart our customers"


def evaluate(model, out, *arguments):
    run(region_retrieval, "--model", model, "--out", out, *arguments)


def loaded(out, split, variant="prompter"):
    folders = [out / direction / split / variant for direction in DIRECTIONS]
    return [load_evaluation(f) for f in folders], [json.loads((f / "scores.json").read_text()) for f in folders]


def test_refcoco_recall_equals_loops_over_single_embeddings(tiny_folder, tmp_path):
    annotations, images = write_refcoco(tmp_path)
    arguments = ["--data", "refcoco", "--annotations", annotations, "--images", images, "--split", "train"]
    evaluate(tiny_folder, tmp_path / "run", *arguments, "--batch-size", 1)
    (by_text, by_region), scores = loaded(tmp_path / "run", "refcoco-unc-train")
    # The two refs of one object are one region with the three different expressions.
    assert [t.text for t in by_text.targets] == ["brown dog", "dog on the left", "the dog", "bus"]
    assert [t.box for t in by_region.targets] == [(4.5, 6.25, 24.5, 16.75), (30.0, 20.0, 64.0, 48.0)]
    assert by_text.protocol["candidates"] == 2 and by_region.protocol["candidates"] == 4
    assert by_region.protocol["chance"]["recall_1"] == pytest.approx((3 / 4 + 1 / 4) / 2)

    model, processor = load_encoder(tiny_folder), load_processor(tiny_folder)
    regions, texts = [], []
    with torch.no_grad():
        for target in by_region.targets:
            inputs, (geometry,) = processor.images([Image.open(images / target.image)])
            box = geometry.boxes_to_model(torch.tensor([target.box]))
            regions.append(model.embed_boxes(model.encode_image(**inputs).tokens, box, torch.tensor([0]))[0])
        for target in by_text.targets:
            texts.append(model.encode_text(**processor.texts([target.text]))[0])
    unit = [torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1).numpy() for rows in (texts, regions)]
    similarity = unit[0] @ unit[1].T
    for matrix in (similarity, similarity.T):
        assert np.diff(np.sort(matrix, axis=1), axis=1).min() > 1e-5  # else rounding could decide
    rights = ([{0}, {0}, {0}, {1}], [{0, 1, 2}, {3}])
    for matrix, right, score in zip((similarity, similarity.T), rights, scores, strict=True):
        for k in (1, 5, 10):
            assert score[f"recall_{k}"]["value"] == pytest.approx(naive_recall(matrix, right, k))


def test_equal_captions_of_grit_tie_or_are_one(tiny_folder, tmp_path, capsys):
    write_grit_tars(tmp_path / "grit", samples=3)
    common = ["--data", "grit", "--images", tmp_path / "grit"]
    evaluate(tiny_folder, tmp_path / "each", *common)
    (by_text, by_region), scores = loaded(tmp_path / "each", "grit")
    # A box's text is its referring expression; the second box is cut at the border.
    assert Counter(t.text for t in by_text.targets) == {HANGER: 3, HANGER[19:]: 3}
    assert {t.box for t in by_region.targets} == {(0.0, 10.0, 40.0, 40.0), (40.0, 20.0, 60.0, 40.0)}
    assert by_text.protocol["candidates"] == by_region.protocol["candidates"] == 6
    for prediction, target in zip(by_region.predictions, by_region.targets, strict=True):
        higher, wrong, right = prediction.place
        assert (wrong, right) == (2, 1) and higher in (0, 3)  # the other two captions of these words
        assert (prediction.raw == target.category) == (higher == 0)
    first = np.mean([p.place[0] == 0 for p in by_region.predictions])
    assert scores[1]["recall_1"]["value"] == pytest.approx(first / 3)
    assert scores[1]["recall_10"]["value"] == 1 and scores[1]["chances"]["recall_1"] == pytest.approx(1 / 6)

    evaluate(tiny_folder, tmp_path / "distinct", *common, "--texts", "distinct")
    (by_text, by_region), scores = loaded(tmp_path / "distinct", "grit")
    assert len(by_text.targets) == 2 and len(by_region.targets) == 6
    assert by_text.protocol["chance"]["recall_1"] == pytest.approx(1 / 2)
    assert scores[1]["recall_1"]["value"] == pytest.approx(first)
    assert capsys.readouterr().out.strip().endswith(f"answers and scores: {tmp_path / 'distinct'}")


def test_visual_genome_with_a_stock_clip_and_what_is_left_out(tiny_folder, tmp_path, capsys):
    clip = save_stock_clip(tiny_folder, tmp_path / "clip")
    image_data, descriptions, _, images = write_visual_genome(tmp_path)
    common = ["--data", "visual_genome", "--annotations", image_data, descriptions, "--images", images]
    with pytest.raises(DataError, match="this is a plain CLIP; use roialign or crop"):
        evaluate(clip, tmp_path / "run", *common)
    for feature in ("roialign", "crop"):
        evaluate(clip, tmp_path / "run", *common, "--feature", feature)
    (by_text, by_region), _ = loaded(tmp_path / "run", "visual_genome", "roialign-1")
    assert [t.text for t in by_text.targets] == ["the clock is green in colour", "a shade", "two men"]
    assert by_region.targets[1].box == (0.0, 20.0, 28.0, 48.0)  # cut at the border
    assert by_text.protocol["left_out"] == {"boxes without area": 0, "boxes without caption": 1}
    assert by_text.protocol["completeness"].startswith("PARTIAL: 2 of 108077 images")

    capsys.readouterr()
    written = (tmp_path / "run/text_to_region/visual_genome/crop/predictions.jsonl").read_text()
    evaluate(clip, tmp_path / "run", *common, "--feature", "crop")  # nothing left to compute: only scored
    assert (tmp_path / "run/text_to_region/visual_genome/crop/predictions.jsonl").read_text() == written
    with pytest.raises(DataError, match="protocol.sample 2000, this run has 1"):
        evaluate(clip, tmp_path / "run", *common, "--feature", "crop", "--sample", 1)
    with pytest.raises(DataError, match="--sample is -1; give a number of pictures, or 0 for all"):
        evaluate(clip, tmp_path / "run", *common, "--feature", "crop", "--sample", -1)


def test_draw_is_even_repeatable_and_keeps_all_on_request():
    numbers = list(range(20))
    assert draw(iter(numbers), 0, 0) == numbers and draw(iter(numbers), 50, 0) == numbers
    assert draw(iter(numbers), 5, 3) == draw(iter(numbers), 5, 3)
    counts = Counter(n for seed in range(2000) for n in draw(iter(numbers), 5, seed))
    assert len(set(draw(iter(numbers), 5, random.randrange(100)))) == 5
    assert all(abs(count - 500) < 5 * math.sqrt(500 * 0.75) for count in counts.values())


def test_bad_input_gets_one_sentence(tiny_folder, tmp_path):
    image_data, descriptions, _, images = write_visual_genome(tmp_path)
    common = ["--data", "visual_genome", "--annotations", image_data, descriptions, "--images", images]
    Image.new("RGB", (9, 9)).save(images / "VG_100K/2.jpg")
    with pytest.raises(DataError, match="VG_100K/2.jpg is 9x9 px, its annotations say 50x40"):
        evaluate(tiny_folder, tmp_path / "run", *common)
    (images / "VG_100K/2.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="VG_100K/2.jpg cannot be read as an image"):
        evaluate(tiny_folder, tmp_path / "run", *common)
    (images / "VG_100K/2.jpg").unlink()
    with pytest.raises(DataError, match="VG_100K/2.jpg is not there"):
        evaluate(tiny_folder, tmp_path / "run", *common)
    with pytest.raises(DataError, match="takes one --annotations"):
        evaluate(tiny_folder, tmp_path / "run", "--data", "refcoco", "--images", images)
    with pytest.raises(DataError, match="--model, --data and --images are needed"):
        run(region_retrieval, "--out", tmp_path / "run")

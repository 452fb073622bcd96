"""Benchmarks whose answers are words, on the shipped MLLM: POPE, RefLVIS, Visual Genome; likelihoods against plain arithmetic."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_fixtures import put, write_visual_genome
from eval_fixtures import run, write_json, write_picture
from PIL import Image

from encoder.errors import DataError, run_main
from encoder.masks import decode_mask
from eval import pope, reflvis, reflvis_records, visual_genome
from eval.predictions import load_evaluation
from eval.reflvis_records import make_records, point_inside, scribble
from eval.scoring import score_line
from mllm.generation import GroundingModel
from mllm.likelihood import answer_likelihoods
from mllm.templates import TEMPLATES

MLLM = Path(__file__).parents[1] / "weights/mllm_cloc"


def write_pope(folder, name="coco_pope_popular.json", **changes):
    """Four questions in POPE's lines on two pictures."""
    rows = [
        {"question_id": i, "image": f"COCO_val2014_{i // 2}.png", "text": f"Is there a {thing} in the image?", "label": label}
        for i, (thing, label) in enumerate([("dog", "yes"), ("bus", "no"), ("cat", "yes"), ("car", "no")], 1)
    ]
    rows[0] |= changes
    for i in range(3):
        write_picture(folder / f"images/COCO_val2014_{i}.png", 40, 30 + i, i)
    return put(folder / "pope" / name, "".join(json.dumps(row) + "\n" for row in rows))


def test_pope_reads_the_official_lines_and_scores_yes_and_no(tmp_path):
    path = write_pope(tmp_path)
    run(pope, "--model", MLLM, "--data", path.parent, "--out", tmp_path / "run", "--instruction", "Answer yes or no.")
    evaluation = load_evaluation(tmp_path / "run/pope/popular")
    assert [p.prompt for p in evaluation.predictions][0] == "Is there a dog in the image? Answer yes or no."
    scores = json.loads((tmp_path / "run/pope/popular/scores.json").read_text())
    # The shipped model knows neither word; by POPE's rule that is a yes, and it is counted.
    assert scores["yes_ratio"] == 1.0 and scores["yes_no"]["value"] == 0.5 and scores["neither_yes_nor_no"] == 4
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((0.5, 1.0, 2 / 3))
    assert scores["completeness"] == "PARTIAL: the file has 4 of 3000 questions"
    for changes, message in (
        ({"label": "maybe"}, "line 1: label is 'maybe'"),
        ({"question_id": 2}, "question_id 2 occurs twice"),
        ({"image": "gone.png"}, "line 1: .*gone.png is not there"),
        ({"image": "../images/1.png"}, "line 1: image file '../images/1.png' leaves the folder of images"),
    ):
        write_pope(tmp_path, **changes)
        with pytest.raises(DataError, match=message):
            run(pope, "--model", MLLM, "--data", path, "--images", tmp_path / "images", "--out", tmp_path / "b")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="line 4: not JSON"):
        run(pope, "--model", MLLM, "--data", path, "--images", tmp_path / "images", "--out", tmp_path / "b")
    write_pope(tmp_path)
    with pytest.raises(DataError, match="no file for split random; there are popular"):
        run(pope, "--model", MLLM, "--data", path, "--images", tmp_path / "images", "--split", "random", "--out", tmp_path / "b")


def write_lvis(folder, num_images=4):
    """Pictures of val2017, one of train2017, with three objects each; classes 5 and 6 are known to be absent from some."""
    categories = [
        {"id": i, "name": name, "synonyms": synonyms, "frequency": "rcf"[i % 3], "synset": "x.n.01", "def": "", "image_count": 1}
        for i, (name, synonyms) in enumerate(
            [("car_(automobile)", ["car_(automobile)", "auto"]), ("dog", ["dog"]), ("bow_(weapon)", ["bow_(weapon)"]),
             ("auto_rickshaw", ["auto_rickshaw", "auto"]), ("cat", ["cat"]), ("bus", ["bus"])], 1)
    ]  # fmt: skip
    images, annotations = [], []
    for i in range(num_images):
        folder_name = "train2017" if i == 3 else "val2017"
        write_picture(folder / f"images/{folder_name}/{i:012d}.png", 60, 50, i)
        images.append({
            "id": i, "width": 60, "height": 50, "coco_url": f"http://x/{folder_name}/{i:012d}.png",
            "neg_category_ids": [4, 6] if i != 2 else [], "not_exhaustive_category_ids": [],
        })  # fmt: skip
        for j in range(3):
            x, y, side = 2 + 18 * j, 4, (14, 16, 3)[j]
            outline = [x, y, x + side, y, x + side, y + side, x, y + side]
            annotations.append({
                "id": 10 * i + j, "image_id": i, "category_id": (1, 2, 3)[j], "bbox": [x, y, side, side], "area": side**2,
                "segmentation": [outline],
            })  # fmt: skip
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    return write_json(folder / "lvis_v1_val.json", content)


def test_records_are_drawn_from_a_seed_with_a_class_that_is_verified_absent(tmp_path):
    lvis = write_lvis(tmp_path)
    records, manifest = make_records(lvis, 100, 0)
    assert [r["id"] for r in records] == [0, 1, 10, 11], "no negative is known for image 2, image 3 is of train2017, one is small"
    assert manifest["passed_over"] == {"not of val2017": 3, "no class verified absent": 3, "under 64 pixels": 2}
    for record in records:
        assert record["negative"] in ("auto_rickshaw", "bus") and record["image"].startswith("val2017/")
        if record["name"] == "car_(automobile)":  # shares the word "auto" with the rickshaw
            assert record["negative"] == "bus"
        x1, y1, x2, y2 = record["box"]
        assert x1 < record["point"][0] < x2 and y1 < record["point"][1] < y2
        drawn = decode_mask(record["free_form"])
        whole = np.zeros((50, 60), bool)
        whole[y1:y2, x1:x2] = True
        assert drawn.any() and not (drawn & ~whole).any() and drawn[int(record["point"][1]), int(record["point"][0])]
    assert make_records(lvis, 100, 0)[0] == records and make_records(lvis, 2, 0)[0] != make_records(lvis, 2, 1)[0]
    some = make_records(lvis, 2, 0)[0]
    assert all(record in records for record in some), "a record does not hang on how many are drawn"
    with pytest.raises(DataError, match="not LVIS v1"):
        make_records(write_json(tmp_path / "coco.json", {"images": [], "annotations": []}), 1, 0)


def test_points_and_scribbles_stay_inside_masks_of_any_shape():
    rng = np.random.default_rng(0)
    for seed in range(100):
        mask = rng.random((20, 30)) < 0.4
        mask[5:9, 4:20] = seed % 2 == 0
        point = point_inside(mask)
        assert mask[int(point[1]), int(point[0])]
        drawn = decode_mask(scribble(mask, point, random.Random(seed)))
        assert drawn.any() and not (drawn & ~mask).any()
    ring = np.ones((21, 21), bool)
    ring[5:16, 5:16] = False
    x, y = point_inside(ring)
    assert ring[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].all(), "a whole neighbourhood, not the centroid's hole"


@pytest.mark.parametrize("decide", ["generation", "likelihood"])
def test_reflvis_asks_in_both_orders_for_each_kind_of_region(tmp_path, decide, capsys):
    lvis = write_lvis(tmp_path)
    run(reflvis_records, "--lvis", lvis, "--out", tmp_path / "reflvis")
    flags = ["--model", MLLM, "--data", tmp_path / "reflvis", "--images", tmp_path / "images", "--out", tmp_path / "run"]
    run(reflvis, *flags, "--decide", decide, "--batch-size", 3)
    name = "reflvis" if decide == "generation" else "reflvis_likelihood"
    prompts = {}
    for kind in ("box", "point", "free_form"):
        evaluation = load_evaluation(tmp_path / "run" / name / kind)
        assert len(evaluation.targets) == 8 and evaluation.targets[0].choices == evaluation.targets[1].choices[::-1]
        prompts[kind] = {t.id: p.prompt for t, p in zip(evaluation.targets, evaluation.predictions, strict=True)}
        scores = json.loads((tmp_path / "run" / name / kind / "scores.json").read_text())
        assert scores["chance"] == 0.5 and {"right_name_first", "right_in_both_orders"} <= scores.keys()
        if decide == "likelihood":
            for target, answer in zip(evaluation.targets, evaluation.predictions, strict=True):
                assert len(answer.likelihoods) == 2 and max(answer.likelihoods) < 0
                assert answer.raw == target.choices[int(np.argmax(answer.likelihoods))]
            assert "ferret_rule" not in scores
            assert "two_choice" in score_line(scores, ("ferret_rule",)), "a line without an accuracy says nothing"
    assert prompts["box"]["0-0"] == "Is the object <region:0> of the image a car (automobile) or a bus?"
    if decide == "generation":
        capsys.readouterr()
        run(reflvis, "--out", tmp_path / "run", "--score-only", "--scorer", "ferret")
        assert "ferret_rule" in (said := capsys.readouterr().out) and "two_choice" not in said
        with pytest.raises(DataError, match="--split mask is no kind of region"):
            run(reflvis, *flags, "--split", "mask")
        records = tmp_path / "reflvis/records.jsonl"
        records.write_text(records.read_text().replace('"bus"', '"cat"'))
        with pytest.raises(DataError, match="records.jsonl is not the file that manifest.json is of"):
            run(reflvis, *flags)


def test_likelihoods_equal_a_row_at_a_time_without_padding():
    """And a generated answer is likelier than any other that was asked for."""
    model = GroundingModel.from_pretrained(MLLM)
    pictures = [Image.new("RGB", (60 + 10 * i, 50), (90 * i, 100, 40)) for i in range(2)]
    box = (5.0, 6.0, 30.0, 40.0)
    (said,) = model.generate([pictures[0]], ["What is <region:0>?"], [[box]], progress=False)
    answers = ["red heart", said, "a very long name of a thing that nobody has seen"]
    rows = [(picture, "What is <region:0>?", [box], answer) for picture in pictures for answer in answers]
    found = answer_likelihoods(model, rows, batch_size=4)
    for row, value in zip(rows, found, strict=True):
        assert answer_likelihoods(model, [row], 1)[0] == pytest.approx(value, rel=1e-4, abs=1e-4)
    # Token by token, each with a run of its own.
    prefix, question = model._prompt_ids(pictures[0], "What is <region:0>?", [box])
    start = [*prefix[:-1], *[model.image_token_id] * model.model.config.image_seq_length, *question]
    answer = model.tokenizer(" red heart", add_special_tokens=False)["input_ids"] + [model.tokenizer.eos_token_id]
    total, ids = 0.0, list(start)
    with torch.inference_mode():
        for token in answer:
            pixels = model.settings.image.pixels([pictures[0]])
            logits = model.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            ids.append(token)
    assert found[0] == pytest.approx(total, abs=1e-4)
    assert found[1] == max(found[:3])


def test_visual_genome_describes_and_grounds_its_regions(tmp_path):
    write_visual_genome(tmp_path / "vg")
    flags = ["--model", MLLM, "--data", tmp_path / "vg", "--images", tmp_path / "vg/images", "--out", tmp_path / "run"]
    for task in ("describing", "grounding"):
        run(visual_genome, *flags, "--task", task)
        evaluation = load_evaluation(tmp_path / f"run/visual_genome_{task}/regions")
        found = [(t.id, t.text, t.box) for t in evaluation.targets]
        assert found == [
            ("VG_100K/2.jpg-0", "two men", (7.0, 6.0, 16.0, 14.0)),
            ("VG_100K_2/1.jpg-0", "the clock is green in colour", (4.0, 5.0, 24.0, 15.0)),
            ("VG_100K_2/1.jpg-1", "a shade", (0.0, 20.0, 28.0, 48.0)),
        ]
        assert evaluation.protocol["left_out"] == {"without words": 1}
    scores = json.loads((tmp_path / "run/visual_genome_describing/regions/scores.json").read_text())
    assert scores["cider"]["n"] == 3 and scores["same_words"]["value"] == 0
    ids = put(tmp_path / "ids.txt", "2\n")
    run(visual_genome, *flags[:-1], tmp_path / "one", "--ids", ids)
    folder = tmp_path / "one/visual_genome_describing/regions"
    assert len(load_evaluation(folder).targets) == 1
    scores = json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert scores["cider"]["n"] == 1 and scores["cider"]["low"] is scores["cider"]["high"] is None
    with pytest.raises(DataError, match="2 numbers, only 1 of them in"):
        run(visual_genome, *flags[:-1], tmp_path / "two", "--ids", put(tmp_path / "ids.txt", "2 77\n"))


def test_a_likelihood_ends_with_the_mark_that_ends_the_answer():
    """A newline that a template writes behind that mark is no part of it: the model never learned to say it."""
    model, found = GroundingModel.from_pretrained(MLLM), []
    rows = [(Image.new("RGB", (60, 50), (90, 100, 40)), "What is this?", [], "red heart")]
    ends = TEMPLATES["chatml"], TEMPLATES["chatml"].replace("{% endgeneration %}{{ '\\n' }}", "{% endgeneration %}")
    assert ends[0] != ends[1]
    for model.tokenizer.chat_template in ends:
        found += answer_likelihoods(model, rows)
    assert found[0] == found[1]


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path, monkeypatch, capsys):
    flags = ["reflvis.py", "--model", MLLM, "--data", put(tmp_path / "reflvis", "{}"), "--out", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", list(map(str, flags)))
    with pytest.raises(SystemExit) as stopped:
        run_main(reflvis.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and "records.jsonl" in said and said.count("\n") == 1

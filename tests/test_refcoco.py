"""RefCOCO's files read as they are distributed, and the grounding command on a tiny CLOC encoder and a tiny MLLM."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.data.prompts import GROUNDING_QUESTION, REFERRING_QUESTION
from encoder.errors import DataError
from encoder.export import export_clip
from encoder.model import ClocModel
from encoder.pretrained import load_encoder, load_processor
from encoder.processor import ClocProcessor
from eval import refcoco
from eval.metrics import paired_iou
from eval.predictions import load_evaluation
from eval.refcoco_files import PUBLISHED, RefcocoFiles, read_plain_pickle
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.training import train

CATEGORIES = {1: "person", 7: "bus"}
SIZES = {101: (40, 24), 102: (30, 50)}


def write_refcoco(folder, file_names=None, protocol=2):
    """Three objects with five expressions on two pictures, in the layout of github.com/lichengunc/refer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names or {101: "val/101.png", 102: "val/102.png"}
    boxes = {11: (101, 1, [5, 5, 10, 10]), 12: (101, 7, [20, 3, 18.5, 20]), 13: (102, 7, [10, 20, 20, 30])}
    instances = {
        "images": [{"id": i, "file_name": names[i], "width": w, "height": h} for i, (w, h) in SIZES.items()],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in CATEGORIES.items()],
        "annotations": [
            {"id": a, "image_id": i, "category_id": c, "bbox": b, "segmentation": []} for a, (i, c, b) in boxes.items()
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    refs, sent_id = [], 0
    texts = {11: ["man on the left", "person"], 12: ["the bus", "bus right"], 13: ["yellow bus"]}
    for ref_id, ann_id, split in ((0, 11, "val"), (1, 12, "val"), (2, 13, "testA")):
        sentences = []
        for text in texts[ann_id]:
            sentences.append({"tokens": text.split(), "raw": text.upper(), "sent_id": sent_id, "sent": text})
            sent_id += 1
        image_id, category_id, _ = boxes[ann_id]
        refs.append({
            "ref_id": ref_id, "ann_id": ann_id, "category_id": category_id, "image_id": image_id, "split": split,
            "file_name": f"COCO_{image_id}_{ref_id}.jpg", "sentences": sentences,
            "sent_ids": [s["sent_id"] for s in sentences],
        })  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    return folder


def write_images(folder):
    rng = np.random.default_rng(0)
    for image_id, (width, height) in SIZES.items():
        path = folder / f"val/{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_expressions_and_objects_of_a_split(tmp_path, protocol):
    files = RefcocoFiles.read(write_refcoco(tmp_path / "refcoco", protocol=protocol))
    assert (files.name, files.split_by, files.test_splits()) == ("refcoco", "unc", ["val", "testA"])
    expressions = files.expressions("val")
    assert [(t.id, t.text, t.category) for t in expressions] == [
        ("0", "man on the left", "person"),
        ("1", "person", "person"),
        ("2", "the bus", "bus"),
        ("3", "bus right", "bus"),
    ]
    assert expressions[2].box == (20.0, 3.0, 38.5, 23.0) and (expressions[2].width, expressions[2].height) == (40, 24)
    assert expressions[2].image == "val/101.png"
    assert [(t.id, t.text) for t in files.objects("testA")] == [("2", "")]


def test_a_python_2_pickle_is_read(tmp_path):
    # What Python 2.7's cPickle, protocol 0 and 2, write for [{'sent': 'caf\xe9', 'id': 3L, u'k': 1.5, 'b': True}].
    zero = b"(lp1\n(dp2\nS'sent'\np3\nS'caf\\xe9'\np4\nsS'id'\np5\nL3L\nsVk\np6\nF1.5\nsS'b'\np7\nI01\nsa."
    two = b"\x80\x02]q\x01}q\x02(U\x04sentq\x03U\x04caf\xe9q\x04U\x02idq\x05\x8a\x01\x03X\x01\x00\x00\x00kq\x06"
    two += b"G?\xf8\x00\x00\x00\x00\x00\x00U\x01bq\x07\x88ua."
    for data in (zero, two):
        (tmp_path / "refs.p").write_bytes(data)
        assert read_plain_pickle(tmp_path / "refs.p") == [{"sent": "café", "id": 3, "k": 1.5, "b": True}]


class Attack:
    def __reduce__(self):
        return (print, ("run by a pickle",))


def test_a_pickle_that_names_anything_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "refs.p"
    for content, named in ((Attack(), "builtins.print"), (np.float64(1), "numpy"), (1j, "builtins.complex")):
        path.write_bytes(pickle.dumps([{"x": content}]))
        with pytest.raises(DataError, match=f"it names {named}.*do not trust it"):
            read_plain_pickle(path)
    for source in (b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."):
        path.write_bytes(source)
        with pytest.raises(DataError, match="it names os.system"):
            read_plain_pickle(path)
    assert "run by a pickle" not in capsys.readouterr().out


def test_every_cut_and_many_damages_of_a_pickle_give_one_sentence(tmp_path):
    whole = (write_refcoco(tmp_path / "refcoco") / "refs(unc).p").read_bytes()
    path = tmp_path / "refs.p"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a whole pickle"):
            read_plain_pickle(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_plain_pickle(path)
        except DataError as error:
            assert "\n" not in str(error)


def test_counts_are_held_against_the_published_ones(tmp_path):
    own = RefcocoFiles.read(write_refcoco(tmp_path / "refcoco"))
    assert own.completeness("val") == own.completeness("testA") == "own data"

    coco = {i: f"COCO_train2014_{i:012d}.jpg" for i in SIZES}
    real = RefcocoFiles.read(write_refcoco(tmp_path / "real/refcoco", coco))
    assert real.completeness("val") == "PARTIAL: the file has 2 of 3811 objects"
    PUBLISHED["three", "unc"] = {"val": (2, 4)}
    try:
        three = RefcocoFiles.read(write_refcoco(tmp_path / "three", coco))
        assert three.completeness("val") == "published"
        assert three.completeness("testA") == "PARTIAL: no published count is known for three, unc, testA"
    finally:
        del PUBLISHED["three", "unc"]
    counted = {name: splits.values() for (name, by), splits in PUBLISHED.items() if by != "google"}
    sums = {name: sum(n for _, n in splits) for name, splits in counted.items()}
    assert sums == {"refcoco": 21586, "refcoco+": 21373, "refcocog": 14498}, "as the Ref-L4 card adds them up"


def _change_refs(folder, change):
    path = folder / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs: refs[1].pop("split"), "item 1: not a referred object .KeyError.'split'"),
        (lambda refs: refs[1].update(ann_id=99), "item 1: ann_id 99 is not in .*instances.json"),
        (lambda refs: refs[2].update(ref_id=0), "ref_id 0 occurs twice; answers are joined by it"),
        (lambda refs: refs[1]["sentences"][0].update(sent_id=0), "sent_id 0 occurs twice"),
        (lambda refs: refs.insert(0, "x"), "item 0: not a referred object"),
    ],
)
def test_bad_refs_get_one_sentence(tmp_path, change, message):
    folder = write_refcoco(tmp_path / "refcoco")
    _change_refs(folder, change)
    with pytest.raises(DataError, match=message):
        RefcocoFiles.read(folder)


def test_wrong_folders_splits_and_files_get_one_sentence(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        RefcocoFiles.read(tmp_path / "gone")
    folder = write_refcoco(tmp_path / "refcoco")
    with pytest.raises(DataError, match=r"no referred object has split 'test'; there are val \(2\), testA \(1\)"):
        RefcocoFiles.read(folder).expressions("test")
    (folder / "refs(google).p").write_bytes((folder / "refs(unc).p").read_bytes())
    with pytest.raises(DataError, match="choose with --split-by"):
        RefcocoFiles.read(folder)
    assert RefcocoFiles.read(folder, "google").split_by == "google"
    (folder / "instances.json").write_text("{")
    with pytest.raises(DataError, match="instances.json: not JSON"):
        RefcocoFiles.read(folder, "unc")
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match="instances.json is not there"):
        RefcocoFiles.read(folder, "unc")
    (folder / "refs(unc).p").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match="holds a dict, a list of referred objects"):
        RefcocoFiles.read(folder, "unc")


@pytest.fixture(scope="module")
def encoders(tiny_folder, tmp_path_factory):
    """Folders of a tiny random CLOC and of the CLIP in it."""
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    export_clip(load_encoder(tiny_folder), folder, load_processor(tiny_folder))
    return {"cloc": tiny_folder, "clip": folder}


@pytest.fixture(scope="module")
def overfitted_mllm(tiny_folder, tmp_path_factory):
    """An MLLM on the tiny CLOC that knows the five expressions and three names of `write_refcoco` by heart."""
    folder = tmp_path_factory.mktemp("mllm")
    write_images(folder / "images")
    files = RefcocoFiles.read(write_refcoco(folder / "refcoco"))
    records = []
    for split in files.test_splits():
        for task, targets in (("where", files.expressions(split)), ("what", files.objects(split))):
            for target in targets:
                question, answer = GROUNDING_QUESTION.format(target.text), "<box:0>"
                if task == "what":
                    question, answer = REFERRING_QUESTION.format("<region:0>"), target.category
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                record = {"id": f"{task}{target.id}", "image": target.image, "width": target.width, "height": target.height}
                records.append({**record, "conversations": turns, "regions": [{"box": target.box}]})
    (folder / "conversations.json").write_text(json.dumps(records))
    config = MllmConfig(
        data=[str(folder / "conversations.json")], images=str(folder / "images"), output=str(folder / "mllm"),
        tower=str(tiny_folder), llm_preset="nano", vocab_size=450, llm_width=64, llm_layers=2, llm_heads=4, batch_size=8,
        learning_rate=5e-3, max_steps=150, max_length=128, precision="fp32", save_dtype="float32", save_every=0,
        log_every=40, report_to="none",
    )  # fmt: skip
    train(config)
    return folder / "mllm"


@pytest.fixture
def scenes(tmp_path):
    write_refcoco(tmp_path / "refcoco")
    write_images(tmp_path / "images")
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["refcoco.py", *map(str, arguments)])
    refcoco.main()


def test_an_encoder_points_with_its_box_head(encoders, scenes, monkeypatch, capsys):
    arguments = ["--model", encoders["cloc"], "--data", scenes / "refcoco", "--out", scenes / "run"]
    run(monkeypatch, *arguments, "--batch-size", 3)
    output = capsys.readouterr().out
    assert "refcoco/val" in output and "refcoco/testA" in output and output.strip().endswith(f"scores: {scenes / 'run'}")
    evaluation = load_evaluation(scenes / "run/refcoco/val")
    assert evaluation.protocol["codec"] == "box head" and evaluation.protocol["geometry"] == "pad"

    model, processor = ClocModel.from_pretrained(encoders["cloc"]).eval(), ClocProcessor.from_pretrained(encoders["cloc"])
    for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
        inputs, (geometry,) = processor.images([Image.open(scenes / "images" / target.image)])
        with torch.inference_mode():
            text = model.encode_text(**processor.texts([target.text]))
            grounded = model.embed_texts(model.encode_image(**inputs).tokens, text, torch.tensor([0]))
            box = geometry.boxes_to_image(model.predict_boxes(grounded))[0]
        if prediction.box is None:
            assert "no area" in prediction.reason and not (box[2] > box[0] and box[3] > box[1])
        else:
            np.testing.assert_allclose(prediction.box, box, atol=1e-3)

    scores = json.loads((scenes / "run/refcoco/val/scores.json").read_text())
    boxes = np.array([p.box or (np.nan,) * 4 for p in evaluation.predictions])
    iou = paired_iou(boxes, np.array([t.box for t in evaluation.targets]))
    assert scores["acc_50"]["value"] == (iou >= 0.5).mean() and scores["n"] == 4
    (scenes / "run/refcoco/val/scores.json").unlink()
    run(monkeypatch, "--out", scenes / "run", "--score-only")
    assert json.loads((scenes / "run/refcoco/val/scores.json").read_text()) == scores


def test_an_mllm_that_knows_the_answers_points_right(overfitted_mllm, scenes, monkeypatch, capsys):
    run(monkeypatch, "--model", overfitted_mllm, "--data", scenes / "refcoco", "--out", scenes / "run", "--batch-size", 2)
    scores = json.loads((scenes / "run/refcoco/val/scores.json").read_text())
    assert scores["acc_50"]["value"] == 1.0 and scores["mean_iou"] > 0.8 and scores["unparsed"] == 0
    evaluation = load_evaluation(scenes / "run/refcoco/val")
    assert evaluation.protocol["codec"] == "int1000" and evaluation.run["model"]["feature_layer"] == -2
    assert evaluation.predictions[0].prompt == "Where is man on the left?"
    assert evaluation.predictions[0].raw.startswith("[") and len(evaluation.run["model"]["weights_sha256"]) == 64

    other = shutil.copytree(overfitted_mllm, scenes / "other")
    settings = json.loads((other / "grounding.json").read_text())
    for change, message in (
        ({"codec": "polar"}, "box codec 'polar' is not known"),
        ({"image": {**settings["image"], "mode": "center_crop"}}, "geometry 'center_crop' cuts objects off"),
        ({"image": {**settings["image"], "size": 64}}, "grounding.json says images of 64 px, config.json a tower of 32 px"),
    ):
        (other / "grounding.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(DataError, match=message):
            run(monkeypatch, "--model", other, "--data", scenes / "refcoco", "--out", scenes / "run2")


def test_words_that_are_no_box_are_wrong_and_counted(overfitted_mllm, scenes, monkeypatch):
    """The same model, its answers cut off after five tokens."""
    monkeypatch.setattr("mllm.generation.GroundingModel.generate", _cut_short(GroundingModel.generate))
    run(monkeypatch, "--model", overfitted_mllm, "--data", scenes / "refcoco", "--out", scenes / "run", "--split", "val")
    scores = json.loads((scenes / "run/refcoco/val/scores.json").read_text())
    assert scores["acc_50"]["value"] == 0 and scores["unparsed"] == 4
    assert scores["unparsed_reasons"] == {"no box of the form [000, 000, 999, 999]": 4}


def _cut_short(generate):
    return lambda self, *arguments, **options: generate(self, *arguments, **{**options, "max_new_tokens": 5})


def test_limit_is_marked_partial(encoders, scenes, monkeypatch, capsys):
    run(monkeypatch, "--model", encoders["cloc"], "--data", scenes / "refcoco", "--out", scenes / "run",
        "--split", "val", "--limit", 3)  # fmt: skip
    assert "n 3  (PARTIAL: 3 of 4)" in capsys.readouterr().out
    for flag, value in (("--limit", -1), ("--limit", 0), ("--batch-size", 0)):
        with pytest.raises(DataError, match=f"{flag} is {value}; give at least 1"):
            run(monkeypatch, "--model", encoders["cloc"], "--data", scenes / "refcoco", "--out", scenes / "run", flag, value)


def test_bad_models_and_images_are_refused_before_anything_is_answered(encoders, scenes, monkeypatch):
    arguments = ["--data", scenes / "refcoco", "--out", scenes / "run"]
    with pytest.raises(DataError, match="is a plain CLIP, which cannot point"):
        run(monkeypatch, "--model", encoders["clip"], *arguments)
    with pytest.raises(DataError, match="--model .*gone is not a folder"):
        run(monkeypatch, "--model", scenes / "gone", *arguments)
    with pytest.raises(DataError, match="--model and --data are needed"):
        run(monkeypatch, *arguments)
    (scenes / "images/val/102.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="102.png cannot be read as an image"):
        run(monkeypatch, "--model", encoders["cloc"], *arguments)
    (scenes / "images/val/102.png").unlink()
    with pytest.raises(DataError, match="1 of 2 images are not in .*val/102.png; pass the folder .* as --images"):
        run(monkeypatch, "--model", encoders["cloc"], *arguments)
    assert not (scenes / "run").exists()


def test_a_geometry_that_was_not_trained_is_refused(encoders, scenes, monkeypatch, tmp_path):
    changed = tmp_path / "squashed"
    shutil.copytree(encoders["cloc"], changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "geometry": "squash"}))
    with pytest.raises(DataError, match="geometry is 'pad', config.json was trained with 'squash'"):
        run(monkeypatch, "--model", changed, "--data", scenes / "refcoco", "--out", scenes / "run")

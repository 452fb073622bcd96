"""The RefCOCO family in other hands' forms, each written here as its maker writes it; and grounding by ranking."""

import json

import numpy as np
import pytest
import torch
from eval_fixtures import run, save_stock_clip, write_json
from PIL import Image
from test_refcoco import SIZES, write_images, write_refcoco

from encoder.errors import DataError
from encoder.pretrained import load_encoder, load_processor
from eval import refcoco
from eval.metrics import paired_iou
from eval.predictions import load_evaluation
from eval.refcoco_mirrors import read_mirror

COCO = {101: "COCO_train2014_000000000101.jpg", 102: "COCO_train2014_000000000102.jpg"}
BUS = [20.0, 3.0, 38.5, 23.0]


def save_images(folder, names=COCO):
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in SIZES.items():
        Image.new("RGB", size, (number, 90, 120)).save(folder / names[number])
    return folder


def jxu124(split="val"):
    info = {"id": 101, "file_name": COCO[101], "width": 40, "height": 24, "license": 1}
    return [{
        "sent_ids": [7, 8], "file_name": "COCO_train2014_000000000101_3.jpg", "ann_id": 12, "ref_id": 3, "image_id": 101,
        "split": split, "category_id": 7, "raw_anns": "{}", "raw_image_info": json.dumps(info), "raw_sentences": "[]",
        "sentences": [{"raw": t.upper(), "sent": t, "sent_id": i, "tokens": t.split()} for i, t in ((7, "the bus"), (8, "bus"))],
        "image_path": f"coco/train2014/{COCO[101]}", "bbox": BUS, "captions": ["bus"], "global_image_id": "coco.101",
        "anns_id": "12",
    }]  # fmt: skip


def lmms():
    return [{
        "question_id": "0", "image": {"bytes": b"not read", "path": None}, "question": "Where?", "answer": ["the bus", "bus"],
        "segmentation": [20.0, 3.0], "bbox": [20.0, 3.0, 18.5, 20.0], "iscrowd": 0,
        "file_name": "COCO_train2014_000000000101_3.jpg",
    }]  # fmt: skip


def ref_l4():
    return [{
        "id": f"{i:06d}", "caption": text, "bbox": [20.0, 3.0, 18.5, 20.0], "bbox_area": 370.0, "bbox_id": 5,
        "ori_category_id": "refcoco_7", "image_id": 101, "height": 24, "width": 40, "file_name": COCO[101], "is_rewrite": i == 1,
        "split": ("val", "test")[i],
    } for i, text in enumerate(["the bus", "bus"])]  # fmt: skip


def qwen():
    return [{"image": COCO[101], "sent": text, "bbox": BUS, "height": 24, "width": 40} for text in ("the bus", "bus")]


def mdetr():
    images = [
        {"file_name": COCO[101], "height": 24, "width": 40, "id": 50 + i, "original_id": 101, "caption": text,
         "dataset_name": "refcoco+", "tokens_negative": [[0, 3]]} for i, text in enumerate(["the bus", "bus"])
    ]  # fmt: skip
    annotations = [{"image_id": 50 + i, "id": i, "bbox": [20.0, 3.0, 18.5, 20.0], "category_id": 7} for i in range(2)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{key: value for key, value in row.items() if key != "image" or isinstance(value, str)} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return path


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (the extra 'data') reads the mirrors' parquet")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


MIRRORS = {
    "jxu124 parquet": ("refcoco/data/validation-00000-of-00001.parquet", write_parquet, jxu124, "refcoco", "unc", ["7", "8"]),
    "jxu124 JSONL": ("refcocog/validation.jsonl", write_jsonl, jxu124, "refcocog", "umd", ["7", "8"]),
    "lmms parquet": ("RefCOCOplus/val-00000-of-00001.parquet", write_parquet, lmms, "refcoco+", "unc", ["val-0-0", "val-0-1"]),
    "lmms JSONL": ("RefCOCO/val.jsonl", write_jsonl, lmms, "refcoco", "unc", ["val-0-0", "val-0-1"]),
    "Ref-L4 parquet": ("x/ref-l4-val.parquet", write_parquet, ref_l4, "ref_l4", "", ["val-000000", "test-000001"]),
    "Qwen": ("refcoco_val.jsonl", write_jsonl, qwen, "refcoco", "unc", ["val-0", "val-1"]),
    "MDETR": ("finetune_refcoco+_val.json", write_json, mdetr, "refcoco+", "unc", ["val-50", "val-51"]),
}


@pytest.mark.parametrize("form", MIRRORS)
def test_each_form_gives_the_same_questions(tmp_path, form):
    name, write, rows, set_name, split_by, ids = MIRRORS[form]
    path = write(tmp_path / name, rows())
    images = save_images(tmp_path / "images")
    for data in (path, path.parent) if path.parent != tmp_path else (path,):
        files = read_mirror(data, images, None, None)
        assert (files.name, files.split_by) == (set_name, split_by)
        targets = files.expressions("all" if set_name == "ref_l4" else "val")
        assert [t.id for t in targets] == ids and [t.text for t in targets] == ["the bus", "bus"]
        for target in targets:
            assert (target.image, target.width, target.height, list(target.box)) == (COCO[101], 40, 24, BUS)
    assert files.completeness("all" if set_name == "ref_l4" else "val").startswith("PARTIAL: ")


def test_a_mirrors_val_that_mixes_two_splits_is_not_the_papers(tmp_path):
    """As many rows as lmms-lab's val has, UNC's and Google's together: never `published`."""
    row = lmms()[0]
    rows = [{**row, "question_id": str(i), "answer": ["bus"] * (3 if i < 2023 else 2)} for i in range(8811)]
    files = read_mirror(write_jsonl(tmp_path / "RefCOCO/val.jsonl", rows), save_images(tmp_path / "images"), None, None)
    assert files.completeness("val") == "PARTIAL: the file has 8811 of 3811 objects"


def test_what_is_not_in_a_form_gets_one_sentence(tmp_path):
    images = save_images(tmp_path / "images")
    for rows, message in (
        ([{"image": "a.jpg", "text": "x"}], "line 1: not in a form of the RefCOCO family"),
        ([{**qwen()[0], "bbox": [20, 3, 18.5, 20]}], "line 1: box .* has no area"),
        ([{**qwen()[0], "bbox": [0.1, 0.2, "x", 1]}], "line 1: bbox is .*4 numbers were expected"),
        ([{**lmms()[0], "file_name": "COCO_train2014_000000000999_1.jpg"}], "0999.jpg is not there or broken.*--images"),
        ([{**lmms()[0], "file_name": "../a.jpg"}], "line 1: image file '../a.jpg' leaves the folder of images"),
        ([{**qwen()[0], "image": "train/../../a.jpg"}], "line 1: image file 'train/../../a.jpg' leaves the folder of images"),
        ([{**qwen()[0], "image": "/etc/a.jpg"}], "line 1: image file '/etc/a.jpg' leaves the folder of images"),
        ([], "holds no row"),
    ):
        with pytest.raises(DataError, match=message):
            read_mirror(write_jsonl(tmp_path / "refcoco_val.jsonl", rows), images, None, None)
    with pytest.raises(DataError, match="no split in the row and none in the file's name"):
        read_mirror(write_jsonl(tmp_path / "refcoco.jsonl", qwen()), images, None, None)
    with pytest.raises(DataError, match="does not tell which set it is; pass --dataset"):
        read_mirror(write_jsonl(tmp_path / "own_val.jsonl", qwen()), images, None, None)
    doubled = write_jsonl(tmp_path / "refcoco_val.jsonl", jxu124() * 2)
    with pytest.raises(DataError, match="expression 7 occurs twice"):
        read_mirror(doubled, images, None, None)
    (tmp_path / "refcoco_val.jsonl").write_text('{"image": ')
    with pytest.raises(DataError, match="line 1: not whole JSON"):
        read_mirror(tmp_path / "refcoco_val.jsonl", images, None, None)
    with pytest.raises(DataError, match="more than one kind of"):
        write_json(tmp_path / "finetune_refcoco_val.json", mdetr())
        read_mirror(tmp_path, images, None, None)


@pytest.mark.parametrize("way", ["prompter", "roialign", "crop"])
def test_ranking_takes_the_candidate_most_similar_to_the_expression(tmp_path, tiny_folder, way):
    data, images = write_refcoco(tmp_path / "refcoco"), write_images(tmp_path / "images")
    model = tiny_folder if way == "prompter" else save_stock_clip(tiny_folder, tmp_path / "clip")
    flags = ["--model", model, "--data", data, "--split", "val", "--out", tmp_path / "run", "--batch-size", 1]
    run(refcoco, *flags, "--baseline" if way == "crop" else "--rank", way, "--geometry", "pad")
    (folder,) = (tmp_path / "run/refcoco_ranking/val").iterdir()
    evaluation = load_evaluation(folder)
    assert evaluation.protocol["codec"] == "ranking" and evaluation.protocol["candidates"] == "annotated boxes"
    assert folder.name == {"roialign": "roialign-1"}.get(way, way)

    encoder, processor = load_encoder(model), load_processor(model)
    processor.image_processor.geometry = "pad"
    candidates = [(5.0, 5.0, 15.0, 15.0), (20.0, 3.0, 38.5, 23.0)]
    picture = Image.open(images / "val/101.png")
    for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
        assert set(prediction.boxes) == set(candidates) and prediction.box == prediction.boxes[0]
        if way == "roialign":
            continue
        with torch.inference_mode():
            text = encoder.get_text_features(**processor.texts([target.text])).pooler_output[0]
            if way == "crop":
                crops = [picture.crop((int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2)))) for x1, y1, x2, y2 in candidates]
                pixels = processor.images(crops)[0]["pixel_values"]
                regions = encoder.get_image_features(pixel_values=pixels).pooler_output
            else:
                inputs, (geometry,) = processor.images([picture])
                boxes = geometry.boxes_to_model(torch.tensor(candidates))
                regions = encoder.embed_boxes(encoder.encode_image(**inputs).tokens, boxes, torch.tensor([0, 0]))
        best = torch.cosine_similarity(regions, text[None]).argmax()
        assert prediction.box == candidates[best]
    scores = json.loads((folder / "scores.json").read_text())
    iou = paired_iou(np.array([p.box for p in evaluation.predictions]), np.array([t.box for t in evaluation.targets]))
    assert scores["acc_50"]["value"] == (iou >= 0.5).mean() and set(scores["by_area"]) == {"small"}
    assert scores["chance"] == 0.5, "one of two candidates, each the right one for half of the questions"
    if way == "crop":
        run(refcoco, *flags, "--rank", way, "--geometry", "pad", "--crop-scale", 1.5)
        assert (folder.parent / "crop1.5/scores.json").is_file(), "another scale is another way, not the same answers again"


def test_proposals_of_a_detector_are_found_by_cocos_number(tmp_path, tiny_folder):
    path = write_jsonl(tmp_path / "refcoco_val.jsonl", qwen())
    save_images(tmp_path / "images")
    found = [{"image_id": 101, "bbox": [20.0, 3.0, 18.5, 20.0], "score": 0.9, "category_id": 1}]
    flags = ["--model", tiny_folder, "--data", path, "--rank", "prompter", "--out", tmp_path / "run", "--proposals"]
    run(refcoco, *flags, write_json(tmp_path / "detections.json", found))
    scores = json.loads((tmp_path / "run/refcoco_ranking/val/prompter/scores.json").read_text())
    assert scores["acc_50"]["value"] == 1.0 and scores["completeness"] == "PARTIAL: the file has 2 of 10834 expressions"
    with pytest.raises(DataError, match="--proposals is for ranking candidate boxes; add --rank"):
        run(refcoco, *flags[:4], *flags[6:], tmp_path / "detections.json")
    with pytest.raises(DataError, match="--crop-scale is for ranking candidate boxes; add --rank"):
        run(refcoco, *flags[:4], *flags[6:8], "--crop-scale", 1.5)
    with pytest.raises(DataError, match="--dtype bfloat16 is for models that are asked"):
        run(refcoco, *flags, tmp_path / "detections.json", "--dtype", "bfloat16")
    with pytest.raises(DataError, match="no candidate box for COCO_train2014_000000000101.jpg"):
        run(refcoco, *flags, write_json(tmp_path / "detections.json", [{**found[0], "image_id": 5}]), "--out", tmp_path / "b")
    with pytest.raises(DataError, match="item 0: not a detection"):
        run(refcoco, *flags, write_json(tmp_path / "detections.json", [{"bbox": [1, 2, 3, 4]}]), "--out", tmp_path / "b")
    with pytest.raises(DataError, match="instances.json is not there; --rank"):
        run(refcoco, *flags[:-1], "--out", tmp_path / "b")

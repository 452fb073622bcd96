"""The written folder, read back with nothing of ours: tarfile, json, pickle and PIL alone."""

import importlib.util
import io
import json
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from encoder.data.pictures import BASE_SEEN, BASE_UNSEEN, load_library
from encoder.data.scene_files import SceneJob
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_scenes.py"
ARGUMENTS = ["--train", "60", "--eval", "150", "--seed", "7"]


def make(out, *more, arguments=ARGUMENTS):
    """Runs the script's main in this process; a user error is raised as the DataError or FileNotFoundError it is."""
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "--out", str(out), "--workers", "1", *arguments, *more])
        script.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "base"
    make(out, "--workers", "2")
    assert not out.with_name("base.partial").exists()
    return out


def read_json(path):
    return json.loads(path.read_text())


def test_shards_hold_the_images_of_the_folder(folder):
    with tarfile.open(folder / "shards" / "train" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    assert len(members) == 3 * 60
    for key in sorted({name.split(".")[0] for name in members}):
        record = json.loads(members[f"{key}.json"])
        assert members[f"{key}.png"] == (folder / "images" / "train" / record["image"]).read_bytes()
        assert members[f"{key}.txt"].decode() == record["captions"][0]
        assert Image.open(io.BytesIO(members[f"{key}.png"])).size == (record["width"], record["height"])
        for region in record["regions"]:
            assert region["phrases"][0] in BASE_SEEN and region["source"] == "scenes"
            left, top, right, bottom = region["box"]
            assert 0 <= left < right <= record["width"] and 0 <= top < bottom <= record["height"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_conversations(folder, split):
    records = read_json(folder / "conversations" / f"{split}.json")
    assert len(records) == len(list((folder / "images" / split).iterdir()))
    grounding = turns = 0
    for record in records:
        assert Image.open(folder / "images" / record["image"]).size == (record["width"], record["height"])
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)
        assert values[0].startswith("<image>\n") and "".join(values).count("<image>") == 1
        questions, answers = [value.replace("<image>\n", "") for value in values[::2]], values[1::2]
        used = []
        for question, answer in zip(questions, answers, strict=True):
            if match := re.fullmatch(r"What is <region:(\d+)>\?", question):
                used.append(int(match[1]))
                # Neither a question nor another answer says the name that is asked for.
                others = [*questions, *(other for other in answers if other is not answer)]
                assert not any(f" {answer} " in f" {text.rstrip('?')} " for text in others)
            else:
                assert re.fullmatch(r"Where is the .+\?", question)
                used.append(int(re.fullmatch(r"<box:(\d+)>", answer)[1]))
                grounding += 1
            turns += 1
        assert sorted(used) == list(range(len(record["regions"])))  # each object once: no box answers two questions
    assert 0.5 < grounding / turns < 0.8


@pytest.mark.parametrize("split", ["train", "val"])
def test_questions_are_records_of_one_turn_with_true_answers(folder, split):
    with tarfile.open(folder / "shards" / "train" / "00000.tar") as tar:
        labels = [json.loads(tar.extractfile(member).read()) for member in tar.getmembers() if member.name.endswith(".json")]
    truth = {label["image"]: {tuple(region["box"]): region["phrases"][0] for region in label["regions"]} for label in labels}
    records = read_json(folder / "questions" / f"{split}.json")
    assert len({record["id"] for record in records}) == len(records)
    asked: dict[str, list[str]] = {}
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        (box,) = (tuple(region["box"]) for region in record["regions"])
        name = truth[record["image"].split("/")[1]][box] if split == "train" else None
        if question == "<image>\nWhat is <region:0>?":
            assert answer == name or split == "val"
        else:
            expression = re.fullmatch(r"<image>\nWhere is the (.+)\?", question)[1]
            assert answer == "<box:0>" and (split == "val" or f" {name}" in f" {expression}")
        asked.setdefault(record["image"], []).append(f"{question} {box}")
    assert all(len(set(questions)) == len(questions) <= 8 for questions in asked.values())
    names = sum("What is" in record["conversations"][0]["value"] for record in records)
    assert 0.2 < names / len(records) < 0.6 and len(asked) == len(read_json(folder / "conversations" / f"{split}.json"))


def test_names_ask_for_every_object_once(folder):
    with tarfile.open(folder / "shards" / "train" / "00000.tar") as tar:
        labels = [json.loads(tar.extractfile(member).read()) for member in tar.getmembers() if member.name.endswith(".json")]
    truth = [(label["image"], region["box"], region["phrases"][0]) for label in labels for region in label["regions"]]
    asked = []
    for record in read_json(folder / "names" / "train.json"):
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question == "<image>\nWhat is <region:0>?" and len(record["regions"]) == 1
        asked.append((record["image"].split("/")[1], record["regions"][0]["box"], answer))
    assert sorted(asked) == sorted(truth)


def test_pointed_questions_ask_for_every_object_once_by_box_point_or_outline(folder):
    """Against the outlines of the instances file: a point lies on its object where no later object covers it."""
    rle_tools = pytest.importorskip("pycocotools.mask", reason="needs the extra eval")
    data = read_json(folder / "regions" / "seen.json")
    names = {category["id"]: category["name"] for category in data["categories"]}
    truth = {image["file_name"]: [] for image in data["images"]}
    files = {image["id"]: image["file_name"] for image in data["images"]}
    for annotation in data["annotations"]:
        mask = rle_tools.decode(rle_tools.frPyObjects(annotation["segmentation"], *annotation["segmentation"]["size"]))
        truth[files[annotation["image_id"]]].append((annotation, mask.astype(bool)))
    asked = {"box": 0, "point": 0, "mask": 0}
    records = read_json(folder / "pointed" / "val.json")
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        ((kind, value),) = record["regions"][0].items()
        index = int(record["id"].rpartition("/")[2])
        annotation, mask = truth[record["image"]][index]
        assert question == "<image>\nWhat is <region:0>?" and answer == names[annotation["category_id"]]
        asked[kind] += 1
        if kind == "box":
            left, top, width, height = annotation["bbox"]
            assert value == [left, top, left + width, top + height]
        elif kind == "mask":
            assert value == annotation["segmentation"]
        else:
            column, row = map(int, value)
            assert value == [column + 0.5, row + 0.5] and mask[row, column]
            assert not any(later[row, column] for _, later in truth[record["image"]][index + 1 :])
    assert len({record["id"] for record in records}) == len(records) == len(data["annotations"])
    assert all(abs(count / len(records) - 1 / 3) < 0.1 for count in asked.values())


def test_refcoco_layout(folder):
    data = (folder / "refcoco" / "refs(unc).p").read_bytes()
    operations = list(pickletools.genops(data))
    assert operations[0][0].name == "PROTO" and operations[0][1] == 2
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ"} & {operation[0].name for operation in operations}
    refs, instances = pickle.loads(data), read_json(folder / "refcoco" / "instances.json")
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    names = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(images) == len(instances["images"]) and len(annotations) == len(instances["annotations"])
    assert {ref["split"] for ref in refs} == {"val", "testA", "testB"}
    assert len({ref["ref_id"] for ref in refs}) == len(refs) == len({ref["ann_id"] for ref in refs})
    sentences = dict.fromkeys(("val", "testA", "testB"), 0)
    sent_ids = []
    for ref in refs:
        assert set(ref) == {
            "ref_id", "ann_id", "category_id", "image_id", "file_name", "split", "sent_ids", "sentences"
        }  # fmt: skip
        annotation, image = annotations[ref["ann_id"]], images[ref["image_id"]]
        assert annotation["image_id"] == ref["image_id"] and annotation["category_id"] == ref["category_id"]
        assert image["file_name"] == ref["file_name"] and ref["file_name"].startswith(ref["split"] + "/")
        assert Image.open(folder / "images" / ref["file_name"]).size == (image["width"], image["height"])
        assert names[ref["category_id"]] in BASE_SEEN and len(ref["sentences"]) == 1
        for sentence in ref["sentences"]:
            assert names[ref["category_id"]] in sentence["sent"] and sentence["tokens"] == sentence["sent"].split()
        sent_ids += ref["sent_ids"]
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        sentences[ref["split"]] += len(ref["sentences"])
    assert len(set(sent_ids)) == len(sent_ids) and all(150 <= count < 175 for count in sentences.values())


def test_few_objects_in_testa_and_a_crowd_with_twins_in_testb(folder):
    instances = read_json(folder / "refcoco" / "instances.json")
    split_of = {image["id"]: image["file_name"].split("/")[0] for image in instances["images"]}
    categories = {}
    for annotation in instances["annotations"]:
        categories.setdefault(annotation["image_id"], []).append(annotation["category_id"])
    for image_id, found in categories.items():
        if split_of[image_id] == "testA":
            assert 2 <= len(found) <= 3
        if split_of[image_id] == "testB":
            assert 5 <= len(found) <= 6 and len(set(found)) < len(found)


def test_regions_seen_and_unseen(folder):
    for split, names, image_split in (("seen", BASE_SEEN, "val"), ("unseen", BASE_UNSEEN, "unseen")):
        data = read_json(folder / "regions" / f"{split}.json")
        assert {category["name"] for category in data["categories"]} == set(names)
        assert len(data["images"]) == len(list((folder / "images" / image_split).iterdir()))
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        for annotation in data["annotations"]:
            left, top, width, height = annotation["bbox"]
            image_width, image_height = sizes[annotation["image_id"]]
            assert left >= 0 and top >= 0 and left + width <= image_width and top + height <= image_height
    manifest = read_json(folder / "manifest.json")
    assert manifest["names"] == {"seen": sorted(BASE_SEEN), "unseen": sorted(BASE_UNSEEN)}
    assert manifest["counts"]["train"]["scenes"] == 60 and manifest["arguments"]["seed"] == 7


def test_outlines_are_those_of_the_objects(folder):
    """As pycocotools reads them: the box is theirs, the pixels are those of the picture that was pasted."""
    rle_tools = pytest.importorskip("pycocotools.mask", reason="needs the extra eval")
    data = read_json(folder / "regions" / "seen.json")
    library = PictureLibrary(load_library("base", 7)[0])
    tops = {annotation["image_id"]: annotation for annotation in data["annotations"]}
    for annotation in data["annotations"]:
        outline = annotation["segmentation"]
        rle = rle_tools.frPyObjects(outline, *outline["size"])
        assert rle_tools.toBbox(rle).tolist() == annotation["bbox"]
        if tops[annotation["image_id"]] is annotation and annotation["image_id"] <= 5:
            scene = draw_scene(SceneJob(seed=7).split_config("val"), library, 7, annotation["image_id"] - 1, "val")
            mask = rle_tools.decode(rle).astype(bool)
            name, box = scene.objects[-1].name, list(map(int, scene.objects[-1].box))
            pictures = [library.resized(name, variant, max(box[2] - box[0], box[3] - box[1]))[1]
                        for variant in range(len(library.by_name[name]))]  # fmt: skip
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert any(inside.shape == own.shape and (inside == own).all() for own in pictures)


def test_splits_share_no_image(folder):
    files = sorted((folder / "images").rglob("*.png"))
    assert len({file.read_bytes() for file in files}) == len(files)


def test_the_same_files_with_one_worker(folder, tmp_path):
    make(tmp_path / "again", "--workers", "1")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_a_finished_folder_is_kept(folder, capsys):
    before = (folder / "manifest.json").stat().st_mtime_ns
    make(folder)
    assert capsys.readouterr().out == f"nothing to do: {folder} already holds these scenes\n"
    with pytest.raises(DataError, match="num_train 60 there, 61 asked"):
        make(folder, "--train", "61")
    (folder / "names").rename(folder / "away")
    with pytest.raises(DataError, match="drawn by an earlier version and has no names/"):
        make(folder)
    (folder / "away").rename(folder / "names")
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_folders_that_are_not_ours_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="no readable manifest.json"):
        make(tmp_path / "mine")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="was not left by this script"):
        make(tmp_path / "new")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "new.partial" / "thesis.txt").exists()


def test_an_interrupted_run_is_no_folder_and_is_cleared(tmp_path, capsys, monkeypatch):
    (tmp_path / "cut.partial").mkdir()
    (tmp_path / "cut.partial" / "UNFINISHED").write_text("")
    (tmp_path / "cut.partial" / "half.png").write_text("")
    (tmp_path / "cut").mkdir()
    make(tmp_path / "cut", arguments=["--train", "2", "--eval", "2"])
    assert not (tmp_path / "cut" / "half.png").exists() and not (tmp_path / "cut.partial").exists()
    assert capsys.readouterr().out.strip().endswith(f"are in {tmp_path / 'cut'}")
    monkeypatch.setattr("encoder.data.scene_files._write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "other", arguments=["--train", "2", "--eval", "2"])
    assert not (tmp_path / "other").exists() and (tmp_path / "other.partial" / "UNFINISHED").exists()


def test_a_folder_of_pictures_over_photographs(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "cut outs").mkdir()
    for index in range(20):
        image = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
        image.paste((12 * index, 90, 255 - 12 * index, 255), (5, 5, 50, 40))
        image.save(tmp_path / "cut outs" / f"tile_{index}.png")
    arguments = ["--pictures", str(tmp_path / "cut outs"), "--backgrounds", str(tmp_path / "photos")]
    size = ["--objects", "2", "4", "--long-side", "64", "--short-side", "48", "--object-size", "16", "28"]
    make(tmp_path / "out", *arguments, *size, arguments=["--train", "10", "--eval", "10"])
    names = read_json(tmp_path / "out" / "manifest.json")["names"]
    assert len(names["seen"]) == 16 and len(names["unseen"]) == 4 and not set(names["seen"]) & set(names["unseen"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pictures", "nowhere"], "picture folder nowhere is not there"),
        (["--backgrounds", "nowhere"], "background folder nowhere is not there"),
        (["--object-size", "24", "90"], "does not fit"),
        (["--train", "0"], "num_train is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--objects", "60", "60"], "a scene of 60 objects wants"),
    ],
)
def test_one_sentence_for_what_cannot_be(tmp_path, arguments, message):
    with pytest.raises((DataError, FileNotFoundError), match=message) as caught:
        make(tmp_path / "out", *arguments, arguments=["--train", "5", "--eval", "5"])
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)


def test_as_a_user_runs_it(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--pictures", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: picture folder nowhere is not there; give a folder of RGBA cut-outs\n"


def test_split_configurations():
    job = SceneJob(config=SceneConfig(num_objects=(2, 4)))
    assert job.split_config("testA").num_objects == (2, 3)
    assert job.split_config("testB").num_objects == (3, 4) and job.split_config("testB").repeat_fraction == 1
    assert job.split_config("train") == job.config
    assert job.split_config("val") == replace(job.config, expressions_per_object=1)
    with pytest.raises(DataError, match="turns is 0"):
        SceneJob(turns=0)

"""prepare_data.py around the readers: resuming, leaving out RefCOCO's pictures, missing images, published counts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from dataset_fixtures import picture, put, write_coco, write_grit_tars, write_lvis, write_refcoco, write_visual_genome
from test_sources import SCRIPT, prepare, records_of

from encoder.data.reader import RegionDataset
from encoder.data.sources import shards
from encoder.data.sources.published import PUBLISHED, completeness
from encoder.errors import DataError
from eval.refcoco_files import PUBLISHED as EVALUATED


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def files_in(out):
    """The dataset's own names of what is in the shards."""
    dataset = RegionDataset(out, progress=False)
    names = []
    for shard in dataset.shards:
        data = shard.read_bytes()
        names += [part.split(b'"')[0].decode() for part in data.split(b'"file": "')[1:]]
    assert len(names) == len(dataset)
    return names


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    annotations, images = write_coco(tmp_path / "coco")
    call = "coco", [annotations], images
    prepare(*call, tmp_path / "whole", "--shard-size", 1)
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [  # image 30, the third, gives no record
        "00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "00002_stats.json", "00003.tar",
        "00003_stats.json", "arguments.json", "summary.json",
    ]  # fmt: skip
    record, looks = shards._record, []

    def interrupted(dataset, image, *more):
        looks.append(image.name)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return record(dataset, image, *more)

    monkeypatch.setattr(shards, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(*call, tmp_path / "cut", "--shard-size", 1)
    assert sorted(contents(tmp_path / "cut")) == ["00000.tar", "00000_stats.json", "00001.tar.partial", "arguments.json"]
    prepare(*call, tmp_path / "cut", "--shard-size", 1)
    assert contents(tmp_path / "cut") == whole
    assert looks.count("000000000009.jpg") == 1  # the finished shard was not written again
    stamp = (tmp_path / "cut" / "00000.tar").stat().st_mtime_ns
    prepare(*call, tmp_path / "cut", "--shard-size", 1)
    assert contents(tmp_path / "cut") == whole and (tmp_path / "cut" / "00000.tar").stat().st_mtime_ns == stamp
    (tmp_path / "cut" / "00001.tar").unlink()  # a shard that went away is written again
    prepare(*call, tmp_path / "cut", "--shard-size", 1)
    assert contents(tmp_path / "cut") == whole


def test_shards_of_any_size_hold_the_same_records(tmp_path):
    images = write_grit_tars(tmp_path / "grit", samples=5)
    for size, tars in ((1, 5), (2, 3), (1000, 1)):
        out = tmp_path / f"size{size}"
        prepare("grit", [], images, out, "--shard-size", size)
        assert len(records_of(out)) == 5 and len(list(out.glob("*.tar"))) == tars
        dataset = RegionDataset(out, progress=False)
        assert [dataset.name(index) for index in range(len(dataset))] == [f"{index:09d}" for index in range(5)]


def test_a_folder_of_other_arguments_is_left_alone(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    call = "coco", [annotations], images, tmp_path / "out"
    prepare(*call, "--limit", 1)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"out holds data of other arguments \(limit: 1 there, None asked\)"):
        prepare(*call)
    put(annotations, json.loads(annotations.read_text()) | {"info": {"year": 2017}})
    with pytest.raises(DataError, match=r"other arguments \(files: "):
        prepare(*call, "--limit", 1)
    assert contents(tmp_path / "out") == before
    put(tmp_path / "mine/thesis.txt", "precious")
    with pytest.raises(DataError, match="mine is not empty and has no readable arguments.json"):
        prepare("coco", [annotations], images, tmp_path / "mine")
    with pytest.raises(DataError, match="thesis.txt is a file"):
        prepare("coco", [annotations], images, tmp_path / "mine/thesis.txt")
    put(tmp_path / "out/00000_stats.json", "{}")
    put(annotations, json.loads(annotations.read_text()) | {"info": {}})
    with pytest.raises(DataError, match="00000_stats.json: not as this script writes it"):
        prepare(*call, "--limit", 1)


def test_pictures_of_refcoco_val_and_test_are_left_out(tmp_path):
    """RefCOCO's val is image 25 and its testA image 34; RefCOCOg's file says the same of 9 as well."""
    refs, _ = write_refcoco(tmp_path / "r")
    annotations, images = write_coco(tmp_path / "coco")
    summary = prepare("coco", [annotations], images, tmp_path / "coco_out", "--exclude-refcoco", tmp_path / "r/refs")
    assert files_in(tmp_path / "coco_out") == ["000000000009.jpg"]
    assert summary["counts"]["images_excluded"] == 2 and summary["counts"]["images"] == 4
    assert files_in_without(tmp_path, "coco", [annotations], images) == [
        "000000000009.jpg",
        "000000000025.jpg",
        "000000000034.jpg",
    ]

    labels, pictures = write_lvis(tmp_path / "lvis")
    prepare("lvis", [labels], pictures, tmp_path / "lvis_out", "--exclude-refcoco", refs / "refs(unc).p")
    assert files_in(tmp_path / "lvis_out") == ["train2017/000000000009.jpg"]

    data, descriptions, _, pictures = write_visual_genome(tmp_path / "vg")
    content = json.loads(data.read_text())
    content[0]["coco_id"] = 34
    put(data, content)
    summary = prepare("visual_genome", [data, descriptions], pictures, tmp_path / "vg_out", "--exclude-refcoco", refs)
    assert files_in(tmp_path / "vg_out") == ["VG_100K/2.jpg"] and summary["counts"]["images_excluded"] == 1

    # A set's own training images that another set tests on: move image 9 to test in a second set.
    other, _ = write_refcoco(tmp_path / "g", "refcocog", "umd")
    moved = (other / "refs(umd).p").read_bytes().replace(b"train", b"test_")
    put(other / "refs(umd).p", moved)
    with pytest.raises(DataError, match="no record of refcoco/unc/train could be written"):
        prepare("refcoco", [refs], tmp_path / "r/images", tmp_path / "ref_out", "--exclude-refcoco", refs, other)
    with pytest.raises(DataError, match=r"images holds no refs\(...\).p"):
        prepare("coco", [annotations], images, tmp_path / "none", "--exclude-refcoco", images)


def files_in_without(tmp_path, *call):
    prepare(*call, tmp_path / "everything")
    return files_in(tmp_path / "everything")


def test_missing_and_unfit_images(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    (images / "000000000009.jpg").unlink()
    put(images / "000000000025.jpg", picture(40, 50, 0))  # turned
    put(images / "000000000030.jpg", b"no picture")
    put(images / "000000000034.jpg", picture(32, 24, 0, "BMP"))
    call = "coco", [annotations], images, tmp_path / "out"
    with pytest.raises(DataError, match="4 of the first 4 images cannot be used, 3 are allowed, the last is 000000000034"):
        prepare(*call, "--max-missing", 3)
    assert not list((tmp_path / "out").glob("*.tar*")) and not (tmp_path / "out/00000_stats.json").exists()
    put(images / "000000000034.jpg", picture(32, 24, 0))
    summary = prepare(*call, "--max-missing", 3)  # more may be missing than before: the same folder goes on
    assert summary["missing"] == [
        f"000000000009.jpg (not there: {images / '000000000009.jpg'})",
        "000000000025.jpg (is 40x50, its annotations say 50x40)",
        "000000000030.jpg (no whole image: UnidentifiedImageError)",
    ]
    assert "3 images could not be used" in summary["completeness"] and files_in(tmp_path / "out") == ["000000000034.jpg"]


def test_flags_that_do_not_fit(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    for more, message in (
        (["--split", "train"], "--split is for refcoco and flickr30k"),
        (["--shard-size", 0], "--shard-size and --limit must be at least 1"),
        (["--max-missing", -1], "--max-missing at least 0"),
    ):
        with pytest.raises(DataError, match=message):
            prepare("coco", [annotations], images, tmp_path / "out", *more)
    with pytest.raises(DataError, match="coco takes one --annotations, 2 were given"):
        prepare("coco", [annotations, annotations], images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_completeness_against_the_published_counts():
    part = "lvis/lvis_v1_val"
    whole = Counter(PUBLISHED[part])
    assert completeness(part, whole, 0) == "complete (19809 images, 244707 annotations, as published)"
    assert completeness(part, whole, 2) == "PARTIAL: 2 images could not be used"
    assert completeness(part, whole - Counter(images=1), 0) == "PARTIAL: 19808 of 19809 images"
    assert completeness("coco/mine", Counter(images=3), 0) == "not checked: no published count of coco/mine is known here"
    for (name, kind), splits in EVALUATED.items():  # the evaluation holds the same sets against the same numbers
        for split, (objects, expressions) in splits.items():
            found = PUBLISHED[f"{name}/{kind}/{split}"]
            assert (found["objects"], found.get("expressions")) == (objects, expressions)


def test_as_a_user_runs_it(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    command = [sys.executable, str(SCRIPT), "coco", "--annotations", str(annotations), "--images", str(images)]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == (
        f"3 records, 4 regions of coco/instances_train2017 are in {tmp_path / 'out'}; "
        "PARTIAL: 4 of 118287 images, 7 of 860001 annotations"
    )

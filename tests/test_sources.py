"""Each public dataset's official form -> the records of its shards, against answers worked out by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from dataset_fixtures import (
    SENTENCES,
    coco_annotation,
    grit_row,
    picture,
    put,
    write_coco,
    write_flickr30k,
    write_grit_tars,
    write_lvis,
    write_objects365,
    write_refcoco,
    write_visual_genome,
)
from pycocotools.coco import COCO

from encoder.data.reader import RegionDataset
from encoder.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


def prepare(source, annotations, images, out, *more):
    """Runs the script in this process; user errors come as the exceptions they are. Returns its summary."""
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = ["--annotations", *map(str, annotations)] if annotations else []
    with pytest.MonkeyPatch.context() as patch:
        arguments = [str(SCRIPT), source, *files, "--images", str(images), "--out", str(out), *map(str, more)]
        patch.setattr(sys, "argv", arguments)
        script.main()
    return json.loads((out / "summary.json").read_text())


def records_of(out):
    """Every record as (caption, [(box, phrases, score)]), read through the product's reader."""
    dataset = RegionDataset(out, progress=False)
    rows = []
    for index in range(len(dataset)):
        image, record = dataset[index]
        assert image.size == (record.width, record.height)
        rows.append((record.captions, [(region.box, region.phrases, region.score) for region in record.regions]))
    return rows


def refuse(change, path, message, *call):
    """The JSON at `path` changed by `change(content)` makes the call fail with one sentence that names the file."""
    before = path.read_text()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        prepare(*call)
    path.write_text(before)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_coco(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    summary = prepare("coco", [annotations], images, tmp_path / "out")
    # 30 has no label, so no text and no record; the largest region is named first in a caption made of names.
    assert records_of(tmp_path / "out") == [
        (("bus, dog",), [((4.5, 6.25, 24.5, 16.75), ("dog",), 1.0), ((30.0, 20.0, 64.0, 48.0), ("bus",), 1.0)]),
        (("bus",), [((10.0, 11.0, 22.0, 24.0), ("bus",), 1.0)]),
        (("dog",), [((1.0, 2.0, 4.0, 6.0), ("dog",), 1.0)]),
    ]
    assert summary["counts"] == {
        "annotations": 7, "boxes_clipped": 1, "boxes_without_area": 2, "captions_from_phrases": 3, "crowd": 1, "images": 4,
        "images_without_text": 1, "record_regions": 4, "records": 3,
    }  # fmt: skip
    assert summary["completeness"] == "PARTIAL: 4 of 118287 images, 7 of 860001 annotations"
    # The bytes are the file's own.
    dataset = RegionDataset(tmp_path / "out", progress=False)
    shard = (tmp_path / "out" / "00000.tar").read_bytes()
    assert len(dataset) == 3 and all((images / f"{n:012d}.jpg").read_bytes() in shard for n in (9, 25, 34))


def test_coco_boxes_are_those_of_pycocotools(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    prepare("coco", [annotations], images, tmp_path / "out")
    reference = COCO(str(annotations))
    names = {row["id"]: row["name"] for row in reference.loadCats(reference.getCatIds())}
    expected = []
    for image_id in reference.getImgIds():
        frame = reference.loadImgs(image_id)[0]
        for row in reference.loadAnns(reference.getAnnIds(imgIds=image_id, iscrowd=False)):
            x, y, w, h = row["bbox"]
            corners = [max(0, x), max(0, y), min(frame["width"], x + w), min(frame["height"], y + h)]
            if corners[0] < corners[2] and corners[1] < corners[3]:
                expected.append((tuple(map(float, corners)), (names[row["category_id"]],)))
    found = [region[:2] for _, regions in records_of(tmp_path / "out") for region in regions]
    assert sorted(found) == sorted(expected) and len(expected) == 4


def test_coco_captions_of_the_same_images(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    texts = [(9, "A dog beside a bus. "), (9, "A bus."), (30, "An empty street.")]
    rows = [{"image_id": image_id, "id": i, "caption": text} for i, (image_id, text) in enumerate(texts)]
    captions = put(tmp_path / "captions_train2017.json", {"info": {}, "images": [], "annotations": rows})
    summary = prepare("coco", [annotations], images, tmp_path / "out", "--captions", captions)
    found = [captions for captions, _ in records_of(tmp_path / "out")]
    assert found == [("A dog beside a bus.", "A bus."), ("bus",), ("An empty street.",), ("dog",)]
    assert summary["counts"]["records"] == 4 and "images_without_text" not in summary["counts"]
    refuse(lambda c: c.pop("annotations"), captions, "not a COCO captions file",
           "coco", [annotations], images, tmp_path / "two", "--captions", captions)  # fmt: skip


def test_broken_coco_files(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    call = "coco", [annotations], images, tmp_path / "out"
    refuse(lambda c: c.pop("categories"), annotations, "'categories' is missing", *call)
    refuse(lambda c: c["annotations"][0].pop("id"), annotations, "'annotations' is missing or not", *call)
    refuse(lambda c: c["annotations"][0].update(id=101), annotations, "an id occurs twice under 'annotations'", *call)
    refuse(lambda c: c["annotations"][0].update(image_id=1), annotations, "annotation 100 names an image_id", *call)
    refuse(lambda c: c["annotations"][0].update(category_id=1), annotations, "annotation 100 names an image_id or cat", *call)
    refuse(lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), annotations, "bbox of annotation 100 is .*4 numbers", *call)
    refuse(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]), annotations, "bbox of annotation 100", *call)
    refuse(lambda c: c["annotations"][0].pop("bbox"), annotations, "bbox of annotation 100 is None", *call)
    refuse(lambda c: c["images"][0].pop("width"), annotations, "image 9 has no 'width'", *call)
    refuse(lambda c: c["categories"][0].pop("name"), annotations, "a category is not as coco has it", *call)
    annotations.write_text(annotations.read_text()[:-40])
    with pytest.raises(DataError, match="instances_train2017.json: not whole JSON"):
        prepare(*call)
    with pytest.raises(DataError, match="nothing.json is not there"):
        prepare("coco", [tmp_path / "nothing.json"], images, tmp_path / "out")
    with pytest.raises(DataError, match="is a folder; give the file in it"):
        prepare("coco", [tmp_path], images, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere is not a folder; .* --images"):
        prepare("coco", [annotations], tmp_path / "nowhere", tmp_path / "out")


def test_a_box_of_no_number_has_no_area(tmp_path):
    annotations, images = write_coco(tmp_path / "coco")
    content = json.loads(annotations.read_text())
    content["annotations"].append(coco_annotation(200, 9, 6, [float("nan"), 1, 2, 3]))
    content["annotations"].append(coco_annotation(201, 9, 6, [0, 1, float("inf"), 3]))
    put(annotations, content)  # Python's JSON writes and reads NaN and Infinity
    assert prepare("coco", [annotations], images, tmp_path / "out")["counts"]["boxes_without_area"] == 4


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/hostname", "//etc/hostname", "a/../../b.jpg", "a\\..\\b.jpg", "", ".", 7]
)
def test_file_names_stay_in_their_folder(tmp_path, name):
    annotations, images = write_coco(tmp_path / "coco")
    put(tmp_path / "coco" / "secret.jpg", picture(64, 48, 0))
    refuse(lambda c: c["images"][0].update(file_name=name), annotations, "image 9: image file .* leaves the folder of images",
           "coco", [annotations], images, tmp_path / "out")  # fmt: skip
    assert not list((tmp_path / "out").glob("*.tar"))


def test_lvis(tmp_path):
    annotations, images = write_lvis(tmp_path / "lvis")
    summary = prepare("lvis", [annotations], images, tmp_path / "out")
    assert records_of(tmp_path / "out") == [
        (("bow (weapon)",), [((5.0, 6.0, 12.0, 14.0), ("bow (weapon)", "archery bow"), 1.0)]),
        (("alarm clock",), [((1.5, 2.0, 4.5, 6.0), ("alarm clock",), 1.0)]),
    ]
    assert summary["completeness"] == "PARTIAL: 4 of 100170 images, 2 of 1270141 annotations"
    call = "lvis", [annotations], images, tmp_path / "two"
    refuse(lambda c: c["images"][0].update(coco_url="http://x/../y"), annotations, "leaves the folder", *call)
    refuse(lambda c: c["images"][0].update(coco_url="y"), annotations, "'y' has no folder", *call)
    refuse(lambda c: c["images"][0].pop("coco_url"), annotations, "image 9 has no 'coco_url'", *call)


def test_objects365(tmp_path):
    annotations, images = write_objects365(tmp_path / "o365")
    summary = prepare("objects365", [annotations], images, tmp_path / "out")
    assert records_of(tmp_path / "out") == [(("cabinet",), [((10.5, 5.25, 30.5, 15.25), ("cabinet", "shelf"), 1.0)])]
    assert summary["counts"]["crowd"] == 1 and summary["completeness"] == "PARTIAL: 2 of 25407598 annotations"
    with pytest.raises(DataError, match="objects365 have no COCO ids"):
        prepare("objects365", [annotations], images, tmp_path / "two", "--exclude-refcoco", write_refcoco(tmp_path / "r")[0])


def test_visual_genome(tmp_path):
    data, descriptions, objects, images = write_visual_genome(tmp_path / "vg")
    summary = prepare("visual_genome", [data, descriptions], images, tmp_path / "regions")
    clock = ((4.0, 5.0, 24.0, 15.0), ("the clock is green in colour",), 1.0)
    shade = ((0.0, 20.0, 28.0, 48.0), ("a shade",), 1.0)
    men = ((7.0, 6.0, 16.0, 14.0), ("two men",), 1.0)
    assert records_of(tmp_path / "regions") == [
        (("a shade, the clock is green in colour",), [clock, shade]),
        (("two men",), [men]),
    ]
    assert summary["counts"] == {
        "boxes_clipped": 1, "boxes_without_phrase": 1, "captions_from_phrases": 2, "images": 2, "record_regions": 3,
        "records": 2, "regions": 4, "without_coco_id": 1,
    }  # fmt: skip
    assert summary["completeness"] == "PARTIAL: 2 of 108077 images"
    summary = prepare("visual_genome", [data, objects, descriptions], images, tmp_path / "both")
    dial = ((3.0, 2.0, 15.0, 12.0), ("clock", "dial"), 1.0)
    assert [regions for _, regions in records_of(tmp_path / "both")] == [[clock, shade, dial], [men]]
    assert summary["counts"]["objects"] == 1 and summary["counts"]["regions"] == 4
    prepare("visual_genome", [data, objects], images, tmp_path / "objects")
    assert records_of(tmp_path / "objects") == [(("clock",), [dial])]


def test_broken_visual_genome_files(tmp_path):
    data, descriptions, objects, images = write_visual_genome(tmp_path / "vg")
    call = "visual_genome", [data, descriptions], images, tmp_path / "out"
    refuse(lambda c: c[0].pop("url"), data, "not as in Visual Genome .*'url'", *call)
    refuse(lambda c: c[0].update(image_id=2), data, "an image's id occurs twice", *call)
    refuse(lambda c: c.pop(), data, "image 2 is not in .*image_data.json; take files of the same version", *call)
    refuse(lambda c: c[0].pop("regions"), descriptions, "'regions'", *call)
    refuse(lambda c: c[0]["regions"][1].pop("phrase"), descriptions, r"image 1, regions\[1\]: not as", *call)
    refuse(lambda c: c[0]["regions"][1].update(x=None), descriptions, r"regions\[1\]: x, y, width, height is", *call)
    with pytest.raises(DataError, match="needs image_data.json and"):
        prepare("visual_genome", [data], images, tmp_path / "out")
    with pytest.raises(DataError, match="image_data.json once"):
        prepare("visual_genome", [data, objects, put(tmp_path / "other.json", [])], images, tmp_path / "out")


GRIT_BOXES = [  # in an 80x40 picture; the first reaches below it and is clipped
    ((40.0, 20.0, 60.0, 40.0), ("a paper cover", grit_row()["caption"][19:]), 0.79),
    ((0.0, 10.0, 40.0, 40.0), ("a wire hanger", grit_row()["caption"]), 0.67),
]


def test_grit_as_img2dataset_writes_tars(tmp_path):
    images = write_grit_tars(tmp_path / "grit")
    summary = prepare("grit", [], images, tmp_path / "out")
    assert records_of(tmp_path / "out") == [((grit_row()["caption"],), GRIT_BOXES)] * 3
    assert summary["counts"] == {
        "boxes_clipped": 3, "images": 3, "noun_chunks": 6, "record_regions": 6, "records": 3, "ref_exps": 6
    }  # fmt: skip
    assert summary["completeness"] == "not checked: no published count of grit is known here"
    limited = prepare("grit", [], images, tmp_path / "less", "--limit", 2)
    assert limited["completeness"] == "PARTIAL: the first 2 images" and limited["counts"]["records"] == 2


def test_grit_as_img2dataset_writes_files(tmp_path):
    put(tmp_path / "grit/00000_stats.json", {})
    put(tmp_path / "grit/00000/000000000.json", grit_row())
    put(tmp_path / "grit/00000/000000000.jpg", picture(80, 40, 1))
    put(tmp_path / "grit/00000/000000001.json", grit_row())  # its picture could not be fetched
    summary = prepare("grit", [], tmp_path / "grit", tmp_path / "out", "--max-missing", 1)
    assert records_of(tmp_path / "out") == [((grit_row()["caption"],), GRIT_BOXES)] and len(summary["missing"]) == 1


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_grit_as_released_with_a_folder_of_pictures(tmp_path, kind):
    rows = [{**grit_row(), "width": 160, "height": 80}, {**grit_row(), "id": 7, "noun_chunks": [], "ref_exps": None}]
    path = tmp_path / f"coyo_0_snappy.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        put(path, json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    put(tmp_path / "images/1795296605919.png", picture(80, 40, 1, "PNG"))
    put(tmp_path / "images/7.webp", picture(30, 20, 1, "WEBP"))
    prepare("grit", [path], tmp_path / "images", tmp_path / "out")
    assert records_of(tmp_path / "out") == [((grit_row()["caption"],), GRIT_BOXES), ((grit_row()["caption"],), [])]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=f"coyo_0_snappy.{kind}.*download it again"):
        prepare("grit", [path], tmp_path / "images", tmp_path / "two")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 40, "height": 40}, "padded or cropped .* --resize_mode keep_ratio"),
        ({"noun_chunks": [[0, 13, 0.1]]}, r"noun_chunks\[0\] is \[0, 13, 0.1\]; 7 numbers"),
    ],
)
def test_grit_that_cannot_be_used(tmp_path, changes, message):
    images = write_grit_tars(tmp_path / "grit", **changes)
    with pytest.raises(DataError, match=f"00000.tar, 000000000.json.*{message}"):
        prepare("grit", [], images, tmp_path / "out")


def test_odd_texts_of_grit(tmp_path):
    """A phrase that is not in the caption is none; half a surrogate pair does not reach a shard."""
    images = write_grit_tars(tmp_path / "grit", samples=1)
    inside = [0, 5, 0.0, 0.0, 0.5, 0.5, 0.9]
    chunks = [inside, [3, 99, 0.5, 0.5, 1.0, 1.0, 0.9], [-4, 2, 0.1, 0.5, 1.0, 1.0, 0.9], [float("nan"), 2, 0, 0, 1, 1, 0.9]]
    rows = put(tmp_path / "rows.json", [{"id": 1, "caption": "a cat \ud83d", "noun_chunks": chunks, "ref_exps": [inside]}])
    put(images / "1.jpg", picture(20, 10, 0))
    summary = prepare("grit", [rows], images, tmp_path / "out")
    assert records_of(tmp_path / "out") == [(("a cat ?",), [((0.0, 0.0, 10.0, 5.0), ("a cat",), 0.9)])]
    assert summary["counts"]["boxes_without_phrase"] == 3
    with pytest.raises(DataError, match="nothing.parquet is not there"):
        prepare("grit", [tmp_path / "nothing.parquet"], images, tmp_path / "two")


def test_broken_grit(tmp_path):
    images = write_grit_tars(tmp_path / "grit")
    whole = (images / "00000.tar").read_bytes()
    for cut in (0, 700, len(whole) // 2):
        (images / "00000.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="00000.tar does not end as a tar does"):
            prepare("grit", [], images, tmp_path / "out")
    (images / "00000.tar").write_bytes(whole.replace(b'"ref_exps"', b'"ref_expt"'))
    with pytest.raises(DataError, match="has no 'ref_exps'; run img2dataset with --save_additional_columns"):
        prepare("grit", [], images, tmp_path / "out")
    (images / "00000.tar").unlink()
    with pytest.raises(DataError, match="neither .tar files nor folders"):
        prepare("grit", [], images, tmp_path / "two")
    rows = put(tmp_path / "rows.json", [{**grit_row(), "id": "../../etc/x"}])
    with pytest.raises(DataError, match="rows.json, row 0: image file '../../etc/x' leaves the folder"):
        prepare("grit", [rows], images, tmp_path / "two")


def test_flickr30k_entities(tmp_path):
    annotations, images = write_flickr30k(tmp_path / "flickr")
    summary = prepare("flickr30k", [annotations], images, tmp_path / "out")
    captions = (
        "Two young guys with shaggy hair look at their hands .",
        "Two men in green shirts are standing in a yard .",
    )
    # The two men are one region, around both boxes.
    regions = [
        ((5.0, 4.0, 45.0, 41.0), ("Two young guys", "Two men"), 1.0),
        ((30.0, 4.0, 45.0, 41.0), ("shaggy hair",), 1.0),
    ]
    assert records_of(tmp_path / "out") == [(captions, regions)]
    assert summary["counts"] == {
        "boxes": 3, "boxes_without_area": 1, "captions": 2, "images": 1, "objects_without_box": 1, "phrases": 6,
        "record_regions": 2, "records": 1,
    }  # fmt: skip
    assert summary["completeness"] == "PARTIAL: 1 of 29783 images"
    whole = prepare("flickr30k", [annotations], images, tmp_path / "all", "--split", "all")
    assert whole["completeness"] == "PARTIAL: 1 of 31783 images, 2 of 158915 captions, 3 of 275775 boxes"


def test_broken_flickr30k_files(tmp_path):
    annotations, images = write_flickr30k(tmp_path / "flickr")
    call = "flickr30k", [annotations], images, tmp_path / "out"
    boxes, sentences = annotations / "Annotations/1000092795.xml", annotations / "Sentences/1000092795.txt"
    whole = boxes.read_text()
    for content, message in (
        (whole[:-9], "not whole, or without a size"),
        (whole.replace("<width>60</width>", ""), "not whole, or without a size"),
        (f'<!DOCTYPE x [<!ENTITY a "b">]>{whole}', "declares a document type"),
        (whole.replace("<xmin>5</xmin>", "<xmin>five</xmin>"), "a bndbox is .*five.*4 numbers"),
        (whole.replace("<xmin>5</xmin>", ""), "a bndbox is .*None.*4 numbers"),
    ):
        boxes.write_text(content)
        with pytest.raises(DataError, match=f"1000092795.xml.*{message}"):
            prepare(*call)
    boxes.write_text(whole)
    sentences.write_text(SENTENCES.replace("guys]", "guys"))
    with pytest.raises(DataError, match="1000092795.txt, line 1: a phrase's mark is broken"):
        prepare(*call)
    sentences.unlink()
    with pytest.raises(DataError, match="1000092795.txt is not there"):
        prepare(*call)
    (annotations / "train.txt").write_text("../../x\n")
    with pytest.raises(DataError, match="'../../x.jpg' leaves the folder"):
        prepare("flickr30k", [annotations], images, tmp_path / "two")
    with pytest.raises(DataError, match="minival.txt is not there; choose another --split"):
        prepare(*call, "--split", "minival")
    with pytest.raises(DataError, match="no record of flickr30k/test could be written"):
        prepare("flickr30k", [annotations], images, tmp_path / "test", "--split", "test")


def test_refcoco(tmp_path):
    annotations, images = write_refcoco(tmp_path / "coco")
    summary = prepare("refcoco", [annotations], images, tmp_path / "out")
    dog = ((4.5, 6.25, 24.5, 16.75), ("brown dog", "dog on the left", "the dog"), 1.0)
    assert records_of(tmp_path / "out") == [(("bus, brown dog",), [dog, ((30.0, 20.0, 64.0, 48.0), ("bus",), 1.0)])]
    assert summary["completeness"] == "PARTIAL: 1 of 16994 images, 3 of 42404 objects, 5 of 120624 expressions"
    summary = prepare("refcoco", [annotations], images, tmp_path / "val", "--split", "val", "--split-by", "unc")
    assert records_of(tmp_path / "val") == [(("the bus",), [((10.0, 11.0, 22.0, 24.0), ("the bus",), 1.0)])]
    assert summary["completeness"] == "PARTIAL: 1 of 1500 images, 1 of 3811 objects, 1 of 10834 expressions"
    with pytest.raises(DataError, match="no object has split 'testB'; there are testA, train, val"):
        prepare("refcoco", [annotations], images, tmp_path / "out", "--split", "testB")
    put(annotations / "refs(google).p", (annotations / "refs(unc).p").read_bytes())
    with pytest.raises(DataError, match=r"it holds refs\(google\).p, refs\(unc\).p; choose with --split-by"):
        prepare("refcoco", [annotations], images, tmp_path / "out")
    refuse(lambda c: c["annotations"].clear(), annotations / "instances.json", "annotation 100 is not in",
           "refcoco", [annotations], images, tmp_path / "two", "--split-by", "unc")  # fmt: skip
    put(annotations / "refs(unc).p", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match="it names os.system"):
        prepare("refcoco", [annotations], images, tmp_path / "two", "--split-by", "unc")

"""Tiny public datasets in their official forms, written by hand: a few pictures of noise, annotations with known answers.

Every writer makes `<folder>/annotations...` and `<folder>/images/...` and returns what `prepare_data.py` is given.
"""

import io
import json
import pickle
import tarfile

import numpy as np
from PIL import Image


def picture(width, height, seed, kind="JPEG"):
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path, content):
    """Writes bytes, text or JSON, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


COCO_SIZES = {9: (64, 48), 25: (50, 40), 30: (40, 40), 34: (32, 24)}


def coco_images():
    return [
        {
            "license": 3, "file_name": f"{number:012d}.jpg", "height": h, "width": w, "id": number,
            "coco_url": f"http://images.cocodataset.org/{'val2017' if number == 34 else 'train2017'}/{number:012d}.jpg",
            "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm7.staticflickr.com/x.jpg",
        }
        for number, (w, h) in COCO_SIZES.items()
    ]  # fmt: skip


def coco_annotation(number, image_id, category_id, box_xywh, crowd=0):
    left, top, width, height = box_xywh
    outline = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {
        "segmentation": [outline], "area": width * height, "iscrowd": crowd, "image_id": image_id, "bbox": box_xywh,
        "category_id": category_id, "id": number,
    }  # fmt: skip


def write_coco(folder):
    """Image 9: a dog, a bus reaching over the edge, a crowd; 25: a box without width and one outside; 30: nothing; 34: a dog."""
    annotations = [
        coco_annotation(100, 9, 18, [4.5, 6.25, 20.0, 10.5]),
        coco_annotation(101, 9, 6, [30.0, 20.0, 40.0, 30.0]),
        coco_annotation(102, 9, 18, [0, 0, 64, 48], crowd=1),
        coco_annotation(103, 25, 6, [10.0, 10.0, 0.0, 5.0]),
        coco_annotation(104, 34, 18, [1, 2, 3, 4]),
        coco_annotation(105, 25, 6, [60.0, 3.0, 5.0, 5.0]),
        coco_annotation(106, 25, 6, [10.0, 11.0, 12.0, 13.0]),
    ]
    categories = [
        {"supercategory": "animal", "id": 18, "name": "dog"},
        {"supercategory": "vehicle", "id": 6, "name": "bus"},
    ]
    content = {"info": {}, "licenses": [], "images": coco_images(), "annotations": annotations, "categories": categories}
    for number, (width, height) in COCO_SIZES.items():
        put(folder / "images" / f"{number:012d}.jpg", picture(width, height, number))
    return put(folder / "instances_train2017.json", content), folder / "images"


def write_lvis(folder):
    images = [{key: value for key, value in row.items() if key != "file_name"} for row in coco_images()]
    for row in images:
        row |= {"not_exhaustive_category_ids": [], "neg_category_ids": [2]}
        put(folder / "images" / "/".join(row["coco_url"].split("/")[-2:]), picture(row["width"], row["height"], row["id"]))
    names = [(1, "bow_(weapon)", ["bow_(weapon)", "archery_bow"]), (2, "alarm_clock", ["alarm_clock"])]
    categories = [
        {"id": i, "name": name, "synonyms": synonyms, "synset": "bow.n.04", "frequency": "r", "def": "...", "image_count": 1}
        for i, name, synonyms in names
    ]
    annotations = [coco_annotation(1, 9, 1, [5, 6, 7, 8]), coco_annotation(2, 34, 2, [1.5, 2, 3, 4])]
    for row in annotations:
        del row["iscrowd"]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    return put(folder / "lvis_v1_train.json", content), folder / "images"


def write_objects365(folder):
    name = "images/v1/patch8/objects365_v1_00420917.jpg"
    images = [{"height": 40, "id": 420917, "license": 5, "width": 60, "file_name": name, "url": ""}]
    put(folder / "images/patch8/objects365_v1_00420917.jpg", picture(60, 40, 1))
    row = {"isfake": 0, "isreflected": 0, "area": 20, "image_id": 420917}
    annotations = [
        row | {"id": 1, "iscrowd": 0, "bbox": [10.5, 5.25, 20.0, 10.0], "category_id": 13},
        row | {"id": 2, "iscrowd": 1, "bbox": [0, 0, 60, 40], "category_id": 1},
    ]
    categories = [{"name": "Person", "id": 1}, {"name": "Cabinet/shelf", "id": 13}]
    content = {"images": images, "annotations": annotations, "categories": categories, "licenses": []}
    return put(folder / "zhiyuan_objv2_train.json", content), folder / "images"


def write_visual_genome(folder):
    """Two pictures: the first is COCO's 9, the second is none of COCO's. Returns image data, descriptions, objects, images."""
    address = "https://cs.stanford.edu/people/rak248/"
    pictures = [
        {"width": 64, "url": address + "VG_100K_2/1.jpg", "height": 48, "image_id": 1, "coco_id": 9, "flickr_id": 7},
        {"width": 50, "url": address + "VG_100K/2.jpg", "height": 40, "image_id": 2, "coco_id": None, "flickr_id": None},
    ]
    region = {"region_id": 1382, "image_id": 1, "synsets": []}
    descriptions = [
        {"id": 1, "regions": [
            region | {"width": 20, "height": 10, "phrase": " the clock is green in colour ", "x": 4, "y": 5},
            region | {"width": 30, "height": 30, "phrase": "a shade", "x": -2, "y": 20},
            region | {"width": 3, "height": 3, "phrase": " ", "x": 1, "y": 1},
        ]},
        {"id": 2, "regions": [region | {"width": 9, "height": 8, "phrase": "two men", "x": 7, "y": 6, "image_id": 2}]},
    ]  # fmt: skip
    thing = {"synsets": ["clock.n.01"], "object_id": 1, "merged_object_ids": []}
    objects = [
        {"image_id": 1, "image_url": "", "objects": [thing | {"h": 10, "w": 12, "names": ["clock", "dial"], "x": 3, "y": 2}]},
        {"image_id": 2, "image_url": "", "objects": []},
    ]
    put(folder / "images/VG_100K_2/1.jpg", picture(64, 48, 1))
    put(folder / "images/VG_100K/2.jpg", picture(50, 40, 2))
    return (
        put(folder / "image_data.json", pictures),
        put(folder / "region_descriptions.json", descriptions),
        put(folder / "objects.json", objects),
        folder / "images",
    )


SENTENCES = """[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#0/notvisual their hands] .
[/EN#1/people Two men] in [/EN#3/clothing/other green shirts] are standing in [/EN#4/scene a yard] .
"""


def write_flickr30k(folder):
    """One training picture: two men with a box each, hair in the first man's box, shirts without width, a yard without box."""

    def thing(names, box):
        corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        inside = f"<bndbox>{corners}</bndbox>" if box else "<scene>1</scene><nobndbox>0</nobndbox>"
        return f"<object>{''.join(f'<name>{name}</name>' for name in names)}{inside}</object>"

    size = "<size><width>60</width><height>50</height><depth>3</depth></size>"
    things = [
        thing([1], [5, 6, 20, 40]),
        thing([1, 2], [30, 4, 45, 41]),
        thing([3], [9, 9, 9, 12]),
        "<object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>",
    ]
    body = f"<annotation><filename>1000092795.jpg</filename>{size}{''.join(things)}</annotation>"
    root = folder / "annotations"
    put(root / "Annotations/1000092795.xml", body)
    put(root / "Sentences/1000092795.txt", SENTENCES)
    put(root / "train.txt", "1000092795\n")
    put(root / "test.txt", "")
    put(folder / "images/1000092795.jpg", picture(60, 50, 3))
    return root, folder / "images"


def grit_row():
    """The caption's words 0-13 are "a wire hanger", 19-32 "a paper cover"; the expression of the first is all of it."""
    caption = "a wire hanger with a paper cover that reads we heart our customers"
    hanger, cover = [0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 0.75, 1.25]
    return {
        "clip_similarity_vitb32": 0.35, "clip_similarity_vitl14": 0.29, "id": 1795296605919, "url": "https://example.org/a.jpg",
        "caption": caption,
        "noun_chunks": [[19.0, 32.0, *cover, 0.79], [0.0, 13.0, *hanger, 0.67]],
        "ref_exps": [[19.0, 66.0, *cover, 0.79], [0.0, 66.0, *hanger, 0.67]],
    }  # fmt: skip


def write_grit_tars(folder, samples=3, **changes):
    """img2dataset's webdataset output: `samples` pictures of 80x40, one tar, a parquet-less folder beside its stats."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index in range(samples):
            added = {
                "key": f"{index:09d}", "status": "success", "error_message": None, "exif": "{}", "width": 80, "height": 40,
                "original_width": 160, "original_height": 80, "sha256": "0",
            }  # fmt: skip
            row = {**grit_row(), **added, **changes}
            members = {
                "jpg": picture(80, 40, index),
                "json": json.dumps(row, indent=4).encode(),
                "txt": row.get("caption", "").encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    put(folder / "00000_stats.json", {"count": samples, "successes": samples})
    return folder


def write_refcoco(folder, name="refcoco", kind="unc"):
    """Images 9 (train, an object asked for twice in two refs, a bus), 25 (val) and 34 (testA), on COCO's pictures."""
    annotations, images = write_coco(folder)
    content = json.loads(annotations.read_text())
    for row in content["images"]:
        row["file_name"] = f"COCO_train2014_{row['id']:012d}.jpg"
        put(images / row["file_name"], (images / f"{row['id']:012d}.jpg").read_bytes())
    refs, sent_id = [], 0
    for ref_id, (ann_id, image_id, split, texts) in enumerate(
        [
            (100, 9, "train", ["brown dog", "dog on the left"]),
            (101, 9, "train", ["bus"]),
            (106, 25, "val", ["the bus"]),
            (104, 34, "testA", ["dog"]),
            (100, 9, "train", ["brown dog", "the dog"]),
        ]
    ):
        sentences = []
        for text in texts:
            sentences.append({"tokens": text.split(), "raw": text.upper(), "sent_id": sent_id, "sent": text})
            sent_id += 1
        refs.append({
            "sent_ids": [row["sent_id"] for row in sentences], "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
            "ann_id": ann_id, "ref_id": ref_id, "image_id": image_id, "split": split, "sentences": sentences,
            "category_id": 18 if ann_id in (100, 104) else 6,
        })  # fmt: skip
    root = folder / "refs" / name
    put(root / "instances.json", content)
    put(root / f"refs({kind}).p", pickle.dumps(refs, 2))
    return root, images

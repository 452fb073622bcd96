"""Outlines against pycocotools' own reading of the same files, patch weights against loops, and the files of LVIS,
Objects365, ADE20K and COCO panoptic in their official forms through the command."""

import json

import numpy as np
import pytest
import torch
from dataset_fixtures import write_lvis, write_objects365
from eval_fixtures import run, save_stock_clip, write_json, write_picture
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from encoder.errors import DataError
from encoder.geometry import Geometry
from encoder.masks import box_weights, patch_weights, pool_under
from encoder.pretrained import load_encoder, load_processor
from eval import region_classification
from eval.coco_files import read_instances
from eval.predictions import load_evaluation
from eval.region_features import dense_features
from eval.region_masks import Masks

WIDTH, HEIGHT = 40, 24


@pytest.fixture(scope="module")
def clip(tiny_folder, tmp_path_factory):
    return save_stock_clip(tiny_folder, tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def shapes(tmp_path):
    """One picture with two polygons, plain and compressed run lengths, and an outline that covers no pixel."""
    write_picture(tmp_path / "images/1.png", WIDTH, HEIGHT, 1)
    blob = np.zeros((HEIGHT, WIDTH), np.uint8)
    blob[3:15, 20:33] = np.random.default_rng(0).integers(0, 2, (12, 13))
    compressed = rle_tools.encode(np.asfortranarray(blob))
    plain = []
    for value in blob.flatten(order="F"):  # COCO's own: lengths of runs down the columns, zeros first
        if len(plain) % 2 == value:
            plain.append(0)
        plain[-1] += 1
    # The loop above opens a run whenever the value changes: run 0 is zeros, run 1 ones, ...
    outlines = [
        [[2.5, 3.0, 18.0, 4.5, 12.0, 20.0]],
        [[1, 1, 6, 1, 6, 6, 1, 6], [30.5, 10, 38, 12, 33, 22]],
        {"size": [HEIGHT, WIDTH], "counts": plain},
        {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]],
    ]
    boxes = [[2.5, 3, 15.5, 17], [1, 1, 37, 21], [20, 3, 13, 12], [20, 3, 13, 12], [5.1, 5.1, 0.1, 0.1]]
    rows = [
        {"id": n, "image_id": 1, "category_id": 1 + n % 2, "bbox": box, "iscrowd": 0, "segmentation": outline, "area": 1}
        for n, (box, outline) in enumerate(zip(boxes, outlines, strict=True), 1)
    ]
    write_json(
        tmp_path / "shapes.json",
        {
            "images": [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}],
            "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "red_heart"}],
            "annotations": rows,
        },
    )
    return tmp_path


def test_outlines_equal_pycocotools(shapes, capsys):
    instances = read_instances(shapes / "shapes.json")
    masks = Masks(instances, list(instances.annotations.values()), None)
    reference = COCO(str(shapes / "shapes.json"))
    for number in (1, 2, 3, 4):
        np.testing.assert_array_equal(masks.of(str(number)), reference.annToMask(reference.anns[number]).astype(bool))
    assert masks.of("1").sum() > 50 and masks.empty == 1 and masks.of("5") is None


def naive_weights(mask, geometry, grid):
    """Loops over patches and pixels: the area of each covered pixel, as placed in the square, that lies in the patch."""
    weights = np.zeros((grid, grid))
    for y, x in zip(*np.nonzero(mask), strict=True):
        corners = geometry.points_to_model(torch.tensor([[x, y], [x + 1, y + 1]], dtype=torch.float64)).numpy() * grid
        for row in range(grid):
            for column in range(grid):
                width = max(0, min(corners[1, 0], column + 1) - max(corners[0, 0], column))
                height = max(0, min(corners[1, 1], row + 1) - max(corners[0, 1], row))
                weights[row, column] += width * height
    return weights


@pytest.mark.parametrize("mode", ["pad", "squash"])
@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (11, 29)])
def test_patch_weights_equal_a_naive_loop(mode, size):
    geometry = Geometry(mode, *size, 32)
    mask = np.random.default_rng(1).random(size[::-1]) < 0.3
    weights = patch_weights(mask, geometry, 5)
    np.testing.assert_allclose(weights, naive_weights(mask, geometry, 5), atol=1e-12)
    assert 0 < weights.max() <= 1 + 1e-12
    filled = np.zeros(size[::-1], bool)
    filled[2:9, 1:8] = True
    np.testing.assert_allclose(box_weights((1, 2, 8, 9), geometry, 5), patch_weights(filled, geometry, 5), atol=1e-12)
    with pytest.raises(DataError, match="they belong to different images"):
        patch_weights(mask.T, geometry, 5)


def test_maskpool_names_boxes_by_the_mean_under_the_mask(clip, shapes):
    run(
        region_classification,
        *("--model", clip, "--annotations", shapes / "shapes.json", "--images", shapes / "images"),
        *("--feature", "maskpool", "--layer", -2, "--out", shapes / "run"),
    )
    evaluation = load_evaluation(shapes / "run/region_classification/shapes/maskpool-2")
    assert evaluation.run["model"]["outlines_empty"] == 1

    model, processor = load_encoder(clip), load_processor(clip)
    inputs, (geometry,) = processor.images([Image.open(shapes / "images/1.png")])
    with torch.no_grad():
        maps = dense_features(model, inputs["pixel_values"], -2).double().numpy()[0]
        texts = model.get_text_features(**processor.texts(["apple", "red heart"])).pooler_output.double().numpy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    reference = COCO(str(shapes / "shapes.json"))
    for prediction in evaluation.predictions[:4]:
        weights = naive_weights(reference.annToMask(reference.anns[int(prediction.id)]), geometry, maps.shape[-1])
        pooled = (maps * weights).sum((1, 2)) / weights.sum()
        ours = pool_under(torch.tensor(maps)[None], torch.tensor(weights)[None], torch.tensor([0]))
        np.testing.assert_allclose(ours[0], pooled, atol=1e-12)
        assert prediction.raw == ["apple", "red_heart"][int((texts @ pooled).argmax())]


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        (None, "annotation 2 has no segmentation"),
        ([[1, 2, 3]], "annotation 2: its segmentation is no polygon"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 6]}, "its runs add up to 11 pixels, 960 are needed"),
        ({"size": [9, 9], "counts": [960]}, r"its segmentation is of \[9, 9\] px, its image of \[40, 24\]"),
    ],
)
def test_bad_outlines_get_one_sentence(shapes, outline, message):
    content = json.loads((shapes / "shapes.json").read_text())
    content["annotations"][1]["segmentation"] = outline
    instances = read_instances(write_json(shapes / "bad.json", content))
    with pytest.raises(DataError, match=message):
        Masks(instances, list(instances.annotations.values()), None)


def common(folder, annotations, images):
    return ["--annotations", annotations, "--images", images, "--out", folder / "run"]


def test_lvis_finds_pictures_by_url_and_scores_by_frequency(tiny_folder, tmp_path):
    annotations, images = write_lvis(tmp_path)
    run(region_classification, "--model", tiny_folder, *common(tmp_path, annotations, images))
    folder = tmp_path / "run/region_classification/lvis_v1_train/prompter"
    evaluation = load_evaluation(folder)
    assert [(t.image, t.category, t.kind) for t in evaluation.targets] == [
        ("train2017/000000000009.jpg", "bow_(weapon)", "rare"),
        ("val2017/000000000034.jpg", "alarm_clock", "rare"),
    ]
    assert evaluation.protocol["completeness"].startswith("PARTIAL: 4 of 100170 images")
    assert json.loads((folder / "scores.json").read_text())["by_kind"]["rare"]["n"] == 2
    assert region_classification.spoken("bow_(weapon)") == "bow (weapon)"


def test_objects365_is_read_from_its_patch_folders(tiny_folder, tmp_path):
    annotations, images = write_objects365(tmp_path)
    run(region_classification, "--model", tiny_folder, *common(tmp_path, annotations, images))
    evaluation = load_evaluation(tmp_path / "run/region_classification/zhiyuan_objv2_train/prompter")
    (target,) = evaluation.targets
    assert target.image == "patch8/objects365_v1_00420917.jpg" and target.category == "Cabinet/shelf"
    assert target.box == (10.5, 5.25, 30.5, 15.25) and evaluation.protocol["crowds_left_out"] == 1


@pytest.fixture
def panoptic(tmp_path):
    """ADE20K's and COCO's panoptic form: a JSON file, and a PNG per picture whose colour is the segment's number."""
    write_picture(tmp_path / "images/ADE_val_00000001.jpg", WIDTH, HEIGHT, 5)
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:, :25], ids[6:20, 8:18] = 3 + 256 * 7, 5 + 65536 * 2
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
    (tmp_path / "png").mkdir()
    Image.fromarray(rgb).save(tmp_path / "png/ADE_val_00000001.png")
    segments = [
        {"id": 3 + 256 * 7, "category_id": 0, "area": 460, "bbox": [0, 0, 25, 24], "iscrowd": 0},
        {"id": 5 + 65536 * 2, "category_id": 7, "area": 140, "bbox": [8, 6, 10, 14], "iscrowd": 0},
    ]
    content = {
        "images": [{"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 0, "name": "wall", "isthing": 0}, {"id": 7, "name": "bed, bunk", "isthing": 1}],
        "annotations": [{"image_id": "ADE_val_00000001", "file_name": "ADE_val_00000001.png", "segments_info": segments}],
    }
    write_json(tmp_path / "ade20k_panoptic_val.json", content)
    return tmp_path, ids


def test_names_of_pngs_and_addresses_do_not_leave_their_folders(tmp_path):
    image = {"id": 1, "width": WIDTH, "height": HEIGHT}
    of_segments = {"image_id": 1, "file_name": "../1.png", "segments_info": [{"id": 3, "category_id": 0, "bbox": [0, 0, 5, 5]}]}
    content = {"categories": [{"id": 0, "name": "wall"}], "annotations": [of_segments]}
    for picture, message in (
        ({"file_name": "1.jpg"}, "annotation of image 1: image file '../1.png' leaves the folder"),
        ({"coco_url": "http://coco/../1.jpg"}, "image 1: image file '../1.jpg' leaves the folder"),
    ):
        write_json(tmp_path / "panoptic.json", {**content, "images": [image | picture]})
        with pytest.raises(DataError, match=message):
            read_instances(tmp_path / "panoptic.json")


def test_panoptic_segments_are_annotations_with_masks(clip, panoptic):
    folder, ids = panoptic
    instances = read_instances(folder / "ade20k_panoptic_val.json")
    rows = list(instances.annotations.values())
    masks = Masks(instances, rows, folder / "png")
    for row in rows:
        np.testing.assert_array_equal(masks.of(row.id), ids == int(row.id.rpartition("-")[2]))
    arguments = ["--model", clip, *common(folder, folder / "ade20k_panoptic_val.json", folder / "images")]
    with pytest.raises(DataError, match="give the folder of the PNGs as --masks"):
        run(region_classification, *arguments, "--feature", "maskpool")
    run(region_classification, *arguments, "--feature", "maskpool", "--masks", folder / "png")
    evaluation = load_evaluation(folder / "run/region_classification/ade20k_panoptic_val/maskpool-1")
    assert [(t.category, t.kind) for t in evaluation.targets] == [("wall", "stuff"), ("bed, bunk", "thing")]
    assert region_classification.spoken("bed, bunk") == "bed"

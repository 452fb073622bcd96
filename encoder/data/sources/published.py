"""How many images and labels each public dataset is published with, and whether what was read is all of it."""

from collections import Counter

# Part of a dataset -> unit -> number. A unit is left out, and said to be unchecked, where no source could be confirmed:
# Visual Genome's descriptions (5,408,689 and 5,406,592 are both in use) and objects, and the images that Objects365's
# training annotations name (1,742,289 can be had, three more are named). GRIT's links die, so no number can be met.
PUBLISHED: dict[str, dict[str, int]] = {
    # cocodataset.org; boxes include crowds.
    "coco/instances_train2017": {"images": 118_287, "annotations": 860_001},
    "coco/instances_val2017": {"images": 5_000, "annotations": 36_781},
    "coco/instances_train2014": {"images": 82_783, "annotations": 604_907},
    "coco/instances_val2014": {"images": 40_504, "annotations": 291_875},
    # lvisdataset.org
    "lvis/lvis_v1_train": {"images": 100_170, "annotations": 1_270_141},
    "lvis/lvis_v1_val": {"images": 19_809, "annotations": 244_707},
    # objects365.org, and counts of its files by users
    "objects365/zhiyuan_objv2_train": {"annotations": 25_407_598},
    "objects365/zhiyuan_objv2_val": {"images": 80_000, "annotations": 1_240_587},
    # visualgenome.org
    "visual_genome": {"images": 108_077},
    # README and paper of Flickr30k Entities (IJCV 2017)
    "flickr30k/all": {"images": 31_783, "captions": 158_915, "boxes": 275_775},
    "flickr30k/train": {"images": 29_783},
    "flickr30k/val": {"images": 1_000},
    "flickr30k/test": {"images": 1_000},
    # Images and objects: TensorFlow Datasets' ref_coco; expressions: the papers (train: the total less the other splits).
    "refcoco/unc/train": {"images": 16_994, "objects": 42_404, "expressions": 120_624},
    "refcoco/unc/val": {"images": 1_500, "objects": 3_811, "expressions": 10_834},
    "refcoco/unc/testA": {"images": 750, "objects": 1_975, "expressions": 5_657},
    "refcoco/unc/testB": {"images": 750, "objects": 1_810, "expressions": 5_095},
    "refcoco+/unc/train": {"images": 16_992, "objects": 42_278, "expressions": 120_191},
    "refcoco+/unc/val": {"images": 1_500, "objects": 3_805, "expressions": 10_758},
    "refcoco+/unc/testA": {"images": 750, "objects": 1_975, "expressions": 5_726},
    "refcoco+/unc/testB": {"images": 750, "objects": 1_798, "expressions": 4_889},
    "refcocog/umd/train": {"images": 21_899, "objects": 42_226, "expressions": 80_512},
    "refcocog/umd/val": {"images": 1_300, "objects": 2_573, "expressions": 4_896},
    "refcocog/umd/test": {"images": 2_600, "objects": 5_023, "expressions": 9_602},
    "refcocog/google/train": {"images": 24_698, "objects": 44_822},
    "refcocog/google/val": {"images": 4_650, "objects": 5_000},
    "refcoco/google/train": {"images": 19_213, "objects": 40_000},
    "refcoco/google/val": {"images": 4_559, "objects": 5_000},
    "refcoco/google/test": {"images": 4_527, "objects": 5_000},
}


def completeness(part: str, counts: Counter, missing: int, limit: int | None = None) -> str:
    """How what was read stands to what is published: `complete (...)`, `PARTIAL: ...` with both numbers, `not checked: ...`.

    counts: of the dataset's own units, before anything was left out; missing: images that could not be used; limit: how
    many images were looked at, at most
    """
    expected = PUBLISHED.get(part, {})
    short = [f"{counts[unit]} of {number} {unit}" for unit, number in expected.items() if counts[unit] != number]
    if limit is not None and counts["images"] == limit and not short:
        short.append(f"the first {limit} images")
    if missing:
        short.append(f"{missing} images could not be used")
    if short:
        return f"PARTIAL: {', '.join(short)}"
    if not expected:
        return f"not checked: no published count of {part} is known here"
    return f"complete ({', '.join(f'{number} {unit}' for unit, number in expected.items())}, as published)"

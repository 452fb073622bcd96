"""Reads the RefCOCO family as its authors distribute it: `refs(unc).p` (a pickle) and `instances.json` beside it.

The format is that of github.com/lichengunc/refer. The pickle is read without running anything it names. The counts
checked are those of the papers (the unit is the expression, not the referred object).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from encoder.data.plain_pickle import read_plain_pickle
from encoder.data.sources.refcoco import refs_file
from encoder.errors import DataError
from eval.coco_files import Instances, read_instances
from eval.pointing import region_of
from eval.predictions import Target

# Folder name, who split it -> split -> (objects referred to, expressions).
PUBLISHED = {
    ("refcoco", "unc"): {"val": (3811, 10834), "testA": (1975, 5657), "testB": (1810, 5095)},
    ("refcoco+", "unc"): {"val": (3805, 10758), "testA": (1975, 5726), "testB": (1798, 4889)},
    ("refcocog", "umd"): {"val": (2573, 4896), "test": (5023, 9602)},
    ("refcoco", "google"): {"val": (5000, None), "test": (5000, None)},
    ("refcocog", "google"): {"val": (5000, None)},
}
# Ref-L4's card and paper give the number of expressions of both splits together, which its results are of.
REF_L4_EXPRESSIONS = 45_341
# COCO's own images, which only the published sets refer to.
PUBLISHED_IMAGES = "COCO_train2014_"


@dataclass(frozen=True)
class Referral:
    """One object that expressions refer to.

    box: xyxy, pixels of the original image; image: file, relative to the folder of images
    sentences: (sent_id, expression, kind) per expression; kind is empty in the published files
    outline: polygons or a run-length encoding, as in the file; None or empty where it has none
    """

    ref_id: int
    split: str
    image: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    category: str
    sentences: tuple[tuple[int, str, str], ...]
    outline: list | dict | None = None


@dataclass(frozen=True)
class RefcocoFiles:
    """All objects of one `refs(...).p`.

    name: of its folder (`refcoco`, `refcoco+`, `refcocog`); split_by: the word in the file's name (`unc`, `umd`, `google`)
    whole_objects: whether a referral is an object with all its expressions; in some mirrors it is one expression
    """

    name: str
    split_by: str
    referrals: tuple[Referral, ...]
    whole_objects: bool = True

    @classmethod
    def read(cls, folder: Path, split_by: str | None = None) -> "RefcocoFiles":
        """Reads a folder; `split_by` picks among several refs files. Raises DataError with the file and the key."""
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; --data is the one that holds refs(...).p and instances.json")
        path = refs_file(folder, split_by)
        refs = read_plain_pickle(path)
        if not isinstance(refs, list):
            raise DataError(f"{path}: holds a {type(refs).__name__}, a list of referred objects was expected")
        instances = read_instances(folder / "instances.json")
        rows = [_row(ref, f"{path}, item {index}", instances) for index, ref in enumerate(refs)]
        refuse_doubled(path, "ref_id", [row["ref_id"] for row in rows])
        refuse_doubled(path, "sent_id", [sent_id for row in rows for sent_id, _, _ in row["sentences"]])
        annotations = [instances.annotations[row["ann_id"]] for row in rows]
        referrals = tuple(
            Referral(
                row["ref_id"],
                row["split"],
                *instances.images[row["image_id"]],
                box,
                instances.categories[row["category_id"]],
                row["sentences"],
                annotation.outline,
            )
            for row, annotation, box in zip(rows, annotations, instances.boxes(annotations), strict=True)
        )
        return cls(folder.resolve().name, path.stem.removeprefix("refs(").removesuffix(")"), referrals)

    def test_splits(self) -> list[str]:
        """The splits that are there, without train, in file order; of Ref-L4 both together."""
        if self.name == "ref_l4":
            return ["all"]
        return [split for split in dict.fromkeys(r.split for r in self.referrals) if split != "train"]

    def of_split(self, split: str) -> list[Referral]:
        """The objects of one split, or of `all`; DataError names the splits there are."""
        chosen = [referral for referral in self.referrals if split in ("all", referral.split)]
        if not chosen:
            counts = ", ".join(f"{name} ({n})" for name, n in Counter(r.split for r in self.referrals).items())
            raise DataError(f"{self.name}: no referred object has split '{split}'; there are {counts or 'none at all'}")
        return chosen

    def expressions(self, split: str) -> list[Target]:
        """One target per expression, id = sent_id."""
        return [
            Target(str(sent_id), r.image, r.width, r.height, text, r.box, r.category, kind)
            for r in self.of_split(split)
            for sent_id, text, kind in r.sentences
        ]

    def objects(self, split: str, region: str = "box") -> list[Target]:
        """One target per referred object, id = ref_id, without text.

        region: how it is pointed at: by its `box`, by a `point` of it, or by its `mask`, see `eval.pointing`
        """
        return [
            Target(
                str(r.ref_id), r.image, r.width, r.height, "", r.box, r.category,
                region=region_of(region, r.outline, r.box, r.width, r.height, f"{self.name}: ref_id {r.ref_id}"),
            )
            for r in self.of_split(split)
        ]  # fmt: skip

    def completeness(self, split: str) -> str:
        """How a split stands to the published set: `published`, `own data`, or `PARTIAL: ...`."""
        here = self.of_split(split)
        num_expressions = sum(len(referral.sentences) for referral in here)
        if self.name == "ref_l4":
            if num_expressions == REF_L4_EXPRESSIONS:
                return "published"
            return f"PARTIAL: {num_expressions} of {REF_L4_EXPRESSIONS} expressions"
        if not all(r.image.rpartition("/")[2].startswith(PUBLISHED_IMAGES) for r in self.referrals):
            return "own data"
        expected = PUBLISHED.get((self.name, self.split_by), {}).get(split)
        if expected is None:
            return f"PARTIAL: no published count is known for {self.name}, {self.split_by}, {split}"
        whole = (len(here) if self.whole_objects else expected[0], num_expressions)
        for unit, found, stated in zip(("objects", "expressions"), whole, expected, strict=True):
            if stated not in (None, found):
                return f"PARTIAL: the file has {found} of {stated} {unit}"
        return "published"


def _row(ref: dict, where: str, instances: Instances) -> dict:
    """The keys of a refs item that are used, `sentences` as (sent_id, sent, kind); its ids must be in `instances`."""
    try:
        row = {key: ref[key] for key in ("ref_id", "split", "ann_id", "image_id", "category_id")}
        row["sentences"] = tuple((s["sent_id"], s["sent"], s.get("kind", "")) for s in ref["sentences"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not a referred object ({error!r}); see github.com/lichengunc/refer") from None
    for key, known in (
        ("ann_id", instances.annotations),
        ("image_id", instances.images),
        ("category_id", instances.categories),
    ):
        if row[key] not in known:
            raise DataError(f"{where}: {key} {row[key]} is not in {instances.path}; the two files belong to different sets")
    return row


def refuse_doubled(path: Path, key: str, ids: list) -> None:
    if len(set(ids)) < len(ids):
        doubled = next(value for value, count in Counter(ids).items() if count > 1)
        raise DataError(f"{path}: {key} {doubled} occurs twice; answers are joined by it, so it must be unique")

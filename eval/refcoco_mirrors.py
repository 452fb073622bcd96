"""Reads the RefCOCO family and Ref-L4 in the forms that others pass them on in: Hugging Face mirrors, MDETR's, Qwen-VL's.

| form | files | box | what to know |
|---|---|---|---|
| jxu124/refcoco, refcocoplus, refcocog | parquet or JSONL | xyxy | `split` is the papers', testA's file is called test |
| lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg | parquet or JSONL | xywh | val is UNC's with Google's, test Google's: PARTIAL |
| JierunChen/Ref-L4 | parquet or JSONL | xywh | published numbers are of split all |
| MDETR, GLIP and Ferret: finetune_refcoco_val.json | JSON | xywh | one image entry per expression |
| Qwen-VL and InternVL: refcoco_val.jsonl | JSONL | xyxy | one line per expression |

All boxes are pixels of the original image. Pictures come from a folder of their own, also where a mirror holds them too.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from encoder.data.sources.labelled import numbers, plain_name
from encoder.errors import DataError
from eval.refcoco_files import RefcocoFiles, Referral, refuse_doubled
from eval.runner import picture_size

SET_NAMES = {"refcocog": "refcocog", "refcoco+": r"refcoco(\+|_?plus)", "ref_l4": "ref-?_?l4", "refcoco": "refcoco"}
SETS = tuple(SET_NAMES)
SPLIT_IN_NAME = re.compile(r"(?:^|[_-])(train|validation|val|testA|testB|test)(?=[_.-]|$)")


def read_mirror(data: Path, images: Path, dataset: str | None, split_by: str | None) -> RefcocoFiles:
    """One set from a file, or from all files of one kind in a folder.

    dataset: one of `SETS`, where the files do not tell; split_by: unc, umd or google, by default the papers' choice
    images: folder of the pictures, asked for their size where the files do not state it
    Raises DataError naming file and row for what is not as in one of the forms.
    """
    rows = [row for path in mirror_files(data) for row in _rows(path)]
    if not rows:
        raise DataError(f"{data} holds no row; download it again")
    read = [_referral(row, where, split, images) for row, where, split in rows]
    name = dataset or _set_of(rows[0][0], data)
    refuse_doubled(data, "the id of an expression", [sent_id for r in read for sent_id, _, _ in r.sentences])
    whole_objects = "caption" not in rows[0][0] and "sent" not in rows[0][0]
    default = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}.get(name, "")
    return RefcocoFiles(name, split_by or default, tuple(read), whole_objects)


def mirror_files(data: Path) -> list[Path]:
    """The files to read: `data` itself, or what lies in the folder. DataError where there are none, or of several kinds."""
    if data.is_file():
        return [data]
    found = [sorted(p for p in data.rglob(f"*{kind}") if p.name != "instances.json") for kind in (".parquet", ".jsonl", ".json")]
    found = [files for files in found if files]
    if len(found) != 1:
        raise DataError(
            f"{data} holds no refs(...).p and {'no' if not found else 'more than one kind of'} .parquet, .jsonl or .json files; "
            "give the folder of RefCOCO's own files, or one file of a mirror"
        )
    return found[0]


def _rows(path: Path) -> Iterator[tuple[dict, str, str]]:
    """(row, where, split by the file's name) of one file."""
    in_name = SPLIT_IN_NAME.search(path.stem)
    split = {"validation": "val"}.get(in_name[1], in_name[1]) if in_name else ""
    if path.suffix == ".parquet":
        for number, row in enumerate(_parquet(path)):
            yield row, f"{path}, row {number}", split
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):  # noqa: B007 (named below)
                yield {"line": number - 1, **json.loads(line)}, f"{path}, line {number}", split
            return
        number = None
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{path}{f', line {number}' if number else ''}: not whole JSON ({error}); download it again") from None
    try:
        entries = {image["id"]: image for image in content["images"]}
        for number, row in enumerate(content["annotations"]):
            yield {**entries[row["image_id"]], "bbox": row["bbox"]}, f"{path}, annotation {number}", split
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not in MDETR's form ({error!r}), which has images with a caption, and annotations") from None


def _parquet(path: Path) -> Iterator[dict]:
    """Rows without the pictures that some mirrors put into them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is read with pyarrow, which is not installed; run: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = [field.name for field in schema if not pyarrow.types.is_struct(field.type) and field.name != "segmentation"]
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not whole Parquet ({' '.join(str(error).split())}); download it again") from None


def _referral(row: dict, where: str, split: str, images: Path) -> Referral:
    """A row of any of the forms."""
    xywh = "sentences" not in row and "sent" not in row
    try:
        if "sentences" in row:
            info = json.loads(row["raw_image_info"])
            name, size = info["file_name"], (info["width"], info["height"])
            sentences = tuple((s["sent_id"], s["sent"], "") for s in row["sentences"])
            ref_id, split = row["ref_id"], row["split"]
        elif "answer" in row:
            # `COCO_train2014_000000581857_16.jpg`: the reference's number stands after the picture's.
            name, size = re.sub(r"_\d+(?=\.\w+$)", "", row["file_name"]) if _counted(row["file_name"]) else row["file_name"], None
            sentences = tuple((f"{split}-{row['question_id']}-{i}", text, "") for i, text in enumerate(row["answer"]))
            ref_id = row["question_id"]
        elif "sent" in row:
            name, size, ref_id = row["image"], (row["width"], row["height"]), row["line"]
            sentences = ((f"{split}-{row['line']}", row["sent"], ""),)
        else:
            name, size, ref_id = row["file_name"], (row["width"], row["height"]), row["id"]
            split = row.get("split", split)
            sentences = ((f"{split}-{row['id']}", row["caption"], ""),)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: not in a form of the RefCOCO family ({error!r}); see docs/evaluation.md") from None
    if not split:
        raise DataError(f"{where}: no split in the row and none in the file's name; call the file like refcoco_val.jsonl")
    plain_name(name, where)
    x1, y1, x2, y2 = numbers(row.get("bbox"), 4, f"{where}: bbox")
    box = (x1, y1, x1 + x2, y1 + y2) if xywh else (x1, y1, x2, y2)
    width, height = size or picture_size(images, name, where)
    if not (0 <= box[0] < box[2] <= width + 1 and 0 <= box[1] < box[3] <= height + 1):
        raise DataError(f"{where}: box {list(box)} has no area or leaves the picture of {width}x{height} px; is it in pixels?")
    return Referral(ref_id, split, name, width, height, box, str(row.get("ori_category_id", "")), sentences)


def _counted(name: str) -> bool:
    return re.search(r"_\d{12}_\d+\.\w+$", name) is not None


def _set_of(row: dict, data: Path) -> str:
    """Which set, by what the files say or are called."""
    if "is_rewrite" in row or "bbox_id" in row:
        return "ref_l4"
    path = data.resolve()
    # The nearest name that tells: the file's, then the folders' above it.
    for said in (str(row.get("dataset_name", "")), path.stem, *path.parts[-2:-4:-1]):
        for name, words in SET_NAMES.items():
            if re.search(words, said, re.IGNORECASE):
                return name
    raise DataError(f"{data} does not tell which set it is; pass --dataset, one of {', '.join(SETS)}")

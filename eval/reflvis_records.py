"""Makes RefLVIS: objects of LVIS v1's validation set, each as a box, a point and a free-form region, with a class that is absent.

    python eval/reflvis_records.py --lvis lvis_v1_val.json --count 3000 --seed 0 --out reflvis

Ferret's own file was never released (arXiv 2310.07704, Section 4.1); this one is drawn again, from a seed: scores are near
the published ones, not of the same questions. Pictures are COCO's val2017 only. The absent class comes from the image's list
`neg_category_ids`: annotators looked for it and found none. Written: `records.jsonl`, and `manifest.json` with its hash.
"""

import argparse
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from encoder.data.sources.labelled import read_json
from encoder.errors import DataError, run_main
from encoder.masks import decode_mask, inner_pixels, run_lengths
from eval.coco_files import FREQUENCIES
from eval.predictions import write_whole

MIN_PIXELS = 64  # a smaller object has no room for a stroke
STROKES = 6


def make_records(lvis: Path, count: int, seed: int) -> tuple[list[dict], dict]:
    """`count` records in order of their annotation's id, and what the manifest says.

    Annotations are gone through in a random order that `seed` alone decides. Raises DataError for a file that is not LVIS's.
    """
    content = read_json(lvis)
    try:
        images = {row["id"]: row for row in content["images"]}
        categories = {row["id"]: row for row in content["categories"]}
        for row in images.values():
            row["neg_category_ids"], row["coco_url"]
        for row in categories.values():
            row["synonyms"], row["frequency"]
        annotations = sorted(content["annotations"], key=lambda row: row["id"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{lvis}: not LVIS v1 ({error!r}); give lvis_v1_val.json, with neg_category_ids") from None
    rng, left_out, records = random.Random(seed), Counter(), []
    present: dict[int, set[int]] = {}
    for row in annotations:
        present.setdefault(row["image_id"], set()).add(row["category_id"])
    order = rng.sample(range(len(annotations)), len(annotations))
    for index in order:
        if len(records) == count:
            break
        row = annotations[index]
        image, category = images[row["image_id"]], categories[row["category_id"]]
        folder, name = image["coco_url"].split("/")[-2:]
        own = _names(category)
        absent = [c for c in image["neg_category_ids"] if c not in present[image["id"]] and not own & _names(categories[c])]
        mask = _mask(row, image, lvis)
        reason = (
            "not of val2017" if folder != "val2017"
            else "no class verified absent" if not absent
            else f"under {MIN_PIXELS} pixels" if mask.sum() < MIN_PIXELS
            else ""
        )  # fmt: skip
        if reason:
            left_out[reason] += 1
            continue
        left, top, width, height = row["bbox"]
        own_rng = random.Random(f"{seed} {row['id']}")  # a record does not depend on those drawn before it
        point = point_inside(mask)
        records.append({
            "id": row["id"], "image": f"{folder}/{name}", "width": image["width"], "height": image["height"],
            "name": category["name"], "synonyms": [s for s in category["synonyms"] if s != category["name"]],
            "negative": categories[own_rng.choice(sorted(absent))]["name"], "frequency": FREQUENCIES[category["frequency"]],
            "box": [max(left, 0), max(top, 0), min(left + width, image["width"]), min(top + height, image["height"])],
            "point": point, "free_form": scribble(mask, point, own_rng),
        })  # fmt: skip
    if not records:
        raise DataError(f"{lvis}: no object can be used ({dict(left_out)}); is it the file of the validation set?")
    manifest = {
        "lvis_sha256": hashlib.sha256(lvis.read_bytes()).hexdigest(),
        "seed": seed,
        "count": len(records),
        "by_frequency": dict(Counter(record["frequency"] for record in records).most_common()),
        "passed_over": dict(left_out),
    }
    return sorted(records, key=lambda record: record["id"]), manifest


def _names(category: dict) -> set[str]:
    return {category["name"], *category["synonyms"]}


def _mask(row: dict, image: dict, lvis: Path) -> np.ndarray:
    """(H, W) bool."""
    try:
        return decode_mask(run_lengths(row["segmentation"], image["width"], image["height"]))
    except DataError:
        raise
    except Exception as error:  # what pycocotools raises for it
        raise DataError(f"{lvis}: annotation {row.get('id')}: no readable segmentation ({error}); download it again") from None


def point_inside(mask_HW: np.ndarray) -> list[float]:
    """x, y: middle of the pixel nearest to the mask's centroid that has the mask on all sides, or of any of the mask."""
    rows, columns = np.nonzero(mask_HW)
    centre = rows.mean(), columns.mean()
    rows, columns = np.nonzero(inner_pixels(mask_HW))
    nearest = int(((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2).argmin())
    return [float(columns[nearest]) + 0.5, float(rows[nearest]) + 0.5]


def scribble(mask_HW: np.ndarray, point: list[float], rng: random.Random) -> dict:
    """A thick line from the point through random places of the mask, cut at its outline: a compressed run-length encoding."""
    from pycocotools import mask as rle_tools

    rows, columns = np.nonzero(mask_HW)
    chosen = [rng.randrange(len(rows)) for _ in range(STROKES)]
    places = [(int(point[0]), int(point[1])), *((int(columns[i]), int(rows[i])) for i in chosen)]
    canvas = Image.new("L", mask_HW.shape[::-1])
    thickness = max(3, round(0.1 * len(rows) ** 0.5))
    ImageDraw.Draw(canvas).line(places, fill=1, width=thickness, joint="curve")
    drawn = (np.asarray(canvas) > 0) & mask_HW
    drawn[places[0][1], places[0][0]] = True
    rle = rle_tools.encode(np.asfortranarray(drawn.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lvis", type=Path, required=True, help="lvis_v1_val.json")
    parser.add_argument("--count", type=int, default=3000, help="objects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl and manifest.json")
    args = parser.parse_args()
    records, manifest = make_records(args.lvis, args.count, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(args.out / "records.jsonl", text)
    manifest["records_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_whole(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    print(f"{len(records)} records, sha256 {manifest['records_sha256'][:12]}: {args.out}")


if __name__ == "__main__":
    run_main(main)

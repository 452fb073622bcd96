"""Checks training data, lists every problem with its file and key, and draws samples as the model will see them.

    python scripts/preview_data.py "runs/scenes/shards/train/*.tar" --out preview.png
    python scripts/preview_data.py runs/scenes/conversations/train.json --images runs/scenes/images

Region shards (WebDataset) and conversations (LLaVA, .json or .jsonl, or a mixture of them, .yaml). Boxes, points and masks
are drawn after the model's transform. Ends with the path of the picture; exits with 1 where there were problems.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from random import Random

from PIL import Image
from tqdm import tqdm

from encoder.data.reader import RegionDataset
from encoder.errors import DataError, run_main
from mllm.image_input import read_picture
from mllm.importers import IMPORTERS, NATIVE
from mllm.mixture import YAML, Source, good_records, sources_of
from mllm.preview import CELL, Sample, draw_sheet
from mllm.records import Sizes, pictures_of
from mllm.regions import Region, parse_region


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "data", nargs="+", help="region shards (.tar, a folder, a pattern), or one .json, .jsonl or mixture .yaml"
    )
    parser.add_argument("--images", type=Path, help="folder that a conversation file's image paths start from")
    parser.add_argument(
        "--importer", choices=IMPORTERS, default=NATIVE, help="a conversation file's format (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (default %(default)s)")
    parser.add_argument("--samples", type=int, default=12, help="samples to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (default %(default)s)")
    parser.add_argument("--geometry", choices=("pad", "squash"), default="pad", help="the model's transform (default pad)")
    parser.add_argument("--size", type=int, default=80, help="side of the model's input, px (default %(default)s)")
    parser.add_argument("--listed", type=int, default=50, help="problems to print (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if min(arguments.samples, arguments.size, arguments.listed) < 1:
        raise DataError("--samples, --size and --listed must be at least 1")
    conversations = [path for path in arguments.data if Path(path).suffix in (".json", ".jsonl", *YAML)]
    if conversations and len(arguments.data) > 1:
        raise DataError(f"{conversations[0]} stands beside other data; give one conversation file, or shards alone")
    if conversations and Path(conversations[0]).suffix not in YAML and arguments.images is None:
        raise DataError(f"{conversations[0]} holds paths of images; say with --images which folder they start from")
    if not conversations and (arguments.images or arguments.importer != NATIVE):
        raise DataError("--images and --importer are of conversation files, and shards hold their images; leave them out")
    count, problems, samples_of = (
        open_conversations(sources_of(conversations, arguments.images, arguments.importer))
        if conversations
        else open_shards(arguments.data)
    )
    good = check_pixels(count, samples_of, problems)
    print(f"{len(good)} good records, {len(problems)} problems", flush=True)
    for problem in problems[: arguments.listed]:
        print(f"problem: {problem}")
    if len(problems) > arguments.listed:
        print(f"and {len(problems) - arguments.listed} more problems; see them with --listed {len(problems)}")
    if not good:
        raise DataError("no record is good, so there is nothing to draw; correct the problems listed above")
    chosen = sorted(Random(arguments.seed).sample(good, min(arguments.samples, len(good))))
    cells = [sample for index in chosen for sample in samples_of(index)]
    sheet = draw_sheet(cells, arguments.geometry, arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out, "PNG")
    print(f"{len(chosen)} samples are drawn in {arguments.out}", flush=True)
    return 1 if problems else 0


def open_shards(shards: list[str]) -> tuple[int, list[str], Callable[[int], list[Sample]]]:
    """Number of records, problems, and how to get the samples of a record: one."""
    dataset = RegionDataset(shards, on_error="collect")

    def samples_of(index: int) -> list[Sample]:
        image, record = dataset[index]
        regions, names = [Region(region.box) for region in record.regions], [region.phrases[0] for region in record.regions]
        return [Sample(image, regions, names, [dataset.name(index), *record.captions[:1]])]

    return len(dataset), dataset.problems, samples_of


def open_conversations(sources: list[Source]) -> tuple[int, list[str], Callable[[int], list[Sample]]]:
    """The same for conversation files: a sample for each picture of a record, and a grey one where it has none."""
    problems: list[str] = []
    sizes: Sizes = {}
    records = [record for source in sources for record in good_records(source, sizes, problems)]

    def samples_of(index: int) -> list[Sample]:
        record = records[index]
        where, names = record["_where"], pictures_of(record)
        try:
            images = [read_picture(record["_folder"] / name) for name in names] or [Image.new("RGB", (CELL, CELL), "lightgrey")]
        except DataError as error:
            raise DataError(f"{where}: image {error}") from error
        lines = [str(record.get("id", index))]
        for turn in record["conversations"]:
            text = turn["value"].replace("<image>", "").strip()
            if turn["from"] == "gpt":
                lines[-1] += f"  {text}"
            else:
                lines.append(text)
        samples = []
        for place, image in enumerate(images):
            own = [(n, value) for n, value in enumerate(record.get("regions", [])) if value.get("image_index", 0) == place]
            regions = [parse_region(value, f"{where}: regions[{number}]", *image.size) for number, value in own]
            below = lines if place == 0 else [f"{lines[0].split('  ')[0]}, picture {place + 1}"]
            samples.append(Sample(image, regions, [str(number) for number, _ in own], below))
        return samples

    return len(records), problems, samples_of


def check_pixels(count: int, samples_of: Callable[[int], list[Sample]], problems: list[str]) -> list[int]:
    """Decodes every image; returns the records whose images are whole, and adds the others to `problems`."""
    good = []
    for index in tqdm(range(count), "images", unit="image"):
        try:
            samples_of(index)
            good.append(index)
        except DataError as error:
            problems.append(str(error))
    return good


if __name__ == "__main__":
    run_main(main)

"""Checks conversation files, or a mixture of them, from the first record to the last, and lists everything that is wrong.

    python scripts/check_conversations.py runs/scenes/conversations/train.json --images runs/scenes/images
    python scripts/check_conversations.py mixture.yaml --decode
    python scripts/check_conversations.py mix665k.json --images /data/llava --importer llava --good good.json

One line a problem, with the file and the record's id or line. Pictures are opened; with --decode they are read to their end.
--good writes what a training can use of a file, in the form of docs/data.md, beside the same folder of pictures.
Ends with the counts; exits with 1 where there were problems.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from encoder.errors import DataError, run_main
from mllm.image_input import read_picture
from mllm.importers import IMPORTERS, NATIVE
from mllm.mixture import good_records, sources_of
from mllm.records import Sizes, pictures_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="conversation files (.json, .jsonl) and mixtures (.yaml)")
    parser.add_argument("--images", type=Path, help="folder of pictures, for files of which a mixture names none")
    parser.add_argument("--importer", choices=IMPORTERS, default=NATIVE, help="format of the files (default %(default)s)")
    parser.add_argument("--decode", action="store_true", help="read every picture to its end, which takes its time")
    parser.add_argument("--good", type=Path, metavar="FILE", help="JSON file to write the good records to, of one file")
    arguments = parser.parse_args()
    sizes: Sizes = {}
    num_good = num_problems = 0
    sources = sources_of(arguments.data, arguments.images, arguments.importer)
    if arguments.good and (len(sources) > 1 or arguments.good.exists()):
        seen = "exists already" if arguments.good.exists() else f"would hold records of {len(sources)} files"
        raise DataError(f"--good {arguments.good} {seen}; give one conversation file, and a file to write that is not there yet")
    for source in sources:
        problems: list[str] = []
        records = []
        try:
            records = good_records(source, sizes, problems)
        except DataError as error:  # not one record of it can be read
            problems.append(str(error))
        if arguments.decode:
            records = [record for record in tqdm(records, "decode", unit="record") if decodes(record, problems)]
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{source.path}: {len(records)} good records, {len(problems)} problems", flush=True)
        if arguments.good:
            own = [{key: value for key, value in record.items() if not key.startswith("_")} for record in records]
            arguments.good.write_text(json.dumps(own, ensure_ascii=False), encoding="utf-8")
        num_good, num_problems = num_good + len(records), num_problems + len(problems)
    where = f"; the good ones are in {arguments.good}" if arguments.good else ""
    print(f"{num_good} good records, {num_problems} problems, {len(sizes)} pictures{where}", flush=True)
    return 1 if num_problems else 0


def decodes(record: dict, problems: list[str]) -> bool:
    """Whether every picture of the record is whole."""
    before = len(problems)
    for name in pictures_of(record):
        try:
            read_picture(record["_folder"] / name)
        except DataError as error:
            problems.append(f"{record['_where']}: image {error}")
    return len(problems) == before


if __name__ == "__main__":
    run_main(main)

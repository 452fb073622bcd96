"""Referring classification on objects of LVIS: "Is the object <region> of the image a A or a B?", as Ferret asks.

    python eval/reflvis_records.py --lvis lvis_v1_val.json --out reflvis
    python eval/reflvis.py --model runs/mllm_cloc --data reflvis --images coco --out runs/eval_cloc

Each object is asked for as a box, a point and a free-form region, with the right name first and second: chance is 50%, and a
model that always takes the first scores 50%. `--decide likelihood` compares how likely both names are as answers instead of
reading one. Answers are scored by our rule and by Ferret's side by side; `--scorer ferret` prints the latter alone.
"""

import argparse
import hashlib
import json

from encoder.data.sources.labelled import plain_name
from encoder.errors import DataError, run_main
from eval.json_lines import json_lines
from eval.predictions import Target
from eval.runner import Part, benchmark_parser, needs_words, run_benchmark
from mllm.regions import parse_region

KINDS = {"box": "box", "point": "point", "free_form": "mask"}
QUESTION = "Is the object <region:0> of the image a {} or a {}?"
KEYS = ("id", "image", "width", "height", "name", "synonyms", "negative", "frequency", "box", "point", "free_form")


def read_records(args: argparse.Namespace) -> tuple[list[dict], str]:
    """The records and the hash of their file. DataError where the manifest tells of another file, or a record is not whole."""
    path = args.data / "records.jsonl"
    rows = json_lines(path)
    for row, where in rows:
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise DataError(f"{where}: no key '{missing[0]}'; make the records with eval/reflvis_records.py")
        plain_name(row["image"], where)
        for kind, key in KINDS.items():
            parse_region({key: row[kind]}, f"{where}: {kind}", row["width"], row["height"])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        stated = json.loads((args.data / "manifest.json").read_text())["records_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{args.data}/manifest.json cannot be read ({error!r}); make the records with eval/reflvis_records.py"
        ) from None
    if found != stated:
        raise DataError(f"{path} is not the file that manifest.json is of; make the records again with eval/reflvis_records.py")
    return [row for row, _ in rows], found


def make_parts(args: argparse.Namespace, records: list[dict], digest: str) -> list[Part]:
    """A part per kind of region."""
    unknown = set(args.split or ()) - KINDS.keys()
    if unknown:
        raise DataError(f"--split {sorted(unknown)[0]} is no kind of region; choose among {', '.join(KINDS)}")
    orders = (0, 1) if args.orders == "both" else (None,)

    def targets(kind: str) -> list[Target]:
        return [
            Target(
                f"{row['id']}-{order if order is not None else index % 2}",
                row["image"],
                row["width"],
                row["height"],
                "",
                tuple(row["box"]),
                row["name"],
                row["frequency"],
                answers=(spoken(row["name"]), *row["synonyms"]),
                choices=(spoken(row["name"]), spoken(row["negative"]))[:: -1 if (index % 2 if order is None else order) else 1],
                region=None if kind == "box" else {KINDS[kind]: row[kind]},
            )
            for index, row in enumerate(records)
            for order in orders
        ]

    name = "reflvis" if args.decide == "generation" else "reflvis_likelihood"
    protocol = {"records_sha256": digest, "decide": args.decide, "orders": args.orders}
    return [Part(name, kind, "choice", targets(kind), "own data", protocol) for kind in args.split or KINDS]


def spoken(name: str) -> str:
    """`bow_(weapon)` as it is put into a question: `bow (weapon)`."""
    return name.replace("_", " ")


def main() -> None:
    parser = benchmark_parser(__doc__, data="folder with records.jsonl and manifest.json of eval/reflvis_records.py")
    parser.add_argument("--decide", choices=("generation", "likelihood"), default="generation", help="default: %(default)s")
    parser.add_argument(
        "--orders", choices=("both", "alternate"), default="both", help="ask twice, or once as Ferret does (default: %(default)s)"
    )
    parser.add_argument("--scorer", choices=("ours", "ferret"), default="ours", help="whose rule is printed; both are kept")
    args = parser.parse_args()

    def question(target: Target) -> tuple[str, list]:
        return QUESTION.format(*target.choices), [target.region or target.box]

    def ask(answerer, part: Part):
        mllm = needs_words(answerer, args.model)
        return mllm.chooses(question) if args.decide == "likelihood" else mllm.asks(question)

    run_benchmark(
        args,
        lambda: make_parts(args, *read_records(args)),
        ask=ask,
        metrics=("ferret_rule",) if args.scorer == "ferret" else None,
    )


if __name__ == "__main__":
    run_main(main)

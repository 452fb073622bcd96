"""Referring on RefCOCO's files: a box, a point or an outline in, the object's name out, "What is [012, 345, 678, 999]?".

    python eval/referring.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc

`--region point` asks by a point of the object near its centre of mass, `--region mask` by its outline; both
have a run folder of their own, `refcoco_referring_point`. The unit is the referred object. Right when the answer is its
category's name, up to case and surrounding blanks; micro (over objects) and macro (over categories) accuracy, each with its
interval.
"""

from encoder.errors import DataError, run_main
from eval.refcoco import read_parts, refcoco_parser
from eval.runner import run_benchmark
from mllm.regions import KINDS


def main() -> None:
    parser = refcoco_parser(__doc__)
    parser.add_argument("--region", choices=KINDS, default="box", help="what points at an object (default: %(default)s)")
    args = parser.parse_args()
    suffix = "_referring" if args.region == "box" else f"_referring_{args.region}"

    def ask(answerer, part):
        if not hasattr(answerer, "name"):
            raise DataError(f"{args.model} is an encoder, which has no words; use eval/region_classification.py for it")
        return answerer.name

    run_benchmark(args, lambda: read_parts(args, suffix, "naming", args.region), ask=ask, unit=args.region)


if __name__ == "__main__":
    run_main(main)

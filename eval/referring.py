"""Referring on RefCOCO's files: a box in, the object's name out, "What is [012, 345, 678, 999]?".

    python eval/referring.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc

The unit is the referred object. Right when the answer is its category's name, up to case and surrounding blanks; micro
(over objects) and macro (over categories) accuracy, each with its interval.
"""

from encoder.errors import DataError, run_main
from eval.refcoco import read_parts, refcoco_parser
from eval.runner import run_benchmark


def main() -> None:
    args = refcoco_parser(__doc__).parse_args()

    def ask(answerer, part):
        if not hasattr(answerer, "name"):
            raise DataError(f"{args.model} is an encoder, which has no words; use eval/region_classification.py for it")
        return answerer.name

    run_benchmark(args, lambda: read_parts(args, "_referring", "naming"), ask=ask, unit="box")


if __name__ == "__main__":
    run_main(main)

"""Referring on RefCOCO's files: a box in, the object's name out, "What is [012, 345, 678, 999]?".

    python eval/referring.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc

The unit is the referred object. Right when the answer is its category's name, up to case and surrounding blanks; micro
(over objects) and macro (over categories) accuracy, each with its interval.
"""

from encoder.errors import run_main
from eval.refcoco import evaluate, parse_arguments


def main() -> None:
    evaluate(parse_arguments(__doc__), suffix="_referring", task="naming")


if __name__ == "__main__":
    run_main(main)

"""The main job on a laptop: two MLLMs that differ in one word, the tower, learn a new domain, and are compared on it.

    make quickstart        or        python scripts/quickstart.py

The shipped bases in weights/ (a CLIP and a CLOC encoder, and an MLLM on each) have seen one set of pictures. This draws
scenes of other pictures, finetunes both MLLMs on them under the deepspeed launcher with the same seed, order and budget,
evaluates both before and after, and writes a report. Interrupted, the same command goes on with the stage it was in.
"""

import argparse
import os
import sys
from pathlib import Path

from encoder.errors import DataError, run_main
from pipeline import PYTHON, TOWERS, balanced_data, mllm_evaluations, scenes_command
from stages import Stage, run_stages

ROOT = Path(__file__).resolve().parent.parent
NOTE = (
    "Shipped in weights/: the CLIP and the CLOC encoder and the MLLM on each, trained on scenes of other pictures "
    "(weights/README.md). Trained now, in this run: both MLLMs' projector and language model, on scenes of the new "
    "pictures, with the same seed, order and number of steps; the towers stayed frozen."
)


def finetune_command(tower: str, folder: Path, scenes: Path, steps: int, port: int) -> list[str]:
    """Finetunes one base under the deepspeed launcher."""
    launcher = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(port)]
    more = ["--model", str(ROOT / "weights" / f"mllm_{tower}"), "--output", str(folder), "--max_steps", str(steps)]
    return [*launcher, "scripts/finetune_mllm.py", "scripts/recipes/nano_finetune.yaml", *balanced_data(scenes), *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart", help="folder of everything it makes")
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes drawn (default 6000)")
    parser.add_argument("--steps", type=int, default=500, help="finetuning steps of each MLLM (default 500)")
    parser.add_argument("--eval", type=int, default=500, help="expressions of each of val, testA, testB (default 500)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default 1)")
    arguments = parser.parse_args()
    missing = [f"mllm_{tower}" for tower in TOWERS if not (ROOT / "weights" / f"mllm_{tower}").is_dir()]
    if missing:
        raise DataError(f"{ROOT / 'weights'} lacks {', '.join(missing)}; check the clone, or run `make reproduce` to make them")
    out = arguments.out.resolve()
    os.chdir(ROOT)
    scenes, report = out / "scenes", out / "report"
    before, after = ({tower: out / f"{when}_{tower}" for tower in TOWERS} for when in ("before", "after"))
    mllm = {tower: out / f"mllm_{tower}" for tower in TOWERS}
    stages = [
        Stage(
            "scenes",
            f"draw {arguments.scenes} scenes of pictures that the bases never saw",
            [scenes_command(scenes, "new", arguments.scenes, arguments.eval, arguments.seed)],
        ),
        Stage(
            "before",
            "evaluate both shipped MLLMs on them",
            [mllm_evaluations(ROOT / "weights" / f"mllm_{tower}", scenes, before[tower]) for tower in TOWERS],
        ),
        Stage(
            "finetune",
            f"finetune both on them, {arguments.steps} steps each, under deepspeed",
            [finetune_command(tower, mllm[tower], scenes, arguments.steps, 29_400 + i) for i, tower in enumerate(TOWERS)],
        ),
        Stage(
            "after",
            "evaluate both again",
            [mllm_evaluations(mllm[tower], scenes, after[tower]) for tower in TOWERS],
        ),
    ]
    run_stages(stages, out)
    runs = [f"{tower}={after[tower]}" for tower in reversed(TOWERS)]
    runs += [f"{tower}_before={before[tower]}" for tower in reversed(TOWERS)]
    pairs = ["cloc:clip", "cloc:cloc_before", "clip:clip_before"]
    compare = ["eval/compare.py", *runs, "--pairs", *pairs, "--note", NOTE, "--out", str(report)]
    os.execv(sys.executable, [sys.executable, *compare])


if __name__ == "__main__":
    run_main(main)

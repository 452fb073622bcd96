"""What an MLLM gains from region tokens, a tuned tower and another feature layer: variants of one finetuning, compared.

    python scripts/study_mllm.py --out runs/study_mllm
    python scripts/study_mllm.py --out runs/study_mllm --variants coords prompter --steps 1000
    python scripts/study_mllm.py --out runs/study_mllm --table-only

Draws scenes of the base pictures that the shipped MLLMs have not seen; goes on from the shipped MLLM of each tower with the
same questions, order and steps, objects asked for by box, point and outline in equal shares; asks for names in each of the
three ways, and for boxes, on scenes that no training saw. `layer_-1` and `layer_-2` start from nothing instead, on scenes of
one or two objects, since a shipped MLLM has learned to read its own layer. Interrupted, the same command goes on. The two towers
of a variant run side by side.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from encoder.errors import DataError, run_main
from pipeline import PYTHON, TOWERS, balanced_data, in_order, scenes_command, training_data
from stages import Stage, run_stages

ROOT = Path(__file__).resolve().parent.parent
REGIONS = ("box", "point", "mask")
TUNED_RATE = 5e-5  # a tenth of nano_balance's


@dataclass(frozen=True)
class Variant:
    """What one variant changes.

    flags: of finetune_mllm.py
    against: the variant that it is compared with
    towers: those that have it
    layer: trained from nothing on this feature layer
    """

    flags: tuple[str, ...] = ()
    against: str | None = "coords"
    towers: tuple[str, ...] = TOWERS
    layer: int | None = None


VARIANTS = {
    "coords": Variant(against=None),
    "pooling": Variant(("--region_tokens", "pooling")),
    "prompter": Variant(("--region_tokens", "prompter", "--prompter", str(ROOT / "weights" / "cloc")), towers=("cloc",)),
    "tuned_tower": Variant(
        ("--train", "projector", "llm", "tower", "--tower_learning_rate", str(TUNED_RATE), "--cache_features", "false")
    ),
    "layer_-1": Variant(against=None, layer=-1),
    "layer_-2": Variant(against="layer_-1", layer=-2),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study_mllm", help="folder of everything it makes")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help="default: all")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS, help="default: both")
    parser.add_argument("--steps", type=int, default=400, help="of 8 pictures, of each variant (default 400)")
    parser.add_argument("--eval", type=int, default=1200, help="expressions of each of val, testA, testB (default 1200)")
    parser.add_argument("--splits", nargs="+", default=["val"], help="to evaluate on: val, testA, testB (default: val)")
    parser.add_argument("--seed", type=int, default=400, help="of the scenes (default 400; 0 and 200 are the bases')")
    parser.add_argument("--table-only", action="store_true", help="make the table again from what --out holds")
    return parser.parse_args()


def train_command(name: str, tower: str, args: argparse.Namespace) -> list[str]:
    """Trains one variant on one tower."""
    variant, output = VARIANTS[name], run_folder(args.out, name, tower) / "mllm"
    common = ["--output", str(output), "--max_steps", str(args.steps), "--save_every", "100", "--val_every", str(args.steps)]
    common += ["--cache_folder", str(args.out / "features")]  # once for all variants of a tower
    script = [PYTHON, "scripts/finetune_mllm.py"]
    if variant.layer is None:
        start = ["scripts/recipes/nano_balance.yaml", *balanced_data(args.out / "scenes", "pointed")]
        start += ["--model", str(ROOT / "weights" / f"mllm_{tower}")]
    else:
        start = ["scripts/recipes/nano_align.yaml", *training_data(args.out / "easy"), "--feature_layer", str(variant.layer)]
        start += ["--tower", str(ROOT / "weights" / tower)]
    return [*script, *start, *common, *variant.flags]


def evaluate_commands(name: str, tower: str, args: argparse.Namespace) -> list[list[str]]:
    """Asks for names by each kind of region that was trained, and for boxes."""
    folder, from_nothing = run_folder(args.out, name, tower), VARIANTS[name].layer is not None
    scenes = args.out / ("easy" if from_nothing else "scenes")
    data = ["--model", str(folder / "mllm"), "--data", str(scenes / "refcoco"), "--images", str(scenes / "images")]
    data += ["--split", *args.splits, "--out", str(folder / "eval")]
    regions = REGIONS[:1] if from_nothing else REGIONS
    asked = [[PYTHON, "eval/referring.py", *data, "--region", region] for region in regions]
    return [*asked, [PYTHON, "eval/refcoco.py", *data]]


def run_folder(out: Path, name: str, tower: str) -> Path:
    return out / f"{tower}_{name}"


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """Scenes, then one variant after the other, on both towers at the same time."""
    rows = 8 * args.steps  # a row is all that is asked about one picture
    draw = scenes_command(args.out / "scenes", "base", rows, args.eval, args.seed)
    easy = [*scenes_command(args.out / "easy", "base", rows, args.eval, args.seed + 1), "--objects", "1", "2"]
    from_nothing = any(VARIANTS[name].layer is not None for name in args.variants)
    stages = [Stage("scenes", f"draw {rows} scenes", [in_order([draw, easy] if from_nothing else [draw])])]
    for name in args.variants:
        towers = [tower for tower in args.towers if tower in VARIANTS[name].towers]
        commands = [in_order([train_command(name, tower, args), *evaluate_commands(name, tower, args)]) for tower in towers]
        if commands:
            stages.append(Stage(name, f"train and evaluate {name} on {' and '.join(towers)}", commands))
    return stages


def main() -> None:
    args = parse_arguments()
    for name in ("steps", "eval"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name} is {getattr(args, name)}; give at least 1")
    args.out = args.out.resolve()
    os.chdir(ROOT)
    if not args.table_only:
        run_stages(stages_of(args), args.out)
    from study_mllm_table import write_table  # slow to import

    print(write_table(args.out, VARIANTS))
    print(f"done: table, models and answers are in {args.out}")


if __name__ == "__main__":
    run_main(main)

"""Makes the shipped weights from zero: scenes, a CLIP and a CLOC encoder, an MLLM on each, and their comparison.

    make reproduce        or        python scripts/reproduce.py

Both encoders see the same images in the same order for the same number of steps, and so do both MLLMs. It takes about
two hours on two cores. Interrupted, the same command goes on. `--seed` makes others; `--ship` copies a result into weights/.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path

from encoder.errors import DataError, run_main
from pipeline import PYTHON, TOWERS, balanced_data, in_order, mllm_evaluations, region_evaluations, scenes_command, training_data
from stages import Stage, commit, run_stages

ROOT = Path(__file__).resolve().parent.parent
# Of its last two, the one that points better on either tower (docs/results.md); the shipped MLLM on CLIP was made at -2.
FEATURE_LAYER = "-1"
NOTE = "All weights were trained by scripts/reproduce.py from zero, on scenes of the base pictures; weights/README.md says how."


def encoder_command(tower: str, scenes: Path, out: Path, seed: int) -> list[str]:
    settings = ["--objective", tower, "--shards", str(scenes / "shards" / "train"), "--output", str(out), "--seed", str(seed)]
    return [PYTHON, "scripts/pretrain_encoder.py", "scripts/recipes/nano_encoder.yaml", *settings]


def mllm_command(tower: str, out: Path, seed: int) -> list[str]:
    """One MLLM on a frozen tower: `nano_align` on scenes of one or two objects, `nano_base` on all, `nano_balance` with more
    names. The tokenizer also reads the words of the later domain, as any grown-up one has."""
    script = [PYTHON, "scripts/finetune_mllm.py"]
    folders = {step: str(out / f"{step}_{tower}") for step in ("align", "base", "mllm")}
    texts = [str(out / name / "conversations" / "train.json") for name in ("scenes", "words")]
    start = ["--tower", str(out / tower / "model"), "--feature_layer", FEATURE_LAYER, "--tokenizer_data", *texts]
    align = [*training_data(out / "easy"), *start, "--output", folders["align"]]
    base = [*training_data(out / "scenes"), "--model", folders["align"], "--output", folders["base"]]
    balance = [*balanced_data(out / "scenes"), "--model", folders["base"], "--output", folders["mllm"]]
    steps = {"nano_align": align, "nano_base": base, "nano_balance": balance}
    return in_order([[*script, f"scripts/recipes/{recipe}.yaml", *flags, "--seed", str(seed)] for recipe, flags in steps.items()])


def ship(out: Path, weights: Path, arguments: argparse.Namespace) -> None:
    """Copies the four finished folders into `weights`, each with its logs, and writes provenance.json beside them."""
    made_at = commit()  # before the copies make the tree another one
    for tower in TOWERS:
        _copy(out / tower / "model", weights / tower, {"log.jsonl": out / tower / "log.jsonl"})
        logs = {
            f"{name}_{step}{suffix}": out / f"{step}_{tower}" / f"{name}{suffix}"
            for step in ("align", "base")
            for name, suffix in (("log", ".jsonl"), ("run", ".json"))
        }
        mllm = out / f"mllm_{tower}"
        _copy(mllm, weights / f"mllm_{tower}", {"log.jsonl": mllm / "log.jsonl", **logs})
    stages = {file.stem: json.loads(file.read_text()) for file in (out / "done").glob("*.json")}
    record = {
        "command": f"python scripts/reproduce.py --seed {arguments.seed} --scenes {arguments.scenes} --eval {arguments.eval}",
        "commit": made_at,
        "seed": arguments.seed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "stages": {name: {key: stage.get(key) for key in ("seconds", "commit")} for name, stage in sorted(stages.items())},
    }
    (weights / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"the shipped weights are in {weights}", flush=True)


def _copy(source: Path, target: Path, logs: dict[str, Path]) -> None:
    """A model's own files, no checkpoints and no features, and its logs under the names given; paths from the root on."""
    kept = [file for file in source.iterdir() if file.suffix in (".safetensors", ".json", ".model", ".jinja")]
    files = {**{file.name: file for file in kept}, **logs}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing or "model.safetensors" not in files:
        raise DataError(f"{', '.join(missing) or source / 'model.safetensors'} is missing; run the stages that make it again")
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name, file in files.items():
        if file.suffix in (".json", ".jsonl"):
            (target / name).write_text(file.read_text(encoding="utf-8").replace(f"{ROOT}{os.sep}", ""), encoding="utf-8")
        else:
            shutil.copyfile(file, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of everything it makes (default runs/base; with a seed runs/base_SEED)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order, not of the scenes (default 0)")
    parser.add_argument("--scenes", type=int, default=40_000, help="training scenes (default 40000)")
    parser.add_argument("--eval", type=int, default=1200, help="expressions of each of val, testA, testB (default 1200)")
    parser.add_argument("--ship", action="store_true", help="copy the finished weights into weights/")
    arguments = parser.parse_args()
    seed = arguments.seed
    out = (arguments.out or ROOT / "runs" / (f"base_{seed}" if seed else "base")).resolve()
    os.chdir(ROOT)
    scenes = out / "scenes"
    mllm, runs = ({tower: out / f"{kind}_{tower}" for tower in TOWERS} for kind in ("mllm", "eval"))
    compare = [PYTHON, "eval/compare.py", *(f"{tower}={runs[tower]}" for tower in reversed(TOWERS))]
    draw = [
        scenes_command(scenes, "base", arguments.scenes, arguments.eval, seed=0),
        [*scenes_command(out / "easy", "base", 12_000, 300, seed=200), "--objects", "1", "2"],
        scenes_command(out / "words", "new", 500, 1, seed=100),
    ]
    stages = [
        Stage("scenes", f"draw {arguments.scenes} scenes", [in_order(draw)]),
        Stage("encoders", "pretrain both encoders", [encoder_command(tower, scenes, out / tower, seed) for tower in TOWERS]),
        Stage("mllms", "train an MLLM on each", [mllm_command(tower, out, seed) for tower in TOWERS]),
        Stage("evaluate", "ground and refer", [mllm_evaluations(mllm[tower], scenes, runs[tower]) for tower in TOWERS]),
        Stage(
            "regions",
            "name boxes with the encoders alone",
            [region_evaluations(out / tower / "model", tower, scenes, runs[tower]) for tower in TOWERS],
        ),
        Stage("compare", "compare", [[*compare, "--note", NOTE, "--out", str(out / "report")]]),
    ]
    run_stages(stages, out)
    if arguments.ship:
        ship(out, ROOT / "weights", arguments)
    print(f"done: the comparison is in {out / 'report' / 'report.html'}")


if __name__ == "__main__":
    run_main(main)

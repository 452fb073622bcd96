"""Which parts of CLOC matter: trains variants of one recipe on the same scenes, order and steps, and compares them.

    python scripts/study.py --scenes runs/scenes --out runs/study
    python scripts/study.py --scenes runs/scenes --out runs/study --variants clip cloc roi_align --seeds 0 1 2 --steps 2000
    python scripts/study.py --out runs/study --table-only

Each variant is the recipe with a few fields changed, `VARIANTS`. What is measured, on scenes that no training saw: naming
boxes, of names trained with and not; finding a box by its name and a name by its box; pointing at a name that is there once.
Interrupted, the same command goes on. A table is printed at the end; everything is in --out.
"""

import argparse
import dataclasses
import json
import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from encoder.arguments import read_recipe
from encoder.config import PRESETS, RegionConfig
from encoder.errors import DataError, run_main
from encoder.pretraining_config import RUN_FIELDS, PretrainConfig
from pipeline import PYTHON
from study_table import write_table

ROOT = Path(__file__).resolve().parent.parent
# Fields that differ from the recipe's. `init: clip` goes on from the variant `clip` of the same seed, for as many steps again.
VARIANTS: dict[str, dict] = {
    "clip": {"objective": "clip"},
    "cloc": {},
    "roi_align": {"region_encoder": "roi_align", "grounding_loss_weight": 0.0},
    "mean": {"prompter_readout": "mean"},
    "no_grounding": {"grounding_loss_weight": 0.0},
    "filter_0.9": {"similar_text_threshold": 0.9},
    "filter_off": {"similar_text_threshold": None},
    "boxes_1": {"max_boxes": 1},
    "boxes_2": {"max_boxes": 2},
    "joint": {"box_token": "joint"},
    "mse": {"grounding_norm": "mse"},
    "grounding_01": {"grounding_loss_weight": 0.1},
    "shared_prompter": {"prompter_shared": True},
    "own_temperature": {"region_temperature": "own"},
    "from_clip": {"init": "clip"},
    "grounding_10": {"grounding_loss_weight": 10.0},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, help="folder of make_scenes.py")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="folder of everything it makes")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of initialisation, order and draws (default 0)")
    parser.add_argument("--steps", type=int, help="of each variant; default: the recipe's")
    parser.add_argument("--recipe", type=Path, default=ROOT / "scripts" / "recipes" / "nano_encoder.yaml")
    parser.add_argument("--parallel", type=int, default=1, help="variants that are trained at the same time (default 1)")
    parser.add_argument("--table-only", action="store_true", help="make the table again from what --out holds")
    parser.add_argument("--variant-here", action="store_true", help=argparse.SUPPRESS)  # the one variant, in this process
    return parser.parse_args()


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"seed_{seed}" / variant


def variant_values(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """The fields of one run, by names of `RUN_FIELDS`."""
    values = read_recipe(args.recipe, RUN_FIELDS)
    values["steps"] = args.steps or int(values["steps"])
    # A short run is warmed up for its tenth at most.
    values["warmup_steps"] = min(int(values.get("warmup_steps", PretrainConfig.warmup_steps)), values["steps"] // 10)
    folder = run_folder(args.out, variant, seed)
    values |= {"seed": seed, "shards": str(args.scenes / "shards" / "train"), "output": str(folder / "training")}
    changed = dict(VARIANTS[variant])
    if "init" in changed:
        changed["init"] = str(run_folder(args.out, changed["init"], seed) / "training" / "model")
        values = preset_fields(values["preset"]) | values
    return values | changed


def preset_fields(name: str) -> dict:
    """What a preset sets of `RegionConfig`, which a CLIP to start from does not bring."""
    if name not in PRESETS:
        raise DataError(f"preset '{name}' is not known; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    values = {field.name: getattr(preset, field.name) for field in dataclasses.fields(RegionConfig)}
    return {key: value for key, value in values.items() if value != getattr(RegionConfig, key)}


def check_settings(args: argparse.Namespace) -> None:
    """One folder holds runs of one recipe, number of steps and set of scenes. DataError otherwise."""
    if args.scenes is None or not (args.scenes / "manifest.json").is_file():
        raise DataError(f"--scenes {args.scenes} has no manifest.json; give a folder that make_scenes.py has finished")
    values = variant_values(args, "cloc", 0)
    free = ("output", "shards", "seed", "log_every", "save_every", "workers")
    settings = {key: value for key, value in values.items() if key not in free}
    settings["scenes"] = json.loads((args.scenes / "manifest.json").read_text())["arguments"]
    path = args.out / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)]
        if differing:
            key = sorted(differing)[0]
            raise DataError(
                f"{path}: the runs there were made with {key} = {before.get(key)}, this one has {settings.get(key)}; "
                "choose another --out"
            )
        return  # not written again: variants that start at the same time read it
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def run_variant(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Trains and evaluates one variant in a process of its own, unless that is done; its output is in run.log beside it."""
    folder = run_folder(args.out, variant, seed)
    if (folder / "result.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [PYTHON, str(Path(__file__).resolve()), "--variant-here", "--variants", variant, "--seeds", str(seed)]
    command += ["--scenes", str(args.scenes), "--out", str(args.out), "--recipe", str(args.recipe)]
    command += ["--steps", str(args.steps)] if args.steps else []
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // args.parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    log = folder / "run.log"
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-8:])
        raise DataError(f"variant '{variant}' of seed {seed} failed with exit code {code}; its log {log} ends:\n{tail}")


def run_all(args: argparse.Namespace) -> list[str]:
    """Every variant of every seed that is not done yet, `args.parallel` at a time; the sentences of those that failed."""
    jobs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    for variant, seed in jobs:
        start = VARIANTS[variant].get("init")
        if start and (start, seed) not in jobs and not (run_folder(args.out, start, seed) / "result.json").is_file():
            raise DataError(f"variant '{variant}' goes on from '{start}' of the same seed; add '{start}' to --variants")
    # What others go on from comes first.
    starts = {VARIANTS[variant].get("init") for variant in args.variants}
    jobs.sort(key=lambda job: job[0] not in starts)
    failures, running = [], {}

    def start_after(before: Future | None, variant: str, seed: int) -> None:
        if before is not None:
            before.result()
        run_variant(args, variant, seed)

    with ThreadPoolExecutor(args.parallel) as pool, tqdm(total=len(jobs), unit="run", desc="study") as bar:
        for variant, seed in jobs:
            before = running.get((VARIANTS[variant].get("init"), seed))
            future = pool.submit(start_after, before, variant, seed)
            future.add_done_callback(lambda _: bar.update())
            running[variant, seed] = future
        try:
            wait(running.values())
        except KeyboardInterrupt:  # the pool would train all that is left before it ends
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for future in running.values():
        error = future.exception()
        if isinstance(error, DataError):
            failures.append(str(error))
        elif error:
            raise error
    return failures


def main() -> None:
    args = parse_arguments()
    args.out, args.recipe = args.out.resolve(), args.recipe.resolve()
    failures = []
    if not args.table_only:
        if args.parallel < 1:
            raise DataError(f"--parallel is {args.parallel}; give at least 1")
        check_settings(args)
        args.scenes = args.scenes.resolve()
        if args.variant_here:
            from study_run import train_and_evaluate  # what trains needs seconds to import

            (variant,), (seed,) = args.variants, args.seeds
            return train_and_evaluate(
                variant_values(args, variant, seed), args.scenes, run_folder(args.out, variant, seed), VARIANTS[variant]
            )
        failures = run_all(args)
    print(write_table(args.out, list(VARIANTS)))
    if failures:
        raise DataError("; ".join(dict.fromkeys(failures)))
    print(f"done: table, answers, scores and encoders are in {args.out}")


if __name__ == "__main__":
    run_main(main)

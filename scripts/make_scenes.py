"""Draws scenes of named pictures and writes them as WebDataset shards, LLaVA conversations, RefCOCO and COCO files.

    python scripts/make_scenes.py --out runs/scenes --train 20000 --eval 1000

The same seed and arguments give the same files, whatever the number of workers. The folder appears under its name
only when it is complete.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from encoder.data.scene_files import FORMAT, LLAVA_KINDS, SceneJob, write_scenes
from encoder.data.scenes import SceneConfig
from encoder.errors import DataError, run_main

UNFINISHED = "UNFINISHED"  # marks a working folder as ours, so that clearing it can hit nothing else


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    config = SceneConfig()
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything else")
    parser.add_argument("--train", type=int, default=1000, help="training scenes (default %(default)s)")
    parser.add_argument(
        "--eval",
        type=int,
        default=100,
        help="expressions wanted, at least, in each of val, testA and testB (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="everything drawn follows from it (default %(default)s)")
    parser.add_argument(
        "--pictures",
        default="base",
        metavar="base|new|DIR",
        help="built-in pictures, or a folder of RGBA cut-outs named by .txt files (default %(default)s)",
    )
    parser.add_argument(
        "--backgrounds",
        default=None,
        metavar="DIR",
        help="folder of photographs to use as backgrounds (default: plain colours and gradients)",
    )
    parser.add_argument("--turns", type=int, default=6, help="most questions in a conversation (default %(default)s)")
    parser.add_argument("--long-side", type=int, default=config.long_side, help="canvas' longer side, px (default %(default)s)")
    parser.add_argument(
        "--short-side", type=int, default=config.short_side, help="smallest shorter side, px (default %(default)s)"
    )
    parser.add_argument(
        "--object-size",
        type=int,
        nargs=2,
        default=config.object_size,
        metavar=("MIN", "MAX"),
        help="objects' long side, px (default %(default)s)",
    )
    parser.add_argument(
        "--questions", type=int, default=8, help="most records of one question about a scene (default %(default)s)"
    )
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=config.num_objects,
        metavar=("MIN", "MAX"),
        help="objects in a scene (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.workers < 1:
        raise DataError(f"--workers is {arguments.workers}; give at least 1")
    config = SceneConfig(
        long_side=arguments.long_side,
        short_side=arguments.short_side,
        object_size=tuple(arguments.object_size),
        num_objects=tuple(arguments.objects),
    )
    job = SceneJob(
        seed=arguments.seed,
        num_train=arguments.train,
        num_eval=arguments.eval,
        turns=arguments.turns,
        questions=arguments.questions,
        pictures=arguments.pictures,
        backgrounds=arguments.backgrounds,
        config=config,
    )
    wanted = json.loads(json.dumps({"format": FORMAT, "arguments": asdict(job)}))
    out = arguments.out
    if complete(out, wanted):
        print(f"nothing to do: {out} already holds these scenes", flush=True)
        return
    working = start_folder(out)
    result = write_scenes(working, job, arguments.workers)
    (working / "manifest.json").write_text(json.dumps({**wanted, **result}, indent=1) + "\n", encoding="utf-8")
    (working / UNFINISHED).unlink()
    if out.exists():
        out.rmdir()  # empty, as `complete` made sure
    working.rename(out)
    counts = ", ".join(f"{split} {number['scenes']}" for split, number in result["counts"].items())
    print(f"scenes ({counts}) are in {out}", flush=True)


def complete(out: Path, wanted: dict) -> bool:
    """Whether `out` is a finished folder of these arguments. DataError if it holds anything else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give a folder for --out")
    if not out.exists() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out} is not empty and has no readable manifest.json; give another --out, or remove it") from error
    for key in wanted:
        if found.get(key) != wanted[key]:
            differing = _first_difference(wanted[key], found.get(key))
            raise DataError(f"{out} holds scenes of other arguments ({differing}); give another --out, or remove it")
    older = next((kind for kind in LLAVA_KINDS if not (out / kind).is_dir()), None)
    if older:
        raise DataError(f"{out} was drawn by an earlier version and has no {older}/; give another --out, or remove it")
    return True


def _first_difference(wanted, found) -> str:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            if found.get(key) != value:
                nested = isinstance(value, dict) and isinstance(found.get(key), dict)
                return _first_difference(value, found[key]) if nested else f"{key} {found.get(key)} there, {value} asked"
    return f"{found} there, {wanted} asked"


def start_folder(out: Path) -> Path:
    """The empty working folder beside `out`; what an interrupted run left there is cleared."""
    working = out.with_name(out.name + ".partial")
    if working.exists():
        if not (working / UNFINISHED).is_file():
            raise DataError(f"{working} is in the way and was not left by this script; move it")
        shutil.rmtree(working)
    working.mkdir(parents=True)
    (working / UNFINISHED).write_text("left by an interrupted make_scenes.py; its next run clears this folder\n")
    return working


if __name__ == "__main__":
    run_main(main)

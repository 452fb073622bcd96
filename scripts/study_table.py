"""The table of a study: a row per variant with its intervals, and its differences to the recipe, paired by question.

Seeds are pooled: a question counts once per seed, and an interval redraws pictures, with all that was asked about them.
What several seeds are apart is beside it, the lowest and the highest of them: an interval over pictures does not know it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.errors import DataError
from eval.metrics import Interval, accuracy_interval, mean_interval
from eval.predictions import find_evaluations, load_evaluation
from eval.scoring import Scored, score_questions

BASE = "cloc"
IOU = "mean IoU"
# Title, benchmark/split, metric.
COLUMNS = (
    ("seen names", "region_classification/seen", "micro"),
    ("unseen names", "region_classification/unseen", "micro"),
    ("text to region, R@10", "text_to_region/seen", "recall_10"),
    ("region to text, R@10", "region_to_text/seen", "recall_10"),
    ("text to box, acc@0.5", "text_to_box/seen", "acc_50"),
    ("text to box, mean IoU", "text_to_box/seen", IOU),
)
READ_BY = {"prompter": "", "roialign-1": "RoIAlign", "roialign-2": "RoIAlign, layer -2", "crop": "crops"}


@dataclass(frozen=True)
class Run:
    """scored: by benchmark/split and way of reading a box; result: what result.json holds."""

    scored: dict[str, dict[str, Scored]]
    result: dict


def read_run(folder: Path) -> Run:
    """A finished run of study.py."""
    scored: dict[str, dict[str, Scored]] = {}
    for evaluation_folder in find_evaluations(folder / "eval"):
        evaluation = load_evaluation(evaluation_folder)
        reading = evaluation.run["model"].get("variant", "prompter")
        scored.setdefault(evaluation.name, {})[reading] = score_questions(evaluation)
    return Run(scored, json.loads((folder / "result.json").read_text()))


def values_of(scored: Scored, metric: str) -> np.ndarray:
    """(N,) what each question counts for a column's metric."""
    return scored.iou if metric == IOU else scored.hits_of(metric)


def pooled(runs: list[Scored], metric: str) -> Interval:
    """Mean over the questions of several seeds, with its interval."""
    values, images = np.concatenate([values_of(run, metric) for run in runs]), np.concatenate([run.images for run in runs])
    return (mean_interval if metric == IOU else accuracy_interval)(values, images)


def difference(runs: list[Scored], bases: list[Scored], metric: str) -> Interval:
    """Mean of run minus base over the questions of the seeds, the same for both, with its interval."""
    for run, base in zip(runs, bases, strict=True):
        if run.ids != base.ids:
            raise DataError("two runs of the study were asked different questions; remove their folders and run it again")
    change = [values_of(run, metric) - values_of(base, metric) for run, base in zip(runs, bases, strict=True)]
    return mean_interval(np.concatenate(change), np.concatenate([run.images for run in runs]))


def best_reading(runs: dict[int, Run], benchmark: str, metric: str) -> str | None:
    """The way of reading boxes that scores highest over all seeds: a CLIP is represented by its best one."""
    readings = next(iter(runs.values())).scored.get(benchmark, {})
    values = {reading: pooled([run.scored[benchmark][reading] for run in runs.values()], metric).value for reading in readings}
    return max(values, key=values.get) if values else None


def shown(interval: Interval, signed: bool = False, of_seeds: Sequence[float] = ()) -> str:
    """Percent with the interval and, of several seeds, the lowest and the highest."""

    def percent(number: float) -> str:
        return f"{100 * number:{'+' if signed else ''}.1f}"

    seeds = f", seeds {percent(min(of_seeds))} to {percent(max(of_seeds))}" if len(of_seeds) > 1 else ""
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]{seeds}"


def rows_of(name: str, runs: dict[int, Run]) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """(title, reading and metric by column) of a variant's lines: one, and one more where a CLOC was also read by RoIAlign."""
    is_clip = runs[min(runs)].result["changed"].get("objective") == "clip"
    ways = [None] if is_clip else ["prompter", "roialign-1"]
    rows = []
    for way in ways:
        cells = {}
        for title, benchmark, metric in COLUMNS:
            reading = way or best_reading(runs, benchmark, metric)
            if reading in runs[min(runs)].scored.get(benchmark, {}):
                cells[title] = reading
        if cells:
            rows.append((name if way in (None, "prompter") else f"{name}, read by RoIAlign", cells))
    return rows


def write_table(out: Path, order: list[str]) -> str:
    """The tables as Markdown, of all finished runs in `out`; study.md and study.json there hold them.

    order: names of variants, as they are to be listed
    """
    studies: dict[str, dict[int, Run]] = {}
    for path in sorted(out.glob("seed_*/*/result.json")):
        seed = int(path.parents[1].name.removeprefix("seed_"))
        studies.setdefault(path.parent.name, {})[seed] = read_run(path.parent)
    if not studies:
        raise DataError(f"{out} holds no finished run of a study; run it without --table-only")
    titles = [title for title, *_ in COLUMNS]
    found = {title: (benchmark, metric) for title, benchmark, metric in COLUMNS}
    lines, changes, record = [], [], {}
    for name in sorted(studies, key=order.index):
        runs = studies[name]
        speeds = [run.result["images_per_cpu_second"] for run in runs.values() if run.result["images_per_cpu_second"]]
        speed = f"{np.mean(speeds):.0f}" if speeds else "-"
        for title, cells in rows_of(name, runs):
            texts, differences, numbers = [], [], {}
            for column in titles:
                reading, (benchmark, metric) = cells.get(column), found[column]
                if reading is None:
                    texts.append("-"), differences.append("-")
                    continue
                scored = {seed: run.scored[benchmark][reading] for seed, run in runs.items()}
                interval = pooled(list(scored.values()), metric)
                means = {seed: float(values_of(run, metric).mean()) for seed, run in scored.items()}
                of_seeds = list(means.values())
                numbers[column] = {**vars(interval), "of_seeds": of_seeds, "read_by": reading}
                by = READ_BY.get(reading, reading) if "objective" in runs[min(runs)].result["changed"] else ""
                texts.append(shown(interval, of_seeds=of_seeds) + (f" ({by})" if by else ""))
                bases = {seed: run.scored[benchmark].get("prompter") for seed, run in studies.get(BASE, {}).items()}
                shared = [seed for seed in scored if bases.get(seed)]
                if shared and title != BASE:
                    change = difference([scored[seed] for seed in shared], [bases[seed] for seed in shared], metric)
                    of_seeds = [means[seed] - float(values_of(bases[seed], metric).mean()) for seed in shared]
                    numbers[column]["difference"] = {**vars(change), "of_seeds": of_seeds}
                    differences.append(shown(change, signed=True, of_seeds=of_seeds))
                else:
                    differences.append("-")
            lines.append([title, *texts, speed, ", ".join(map(str, sorted(runs)))])
            changes.append([title, *differences])
            record[title] = {"seeds": sorted(runs), "steps": runs[min(runs)].result["steps"], "speeds": speeds, **numbers}
    tables = [
        markdown(["variant", *titles, "images per CPU second", "seeds"], lines),
        f"Minus `{BASE}`, paired by question:\n",
        markdown(["variant", *titles], [row for row in changes if row[0] != BASE]),
    ]
    text = "\n".join(tables)
    (out / "study.md").write_text(text + "\n")
    (out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"

"""Several runs side by side, question by question: what may be compared, the differences and their intervals."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from encoder.errors import DataError
from eval.judge import read_judged
from eval.metrics import Interval, SignTest
from eval.predictions import Evaluation, find_evaluations, first_difference, load_evaluation
from eval.scoring import Scored, score_questions

# Tasks whose answers are better or worse, but not right or wrong.
GRADED = ("judged", "describing")


@dataclass(frozen=True)
class Entry:
    """One evaluation of a run, scored."""

    evaluation: Evaluation
    scored: Scored

    @property
    def variant(self) -> str:
        """How a box was read, where a run tried several ways: `roialign-2`; empty elsewhere."""
        return self.evaluation.run["model"].get("variant", "")


@dataclass(frozen=True)
class Run:
    """A run folder under the name that tables give it; `entries`: per benchmark/split, the variants, the best one first."""

    name: str
    folder: Path
    entries: dict[str, list[Entry]]


@dataclass(frozen=True)
class Pair:
    """The difference `first` minus `second`, by run name."""

    first: str
    second: str

    @property
    def title(self) -> str:
        return f"{self.first} \N{MINUS SIGN} {self.second}"


@dataclass(frozen=True)
class Row:
    """One line of the tables: a metric of one benchmark and split; n: questions, chance: accuracy without looking.

    accuracies: by run name, absent where the run has no such evaluation; differences, signs: by pair, absent likewise
    """

    name: str
    metric: str
    n: int
    chance: float
    accuracies: dict[str, Interval]
    differences: dict[Pair, Interval] = field(default_factory=dict)
    signs: dict[Pair, SignTest] = field(default_factory=dict)


def load_run(argument: str) -> Run:
    """A run from `FOLDER` or `NAME=FOLDER`; the name defaults to the folder's."""
    name, equals, path = argument.rpartition("=")
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the --out folder of an evaluation, or NAME=FOLDER")
    entries: dict[str, list[Entry]] = {}
    for evaluation_folder in find_evaluations(folder):
        evaluation = load_evaluation(evaluation_folder)
        if evaluation.protocol.get("task") == "judged":
            judged = read_judged(evaluation_folder)
            if judged is None:  # said to be not evaluated, as any other that is not there
                continue
            evaluation.protocol.update(judge=judged["judge"], rule_sha256=judged["rule_sha256"])
        entries.setdefault(evaluation.name, []).append(Entry(evaluation, score_questions(evaluation)))
    for variants in entries.values():
        # Every run, the baseline too, is represented by its best way of reading a box.
        variants.sort(key=lambda entry: -entry.scored.accuracy(entry.scored.metrics[0]).value)
    ordered = {key: entries[key] for key in sorted(entries, key=paper_order)}
    return Run(name if equals else folder.resolve().name, folder, ordered)


def load_runs(arguments: list[str]) -> list[Run]:
    runs = [load_run(argument) for argument in arguments]
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise DataError("one run was given; a comparison needs two run folders or more")
    if len(set(names)) < len(names):
        raise DataError(f"two runs are called the same ({', '.join(names)}); name them, as in before=FOLDER after=FOLDER")
    return runs


def choose_pairs(runs: list[Run], arguments: list[str] | None) -> list[Pair]:
    """Pairs from `A:B` arguments; without them, the first run minus each of the others."""
    names = [run.name for run in runs]
    pairs = [Pair(names[0], name) for name in names[1:]]
    if arguments:
        pairs = [Pair(first, second) for first, _, second in (argument.partition(":") for argument in arguments)]
    for pair in pairs:
        if pair.first not in names or pair.second not in names or pair.first == pair.second:
            raise DataError(
                f"--pairs {pair.first}:{pair.second} needs two of the runs {', '.join(names)}, written A:B for A minus B"
            )
    return pairs


def shared_names(runs: list[Run], pairs: list[Pair]) -> list[str]:
    """Benchmarks that both runs of at least one pair have, in the first run's order. DataError when there are none."""
    by_name = {run.name: run for run in runs}
    shared = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.entries)
        if any(name in by_name[pair.first].entries and name in by_name[pair.second].entries for pair in pairs)
    ]
    if not shared:
        held = "; ".join(f"{run.name} has {', '.join(run.entries)}" for run in runs)
        raise DataError(f"the runs have no benchmark and split in common: {held}")
    return shared


def unshared(runs: list[Run]) -> list[str]:
    """A sentence per group of benchmarks that some runs lack, so that nothing is left out unsaid."""
    names = dict.fromkeys(name for run in runs for name in run.entries)
    lacking: dict[str, list[str]] = {}
    for name in names:
        without = ", ".join(run.name for run in runs if name not in run.entries)
        if without:
            lacking.setdefault(without, []).append(name)
    return [f"{', '.join(some)}: not evaluated for {without}" for without, some in lacking.items()]


def paper_order(name: str) -> tuple[str, int, str]:
    """Sorts benchmark/split names by benchmark, and its splits as the papers' tables do: val, testA, testB, test."""
    benchmark, _, split = name.partition("/")
    splits = ("seen", "val", "testA", "testB", "test", "unseen")
    return benchmark, splits.index(split) if split in splits else len(splits), split


def variants_compared(runs: list[Run], pair: Pair) -> list[str]:
    """A sentence per benchmark where a run read boxes in a named way, with the ways that were not the best."""
    by_name = {run.name: run for run in runs}
    sentences = []
    for name in sorted(by_name[pair.first].entries, key=paper_order):
        sides = []
        for run in (by_name[pair.first], by_name[pair.second]):
            best, *others = [entry.variant for entry in run.entries.get(name, [])] or [""]
            if best:
                sides.append(f"{run.name} by {best}" + (f" (better than {', '.join(others)})" if others else ""))
        if sides:
            sentences.append(f"{name}: {'; '.join(sides)}")
    return sentences


def refuse_different_protocol(runs: list[Run]) -> None:
    """DataError when a benchmark was not put to all runs in the same way, naming the field; or not the same questions."""
    first_with: dict[str, tuple[str, Evaluation]] = {}
    for run in runs:
        for name, variants in run.entries.items():
            for entry in variants:
                other_name, other = first_with.setdefault(name, (run.name, entry.evaluation))
                key = first_difference(other.protocol, entry.evaluation.protocol)
                if key == "targets_sha256":
                    pairs = zip(other.targets, entry.evaluation.targets, strict=True)
                    a, b = next((a, b) for a, b in pairs if a != b)
                    raise DataError(
                        f"{name}: {other_name} was asked id {a.id}, {run.name} id {b.id} with other contents; use one data set"
                    )
                if key is not None:
                    raise DataError(
                        f"{name}: protocol.{key} is {other.protocol.get(key)!r} in {other_name} and "
                        f"{entry.evaluation.protocol.get(key)!r} in {run.name}; evaluate both in the same way"
                    )


def compare(runs: list[Run], pairs: list[Pair], seed: int = 0) -> list[Row]:
    """All rows of the tables. Call `refuse_different_protocol` first: rows pair answers by position."""
    best = {run.name: {name: variants[0].scored for name, variants in run.entries.items()} for run in runs}
    rows = []
    for name in sorted(shared_names(runs, pairs), key=paper_order):
        scored = {run: entries[name] for run, entries in best.items() if name in entries}
        any_run = next(iter(scored.values()))
        for metric in any_run.metrics:
            accuracies = {run: s.accuracy(metric, seed) for run, s in scored.items()}
            differences = {
                pair: scored[pair.first].difference(scored[pair.second], metric, seed)
                for pair in pairs
                if pair.first in scored and pair.second in scored
            }
            signs = {pair: scored[pair.first].signs(scored[pair.second], metric) for pair in differences}
            rows.append(Row(name, metric, len(any_run.ids), any_run.chance[metric], accuracies, differences, signs))
    return rows


@dataclass(frozen=True)
class Example:
    """One question with the answers of both runs of a pair; `scores`: IoU, or 1 and 0 for a name."""

    evaluation: Evaluation
    index: int
    answers: tuple
    scores: tuple[float, float]


def examples(first: list[Entry], second: list[Entry], count: int) -> dict[str, tuple[int, list[Example]]]:
    """Up to `count` questions each that only the first, only the second and none of the runs got right; of a task in `GRADED`
    those that the first and the second answered better.

    first, second: entries of the same benchmarks and splits. Most disagreement first, at most one question per picture.
    Returns group -> (number of all such questions, examples).
    """
    groups: dict[str, list[tuple[float, Example]]] = {"first": [], "second": [], "neither": []}
    for a, b in zip(first, second, strict=True):
        scores_a, scores_b = (e.scored.hits if e.scored.iou is None else e.scored.iou for e in (a, b))
        for index, (hit_a, hit_b) in enumerate(zip(a.scored.hits, b.scored.hits, strict=True)):
            if a.scored.task in GRADED:
                hit_a, hit_b = hit_a > hit_b, hit_b > hit_a
                if not (hit_a or hit_b):
                    continue
            elif hit_a and hit_b:
                continue
            answers = (a.evaluation.predictions[index], b.evaluation.predictions[index])
            example = Example(a.evaluation, index, answers, (float(scores_a[index]), float(scores_b[index])))
            group = "first" if hit_a else "second" if hit_b else "neither"
            groups[group].append((abs(example.scores[0] - example.scores[1]), example))
    chosen = {}
    for group, found in groups.items():
        # A fixed shuffle breaks ties, so that questions of equal disagreement do not all come from the first pictures.
        order = np.random.default_rng(0).permutation(len(found))
        ranked = sorted((found[i] for i in order), key=lambda pair: -pair[0])
        by_picture = {(e.evaluation.name, e.evaluation.targets[e.index].image): e for _, e in reversed(ranked)}
        first_ones = [e for _, e in ranked if by_picture[e.evaluation.name, e.evaluation.targets[e.index].image] is e]
        chosen[group] = (len(found), first_ones[:count])
    return chosen

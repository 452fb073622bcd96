"""The tables of study_mllm.py: a line per tower and variant, and differences paired by question, per split.

Intervals are over pictures, with all that was asked about them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from encoder.errors import DataError
from eval.predictions import find_evaluations, load_evaluation
from eval.scoring import Scored, score_questions
from pipeline import TOWERS
from study_table import difference, markdown, pooled, shown

# Title, benchmark, metric.
COLUMNS = (
    ("name by box", "refcoco_referring", "micro"),
    ("by point", "refcoco_referring_point", "micro"),
    ("by outline", "refcoco_referring_mask", "micro"),
    ("box by expression, acc@0.5", "refcoco", "acc_50"),
)
TITLES = [title for title, *_ in COLUMNS]
Answers = dict[str, Scored]  # by benchmark/split


def read_runs(out: Path, variants: Mapping) -> dict[tuple[str, str], Answers]:
    """What was evaluated, by variant and tower, in the order of `variants`."""
    runs = {}
    for name in variants:
        for tower in TOWERS:
            folder = out / f"{tower}_{name}" / "eval"
            if folder.is_dir():
                evaluations = map(load_evaluation, find_evaluations(folder))
                runs[name, tower] = {evaluation.name: score_questions(evaluation) for evaluation in evaluations}
    if not runs:
        raise DataError(f"{out} holds no evaluated variant; run study_mllm.py without --table-only")
    return runs


def write_table(out: Path, variants: Mapping) -> str:
    """Markdown of all evaluated variants in `out`; study.md and study.json there hold it and its numbers."""
    runs = read_runs(out, variants)
    splits = dict.fromkeys(name.rpartition("/")[2] for answers in runs.values() for name in answers)
    parts, record = [], {}
    for split in splits:
        values = {(f"{tower} {name}",): (answers, None) for (name, tower), answers in runs.items()}
        changes = {}
        for (name, tower), answers in runs.items():
            base = variants[name].against
            if (base, tower) in runs:
                changes[f"{tower} {name}", f"{tower} {base}"] = answers, runs[base, tower]
        for name in dict.fromkeys(name for name, _ in runs):
            if all((name, tower) in runs for tower in TOWERS):
                pair = [f"{tower} {name}" for tower in reversed(TOWERS)]
                changes[tuple(pair)] = runs[name, "cloc"], runs[name, "clip"]
        for title, compared in ((f"{split}:", values), (f"{split}, paired by question:", changes)):
            lines, numbers = table(compared, split)
            if lines:
                parts.append(f"{title}\n\n{markdown(['', *TITLES, 'n'], lines)}")
                record |= {f"{split}/{key}": value for key, value in numbers.items()}
    text = "\n".join(parts)
    (out / "study.md").write_text(text)
    (out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    return text


def table(compared: dict[tuple[str, ...], tuple[Answers, Answers | None]], split: str) -> tuple[list[list[str]], dict]:
    """A line for each answers, or each difference of two, with the numbers behind it."""
    lines, record = [], {}
    for names, (answers, base) in compared.items():
        title, cells, numbers = " − ".join(names), [], {}
        for column, benchmark, metric in COLUMNS:
            key = f"{benchmark}/{split}"
            if key not in answers or (base is not None and key not in base):
                cells.append("-")
                continue
            one = [answers[key]]
            interval = pooled(one, metric) if base is None else difference(one, [base[key]], metric)
            numbers[column] = vars(interval)
            cells.append(shown(interval, signed=base is not None))
        if numbers:
            counts = dict.fromkeys(value["n"] for value in numbers.values())
            lines.append([title, *cells, ", ".join(f"{count:,}" for count in counts)])
            record[title] = numbers
    return lines, record

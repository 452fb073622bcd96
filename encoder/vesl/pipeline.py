"""Labels a collection by the stages of arXiv 2410.02746, section 4; which run at the same time is the engine's affair.

What is finished is skipped. The stages may run apart, on other days and machines; what they found lies in the output folder.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from encoder.data.shards import is_url
from encoder.data.sources.shards import write_json
from encoder.errors import DataError
from encoder.vesl.inputs import Input, TarInput
from encoder.vesl.stage_files import LabelFolder, whole_file
from encoder.vesl.stages import LabelJob, Worker

Check = Callable[[str, dict[str, Any]], None]  # told what a stage's part says of itself; DataError where it must not work
Bar = Callable[..., tqdm]  # a progress bar over shards: bar(total=..., desc=...)
# An engine does the stages for the shards that each has left, in the order of the stages. It calls `check` with each part that
# it loads, before any work is done with it.
Engine = Callable[[LabelJob, dict[str, list[Input]], Check, Bar], None]


def run_here(job: LabelJob, left: dict[str, list[Input]], check: Check, bar: Bar) -> None:
    """The engine of a single process: stage after stage over all shards, so that one model is loaded at a time."""
    for stage, shards in left.items():
        worker = Worker(job, stage)
        check(stage, worker.describe())
        with bar(total=len(shards), desc=stage) as progress:
            for shard in shards:
                worker.run(shard, progress.update)


def label(
    job: LabelJob,
    inputs: list[Input],
    source: dict[str, Any],
    stages: Sequence[str] | None = None,
    engine: Engine = run_here,
    redo: str | None = None,
    progress: bool = True,
) -> Counter:
    """Runs the stages over the shards and returns the counts of all finished ones; `summary.json` holds them too.

    inputs, source: as `open_input` gives them
    stages: to run now, None: all
    redo: a stage whose results, and those built on them, are removed first
    Raises DataError where the output is of another input or of other settings, before any model is loaded, or where a model
    is another one than that of earlier results.
    """
    for stage in [*(stages or ()), *([redo] if redo else ())]:
        if stage not in job.stages:
            raise DataError(f"there is no stage '{stage}' here; choose among {', '.join(job.stages)}")
    wanted = [stage for stage in job.stages if stages is None or stage in stages]
    settings = {stage: job.settings(stage) for stage in wanted}
    folder = job.output
    _keep_apart(folder, inputs)
    with folder.locked():
        if redo:
            folder.redo(redo)
        folder.claim(source, settings)
        left = {stage: [shard for shard in inputs if not folder.has(stage, shard.name)] for stage in wanted}
        left = {stage: shards for stage, shards in left.items() if shards}
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} shards [{elapsed}<{remaining}]"
        bar = partial(tqdm, bar_format=form, disable=not progress)
        if left:
            engine(job, left, folder.record_part, bar)
        return _summary(folder, [shard.name for shard in inputs])


def _keep_apart(folder: LabelFolder, inputs: list[Input]) -> None:
    """DataError where a labelled shard would take the place of its input."""
    for shard in inputs:
        if (
            isinstance(shard, TarInput)
            and not is_url(shard.shard)
            and Path(shard.shard).resolve() == folder.shard(shard.name).resolve()
        ):
            raise DataError(f"{folder.path} holds the input's own shards; give another output")


def _summary(folder: LabelFolder, names: list[str]) -> Counter:
    counts, problems = Counter(), []
    for name in names:
        if folder.is_finished(name):
            stats = folder.read_stats(name)
            counts["shards"] += 1
            counts.update(stats["counts"])
            problems += stats["problems"]
    write_json(folder.path / "summary.json", {"shards_of_input": len(names), "counts": dict(sorted(counts.items()))})
    with whole_file(folder.path / "problems.txt") as path:
        path.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8", errors="backslashreplace")
    return counts

"""The stages on a Ray cluster, or on several processes of one machine: a Ray Data dataset whose rows are the shards.

A stage is a map over rows: it writes its results for the row's shard and hands the row on, so that the second shard is
captioned while the first one's phrases are looked for. Stages with a model are pools of actors, the others tasks.

A row is a shard and not an image: Ray Data's batches run across blocks, so that what a model is shown with an image would
depend on the number of workers, and a restart would begin from the input. Here batches are made within a shard, as in a single
process, which keeps its bytes; and the files of results are the checkpoints. All nodes must see input and output under the
same paths.
"""

import logging
import uuid
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from encoder.errors import DataError
from encoder.vesl.inputs import Input
from encoder.vesl.pipeline import Bar, Check
from encoder.vesl.stages import LabelJob, Worker

RETRIES = 3  # of a shard whose process or machine went away


@dataclass(frozen=True)
class RayEngine:
    """workers: actors of a stage with a model, each with one of the cluster's GPUs where it has any. cpus: that each of them
    asks Ray for. `RAY_ADDRESS` names a cluster; without it one is started on this machine.

    All stages run at once where the cluster has room for an actor of each stage with a model, else one after the other. Where
    it has no room for `workers` of each, Ray Data moves the room to the stage that has more to do.
    """

    workers: int
    cpus: int = 1

    def __post_init__(self):
        if min(self.workers, self.cpus) < 1:
            raise DataError(f"workers is {self.workers} and cpus {self.cpus}; give at least 1")

    def __call__(self, job: LabelJob, left: dict[str, list[Input]], check: Check, bar: Bar) -> None:
        """Does the stages for the shards that they have left (see `encoder.vesl.pipeline.Engine`)."""
        ray = _ray()
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        models = [stage for stage in left if stage in ("captions", "detections") and job.parts[stage].make]
        room, gpus = self._room(ray)
        if models and self.workers > room:  # the rest would wait for ever
            raise DataError(
                f"the cluster has room for {room} workers of {self.cpus} CPUs each, {self.workers} are asked; ask less"
            )
        if len(models) < len(left) and ray.cluster_resources().get("CPU", 0) <= room * self.cpus:
            room -= 1  # tasks need a CPU that no actor holds
        register = ray.remote(num_cpus=0)(Register).remote(check)
        run = uuid.uuid4().hex
        for stages in [list(left)] if len(models) <= room else [[stage] for stage in left]:
            shards = list({shard.name: shard for stage in stages for shard in left[stage]}.values())
            rows = ray.data.from_items([{"shard": shard, "problem": ""} for shard in shards], override_num_blocks=len(shards))
            for stage in stages:
                if stage in models:
                    most = min(self.workers, len(shards))
                    least = most if len(stages) == 1 or most * len(models) <= room else 1
                    # A shard waits at no busy actor, but for Ray Data to see there that a pool should grow.
                    at_actor = 1 if least == most else None
                    pool = ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=at_actor)
                    rows = rows.map(
                        StageActor,
                        fn_constructor_args=(job, stage, register),
                        compute=pool,
                        num_cpus=self.cpus,
                        num_gpus=gpus,
                        max_task_retries=RETRIES,
                    )
                else:
                    arguments = {"run": run, "job": job, "stage": stage, "register": register}
                    rows = rows.map(stage_task, fn_kwargs=arguments, num_cpus=1, max_retries=RETRIES)
            with bar(total=len(shards), desc=", ".join(stages)) as progress:
                _consume(ray, rows, stages, progress)

    def _room(self, ray) -> tuple[int, int]:
        """How many actors with a model fit into the cluster, and how many GPUs each of them has, 1 or 0."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = any(node.get("GPU") for node in nodes)
        fit = [min(node.get("CPU", 0) // self.cpus, node.get("GPU", 0) if gpus else node.get("CPU", 0)) for node in nodes]
        return int(sum(fit)), int(gpus)


class Register:
    """An actor that hears what the workers' parts say of themselves, one after the other, before any of them works."""

    def __init__(self, check: Check):
        self._check, self._first = check, {}

    def refusal(self, stage: str, part: dict[str, Any]) -> str:
        """A sentence where a part must not work; "" where it may."""
        if self._first.setdefault(stage, part) != part:
            return f"the workers have different models for {stage}; put the same files on all nodes"
        try:
            self._check(stage, part)
        except DataError as error:
            return str(error)
        return ""


class StageActor:
    """A stage in one process, as Ray Data calls it: a row in, the same row out once the stage is through with its shard.

    What stops it travels in the row's `problem`, since Ray Data would bury it in its own account.
    """

    def __init__(self, job: LabelJob, stage: str, register):
        self.worker, self.register, self.checked = Worker(job, stage), register, False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        stage, output, shard = self.worker.stage, self.worker.job.output, row["shard"]
        if row["problem"] or output.has(stage, shard.name):
            return row
        try:
            if not self.checked and (refusal := _ray().get(self.register.refusal.remote(stage, self.worker.describe()))):
                raise DataError(refusal)
            self.checked = True
            self.worker.run(shard)
        except DataError as error:
            return row | {"problem": str(error)}
        return row


_in_tasks: dict[tuple[str, str], StageActor] = {}  # of this process, by run and stage: a part is loaded once, not per shard


def stage_task(row: dict[str, Any], run: str, job: LabelJob, stage: str, register) -> dict[str, Any]:
    """A stage without a model as a task: what `StageActor` does, in whichever process is free."""
    if (run, stage) not in _in_tasks:
        _in_tasks[run, stage] = StageActor(job, stage, register)
    return _in_tasks[run, stage](row)


def _consume(ray, rows, stages: list[str], progress) -> None:
    """Runs the dataset to its end, or to the first problem. DataError for that, and where processes die too often."""
    errors = ray.exceptions
    try:
        with closing(iter(rows.iter_batches(batch_size=None, batch_format="pandas", prefetch_batches=0))) as batches:
            for batch in batches:
                if problem := "".join(batch["problem"][:1]):
                    raise DataError(problem)
                progress.update(len(batch))
    except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"a worker of {', '.join(stages)} died too often ({reason}); the same command goes on from what is done"
        ) from error


def _ray():
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DataError("--engine ray needs Ray Data, which is not installed; pip install 'open-cloc[ray]'") from error
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is there
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised as well
    return ray

"""The stages on a Ray cluster, or on several processes of one machine: actors for each stage, which take a shard at a time.

Not Ray Data: its batches run across blocks, so that what a model is shown with an image would depend on the number of
workers, and a restart would begin from the input. A shard per call keeps the batches of the in-process engine, and with them
its bytes, and its files of results are the checkpoints. All nodes must see input and output under the same paths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from encoder.errors import DataError
from encoder.vesl.inputs import Input
from encoder.vesl.stages import LabelJob, Progress, Worker

MODEL_STAGES = ("captions", "detections")
RETRIES = 3  # of a shard whose actor or machine went away


@dataclass(frozen=True)
class RayEngine:
    """workers: actors of a stage with a model, each with one of the cluster's GPUs where it has any; the other stages have one
    for every CPU. cpus: that an actor with a model asks Ray for. `RAY_ADDRESS` names a cluster; without it one is started on
    this machine."""

    workers: int
    cpus: int = 1

    def __post_init__(self):
        if min(self.workers, self.cpus) < 1:
            raise DataError(f"workers is {self.workers} and cpus {self.cpus}; give at least 1")

    def __call__(
        self, job: LabelJob, stage: str, shards: list[Input], check: Callable[[dict[str, Any]], None], progress: Progress
    ) -> None:
        """Does one stage for some shards (see `encoder.vesl.pipeline.Engine`)."""
        ray = _ray()
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        there = ray.cluster_resources()
        if stage in MODEL_STAGES:
            number, options = self.workers, {"num_cpus": self.cpus, "num_gpus": int(there.get("GPU", 0) > 0)}
            room = min(there.get("CPU", 0) // self.cpus, there.get("GPU") or number)
            if number > room:  # the rest would wait for ever
                raise DataError(
                    f"the cluster has room for {room:.0f} workers of {self.cpus} CPUs each, {number} are asked; ask less"
                )
        else:
            number, options = int(there.get("CPU", 1)), {"num_cpus": 1}
        actor = ray.remote(Worker).options(**options, max_restarts=RETRIES, max_task_retries=RETRIES)
        actors = [actor.remote(job, stage) for _ in range(min(number, len(shards)))]
        try:
            first, *others = ray.get([each.describe.remote() for each in actors])
            if any(other != first for other in others):
                raise DataError(f"the workers have different models for {stage}; put the same files on all nodes")
            check(first)
            waiting, running = list(reversed(shards)), {}
            for each in actors:
                running[each.run.remote(waiting.pop())] = each
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                each = running.pop(done)
                ray.get(done)
                progress(1.0)
                if waiting:
                    running[each.run.remote(waiting.pop())] = each
        except ray.exceptions.RayTaskError as error:  # the worker's own error, not Ray's account of it
            if isinstance(error.cause, DataError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"a worker of {stage} died too often ({reason}); the same command goes on from what is done"
            ) from error
        finally:
            for each in actors:
                ray.kill(each)


def _ray():
    try:
        import ray
    except ImportError as error:
        raise DataError("--engine ray needs Ray, which is not installed; pip install 'open-cloc[ray]'") from error
    return ray

"""The stages on a Ray cluster, or on several processes of one machine: an actor per worker, a shard at a time.

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

RETRIES = 3  # of a shard whose actor or machine went away


@dataclass(frozen=True)
class RayEngine:
    """workers: actors of a stage; cpus, gpus: that each of those asks Ray for; gpus None: one where a model runs and the
    cluster has any. `RAY_ADDRESS` names a cluster; without it one is started on this machine."""

    workers: int
    cpus: float = 1
    gpus: float | None = None

    def __call__(
        self, job: LabelJob, stage: str, shards: list[Input], check: Callable[[dict[str, Any]], None], progress: Progress
    ) -> None:
        """Does one stage for some shards (see `encoder.vesl.pipeline.Engine`)."""
        ray = _ray()
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        needs_model = stage in ("captions", "detections")
        gpus = self.gpus if self.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        actor = ray.remote(Worker).options(
            num_cpus=self.cpus, num_gpus=gpus if needs_model else 0, max_restarts=RETRIES, max_task_retries=RETRIES
        )
        actors = [actor.remote(job, stage) for _ in range(min(self.workers, len(shards)))]
        try:
            for found in ray.get([each.describe.remote() for each in actors]):
                check(found)
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
        finally:
            for each in actors:
                ray.kill(each)


def _ray():
    try:
        import ray
    except ImportError as error:
        raise DataError("--engine ray needs Ray, which is not installed; pip install 'open-cloc[vesl]'") from error
    return ray

"""Labelling on a Ray cluster of three nodes on this machine: the bytes of one process, whatever happens to the workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import labelling_fixtures
import pytest
from labelling_fixtures import ScriptedCaptioner, ScriptedDetector, contents, img2dataset_shards, run, scripted_job

from encoder.errors import DataError
from encoder.vesl import ray_engine
from encoder.vesl.ray_engine import RayEngine
from encoder.vesl.stages import KEPT_CAPTIONS, Part

ray = pytest.importorskip("ray", reason="ray is not installed; it comes with the extra ray")
pytest.importorskip("pyarrow", reason="pyarrow, which Ray Data needs, is not installed; it comes with the extra ray")
pytestmark = pytest.mark.timeout(1800)  # minutes on a busy machine: every actor is a process that imports torch

PATIENCE = 120  # seconds that a noting part waits for others to be at work


@pytest.fixture(scope="module")
def cluster():
    """Nodes of 1, 2 and 2 CPUs, whose workers get the scripted parts as bytes, since they do not find this folder."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80_000_000}
    for last in (False, False, True):  # Ray gives a node 30 seconds to start, too few for a busy machine
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=1, include_dashboard=False, **memory)
            for _ in range(2):
                nodes.add_node(num_cpus=2, **memory)
            break
        except Exception:
            nodes.shutdown()
            if last:
                raise
    ray.init(address=nodes.address, log_to_driver=False)
    for module in (labelling_fixtures, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    yield nodes
    for module in (labelling_fixtures, sys.modules[__name__]):
        ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return img2dataset_shards(tmp_path_factory.mktemp("collection") / "in", (5, 2, 4))


@pytest.fixture(scope="module")
def labelled(collection, tmp_path_factory):
    """The files that one process writes."""
    output = tmp_path_factory.mktemp("labelled") / "out"
    run(collection, output)
    return contents(output)


def note(folder: Path, stage: str) -> None:
    """Leaves a file that says in which process of which node a part is at work."""
    (folder / f"{stage}.{ray.get_runtime_context().get_node_id()}.{os.getpid()}").touch()


def wait_for(folder: Path, stage: str, processes: int) -> None:
    """Until so many processes have been at work at a stage."""
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob(f"{stage}.*"))) < processes:
        if time.monotonic() > end:
            raise RuntimeError(f"{processes} processes were never at work at {stage}")
        time.sleep(0.05)


@dataclass
class NotingCaptioner(ScriptedCaptioner):
    """Says where it works; does not go on before `together` processes work, nor with the third shard before a detector has."""

    notes: Path | None = None
    together: int = 1

    def caption(self, images, alt_texts):
        note(self.notes, "captions")
        wait_for(self.notes, "captions", self.together)
        if "alt 200" in alt_texts:
            wait_for(self.notes, "detections", 1)
        return super().caption(images, alt_texts)


@dataclass
class NotingDetector(ScriptedDetector):
    notes: Path | None = None
    together: int = 1

    def detect(self, images, phrases):
        note(self.notes, "detections")
        wait_for(self.notes, "detections", self.together)
        return super().detect(images, phrases)


@dataclass
class DyingCaptioner(ScriptedCaptioner):
    """Takes its process with it, `deaths` times in all, at the second shard."""

    notes: Path | None = None
    deaths: int = 1

    def caption(self, images, alt_texts):
        if "alt 100" in alt_texts and len(list(self.notes.iterdir())) < self.deaths:
            (self.notes / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().caption(images, alt_texts)


def captioner(cls, *arguments) -> Part:
    return Part(partial(cls, "Describe.", 0.0, *arguments), {"captioner": "scripted", "prompt": "Describe."})


def detector(cls, *arguments) -> Part:
    return Part(partial(cls, 0.1, 0.0, *arguments), {"detector": "scripted", "min_score": 0.1})


def places(notes: Path) -> dict[str, set[str]]:
    """The nodes on which each noting part was at work."""
    found = defaultdict(set)
    for path in notes.iterdir():
        stage, node, _ = path.name.split(".")
        found[stage].add(node)
    return found


def test_a_cluster_streams_what_one_process_writes(cluster, collection, labelled, tmp_path):
    """All four actors at work, which no node has the CPUs for; the first shard's detections before the last one's captions."""
    (tmp_path / "notes").mkdir()
    notes = tmp_path / "notes"
    parts = {"captioner": captioner(NotingCaptioner, notes, 2), "detector": detector(NotingDetector, notes, 2)}
    counts = run(collection, tmp_path / "out", engine=RayEngine(workers=2), **parts)
    assert counts["records"] == 11 and contents(tmp_path / "out") == labelled
    found = places(notes)
    assert len(found["captions"] | found["detections"]) >= 2
    assert run(collection, tmp_path / "out", engine=RayEngine(9)) == counts  # all is done: Ray is not asked


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_workers_changes_nothing(cluster, collection, labelled, tmp_path, workers):
    """With five the stages run one after the other, as the cluster has no room for both models' actors beside the tasks."""
    run(collection, tmp_path / "out", engine=RayEngine(workers))
    assert contents(tmp_path / "out") == labelled


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster, collection, tmp_path):
    with pytest.raises(DataError, match="room for 5 workers of 1 CPUs each, 6 are asked; ask less"):
        run(collection, tmp_path / "out", engine=RayEngine(6))
    with pytest.raises(DataError, match="room for 2 workers of 2 CPUs each, 3 are asked; ask less"):
        run(collection, tmp_path / "out", engine=RayEngine(3, cpus=2))


def test_the_shard_of_a_dead_worker_is_done_again(cluster, collection, labelled, tmp_path):
    (tmp_path / "notes").mkdir()
    run(collection, tmp_path / "out", engine=RayEngine(2), captioner=captioner(DyingCaptioner, tmp_path / "notes"))
    assert len(list((tmp_path / "notes").iterdir())) == 1 and contents(tmp_path / "out") == labelled


def test_a_shard_that_kills_its_workers_stops_the_run(cluster, collection, labelled, tmp_path, monkeypatch):
    """In one sentence; the same command goes on from what is done."""
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    (tmp_path / "notes").mkdir()
    dying = captioner(DyingCaptioner, tmp_path / "notes", 99)
    with pytest.raises(DataError, match=r"a worker of captions, phrases, .* died too often \(.*\); the same command") as error:
        run(collection, tmp_path / "out", engine=RayEngine(1), captioner=dying)
    assert "\n" not in str(error.value) and len(list((tmp_path / "notes").iterdir())) == 2
    first = tmp_path / "out/stages/captions/00000.jsonl"
    stamp = first.stat().st_mtime_ns
    run(collection, tmp_path / "out", engine=RayEngine(2))
    assert contents(tmp_path / "out") == labelled and first.stat().st_mtime_ns == stamp


def test_a_killed_run_goes_on(cluster, collection, labelled, tmp_path):
    """The process that drives the cluster is killed while workers are at work; what they leave does not matter."""
    output = tmp_path / "out"
    program = (
        "import labelling_fixtures, ray, sys; from encoder.vesl.ray_engine import RayEngine\n"
        "ray.cloudpickle.register_pickle_by_value(labelling_fixtures)\n"
        "labelling_fixtures.run(sys.argv[1], sys.argv[2], pause=0.3, engine=RayEngine(2))"
    )
    here = Path(__file__).parent
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    process = subprocess.Popen([sys.executable, "-c", program, str(collection), str(output)], env=environment)
    while not list(output.glob("stages/captions/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(list(output.glob("*_stats.json"))) < 3
    run(collection, output, engine=RayEngine(2))
    assert contents(output) == labelled


def test_a_workers_refusal_is_one_sentence(cluster, collection, tmp_path):
    run(collection, tmp_path / "out", stages=["captions"])
    rows = tmp_path / "out/stages/captions/00001.jsonl"
    rows.write_text(rows.read_text().replace('"key"', '"name"'))
    with pytest.raises(
        DataError, match=r"00001.jsonl is not as the stage captions writes it \(KeyError\('key'\)\); remove it and"
    ) as error:
        run(collection, tmp_path / "out", stages=["phrases"], engine=RayEngine(workers=2))
    assert "\n" not in str(error.value)


def test_workers_with_other_weights_are_refused(cluster, collection, tmp_path):
    run(collection, tmp_path / "out", stages=["captions"], limit=6)
    (tmp_path / "out/stages/captions/00001.jsonl").unlink()
    other = Part(partial(ScriptedCaptioner, "Other."), scripted_job(tmp_path).captioner.settings)
    with pytest.raises(DataError, match='captions of other settings .prompt: "Describe." there, "Other." asked'):
        run(collection, tmp_path / "out", stages=["captions"], engine=RayEngine(1), captioner=other, limit=6)
    assert not (tmp_path / "out/stages/captions/00001.jsonl").exists()


def test_a_model_takes_a_gpu_where_the_cluster_has_one(cluster, collection, tmp_path):
    """With one GPU the models run on its node, one after the other; kept captions take none."""
    node = cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=80_000_000)
    try:
        (tmp_path / "notes").mkdir()
        with pytest.raises(DataError, match="room for 1 workers of 1 CPUs each, 2 are asked"):
            run(collection, tmp_path / "out", engine=RayEngine(2))
        parts = {"captioner": KEPT_CAPTIONS, "detector": detector(NotingDetector, tmp_path / "notes")}
        run(collection, tmp_path / "out", engine=RayEngine(1), **parts)
        assert places(tmp_path / "notes") == {"detections": {node.node_id}}
        run(collection, tmp_path / "here", captioner=KEPT_CAPTIONS)
        assert contents(tmp_path / "out") == contents(tmp_path / "here")
        manifest = json.loads((tmp_path / "out/manifest.json").read_text())
        assert manifest["stages"]["captions"]["part"] == {}
        run(collection, tmp_path / "both", engine=RayEngine(1))
    finally:
        cluster.remove_node(node)


def test_nonsense_is_refused():
    with pytest.raises(DataError, match="workers is 0"):
        RayEngine(0)

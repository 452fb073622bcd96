"""Labelling on Ray: two workers write what one process writes, byte for byte, and say no in the same words."""

from functools import partial

import labelling_fixtures
import pytest
from labelling_fixtures import ScriptedCaptioner, contents, img2dataset_shards, run, scripted_job

from encoder.errors import DataError
from encoder.vesl.ray_engine import RayEngine
from encoder.vesl.stages import Part

ray = pytest.importorskip("ray", reason="ray is not installed; it comes with the extra ray")
pytestmark = pytest.mark.timeout(1800)  # minutes on a busy machine: every actor is a process that imports torch


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPUs whose workers get the scripted parts as bytes, since they do not find this folder."""
    ray.cloudpickle.register_pickle_by_value(labelling_fixtures)
    for last in (False, False, True):  # Ray gives a machine 30 seconds to start it, too few for a busy one
        try:
            ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
            break
        except Exception:
            if last:
                raise
            ray.shutdown()
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(labelling_fixtures)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return img2dataset_shards(tmp_path_factory.mktemp("collection") / "in", (5, 2, 4))


def test_two_workers_write_what_one_process_writes(cluster, collection, tmp_path):
    here = run(collection, tmp_path / "here")
    there = run(collection, tmp_path / "there", engine=RayEngine(workers=2))
    assert here == there and here["records"] == 11
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


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


def test_nonsense_is_refused():
    with pytest.raises(DataError, match="workers is 0"):
        RayEngine(0)

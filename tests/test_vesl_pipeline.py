"""Labelling with scripted parts: bytes kept, bad samples counted, stages apart, settings guarded, kills without a trace."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from labelling_fixtures import (
    ScriptedCaptioner,
    ScriptedDetector,
    contents,
    encoded,
    img2dataset_shard,
    img2dataset_shards,
    members,
    records,
    run,
    scripted_job,
    write_tar,
)

from encoder.data.reader import RegionDataset
from encoder.errors import DataError
from encoder.vesl.inputs import open_input, parse_texts
from encoder.vesl.stages import KEPT_CAPTIONS, Part


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Three shards as img2dataset writes them, 20 images."""
    return img2dataset_shards(tmp_path_factory.mktemp("collection") / "in", (7, 9, 4))


@pytest.fixture(scope="module")
def labelled(collection, tmp_path_factory):
    """The collection, labelled without an interruption."""
    output = tmp_path_factory.mktemp("labelled") / "out"
    counts = run(collection, output)
    return output, counts


def test_the_shards_come_back_with_a_record_beside_every_image(collection, labelled):
    output, counts = labelled
    assert counts == {"shards": 3, "records": 20, "regions": 40, "boxes_dropped": 20}
    for tar in sorted(collection.glob("*.tar")):
        before, after = members(tar), members(output / tar.name)
        assert list(before) == list(after)
        assert all(before[name] == after[name] for name in before if not name.endswith(".json"))
    record = records(output)["000000101"]
    caption = ScriptedCaptioner().caption([RegionDataset(collection / "00001.tar")[1][0]], ["alt 101"])[0].strip()
    words = caption.split()
    assert record["captions"] == [caption] and record["alt_text"] == "alt 101"
    assert record["queries"] == [" ".join(words[i : i + 2]) for i in (0, 3, 6)]
    assert record["regions"] == [  # clipped to the 131 x 20 image; the box outside it is dropped
        {"box": [0.0, 1.0, 131.0, 19.0], "phrases": [record["queries"][0]], "score": 0.9, "source": "vesl"},
        {"box": [0.0, 1.0, 65.5, 19.0], "phrases": [record["queries"][2]], "score": 0.45, "source": "vesl"},
    ]
    assert (record["image"], record["width"], record["height"]) == ("000000101.jpg", 131, 20)
    assert record["url"] == "https://example.org/101.jpg" and record["caption"] == "alt 101"  # img2dataset's own


def test_the_reader_takes_them_as_they_are(labelled):
    dataset = RegionDataset(labelled[0], progress=False)
    assert len(dataset) == 20
    image, record = dataset[8]
    assert image.size == (131, 20) and len(record.regions) == 2 and record.alt_text == "alt 101"


def test_region_shards_keep_their_text_as_alt_text(region_shards, tmp_path):
    run(region_shards, tmp_path / "out")
    before = RegionDataset(region_shards, progress=False)
    after = RegionDataset(tmp_path / "out", progress=False)
    assert len(after) == len(before) == 24
    for index in range(24):
        old, new = before.record(index), after.record(index)
        assert new.alt_text == old.captions[0] and new.captions[0].endswith(f"near {old.captions[0]}")
        assert all(region.source == "vesl" for region in new.regions) and new.regions
        assert np.array_equal(np.asarray(before[index][0]), np.asarray(after[index][0]))


def test_a_folder_of_images_becomes_shards(tmp_path):
    pictures = tmp_path / "pictures"
    for name in ("b/two.png", "a/one.jpg", "three.JPEG"):
        path = pictures / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(kind="PNG" if name.endswith("png") else "JPEG"))
    (pictures / "a/one.txt").write_text("the first\n")
    (pictures / "a/._one.jpg").write_bytes(b"a Mac's leaving")
    counts = run(pictures, tmp_path / "out", shard_size=2)
    assert counts["records"] == 3 and counts["shards"] == 2
    assert list(members(tmp_path / "out/00000.tar")) == [
        "000000000.jpg", "000000000.txt", "000000000.json", "000000001.png", "000000001.json",
    ]  # fmt: skip
    assert members(tmp_path / "out/00001.tar")["000000002.jpeg"] == (pictures / "three.JPEG").read_bytes()
    found = records(tmp_path / "out")
    assert [found[key]["file"] for key in sorted(found)] == ["a/one.jpg", "b/two.png", "three.JPEG"]
    assert found["000000000"]["alt_text"] == "the first" and "alt_text" not in found["000000001"]
    assert len(RegionDataset(tmp_path / "out", progress=False)) == 3
    (pictures / "three.JPEG").rename(pictures / "0.jpg")  # numbers would belong to other images now
    with pytest.raises(DataError, match="made of another input .names: "):
        run(pictures, tmp_path / "out", shard_size=2)


def test_bad_samples_are_counted_named_and_left_out(tmp_path):
    good = encoded()
    names = {
        "a.jpg": good, "a.txt": b"fine",
        "b.jpg": b"no image", "b.txt": b"broken image",
        "c.jpg": good[:-40], "c.txt": b"cut off",
        "d.txt": b"no image at all",
        "e.jpg": good, "e.json": b"{not json",
        "f.jpg": good, "f.txt": b"\xff\xfe",
        "g.jpg": encoded((9, 9)), "g.txt": b"too small for the model",
        "h.jpg": good,
        "i.webp": encoded(kind="WEBP"), "i.cls": b"7",
    }  # fmt: skip
    write_tar(tmp_path / "in/x.tar", names)
    counts = run(tmp_path / "in", tmp_path / "out")
    assert counts == {
        "shards": 1, "records": 3, "regions": 6, "boxes_dropped": 3,
        "left_out_image": 2, "left_out_text": 2, "left_out_model": 1, "left_out_member": 1,
    }  # fmt: skip
    problems = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert [next(key for key in "abcdefghi" if f", {key}" in line or f"sample {key}" in line) for line in problems] == list(
        "dbcefg"
    )
    assert "the model refuses the image (mean must have 3 elements)" in problems[-1]
    assert list(records(tmp_path / "out")) == ["a", "h", "i"]
    assert members(tmp_path / "out/x.tar")["i.cls"] == b"7"  # what else lies beside an image stays there
    assert json.loads((tmp_path / "out/summary.json").read_text())["counts"] == dict(sorted(counts.items()))


def test_a_truncated_shard_gives_what_is_whole_in_it(collection, tmp_path):
    data = (collection / "00000.tar").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/00000.tar").write_bytes(data[: len(data) // 2])
    counts = run(tmp_path / "in", tmp_path / "out")
    assert 0 < counts["records"] < 7 and counts["left_out_member"] >= 1
    assert "truncated" in (tmp_path / "out/problems.txt").read_text()


def test_a_model_that_refuses_everything_stops_the_run(tmp_path):
    write_tar(tmp_path / "in/x.tar", {f"{key}.jpg": encoded((5, 5)) for key in "abc"})
    with pytest.raises(DataError, match="no image of 3 can be labelled; the first: .* refuses"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/stages/captions").exists() or not list((tmp_path / "out/stages/captions").glob("*.jsonl"))


def test_stages_apart_write_what_one_run_writes(collection, labelled, tmp_path):
    with pytest.raises(DataError, match="captions.00000.jsonl is not there; run the stage captions first"):
        run(collection, tmp_path / "out", stages=["phrases"])
    run(collection, tmp_path / "apart", stages=["captions"])
    assert not list((tmp_path / "apart").glob("*.tar"))
    run(collection, tmp_path / "apart", stages=["phrases", "detections"], captioner=None)  # is not needed now
    run(collection, tmp_path / "apart", stages=["shards"])
    assert contents(tmp_path / "apart") == contents(labelled[0])


@pytest.mark.parametrize("decoders", [1, 5])
def test_the_number_of_threads_changes_nothing(collection, labelled, tmp_path, decoders):
    run(collection, tmp_path / "out", decoders=decoders)
    assert contents(tmp_path / "out") == contents(labelled[0])


def test_a_shard_does_not_depend_on_the_others(collection, labelled, tmp_path):
    run(collection / "00001.tar", tmp_path / "out")
    assert (tmp_path / "out/00001.tar").read_bytes() == (labelled[0] / "00001.tar").read_bytes()


def test_finished_shards_are_skipped_and_new_ones_added(collection, tmp_path):
    output = tmp_path / "out"
    run(collection / "00001.tar", output)
    stamp = (output / "00001.tar").stat().st_mtime_ns
    (output / "stages/captions/00001.jsonl").unlink()  # whoever needs the room may remove the stages
    loads = []

    def counted(pause=0.0):
        loads.append(1)
        return ScriptedCaptioner("Describe.")

    changes = {"captioner": Part(counted, scripted_job(output).captioner.settings)}
    run(collection / "00001.tar", output, **changes)
    assert not loads and (output / "00001.tar").stat().st_mtime_ns == stamp
    counts = run(collection, output, **changes)
    assert len(loads) == 1 and counts["shards"] == 3 and (output / "00001.tar").stat().st_mtime_ns == stamp


def test_other_settings_are_refused_and_redone_where_that_is_asked(collection, tmp_path):
    output = tmp_path / "out"
    run(collection, output)
    before = contents(output)
    other = {"detector": Part(ScriptedDetector, {"detector": "scripted", "min_score": 0.3})}
    with pytest.raises(
        DataError, match=r"holds detections of other settings \(min_score: 0.1 there, 0.3 asked\).*--redo detections"
    ):
        run(collection, output, **other)
    with pytest.raises(DataError, match=r"batch: 3 there, 2 asked"):
        run(collection, output, caption_batch=2)
    with pytest.raises(DataError, match=r"another input \(limit: null there, 5 asked\)"):
        run(collection, output, limit=5)
    assert contents(output) == before
    captions = (output / "stages/captions/00000.jsonl").stat().st_mtime_ns
    run(collection, output, redo="detections", **other)
    assert (output / "stages/captions/00000.jsonl").stat().st_mtime_ns == captions
    assert json.loads((output / "manifest.json").read_text())["stages"]["detections"]["settings"]["min_score"] == 0.3


def test_other_weights_under_the_same_name_are_refused(collection, tmp_path):
    output = tmp_path / "out"
    run(collection / "00000.tar", output)
    changed = {"detector": Part(lambda: ScriptedDetector(0.7), {"detector": "scripted", "min_score": 0.1})}
    with pytest.raises(DataError, match=r"detections of other settings \(min_score: 0.1 there, 0.7 asked\)"):
        run(collection, output, **changed)


def test_baseline_phrases_come_from_the_alt_text(collection, tmp_path):
    write_tar(tmp_path / "in/x.tar", {"a.jpg": encoded(), "a.txt": b"one two three four", "b.jpg": encoded()})
    counts = run(tmp_path / "in", tmp_path / "out", from_alt_text=True, source="ngrams")
    assert counts == {"shards": 1, "records": 1, "regions": 1, "boxes_dropped": 1, "left_out_text": 1}
    record = records(tmp_path / "out")["a"]
    assert record["queries"] == ["one two"] and "captions" not in record and record["alt_text"] == "one two three four"
    assert record["regions"][0]["source"] == "ngrams"
    assert not (tmp_path / "out/stages/captions").exists()


def test_captions_can_be_the_inputs_own(region_shards, tmp_path):
    run(region_shards, tmp_path / "out", captioner=KEPT_CAPTIONS)
    before, after = RegionDataset(region_shards, progress=False), RegionDataset(tmp_path / "out", progress=False)
    assert all(before.record(index).captions == after.record(index).captions for index in range(24))


def test_a_limit_takes_the_first_samples(collection, tmp_path):
    counts = run(collection, tmp_path / "out", limit=10)
    assert counts["records"] == 10 and counts["shards"] == 2
    assert sorted(records(tmp_path / "out")) == [f"{n:09d}" for n in (*range(7), 100, 101, 102)]


def test_what_cannot_be_labelled_is_one_sentence(collection, tmp_path):
    with pytest.raises(DataError, match="holds the input's own shards"):
        run(collection, collection)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is not empty and has no manifest.json"):
        run(collection, tmp_path / "full")
    with pytest.raises(DataError, match="no .tar shard and no image"):
        open_input(str(tmp_path / "full"))
    img2dataset_shard(tmp_path / "more/00000.tar")
    with pytest.raises(DataError, match="have the same name"):
        open_input([str(collection), str(tmp_path / "more")])
    with pytest.raises(DataError, match="no stage 'caption' here; choose among captions, phrases"):
        run(collection, tmp_path / "out", stages=["caption"])
    with pytest.raises(DataError, match="the stage detections is to run, and nothing was given"):
        run(collection, tmp_path / "out", detector=None)
    with scripted_job(tmp_path / "out").output.locked(), pytest.raises(DataError, match="another run is writing"):
        run(collection, tmp_path / "out")


def test_texts_are_found_wherever_they_are():
    assert parse_texts(None, b" alt \n", "x") == ({}, (), "alt")
    assert parse_texts(b'{"caption": "from the metadata"}', None, "x").alt_text == "from the metadata"
    assert parse_texts(b'{"caption": null, "captions": 3}', None, "x")[1:] == ((), "")
    assert parse_texts(b'{"captions": ["re", " "], "alt_text": "found"}', b"beside", "x")[1:] == (("re",), "found")


def test_a_run_killed_at_its_first_write_goes_on(collection, labelled, tmp_path):
    (tmp_path / "manifest.json.partial").write_text('{"form')
    run(collection, tmp_path)
    assert contents(tmp_path) == contents(labelled[0])


def test_killed_three_times_at_random_and_restarted_it_is_as_if_left_alone(collection, tmp_path):
    """The run is killed as a whole, without a chance to clean up, each time somewhere else."""
    context = multiprocessing.get_context("fork")  # the libraries are imported here already

    def started(output):
        process = context.Process(target=run, args=(collection, output, 0.02))
        process.start()
        return process, time.monotonic()

    process, start = started(tmp_path / "alone")
    process.join()
    assert process.exitcode == 0
    whole = time.monotonic() - start
    draw, kills = random.Random(int.from_bytes(os.urandom(4))), 0
    while kills < 3:
        process, start = started(tmp_path / "killed")
        time.sleep(draw.uniform(0, whole))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was through before: begin again
            assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
            shutil.rmtree(tmp_path / "killed")
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    run(collection, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")

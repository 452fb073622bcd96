"""Streaming: any source, the same batches over ranks, workers, lanes and restarts, broken records counted."""

import io
import json
import runpy
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import numpy as np
import pytest
import torch
from conftest import paint_record, write_shards

from encoder.data.batches import RegionBatches, batch_loader
from encoder.data.cache import ReadAhead, ShardCache
from encoder.data.reader import BrokenRecords, RegionDataset
from encoder.data.shards import expand_braces, find_shards, find_sources
from encoder.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "index_shards.py"


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def picture(index, kind="JPEG") -> bytes:
    encoded = io.BytesIO()
    paint_record(index)[0].save(encoded, kind)
    return encoded.getvalue()


def write_plain(path, first, count, broken=()):
    """What `img2dataset` writes: .jpg, .txt, .json of metadata; of `broken` ones the image is cut."""
    with tarfile.open(path, "w") as tar:
        for index in range(first, first + count):
            data = picture(index)
            add(tar, f"{index:09d}.jpg", data[:-40] if index in broken else data)
            add(tar, f"{index:09d}.txt", f"alt text {index}".encode())
            add(tar, f"{index:09d}.json", json.dumps({"key": str(index), "url": "x", "width": 9, "status": "success"}).encode())
    return path


@pytest.fixture
def plain(tmp_path):
    """Five shards of unlike sizes, 40 images without regions, and the list of their sizes."""
    folder, first, sizes = tmp_path / "plain", 0, {}
    folder.mkdir()
    for number, count in enumerate((3, 12, 7, 10, 8)):
        write_plain(folder / f"{number:05d}.tar", first, count)
        sizes[f"{number:05d}.tar"], first = count, first + count
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")


@pytest.fixture
def memory(plain):
    """The same shards in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    for path in plain.iterdir():
        system.pipe(f"/laion/{path.name}", path.read_bytes())
    yield "memory://laion"
    system.rm("/laion", recursive=True)


def texts(dataset):
    return [dataset.record(index).alt_text for index in range(len(dataset))]


def make(dataset, processor, **fields):
    return RegionBatches(dataset, processor, **{"batch_size": 8, "seed": 5, "window": 16, **fields})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- sources


def test_braces():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"] and expand_braces("plain") == ["plain"]
    with pytest.raises(DataError, match="the range {3..1} is empty"):
        expand_braces("{3..1}.tar")


def test_every_way_to_name_a_source(plain, memory):
    local = sorted(plain.glob("*.tar"))
    assert find_shards(str(plain / "{00000..00004}.tar")) == local
    urls = [f"{memory}/{path.name}" for path in local]
    assert find_shards(f"{memory}/{{00000..00004}}.tar") == urls
    assert [shard.replace("memory:///", "memory://") for shard in find_shards(f"{memory}/*.tar")] == urls
    assert [shard.replace("memory:///", "memory://") for shard in find_shards(memory)] == urls
    listed, remote = find_sources(plain / "sizes.json")[0], find_sources(f"{memory}/sizes.json")[0]
    assert listed.shards == local and remote.shards == urls and listed.counts == remote.counts == [3, 12, 7, 10, 8]
    (plain / "mix.yaml").write_text(f"{plain / 'sizes.json'}: 3\n{memory}/00001.tar: 0.5\n")
    mixed = find_sources(plain / "mix.yaml")
    assert [(source.shards, source.weight) for source in mixed] == [(local, 3.0), ([urls[1]], 0.5)]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "{", "cannot be parsed"),
        ("a.json", '{"a.tar": -1}', "a.tar has -1 records"),
        ("a.yaml", "- x", "holds no mapping"),
        ("a.yaml", "x: 0", "weight is 0; give a positive number"),
        ("a.yaml", "x: high", "weight is 'high'"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        find_sources(tmp_path / name)


def test_unknown_protocols_and_missing_files(tmp_path, memory, cache):
    for missing in (tmp_path / "no.json", "nowhere{0..3}.tar", f"{memory}/no*.tar"):
        with pytest.raises(FileNotFoundError):
            find_sources(missing)
    with pytest.raises(DataError, match="abc://x/a.tar cannot be opened by fsspec"):
        RegionDataset("abc://x/a.tar", cache=cache)
    with pytest.raises(DataError, match="no.tar cannot be fetched .FileNotFoundError"):
        RegionDataset(f"{memory}/no.tar", cache=cache)


# ---- samples


def test_images_without_regions_and_url_equals_local(plain, memory, cache):
    expected = [f"alt text {index}" for index in range(40)]
    for shards in (plain, plain / "sizes.json", f"{memory}/{{00000..00004}}.tar", f"{memory}/sizes.json"):
        dataset = RegionDataset(shards, cache=cache, progress=False)
        assert len(dataset) == 40 and texts(dataset) == expected and dataset.name(17) == "000000017"
        image, record = dataset[17]
        assert image.size == (record.width, record.height) == paint_record(17)[0].size
        assert (record.regions, record.captions, record.image) == ((), (), "000000017.jpg")


def test_alt_text_beside_a_record(tmp_path):
    """From the record, else from the .txt, else from img2dataset's JSON; a sample without any text is a problem."""
    fields = paint_record(0)[1]
    bare = {key: value for key, value in fields.items() if key != "captions"}
    cases = {
        "both": ({**fields, "alt_text": "own"}, b"txt"),
        "txt": (fields, b"txt"),
        "only_alt": (bare, b"txt"),
        "plain": ({"caption": " from json "}, None),
        "none": ({"caption": None}, b" "),
        "lacking": (bare, None),
        "latin": (fields, b"\xe4"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, (label, text) in cases.items():
            add(tar, f"{name}.png", picture(0, "PNG"))
            if "image" in label:
                label = {**label, "image": f"{name}.png"}
            add(tar, f"{name}.json", json.dumps(label).encode())
            if text is not None:
                add(tar, f"{name}.txt", text)
    dataset = RegionDataset(tmp_path / "a.tar", on_error="collect")
    assert [dataset.name(index) for index in range(4)] == ["both", "txt", "only_alt", "plain"]
    assert texts(dataset) == ["own", "txt", "txt", "from json"]
    assert len(dataset.record(1).captions) == 2 and dataset.record(2).captions == ()
    shown = "\n".join(dataset.problems)
    assert "none: neither the .txt nor the .json has a caption" in shown
    assert "lacking.json: key 'captions' is missing" in shown and "latin.txt is not UTF-8" in shown


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_recaption_ratio(region_shards, tiny_processor, ratio):
    dataset = RegionDataset(region_shards, progress=False)
    batches = RegionBatches(dataset, tiny_processor, 8, recaption_ratio=ratio)
    record = dataset.record(0)
    record = type(record)(record.image, record.width, record.height, ("one", "two"), (), "alt")
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(batches.text_of(record, generator) for _ in range(4000))
    assert abs(drawn["alt"] / 4000 - (1 - ratio)) < 0.03 and abs(drawn["one"] - drawn["two"]) < 300
    for captions, alt_text, only in (((), "alt", "alt"), (("one",), "", "one")):
        record = type(record)("a.png", 1, 1, captions, (), alt_text)
        assert {batches.text_of(record, generator) for _ in range(50)} == {only}


# ---- batches


@pytest.fixture
def mixed(plain, region_shards, tmp_path, cache):
    (tmp_path / "mix.yaml").write_text(f"{region_shards}: 1\n{plain / 'sizes.json'}: 2\n")
    return RegionDataset(tmp_path / "mix.yaml", cache=cache, progress=False)


@pytest.mark.parametrize("world_size, lanes, workers", [(1, 1, 2), (2, 4, 0), (4, 2, 0), (8, 8, 0)])
def test_ranks_and_workers_split_the_batch(mixed, tiny_processor, world_size, lanes, workers):
    """Joined over ranks, each step's images are those of the one-process batch, in order, whoever loads them."""
    one = make(mixed, tiny_processor, lanes=lanes)
    ranks = [make(mixed, tiny_processor, rank=rank, world_size=world_size, lanes=lanes) for rank in range(world_size)]
    loaded = [list(batch_loader(batches, 0, 4, workers)) for batches in ranks]
    for step in range(4):
        whole = one[step]
        assert torch.equal(torch.cat([batches[step]["pixel_values"] for batches in loaded]), whole["pixel_values"])
        share = 8 // world_size
        indices = [index for rank in range(world_size) for index in one.indices(step, rank * share, (rank + 1) * share)]
        assert indices == one.indices(step)
        assert sum(len(batches[step]["boxes"]) for batches in loaded) == len(whole["boxes"])


def test_an_epoch_over_ranks_counts_every_image_once(plain, tiny_processor, cache):
    dataset = RegionDataset(plain / "sizes.json", cache=cache)
    for world_size, lanes in ((2, 1), (4, 4), (2, 8)):
        ranks = [make(dataset, tiny_processor, rank=rank, world_size=world_size, lanes=lanes) for rank in range(world_size)]
        share = 8 // world_size
        for epoch in range(2):
            steps = range(5 * epoch, 5 * epoch + 5)
            seen = [
                i
                for step in steps
                for r, batches in enumerate(ranks)
                for i in batches.indices(step, r * share, r * share + share)
            ]
            assert sorted(seen) == list(range(40))


def test_resumes_at_any_step_with_other_workers(mixed, tiny_processor):
    expected = list(batch_loader(make(mixed, tiny_processor, lanes=2), 0, 9))
    for first, workers in ((1, 2), (4, 3), (8, 1)):
        loaded = list(batch_loader(make(mixed, tiny_processor, lanes=2), first, 9, workers))
        assert len(loaded) == 9 - first and all(equal(a, b) for a, b in zip(loaded, expected[first:], strict=True))


def test_images_without_regions_give_empty_region_tensors(plain, tiny_processor, cache):
    batch = make(RegionDataset(plain, cache=cache, progress=False), tiny_processor)[0]
    assert batch["pixel_values"].shape == (8, 3, 32, 32) and batch["boxes"].shape == (0, 4)


def test_other_data_is_another_run(plain, mixed, tiny_processor, cache):
    dataset = RegionDataset(plain / "sizes.json", cache=cache)
    identity = make(dataset, tiny_processor).identity()
    assert identity == make(RegionDataset(plain, progress=False), tiny_processor).identity()  # however it is named
    dataset.counts[0][:2] = [4, 11]
    assert make(dataset, tiny_processor).identity() != identity != make(mixed, tiny_processor).identity()


# ---- broken records


@pytest.fixture
def damaged(plain):
    """Records 5, 20 and 39 cannot be decoded, sizes known and unknown."""
    write_plain(plain / "00001.tar", 3, 12, broken=(5,))
    write_plain(plain / "00002.tar", 15, 7, broken=(20,))
    write_plain(plain / "00004.tar", 32, 8, broken=(39,))
    return plain


@pytest.mark.parametrize("name", ["", "sizes.json"])
def test_broken_records_are_replaced_counted_and_named(damaged, tiny_processor, cache, tmp_path, name):
    logs = [tmp_path / "broken" / f"rank_{rank:05d}.txt" for rank in range(2)]
    for rank, log in enumerate(logs):
        dataset = RegionDataset(damaged / name, cache=cache, progress=False, broken=BrokenRecords(3, log))
        batches = make(dataset, tiny_processor, rank=rank, world_size=2)
        loaded = list(batch_loader(batches, 0, 10, workers=2 * rank))
        assert all(len(batch["pixel_values"]) == 4 for batch in loaded)
        assert dataset.sample(39)[1].alt_text == "alt text 32"  # the next one, from the shard's start on
        assert dataset.where(39).endswith("00004.tar, 000000032") and dataset.where(38).endswith(", 000000038")
    lines = {line for log in logs for line in log.read_text().splitlines()}
    assert len(lines) == 3 and all("cannot be read (OSError); replace it" in line for line in lines)
    assert {line.split(",")[1].strip()[:9] for line in lines} == {"000000005", "000000020", "000000039"}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_records_stop_the_run_with_the_list(damaged, tiny_processor, cache, tmp_path, workers):
    broken = BrokenRecords(2, tmp_path / "broken" / "rank_00000.txt")
    batches = make(RegionDataset(damaged / "sizes.json", cache=cache, broken=broken), tiny_processor)
    with pytest.raises(
        DataError, match="^3 broken records, max_broken is 2, listed in .*broken: .*00001.tar, 000000005.*; "
    ) as caught:
        list(batch_loader(batches, 0, 6, workers))
    assert "\n" not in str(caught.value) and "000000020" in str(caught.value)
    with pytest.raises(DataError, match="^[^;]*image 0000000.*jpg cannot be read"):  # none accepted: the first one stops it
        list(batch_loader(make(RegionDataset(damaged / "sizes.json", cache=cache), tiny_processor), 0, 6, workers))


def test_a_shard_that_is_not_what_its_list_says(plain, cache):
    write_plain(plain / "00003.tar", 22, 9)
    dataset = RegionDataset(plain / "sizes.json", cache=cache, broken=BrokenRecords(100))
    with pytest.raises(DataError, match="00003.tar holds 9 samples, its list of sizes says 10"):
        dataset.sample(25)
    (plain / "00001.tar").write_bytes((plain / "00001.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match="00001.tar is truncated at byte 5000"):
        RegionDataset(plain / "sizes.json", cache=cache).sample(4)


# ---- cache


def test_the_cache_is_bounded_and_never_fetches_twice(memory, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_gb=60e-6)  # room for two of the five
    for number in range(5):
        shard = f"{memory}/{number:05d}.tar"
        assert len(cache.table(shard).rows) == (3, 12, 7, 10, 8)[number]
        assert {path.stem for path in cache.folder.glob("*.npz")} == {path.stem for path in cache.folder.glob("*.tar")}
        held = [path.stat().st_size for path in cache.folder.glob("*.tar")]
        assert held and (sum(held) <= 60e3 or len(held) == 1)
    system = fsspec.filesystem("memory")
    system.rm("/laion/00004.tar")
    assert cache.open(f"{memory}/00004.tar").read(9) == b"000000032"
    with pytest.raises(DataError, match="cannot be fetched"):
        RegionDataset(f"{memory}/00004.tar", cache=ShardCache(tmp_path / "other"))
    system.pipe("/laion/00004.tar", b"")


def test_a_hiccup_is_tried_again_and_said(memory, cache, monkeypatch, capsys):
    real, calls = fsspec.implementations.memory.MemoryFileSystem.get_file, []

    def get_file(system, remote, local, **kwargs):
        calls.append(remote)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        real(system, remote, local, **kwargs)
        if len(calls) == 2:  # as if the connection had closed early
            Path(local).write_bytes(Path(local).read_bytes()[:700])

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "get_file", get_file)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert len(cache.table(f"{memory}/00000.tar").rows) == 3 and len(calls) == 3
    said = capsys.readouterr().err
    assert "reset by peer" in said and "700 of " in said and said.count("trying again in") == 2


def test_reading_ahead_fetches_what_comes_next(memory, tiny_processor, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    batches = make(RegionDataset(f"{memory}/sizes.json", cache=cache), tiny_processor)
    wanted = batches.shards_ahead(0)
    read = {int(np.searchsorted(batches.dataset._ends, i, side="right")) for step in range(4) for i in batches.indices(step)}
    assert {batches.dataset.shards[number] for number in read} == set(wanted)  # this window and the next: 32 records
    ahead = ReadAhead(cache)
    ahead.want(wanted)
    for _ in range(500):
        if len(list(cache.folder.glob("*.npz"))) == len(wanted):
            break
        time.sleep(0.02)
    ahead.close()
    assert len(list(cache.folder.glob("*.tar"))) == len(wanted)
    assert len(list(batch_loader(batches, 0, 3))) == 3


# ---- the script


def test_index_shards(plain, memory, tmp_path, monkeypatch, capsys):
    def run(*arguments) -> int:
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), *map(str, arguments), "--workers", "1", "--shard_cache", str(tmp_path / "c")]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code

    expected = json.loads((plain / "sizes.json").read_text())
    assert run(plain, "--out", plain / "new.json") == 0 and json.loads((plain / "new.json").read_text()) == expected
    assert "40 records in 5 shards, 0 problems" in capsys.readouterr().out
    (plain / "00002_stats.json").write_text('{"count": 20, "successes": 11}')
    assert run(plain, "--out", tmp_path / "elsewhere.json") == 0
    counts = json.loads((tmp_path / "elsewhere.json").read_text())
    assert list(counts.values()) == [3, 12, 11, 10, 8] and find_sources(tmp_path / "elsewhere.json")[0].shards[0].is_file()
    assert run(f"{memory}/{{00000..00001}}.tar", "--out", tmp_path / "remote.json") == 0
    assert json.loads((tmp_path / "remote.json").read_text()) == {f"{memory}/00000.tar": 3, f"{memory}/00001.tar": 12}
    (plain / "00003_stats.json").write_text('{"counts": {"records": 10}, "missing": []}')  # prepare_data.py's, label_regions.py's
    (plain / "00004_stats.json").write_text('{"succ')
    assert run(plain, "--out", tmp_path / "made" / "here.json") == 0
    assert list(json.loads((tmp_path / "made" / "here.json").read_text()).values()) == [3, 12, 11, 10, 8]
    (tmp_path / "bad.json").write_text("{")
    assert run(plain, "--out", tmp_path / "bad.json") == 2 and "bad.json is no list of an earlier" in capsys.readouterr().err
    write_shards(tmp_path / "cut", 8)
    cut = tmp_path / "cut" / "00000.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    assert run(cut, "--out", tmp_path / "cut.json") == 1 and "problem: " in capsys.readouterr().out


def test_telling_of_many_shards_does_not_wait_for_the_readers(tmp_path):
    class Idle(ShardCache):
        def prefetch(self, shard):
            time.sleep(3600)

    ahead = ReadAhead(Idle(tmp_path))
    start = time.monotonic()
    ahead.want([f"memory://some/long/path/to/shards/of/a/source/{number:08d}.tar" for number in range(4000)])
    ahead.close()
    assert time.monotonic() - start < 30  # a pipe holds about 800 of them

"""Shards read by seeking: every record and image as written, broken archives and members named."""

import io
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image, features

from encoder.data.reader import RegionDataset
from encoder.data.shards import find_shards
from encoder.errors import DataError


def names(dataset: RegionDataset) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


def image_bytes(size=(20, 16), seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def record(name, size=(20, 16), **changes):
    region = {"box": [1, 1, 10, 10], "phrases": ["bus"]}
    base = {"image": name, "width": size[0], "height": size[1], "captions": [f"caption {name}"], "regions": [region]}
    return json.dumps({**base, **changes}).encode()


def write_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key, seed=0, **changes):
    return [(f"{key}.png", image_bytes(seed=seed)), (f"{key}.json", record(f"{key.split('/')[-1]}.png", **changes))]


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        members = [member for index in range(4) for member in sample(f"{shard}{index}", seed=10 * shard + index)]
        write_tar(tmp_path / f"{shard:05d}.tar", members + [(f"{shard}3.txt", b"extra")])
    return tmp_path


def test_every_record_by_index(shards):
    dataset = RegionDataset(shards)
    assert len(dataset) == 12
    for index in np.random.default_rng(0).permutation(12).tolist():
        image, found = dataset[index]
        shard, place = divmod(index, 4)
        assert found.image == f"{shard}{place}.png" and found.regions[0].phrases == ("bus",)
        expected = Image.open(io.BytesIO(image_bytes(seed=10 * shard + place)))
        assert image.mode == "RGB" and image.tobytes() == expected.tobytes()


def test_ways_to_name_shards(shards):
    everything = sorted(shards.glob("*.tar"))
    assert find_shards(shards) == find_shards(str(shards / "*.tar")) == find_shards([shards / "*.tar"]) == everything
    assert find_shards([everything[2], everything[0]]) == [everything[2], everything[0]]
    for missing in (shards / "no.tar", str(shards / "x*.tar"), [], shards.parent / "nowhere"):
        with pytest.raises(FileNotFoundError):
            find_shards(missing)


def _names(dataset):
    return [dataset[index][1].image for index in range(len(dataset))]


def test_pickled_and_forked(shards):
    dataset = RegionDataset(shards)
    expected = _names(dataset)
    assert _names(pickle.loads(pickle.dumps(dataset))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_names, [dataset, dataset]) == [expected, expected]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_jpeg(tmp_path, tar_format):
    key = f"{'folder/' * 20}{'k' * 120}"
    name = key.split("/")[-1]
    write_tar(
        tmp_path / "a.tar",
        [(f"{key}.jpg", image_bytes(kind="JPEG")), (f"{key}.json", record(f"{name}.jpg"))],
        tar_format,
    )
    dataset = RegionDataset(tmp_path / "a.tar")
    assert len(dataset) == 1 and dataset[0][0].size == (20, 16) and names(dataset) == [key]


@pytest.mark.parametrize(
    "members, message",
    [
        ([("../a.png", b"x")], r"member path '\.\./a\.png'"),
        ([("/etc/a.png", b"x")], "member path '/etc/a.png'"),
        ([("a.png", image_bytes())], r"sample a has only png; add a \.json"),
        ([("a.json", record("a.png"))], "sample a has only json; add an image"),
        (sample("a", image="b.png"), "image is 'b.png', beside it lies a.png"),
        (sample("a", width=21), "width and height say 21x16, image a.png is 20x16"),
        (sample("a", regions=[{"phrases": ["bus"]}]), r"a.json: key 'regions\[0\].box' is missing"),
        ([("a.png", b"no image"), ("a.json", record("a.png"))], "image a.png cannot be read"),
        ([("a.png", b""), ("a.json", record("a.png"))], "image a.png cannot be read"),
    ],
)
def test_broken_samples_are_named(tmp_path, members, message):
    write_tar(tmp_path / "bad.tar", [*sample("good0"), *members, *sample("good1")])
    with pytest.raises(DataError, match=message) as caught:
        RegionDataset(tmp_path)
    assert "bad.tar" in str(caught.value) and "\n" not in str(caught.value)
    collected = RegionDataset(tmp_path, on_error="collect")
    assert names(collected) == ["good0", "good1"] and collected.problems == [str(caught.value)]


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="link"):
        RegionDataset(tmp_path)


def test_a_tar_cut_anywhere_is_truncated(tmp_path):
    whole = tmp_path / "whole.tar"
    write_tar(whole, [*sample("a"), *sample("b"), *sample("c")])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        end = max(member.offset_data + member.size for member in tar.getmembers())
    for cut in [0, 100, 512, 600, *range(1000, end, 257), end, end + 511]:
        broken = tmp_path / "cut.tar"
        broken.write_bytes(data[:cut])
        with pytest.raises(DataError, match="cut.tar .*byte") as caught:
            RegionDataset(broken)
        assert str(cut) in str(caught.value), (cut, str(caught.value))
        collected = RegionDataset(broken, on_error="collect")
        assert collected.problems and set(names(collected)) <= {"a", "b", "c"}
        for index in range(len(collected)):
            collected[index]


def test_a_broken_header_in_the_middle(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [*sample("a"), *sample("b")])
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.png").offset
    data = bytearray(path.read_bytes())
    data[offset + 148 : offset + 156] = b"99999999"  # its checksum
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"broken member header at byte {offset}"):
        RegionDataset(path)


def test_not_a_tar_and_nothing_in_it(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    with pytest.raises(DataError, match="not a whole uncompressed tar"):
        RegionDataset(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="not a whole uncompressed tar"):
        RegionDataset(tmp_path / "packed.tar")
    write_tar(tmp_path / "none.tar", [])
    with pytest.raises(DataError, match="hold no record"):
        RegionDataset(tmp_path / "none.tar")
    with pytest.raises(DataError, match="on_error is 'skip'"):
        RegionDataset(tmp_path / "none.tar", on_error="skip")


def test_broken_pixels_are_named_when_read(tmp_path):
    data = bytearray(image_bytes())
    del data[len(data) // 2 :]
    write_tar(tmp_path / "a.tar", [("a.png", bytes(data)), ("a.json", record("a.png"))])
    dataset = RegionDataset(tmp_path)
    with pytest.raises(DataError, match=r"a\.tar, a: image a\.png cannot be read"):
        dataset[0]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_what_an_avif_decoder_raises_is_a_broken_image_too(tmp_path):
    """Under a .jpg name, as on the web; Pillow goes by the content, and this decoder says RuntimeError."""
    data = image_bytes(kind="AVIF")
    start = data.index(b"mdat") + 4
    write_tar(tmp_path / "a.tar", [("a.jpg", data[:start] + b"\xff" * 30 + data[start + 30 :]), ("a.json", record("a.jpg"))])
    with pytest.raises(DataError, match=r"a\.tar, a: image a\.jpg cannot be read \(RuntimeError\)"):
        RegionDataset(tmp_path)[0]

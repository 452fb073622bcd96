"""Mixtures: how much of each file an epoch has, which records, and a training on one."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from safetensors.torch import load_file

from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.config import MllmConfig, check_identity, load_config
from mllm.data import ConversationDataset
from mllm.mixture import Source, expand, read_mixture, sources_of
from mllm.model import build_mllm
from mllm.training import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two files with pictures of the same names in folders of their own, and one of text."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("a", 0), ("b", 1)):
        path = write_conversations(folder / name, 5, seed=seed)
        text = path.read_text().replace(f'"{seed}_', '"')
        (folder / f"{name}.json").write_text(text)
        for picture in (folder / name / "images").iterdir():
            picture.rename(picture.with_name(picture.name.removeprefix(f"{seed}_")))
    turns = [{"from": "human", "value": "What is a square?"}, {"from": "gpt", "value": "four sides"}]
    lines = [json.dumps({"id": f"t{index}", "conversations": turns}) for index in range(4)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    write_clip(folder / "clip")
    return folder


def entries(world, **more) -> list:
    return [
        {"path": str(world / "a.json"), "images": str(world / "a/images"), "weight": 2.4},
        {"path": str(world / "b.json"), "images": str(world / "b/images"), "count": 3} | more,
        str(world / "text.jsonl"),
    ]


def test_weights_and_counts_are_kept_by_the_seed(world):
    sources = sources_of(entries(world))
    records, order, lines = read_mixture(sources, 0, progress=False)
    drawn = Counter((records[index]["_where"].split(",")[0], records[index]["id"]) for index in order)
    by_file = {name: [n for (path, _), n in drawn.items() if path.endswith(name)] for name in ("a.json", "b.json", "text.jsonl")}
    assert sorted(by_file["a.json"]) == [2, 2, 2, 3, 3] and by_file["b.json"] == [1] * 3 and by_file["text.jsonl"] == [1] * 4
    assert order[:10] == [0, 1, 2, 3, 4] * 2 and order[-4:] == sorted(order[-4:]) and len(records) == 5 + 3 + 4
    assert lines == [
        f"{world / 'a.json'}: 12 of 5 conversations an epoch (weight 2.4)",
        f"{world / 'b.json'}: 3 of 5 conversations an epoch (count 3)",
        f"{world / 'text.jsonl'}: 4 of 4 conversations an epoch",
    ]
    assert read_mixture(sources, 0, progress=False)[1] == order
    rests = {tuple(sources[0].draw(1000, place, seed)[2000:]) for seed in range(3) for place in range(2)}
    assert len(rests) == 6 and all(len(rest) == 400 for rest in rests)


@pytest.mark.parametrize(("weight", "number", "wanted"), [(0.2, 10, 2), (1, 7, 7), (3, 7, 21), (2.5, 7, 18), (0.5, 3, 2)])
def test_weight_is_how_often_a_record_comes(weight, number, wanted):
    counts = Counter(Source("x.json", weight=weight).draw(number, 0, 0))
    assert sum(counts.values()) == wanted and {counts[n] for n in range(number)} <= {int(weight), int(weight) + 1}


def test_a_weight_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="weight 0.1 of 5 conversations is none"):
        Source("x.json", weight=0.1).draw(5, 0, 0)


def test_pictures_of_like_names_in_two_folders_stay_apart(world):
    mllm = build_mllm(MllmConfig(**recipe(world, data=entries(world), images=None)))
    arguments = mllm.tokenizer, mllm.settings.image, BoxCodec(), mllm.num_image_tokens, 256
    dataset = ConversationDataset(entries(world), None, *arguments, progress=False)
    assert len(dataset) == dataset.num_records == 12 + 3 + 4 and len(dataset.image_files) == 8
    assert dataset.image_path(0) == world / "a/images/0000.png" and dataset.image_path(7).parent == world / "b/images"
    twin = dataset.image_files.index(dataset.image_files[7])
    assert twin < 5 and not torch.equal(dataset.pixels(twin), dataset.pixels(7))
    again = ConversationDataset(entries(world), None, *arguments, progress=False)
    assert all((dataset[i].ids == again[i].ids).all() and dataset[i].images == again[i].images for i in range(19))


def test_a_recipe_with_a_mixture_trains_prints_its_counts_and_resumes_bit_equal(world, tmp_path, capfd):
    fields = recipe(world, data=entries(world), images=None, max_steps=4, batch_size=3, pack=True, max_length=512)
    whole = train(MllmConfig(**fields | {"output": str(tmp_path / "whole")}))
    assert "b.json: 3 of 5 conversations an epoch (count 3)" in capfd.readouterr().out
    part = MllmConfig(**fields | {"output": str(tmp_path / "part")})
    train(part)
    (tmp_path / "part" / "grounding.json").unlink()
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    train(part)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "part"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(DataError, match="were made with data = "):
        check_identity(tmp_path / "part", MllmConfig(**fields | {"data": entries(world, count=4)}))


def test_a_yaml_file_stands_for_its_entries(world, tmp_path):
    lines = [json.dumps(entry) for entry in entries(world)]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("".join(f"- {line}\n" for line in lines))
    assert expand([str(mixture), "more.json"]) == [*entries(world), "more.json"]
    config = load_config(None, recipe(world, data=[str(mixture)], images=None))
    assert config.identity()["data"] == entries(world)
    assert sources_of([Path("x.json")], "pictures") == [Source("x.json", "pictures")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.json", "wieght": 2}, "data has an entry with 'wieght'; did you mean 'weight'"),
        ({"images": "x"}, "names no path"),
        ({"path": "a.json", "weight": 0}, "a.json: weight is 0; give a number above 0"),
        ({"path": "a.json", "count": 1.5}, "a.json: count is 1.5; give a whole number above 0"),
        ({"path": "a.json", "count": 1, "weight": 1}, "weight and count are both given"),
        ({"path": "a.json", "importer": "kosmos"}, "importer 'kosmos' is not known; choose one of conversations, llava"),
        ("absent.yaml", "mixture absent.yaml does not exist"),
    ],
)
def test_a_bad_entry_is_refused_when_the_recipe_is_read(entry, message):
    with pytest.raises(DataError, match=message):
        MllmConfig(data=[entry], output="out", tower="t", llm="l")


def test_bad_files_of_a_mixture(world, tmp_path):
    for text, message in (("a: 1", "holds no list"), ("- [", "is not YAML"), ("[]", "holds no list")):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            expand([tmp_path / "m.yaml"])
    for folder, message in ((None, "has a picture, but images is not given"), ("nowhere", "nowhere does not exist")):
        with pytest.raises(DataError, match=message):
            read_mixture(sources_of([str(world / "a.json")], folder), 0, progress=False)

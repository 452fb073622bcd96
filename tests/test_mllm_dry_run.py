"""What a dry run tells is what the run then does: parts, steps, and the first batch, token by token and box by box."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image

from encoder.errors import DataError
from mllm import training
from mllm.box_text import BoxCodec
from mllm.config import MllmConfig
from mllm.dry_run import dry_run, duration, first_batch, memory, outline, readable, sample_of
from mllm.model import build_mllm
from mllm.records import read_records
from mllm.trainer import LengthSampler
from mllm.training import read_dataset, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 9, text_only=2)
    write_clip(folder / "clip")
    train(MllmConfig(**recipe(folder, output=str(folder / "base"), max_steps=1, save_every=0)))
    return folder


def test_the_script_tells_and_draws_and_trains_nothing(world, tmp_path):
    fields = {"train": ["projector", "llm_lora"], "lora_rank": 4, "llm_bits": 4, "max_steps": 0, "epochs": 2}
    values = recipe(world, model=str(world / "base"), output=str(tmp_path / "run"), **fields)
    values["val_data"] = values["data"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "scripts/finetune_mllm.py", str(tmp_path / "recipe.yaml"), "--dry-run", "--processes", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
    assert Image.open(tmp_path / "run" / "first_batch.png").size[0] > 1000  # four rows side by side
    # LoRA of rank 4 on seven layers of two blocks of width 32 and 96: 4 (in + out) each.
    learned = 2 * 4 * (4 * 64 + 3 * 128)
    assert re.search(rf"^llm_lora +{learned / 1e6:.2f} +0.00$", done.stdout, re.M)
    assert re.search(r"^tower +0.00 +0.0\d$", done.stdout, re.M)
    # 11 rows in batches of 4 on two processes: two steps an epoch.
    assert "4 steps of 8 rows" in done.stdout and "2 steps an epoch" in done.stdout
    assert re.search(r"^ZeRO-2, 2 processes", done.stdout, re.M) and "ZeRO-3" not in done.stdout


@pytest.mark.parametrize("fields", [{}, {"share_pictures": True, "batch_size": 2}, {"group_by_length": True, "batch_size": 2}])
def test_the_first_batch_is_the_one_that_training_meets_first(world, fields, tmp_path, monkeypatch):
    config = MllmConfig(**recipe(world, output=str(tmp_path), max_steps=1, **fields))
    mllm = outline(config)
    dataset = read_dataset(config, mllm, config.data)
    told = first_batch(config, dataset)
    seen = []
    real = training.MllmTrainer.training_step

    def watched(self, model, inputs, *arguments):
        seen.append(inputs)
        return real(self, model, inputs, *arguments)

    monkeypatch.setattr(training.MllmTrainer, "training_step", watched)
    train(config)
    mark = mllm.tokenizer.convert_tokens_to_ids("<image>")
    for row, ids, labels in zip(told, seen[0]["input_ids"].tolist(), seen[0]["labels"].tolist(), strict=False):
        assert row.ids[row.ids != mark].tolist() == [i for i in ids if i not in (mark, mllm.tokenizer.pad_token_id)]
        assert row.ids[row.supervised].tolist() == [label for label in labels if label != -100]


def test_lengths_are_grouped_over_the_step_of_all_processes(world, tmp_path):
    """The first rows of the order that three processes share are those of the first of them."""
    config = MllmConfig(**recipe(world, output=str(tmp_path), group_by_length=True, batch_size=2, gradient_accumulation=1))
    dataset = read_dataset(config, outline(config), config.data)
    orders = {count: list(LengthSampler(2 * count, dataset.lengths.tolist(), lambda: config.seed)) for count in (1, 3)}
    assert orders[1][:2] != orders[3][:2] and sorted(orders[3]) == list(range(len(dataset)))
    for count, order in orders.items():
        rows = first_batch(config, dataset, count)
        assert [row.ids.tolist() for row in rows] == [dataset[index].ids.tolist() for index in order[:2]]
    longest = dataset.lengths[orders[3]].reshape(-1)[:6]
    assert (longest[:-1] >= longest[1:]).all()


def test_a_row_is_read_with_its_answers_marked_and_its_boxes_back(world, tmp_path):
    config = MllmConfig(**recipe(world, output=str(tmp_path)))
    mllm = outline(config)
    dataset = read_dataset(config, mllm, config.data)
    record = read_records(world / "conversations_0.json")[0]
    text = readable(dataset[0], mllm)
    answers = re.findall("\u00ab(.*?)\u00bb", text)
    codec, geometry = BoxCodec("int1000"), dataset.image.geometry(record["width"], record["height"])
    said = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    for answer, value in zip(answers, said, strict=True):
        if value.startswith("<box"):
            box = torch.tensor(record["regions"][int(value[5])]["box"], dtype=torch.float64)
            assert (codec.decode(answer)[0] - geometry.boxes_to_model(box)).abs().max() < 1e-3
        else:
            assert answer == f" {value}</s>"
    assert text.startswith("<s>USER: <image>") and re.sub("[\u00ab\u00bb]", "", text) == mllm.tokenizer.decode(dataset[0].ids)


def test_points_and_boxes_of_the_questions_are_drawn(world, tmp_path):
    """Read back from the words to half a step of the square's 40 px."""
    name = sorted(path.name for path in (world / "images").glob("*.png"))[0]
    turns = [{"from": "human", "value": "<image>\nWhat is <region:0>, <region:1>?"}, {"from": "gpt", "value": "a square"}]
    regions = [{"point": [20, 30]}, {"box": [4, 6, 30, 33]}]
    (tmp_path / "one.json").write_text(json.dumps([{"id": "a", "image": name, "conversations": turns, "regions": regions}]))
    config = MllmConfig(**recipe(world, output=str(tmp_path), data=[str(tmp_path / "one.json")]))
    mllm = outline(config)
    dataset = read_dataset(config, mllm, config.data)
    box, point = sample_of(dataset[0], readable(dataset[0], mllm), dataset, BoxCodec()).regions
    assert box.point is None and box.box == pytest.approx((4, 6, 30, 33), abs=0.05)
    assert point.point == pytest.approx((20, 30), abs=0.05)


def test_more_processes_hold_less_and_take_fewer_steps(world, tmp_path):
    config = MllmConfig(**recipe(world, output=str(tmp_path), max_steps=0, max_length=64, train=["projector", "llm", "tower"]))
    mllm = outline(config)
    dataset = read_dataset(config, mllm, config.data)
    one, eight = (list(memory(config, mllm.model, count)) for count in (1, 8))
    together = [[float(line.split()[-1]) for line in table[1:]] for table in (one, eight)]
    assert together[0][0] == together[1][0] and together[1][3] <= together[1][2] <= together[1][1]
    assert "3 steps of 4 rows" in list(duration(config, dataset, 1))[-1]
    assert "1 steps of 16 rows" in list(duration(config, dataset, 4))[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_layer": 7}, "feature_layer is 7, but the tower"),
        ({"model": "base", "geometry": "squash"}, "geometry is squash, but the MLLM .* was trained with pad"),
        ({"model": "base", "codec": "float2"}, "codec is float2, but the MLLM .* was trained with int1000"),
    ],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(world, fields, message, tmp_path):
    fields = fields | ({"model": str(world / fields["model"])} if "model" in fields else {})
    config = MllmConfig(**recipe(world, output=str(tmp_path), **fields))
    for act in (outline, train):
        with pytest.raises(DataError, match=message):
            act(config)


def test_a_run_that_goes_on_from_an_adapter(world, tmp_path):
    adapter = {"train": ["projector", "llm_lora"], "lora_rank": 4, "save_adapter": True, "max_steps": 1, "save_every": 0}
    train(MllmConfig(**recipe(world, model=str(world / "base"), output=str(tmp_path / "adapter"), **adapter)))
    config = MllmConfig(**recipe(world, model=str(tmp_path / "adapter"), output=str(tmp_path / "on"), train=["projector"]))
    told, real = (dict(mllm.model.named_parameters()) for mllm in (outline(config), build_mllm(config)))
    assert {name: value.shape for name, value in told.items()} == {name: value.shape for name, value in real.items()}


def test_a_run_of_no_process_is_refused(world, tmp_path):
    with pytest.raises(DataError, match="processes is 0; give 1 or more"):
        dry_run(MllmConfig(**recipe(world, output=str(tmp_path))), processes=0)


def test_the_number_of_processes_is_of_a_dry_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune_mllm.py", "r.yaml", "--processes", "8"])
    with pytest.raises(DataError, match="--processes is of --dry-run alone"):
        runpy.run_path("scripts/finetune_mllm.py")["main"]()

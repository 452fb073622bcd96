import json
import shutil

import pytest
import torch
import yaml
from mllm_fixtures import recipe, write_clip, write_conversations
from safetensors.torch import load_file

from encoder.errors import DataError
from mllm import training
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig, load_config
from mllm.data import ConversationDataset, pixel_collator
from mllm.features import CachedTower, cache_features, feature_collator, measure_features, sample_features
from mllm.model import build_mllm
from mllm.training import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 16, text_only=2)
    write_conversations(folder, 4, seed=1)
    write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(world):
    return train(MllmConfig(**recipe(world, output=str(world / "whole"), report_to="tensorboard")))


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_run_writes_a_folder_that_loads(world, uninterrupted):
    model, _, settings = load_mllm(uninterrupted)
    assert settings.trained == [["llm", "projector"]] and settings.tower_path == str(world / "clip")
    assert sorted(p.name for p in uninterrupted.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert list((uninterrupted / "tensorboard").iterdir())
    before = build_mllm(MllmConfig(**recipe(world)))
    moved = (model.lm_head.weight - before.model.lm_head.weight).abs().max()
    assert moved > 1e-3
    # The frozen tower is what it was, rounded to what is saved.
    for name, value in before.model.model.vision_tower.state_dict().items():
        assert torch.equal(value.bfloat16().float(), model.model.vision_tower.state_dict()[name]), name


def test_the_same_command_again_does_nothing_when_finished(world, uninterrupted, capsys):
    stamp = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    train(MllmConfig(**recipe(world, output=str(uninterrupted), report_to="tensorboard")))
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("cached", [False, True])
def test_resumed_equals_uninterrupted_bit_by_bit(world, uninterrupted, cached, tmp_path, monkeypatch):
    fields = recipe(world, output=str(tmp_path / "run"), cache_features=cached, cache_folder=str(tmp_path / "cache"))
    whole = train(MllmConfig(**{**fields, "output": str(tmp_path / "whole")})) if cached else uninterrupted
    real = training.MllmTrainer.training_step
    steps = []

    def killed_in_step_four(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.MllmTrainer, "training_step", killed_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        train(MllmConfig(**fields))
    monkeypatch.undo()
    # As if killed while it wrote its next checkpoint: that one is not to be used.
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()
    assert_equal_weights(train(MllmConfig(**fields)), whole)
    assert steps == [0, 1, 2, 3]


def test_a_checkpoint_of_another_configuration_is_refused(world, uninterrupted):
    with pytest.raises(DataError, match="run.json: the checkpoints here were made with learning_rate = 0.001, this run has 0.5"):
        train(MllmConfig(**recipe(world, output=str(uninterrupted), learning_rate=0.5)))


def test_another_number_of_processes_is_refused_until_it_is_finished(world, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    saved = json.loads((output / "run.json").read_text())
    assert saved["processes"] == 1
    (output / "run.json").write_text(json.dumps(saved | {"processes": 2}))
    fields = recipe(world, output=str(output), report_to="tensorboard")
    assert train(MllmConfig(**fields)) == output
    (output / "grounding.json").unlink()
    with pytest.raises(DataError, match="run.json: the checkpoints here are of processes = 2, this run has 1; start as many"):
        train(MllmConfig(**fields))


def test_cached_features_give_the_loss_and_the_gradients_of_the_tower_itself(world, tmp_path):
    mllm = build_mllm(MllmConfig(**recipe(world)))
    dataset = training.read_dataset(MllmConfig(**recipe(world)), mllm, [str(world / "conversations_0.json")])
    ids = mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id
    features = cache_features(mllm.model, dataset, tmp_path, batch_size=5, progress=False)
    rows = [dataset[index] for index in (0, 3, 16, 5)]
    assert not dataset[16].images  # one of them has no picture
    results = {}
    for name in ("tower", "cache"):
        if name == "cache":
            mllm.model.model.vision_tower = CachedTower(mllm.model.config.vision_feature_layer)
            batch = feature_collator(dataset, features, *ids)(rows)
        else:
            batch = pixel_collator(dataset, *ids)(rows)
        mllm.model.zero_grad()
        loss = mllm.model(**batch).loss
        loss.backward()
        gradients = [p.grad.clone() for p in mllm.model.model.multi_modal_projector.parameters()]
        results[name] = loss.detach(), gradients
    torch.testing.assert_close(results["cache"][0], results["tower"][0], atol=1e-4, rtol=1e-4)
    for a, b in zip(results["cache"][1], results["tower"][1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["data", "val_data"])
def test_there_is_no_cache_without_pictures(world, tmp_path, name):
    records = json.loads((world / "conversations_0.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([record for record in records if "image" not in record]))
    fields = recipe(world, output=str(tmp_path / "run"), cache_features=True) | {name: [str(tmp_path / "text.json")]}
    with pytest.raises(DataError, match=f"no conversation of {name} has one; set it to false"):
        train(MllmConfig(**fields))


def test_the_cache_is_made_once_per_tower_layer_and_pictures(world, tmp_path, monkeypatch):
    mllm = build_mllm(MllmConfig(**recipe(world)))
    dataset = training.read_dataset(MllmConfig(**recipe(world)), mllm, [str(world / "conversations_0.json")])
    first = cache_features(mllm.model, dataset, tmp_path, progress=False)
    assert first.shape == (16, 26, 32) and first.dtype == torch.float16
    torch.testing.assert_close(sample_features(first, 25), measure_features(mllm.model, dataset), atol=5e-3, rtol=1e-3)
    monkeypatch.setattr(ConversationDataset, "pixels", None)  # no picture is read again
    assert torch.equal(cache_features(mllm.model, dataset, tmp_path, progress=False), first)
    monkeypatch.undo()
    mllm.model.config.vision_feature_layer = -1
    other = cache_features(mllm.model, dataset, tmp_path, progress=False)
    assert not torch.equal(other, first) and len(list(tmp_path.iterdir())) == 2


def test_a_batch_without_pictures_still_reaches_tower_and_projector(world):
    """Zero gradients, not missing ones: a rank without pictures takes part in every collective, and adds nothing."""
    config = MllmConfig(**recipe(world, train=["projector", "llm", "tower"]))
    mllm = build_mllm(config)
    dataset = training.read_dataset(config, mllm, config.data)
    collate = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)
    batch = collate([dataset[16], dataset[17]])
    loss = mllm.model(**batch).loss
    loss.backward()
    tower = mllm.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight  # layer -2 is read, the last one is not
    for parameter in [*mllm.model.model.multi_modal_projector.parameters(), tower]:
        assert parameter.grad is not None and not parameter.grad.any()
    text = {key: value[:2] for key, value in batch.items() if key != "pixel_values"}
    keep = text["attention_mask"].sum(1).max()
    plain = mllm.model(**{key: value[:, :keep] for key, value in text.items()}).loss
    torch.testing.assert_close(loss, plain)


def test_finetuning_goes_on_from_a_folder(world, uninterrupted):
    fields = recipe(
        world,
        output=str(world / "more"),
        model=str(uninterrupted),
        train=["projector"],
        data=[str(world / "conversations_1.json")],
    )
    more = train(MllmConfig(**fields))
    before, after = weights(uninterrupted), weights(more)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    assert load_mllm(more)[2].trained == [["llm", "projector"], ["projector"]]
    assert (more / "tokenizer.model").read_bytes() == (uninterrupted / "tokenizer.model").read_bytes()


def test_it_learns(world, tmp_path, capsys):
    """Held-out pictures of the same kind: the loss nearly halves; rates per part, length groups and bf16 on the way."""
    fields = recipe(
        world,
        output=str(tmp_path),
        max_steps=60,
        log_every=20,
        save_every=0,
        learning_rate=5e-3,
        projector_learning_rate=3e-3,
        batch_size=8,
        precision="bf16",
        group_by_length=True,
        cache_features=True,
        val_data=[str(world / "conversations_1.json")],
        val_every=30,
    )
    train(MllmConfig(**fields))
    out = capsys.readouterr().out
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.6 * losses[0] and "held-out loss" in out and "rows/s" in out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "a", "tower": "b"}, "model and tower are both given"),
        ({"tower": None}, "neither model nor tower"),
        ({"llm": "x"}, "llm and llm_preset: both given"),
        ({"llm_preset": None}, "llm and llm_preset: neither"),
        ({"train": ["projector"]}, "random weights, but train lacks llm"),
        ({"train": ["projector", "lmm"]}, "train names 'lmm'"),
        ({"train": []}, "train is empty"),
        ({"train": ["projector", "llm", "tower"], "cache_features": True}, "a frozen tower's features"),
        ({"tower_learning_rate": 1e-6}, "tower_learning_rate is given, but train lacks tower"),
        ({"geometry": "center_crop"}, "cuts boxes off"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; choose one of"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup": 100}, "warmup is 100; give a share of the steps"),
        ({"lora_rank": 64}, "lora_rank is 64, but train names neither llm_lora nor tower_lora, so nothing would read it"),
        ({"lora_targets": ["q_proj"]}, "lora_targets is .* so nothing would read it"),
        ({"model": "m", "tower": None, "llm_preset": None}, "vocab_size is 400, but llm_preset is not given"),
        ({"llm_width": 30}, "llm_width 30"),
        ({"learning_rate": 0}, "learning_rate and epochs"),
    ],
)
def test_contradictions_are_refused_at_construction(world, fields, message):
    with pytest.raises(DataError, match=message):
        MllmConfig(**{**recipe(world), **fields})


def test_recipes_are_read_with_flags_on_top(world, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(world)).replace("max_steps: 4", "max_steps: 4\nlearning_rate: 1e-2"))
    config = load_config(path, {"batch_size": 7})
    assert (config.batch_size, config.learning_rate, config.max_steps) == (7, 0.01, 4)
    path.write_text(path.read_text() + "learning_rte: 1\n")
    with pytest.raises(DataError, match="recipe.yaml: field 'learning_rte' is not known; did you mean 'learning_rate'"):
        load_config(path, {})


def test_the_log_goes_to_no_package_that_is_not_there(world, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="the package wandb is not installed"):
        train(MllmConfig(**recipe(world, output=str(world / "w"), report_to="wandb")))


def test_a_zero_file_that_is_not_there(world):
    with pytest.raises(DataError, match="ZeRO file nowhere.json does not exist"):
        train(MllmConfig(**recipe(world, output=str(world / "z"), zero="nowhere.json")))

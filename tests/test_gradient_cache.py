"""A batch in micro batches against the same batch at once: loss and gradient, then on DeepSpeed engines of two processes."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from encoder.config import tiny
from encoder.data.batches import RegionBatches
from encoder.data.reader import RegionDataset
from encoder.errors import DataError
from encoder.gradient_cache import cached_backward
from encoder.losses import LossConfig, cloc_losses
from encoder.model import ClocModel, ClocOutput

pytestmark = pytest.mark.timeout(1800)  # two processes start slowly on a busy machine

SIGMOID = LossConfig(contrastive="sigmoid", similar_text_threshold=0.9999)
SOFTMAX = LossConfig(similar_text_threshold=0.9999)
ENGINES = {  # name: (fields of PretrainConfig, LossConfig); each is run at once and in micro batches
    "zero0": ({"zero_stage": 0}, SOFTMAX),
    "zero1": ({"zero_stage": 1}, SOFTMAX),
    "zero2": ({"zero_stage": 2}, SIGMOID),
    "zero3": ({"zero_stage": 3}, SOFTMAX),
    "zero0 bf16": ({"zero_stage": 0, "precision": "bf16"}, SOFTMAX),
    "zero1 bf16": ({"zero_stage": 1, "precision": "bf16"}, SOFTMAX),
}
STEPS = 3


def make_model(vocab_size: int, dropout: float = 0.0) -> ClocModel:
    torch.manual_seed(0)
    config = tiny(vocab_size=vocab_size, logit_bias_init_value=-2.0)
    config.vision_config.attention_dropout = config.text_config.attention_dropout = dropout
    return ClocModel(config).train()


@pytest.fixture(scope="module")
def batches(region_shards, tiny_processor) -> RegionBatches:
    return RegionBatches(RegionDataset(region_shards, progress=False), tiny_processor, 8)


@pytest.fixture(scope="module")
def batch(batches) -> dict[str, torch.Tensor]:
    """Eight images of which some have no region, and texts that several of them share."""
    batch = batches[0]
    assert len(batch["image_index"].unique()) < 8 and len(batch["region_input_ids"]) < len(batch["boxes"])
    return batch


@pytest.fixture()
def cut(batches):
    """The same batch in so many parts, as the loader reads them: each padded to its own longest text."""
    return lambda count: [batches.part(0, number, count) for number in range(count)]


def backward_at_once(model, batch, config):
    """(loss, gradients by name) of the batch in one pass."""
    losses, _ = cloc_losses(model(**batch), batch.get("boxes"), batch.get("image_index"), config)
    sum(losses.values()).backward()
    return sum(losses.values()).detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def backward_in_parts(model, parts, config):
    """The same through the cache, with all features that the model gave, in order."""
    seen = []

    def forward(part):
        seen.append(model(**part))
        return seen[-1]

    def loss_of(output, boxes, image_index):
        loss = sum(cloc_losses(output, boxes, image_index, config)[0].values())
        return loss, {"loss": loss.detach()}

    report = cached_backward(parts, forward, loss_of, torch.Tensor.backward)
    return report["loss"], {name: parameter.grad for name, parameter in model.named_parameters()}, seen


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    for name, expected in theirs.items():
        if expected is None:  # the biases, without the sigmoid loss
            assert ours[name] is None and "logit_bias" in name
            continue
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID, LossConfig(block_size=3)], ids=["softmax", "sigmoid", "blocks"])
@pytest.mark.parametrize("count", [8, 2, 1])
def test_loss_and_gradient_are_those_of_the_whole_batch(batch, cut, count, config):
    vocab_size = int(batch["input_ids"].max()) + 1
    loss, grads = backward_at_once(make_model(vocab_size), batch, config)
    cached_loss, cached_grads, _ = backward_in_parts(make_model(vocab_size), cut(count), config)
    assert float(cached_loss) == pytest.approx(float(loss), rel=1e-5)
    assert_same_gradients(cached_grads, grads)


def test_images_and_captions_alone(batch, cut):
    keys = ("pixel_values", "input_ids", "attention_mask")
    images, *parts = ({key: part[key] for key in keys} for part in (batch, *cut(4)))
    vocab_size = int(batch["input_ids"].max()) + 1
    loss, grads = backward_at_once(make_model(vocab_size), images, SOFTMAX)
    cached_loss, cached_grads, _ = backward_in_parts(make_model(vocab_size), parts, SOFTMAX)
    assert float(cached_loss) == pytest.approx(float(loss), rel=1e-5)
    for name, expected in grads.items():
        assert (cached_grads[name] is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(cached_grads[name], expected, rtol=1e-4, atol=2e-6)


def test_the_second_pass_draws_what_the_first_drew(batch, cut):
    """With dropout: the features are the same twice, the gradient is that of those draws, and the generator goes on after."""
    vocab_size, parts = int(batch["input_ids"].max()) + 1, cut(4)
    model = make_model(vocab_size, dropout=0.5)
    torch.manual_seed(7)
    outputs = [model(**part) for part in parts]
    after = torch.rand(3)
    features = {
        name: torch.cat([getattr(output, name) for output in outputs]) if value.ndim else value
        for name, value in vars(outputs[0]).items()
    }
    sum(cloc_losses(ClocOutput(**features), batch["boxes"], batch["image_index"], SOFTMAX)[0].values()).backward()

    cached = make_model(vocab_size, dropout=0.5)
    torch.manual_seed(7)
    _, grads, seen = backward_in_parts(cached, parts, SOFTMAX)
    assert torch.equal(torch.rand(3), after)
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first.image_feat, second.image_feat) and torch.equal(first.predicted_boxes, second.predicted_boxes)
    assert not torch.equal(outputs[0].image_feat, model(**parts[0]).image_feat)  # other draws would have been other features
    assert_same_gradients(grads, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_the_parts_are_the_batch_in_order(batch, cut):
    """Images, boxes and texts, each region with its image's; a part holds no text that it does not use."""

    def content(part: dict, first: int) -> tuple[list, list]:
        def words(ids: torch.Tensor, mask: torch.Tensor) -> tuple:
            return tuple(ids[mask.bool()].tolist())

        texts = list(map(words, part["region_input_ids"], part["region_attention_mask"]))
        assert sorted(set(part["region_text_index"].tolist())) == list(range(len(texts)))
        rows = zip(part["boxes"].tolist(), part["image_index"].tolist(), part["region_text_index"].tolist(), strict=True)
        regions = [(*box, first + image, texts[text]) for box, image, text in rows]
        return list(map(words, part["input_ids"], part["attention_mask"])), regions

    parts = cut(4)
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])
    captions, regions = zip(*(content(part, 2 * number) for number, part in enumerate(parts)), strict=True)
    assert (sum(captions, []), sum(regions, [])) == content(batch, 0)


def run_engines(rank: int, port: int, folder: str, shards: str, processor) -> None:
    """A few steps with each engine, at once and in micro batches of one of the two images."""
    from encoder.engine import make_engine
    from encoder.pretraining import train_step
    from encoder.pretraining_config import PretrainConfig

    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in environment.items()}
    import deepspeed

    from encoder.distributed import choose_backend

    deepspeed.init_distributed(choose_backend(), verbose=False)
    batches = RegionBatches(RegionDataset(shards, progress=False), processor, 4, rank=rank, world_size=2)
    results = {}
    for name, (fields, loss_config) in ENGINES.items():
        for micro_batch_size in (0, 1):
            config = PretrainConfig(
                shards=shards, output=folder, batch_size=4, micro_batch_size=micro_batch_size, steps=9, warmup_steps=1,
                **{"precision": "fp32", **fields},
            )  # fmt: skip
            engine = make_engine(make_model(len(processor.tokenizer)), config)
            count = engine.gradient_accumulation_steps()
            steps = [[batches.part(step, number, count) for number in range(count)] for step in range(STEPS)]
            reports = [train_step(engine, parts, loss_config) for parts in steps]
            assert engine.global_steps == STEPS and engine.micro_steps == STEPS * (2 if micro_batch_size else 1)
            reports = [{key: float(value) for key, value in report.items()} for report in reports]
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=config.zero_stage == 3):
                weights = {key: value.detach().float().clone() for key, value in engine.module.named_parameters()}
            norm = engine.get_global_grad_norm()
            results[name, micro_batch_size] = reports, weights, float(norm), engine.get_lr()
            engine.destroy()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engines(tmp_path_factory, region_shards, tiny_processor) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("engines")
    multiprocessing.spawn(run_engines, (port, str(folder), str(region_shards), tiny_processor), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_takes_the_same_steps(engines, name):
    """Two processes, uneven regions: reports, gradient norm and weights after updates are those of the batch at once."""
    tolerance = 2e-2 if "bf16" in name else 1e-4
    for rank in engines:
        reports, weights, norm, rate = rank[name, 0]
        ours, our_weights, our_norm, our_rate = rank[name, 1]
        for step in range(STEPS):
            assert ours[step].keys() == reports[step].keys()
            for key, value in reports[step].items():
                assert ours[step][key] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, key)
        assert our_rate == rate and our_norm == pytest.approx(norm, rel=tolerance)
        for key, value in weights.items():
            torch.testing.assert_close(
                our_weights[key], value, rtol=1e-3, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert len({rank[name, 0][0][0]["loss"] for rank in engines}) == 2  # each rank has its own part


def test_a_micro_batch_that_does_not_divide_is_refused(tiny_model):
    from encoder.engine import make_engine
    from encoder.pretraining_config import PretrainConfig

    config = PretrainConfig(shards="x", output="y", batch_size=8, micro_batch_size=3)
    with pytest.raises(DataError, match="micro_batch_size 3 does not divide the 8 images of a process; choose a divisor"):
        make_engine(tiny_model, config)

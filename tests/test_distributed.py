"""Several gloo processes equal one process on the joined batch, in value and in gradient, with uneven and empty ranks.

In float64: in float32 a gradient of one part in a million of the largest is rounding, which any other order of sums moves.
One spawn runs every case: starting processes costs more than all the arithmetic.
"""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from encoder import distributed
from encoder.config import tiny
from encoder.contrastive import contrastive_loss
from encoder.gradient_cache import cached_backward
from encoder.losses import LossConfig, cloc_losses
from encoder.model import ClocModel

pytestmark = pytest.mark.timeout(1800)  # two processes start slowly on a busy machine

WORLD = 2
# Regions of each of four images; the first two images are rank 0's.
REGION_COUNTS = {"uneven": (3, 1, 0, 4), "all on one rank": (0, 0, 2, 3), "one region": (0, 1, 0, 0), "none at all": (0, 0, 0, 0)}
CONFIGS = {
    "default": LossConfig(),
    "strong filter, l2, blocks": LossConfig(similar_text_threshold=0.2, grounding_norm="l2", block_size=2),
    "sigmoid": LossConfig(contrastive="sigmoid", block_size=3),
}
LOGITS = torch.tensor([[1.0, -200.0, -torch.inf, 90.0], [2.0, -190.0, -300.0, 95.0]])
ROW_COUNTS = {"even": (3, 3), "uneven": (5, 2), "empty rank": (0, 6), "both empty": (0, 0)}


def joined_batch(counts) -> dict[str, torch.Tensor]:
    """Four images, captions and their regions; texts repeat across images, so that the filter has work across ranks."""
    generator = torch.Generator().manual_seed(5)
    total = sum(counts)
    corners = torch.rand(total, 2, 2, generator=generator).sort(dim=1).values
    ids = torch.randint(2, 60, (6, 7), generator=generator)
    ids[:, -1] = 1
    return {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator).double(),
        "input_ids": ids[:4],
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
        "boxes": corners.reshape(total, 4),
        "image_index": torch.repeat_interleave(torch.arange(4), torch.tensor(counts)),
        "region_input_ids": ids,
        "region_attention_mask": torch.ones(6, 7, dtype=torch.long),
        "region_text_index": torch.arange(total) % 3,
    }


def part_of(batch: dict, number: int, size: int) -> dict:
    """The `number`-th `size` images; a part without regions has no region text either, as in `RegionBatches`."""
    mine = (batch["image_index"] // size) == number
    used = batch["region_text_index"][mine].unique()
    part = {key: batch[key][size * number : size * (number + 1)] for key in ("pixel_values", "input_ids", "attention_mask")}
    part |= {"boxes": batch["boxes"][mine], "image_index": batch["image_index"][mine] - size * number}
    part |= {key: batch[key][used] for key in ("region_input_ids", "region_attention_mask")}
    return part | {"region_text_index": torch.searchsorted(used, batch["region_text_index"][mine])}


def model_step(batch: dict, config: LossConfig, micro_batch_size: int = 0) -> tuple[torch.Tensor, dict, dict]:
    """This rank's share of the loss, its report, and the share's gradient for every parameter."""
    torch.manual_seed(0)
    bias = -2.0 if config.contrastive == "sigmoid" else None
    model = ClocModel(tiny(vocab_size=64, region_temperature="own", logit_bias_init_value=bias)).double()

    def loss_of(output, boxes, image_index):
        losses, report = cloc_losses(output, boxes, image_index, config)
        share = sum(losses.values())
        return share, {**report, "share": share.detach()}

    if micro_batch_size:
        parts = [part_of(batch, number, micro_batch_size) for number in range(len(batch["pixel_values"]) // micro_batch_size)]
        report = cached_backward(parts, lambda part: model(**part), loss_of, torch.Tensor.backward)
    else:
        share, report = loss_of(model(**batch), batch["boxes"], batch["image_index"])
        share.backward()
    return report.pop("share"), report, {name: parameter.grad for name, parameter in model.named_parameters()}


def rows(counts) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(sum(counts), 6, generator=generator), torch.randn(sum(counts), 6, generator=generator)


def contrast(a, b, sigmoid: bool) -> tuple[torch.Tensor, ...]:
    """This rank's share, and the gradients of a, b, scale and bias."""
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss, _ = contrastive_loss(a, b, scale, 0.3, bias if sigmoid else None, block_size=3)
    return (loss.detach(), *torch.autograd.grad(loss, [a, b, scale, bias], allow_unused=True, materialize_grads=True))


def everything(rank: int) -> dict:
    """All cases as one rank sees them."""
    results = {}
    for name, counts in REGION_COUNTS.items():
        for config_name, config in CONFIGS.items():
            for micro_batch_size in (0, 1):
                part = part_of(joined_batch(counts), rank, 2)
                results["model", name, config_name, micro_batch_size] = model_step(part, config, micro_batch_size)
    for name, counts in ROW_COUNTS.items():
        start = sum(counts[:rank])
        for sigmoid in (False, True):
            results["rows", name, sigmoid] = contrast(*(feat[start : start + counts[rank]] for feat in rows(counts)), sigmoid)
        mine = torch.arange(start, start + counts[rank]).float()[:, None]
        gathered = distributed.gather(mine, distributed.gather_counts(len(mine)))
        results["gather", name] = gathered, distributed.sum_to_owners((1 + rank) * gathered, list(counts))
    results["counts"] = distributed.gather_counts(10 + rank), distributed.rank(), distributed.world_size()
    results["sum"] = distributed.sum_over_ranks(torch.tensor([1.0 + rank, 10.0]))
    results["logsumexp"] = distributed.logsumexp_over_ranks(LOGITS[rank].clone())
    return results


def run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.save(everything(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes computed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("micro_batch_size", [0, 1])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("counts", REGION_COUNTS)
def test_two_processes_equal_one_on_the_joined_batch(ranks, counts, config, micro_batch_size):
    """Also where each process runs its two images one after the other: the loss stays that of all four at once."""
    share, report, grads = model_step(joined_batch(REGION_COUNTS[counts]), CONFIGS[config])
    parts = [rank["model", counts, config, micro_batch_size] for rank in ranks]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(share), rel=1e-12)
    for key in report:
        if "loss" in key:
            assert float(sum(part[1][key] for part in parts)) == pytest.approx(float(report[key]), rel=1e-12), key
    for key in ("regions", "coverage"):
        assert [part[1].get(key) for part in parts] == [report[key]] * WORLD
    for part in parts:  # of all ranks' pairs, on every rank
        assert float(part[1]["masked_fraction"]) == pytest.approx(float(report["masked_fraction"]), rel=1e-6)
    for name, expected in grads.items():
        parts_grad = [part[2][name] for part in parts]
        assert all(grad is not None for grad in parts_grad), f"{name} has no gradient on a rank: its reduction would hang"
        torch.testing.assert_close(
            sum(parts_grad), expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("counts", ROW_COUNTS)
def test_contrastive_shares_sum_to_the_loss_and_each_row_gets_its_gradient(ranks, counts, sigmoid):
    expected = contrast(*rows(ROW_COUNTS[counts]), sigmoid)
    parts = [rank["rows", counts, sigmoid] for rank in ranks]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0], rtol=1e-5, atol=1e-6)
    for index in (1, 2):  # a and b: rows lie on their own rank
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), expected[index], rtol=1e-4, atol=1e-6)
    for index in (3, 4):  # scale and bias
        torch.testing.assert_close(parts[0][index] + parts[1][index], expected[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", ROW_COUNTS)
def test_gather_keeps_rank_order_and_the_way_back_adds_up(ranks, counts):
    values = torch.arange(sum(ROW_COUNTS[counts])).float()[:, None]
    for rank in ranks:
        assert torch.equal(rank["gather", counts][0], values)
    # rank r sends (1 + r) * x back: together 3 * x, each row to the rank that owns it
    assert torch.equal(torch.cat([rank["gather", counts][1] for rank in ranks]), 3 * values)


def test_counts_ranks_and_sums(ranks):
    assert [rank["counts"] for rank in ranks] == [([10, 11], 0, 2), ([10, 11], 1, 2)]
    assert all(rank["sum"].tolist() == [3.0, 20.0] for rank in ranks)
    for rank in ranks:
        torch.testing.assert_close(rank["logsumexp"], LOGITS.double().logsumexp(0).float())


def test_one_process_needs_no_group():
    assert not dist.is_initialized()
    rows = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather(rows, [3]) is rows and torch.equal(distributed.sum_to_owners(rows.detach(), [3]), rows)
    assert (distributed.rank(), distributed.world_size(), distributed.gather_counts(4)) == (0, 1, [4])
    assert torch.equal(distributed.sum_over_ranks(rows), rows.detach())
    assert torch.equal(distributed.logsumexp_over_ranks(LOGITS), LOGITS)

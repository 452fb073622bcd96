"""The contrastive losses on one process: against dense float64 matrices, at every block size, at the edges, in bf16.

Several processes: test_distributed.
"""

import math

import pytest
import torch

from encoder.contrastive import contrastive_loss


def dense_logits(a, b, scale, threshold=None):
    """All logits as one float64 matrix; filtered pairs are -inf."""
    a, b = (feat.double() / feat.double().norm(dim=-1, keepdim=True) for feat in (a, b))
    logits = scale.double() * a @ b.T
    if threshold is not None:
        drop = ((b @ b.T).detach() > threshold) & ~torch.eye(len(a), dtype=torch.bool)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def dense_softmax(a, b, scale, threshold=None, bias=None):
    """InfoNCE written with logsumexp."""
    logits = dense_logits(a, b, scale, threshold)
    positive = logits.diagonal()
    return ((logits.logsumexp(1) - positive).mean() + (logits.logsumexp(0) - positive).mean()) / 2


def dense_sigmoid(a, b, scale, threshold=None, bias=None):
    """SigLIP's pseudocode: labels of +1 and -1, the sum over pairs divided by the rows."""
    logits = dense_logits(a, b, scale, threshold) + bias.double()
    labels = 2 * torch.eye(len(a)) - torch.ones(len(a), len(a))
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(a)


def pairs(count: int, width: int = 5, seed: int = 0):
    """Random features of which some texts repeat, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(count, width, generator=generator), torch.randn(count, width, generator=generator)
    b[count // 2] = 2 * b[0]
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("block_size", [1, 3, 4, 11, 2048])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.9])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equals_the_dense_matrix_in_value_and_gradient(kind, threshold, block_size):
    a, b = pairs(11)
    scale, bias = torch.tensor(12.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    sigmoid = kind == "sigmoid"
    leaves = [a, b, scale, bias] if sigmoid else [a, b, scale]
    loss, report = contrastive_loss(a, b, scale, threshold, bias if sigmoid else None, block_size)
    expected = (dense_sigmoid if sigmoid else dense_softmax)(a, b, scale, threshold, bias)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    masked = int(torch.isinf(dense_logits(a, b, scale, threshold)).sum())
    assert report["count"] == 11 and float(report["masked_fraction"]) == pytest.approx(masked / 110)
    assert masked == 0 if threshold is None else masked >= 2
    for got, want in zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [None, -1.0])
def test_no_matrix_is_larger_than_a_block(bias):
    """Forward and backward, with the filter: no operation returns more than a block or the features themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    a, b = pairs(96, width=2)
    with Watch():
        loss, _ = contrastive_loss(a, b, torch.tensor(9.0), 0.9, None if bias is None else torch.tensor(bias), block_size=16)
        loss.backward()
    assert largest == 16 * 16 > 96 * 2


def test_the_length_of_a_feature_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    lengths = torch.rand(6, 1, generator=generator) * 50 + 0.1
    one, _ = contrastive_loss(a, b, torch.tensor(10.0), 0.5)
    two, _ = contrastive_loss(a * lengths, b * lengths.flip(0), torch.tensor(10.0), 0.5)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_chance_is_log_n_and_a_perfect_match_is_zero():
    same = torch.ones(8, 4)
    assert float(contrastive_loss(same, same, torch.tensor(100.0))[0]) == pytest.approx(math.log(8), rel=1e-5)
    basis = torch.eye(8)
    assert float(contrastive_loss(basis, basis, torch.tensor(100.0))[0]) == pytest.approx(0.0, abs=1e-6)
    sure = contrastive_loss(basis, basis, torch.tensor(100.0), logit_bias=torch.tensor(-50.0))
    assert float(sure[0]) == pytest.approx(0.0, abs=1e-6)


def test_far_apart_logits_neither_overflow_nor_vanish():
    """At scale 100 the positive can lie 200 below a negative of another block: exp() of neither fits in float32."""
    a = torch.tensor([[1.0, 0.0], [-1.0, 1e-3], [0.2, 1.0]], requires_grad=True)
    b = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.1, -1.0]])
    scale = torch.tensor(100.0)
    loss, _ = contrastive_loss(a, b, scale, block_size=1)
    expected = dense_softmax(a, b, scale)
    assert float(loss) > 100 and float(loss) == pytest.approx(float(expected), rel=1e-5)
    (got,), (want,) = torch.autograd.grad(loss, [a]), torch.autograd.grad(expected, [a])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_single_pair_and_no_pair_are_zero():
    for count in (1, 0):
        a = torch.randn(count, 4, requires_grad=True)
        b = torch.randn(count, 4, requires_grad=True)
        scale = torch.tensor(14.0, requires_grad=True)
        loss, report = contrastive_loss(a, b, scale, 0.9)
        assert float(loss) == 0 and report == {"count": count, "masked_fraction": 0.0}
        loss.backward()
        assert not a.grad.any() and not b.grad.any() and not scale.grad.any()


def test_the_positive_is_never_filtered():
    """With every text alike everything but the diagonal goes: the loss is 0 and finite, not -inf or nan."""
    for block_size in (2, 2048):
        a, text = torch.randn(5, 4, requires_grad=True), torch.ones(5, 4)
        loss, report = contrastive_loss(a, text, torch.tensor(14.0), 0.9, block_size=block_size)
        loss.backward()
        assert float(loss) == 0 and report["masked_fraction"] == 1.0 and torch.isfinite(a.grad).all()


def test_bf16_features_are_compared_in_float32():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(16, 32, generator=generator).bfloat16() for _ in range(2))
    loss, _ = contrastive_loss(a, b, torch.tensor(100.0).bfloat16())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(dense_softmax(a.float(), b.float(), torch.tensor(100.0))), rel=1e-4)

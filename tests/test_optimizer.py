"""The optimizer's ceiling and running average against the same written out, and which parameters are in which group."""

import math

import torch

from encoder.losses import bounded_scale
from encoder.optimizer import PretrainAdamW, parameter_groups

CEILING = math.log(100.0)


def test_groups_decay_matrices_alone_and_hold_temperatures(tiny_model):
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    matrices, vectors, scales = parameter_groups(tiny_model, 0.2)
    assert matrices["weight_decay"] == 0.2 and vectors["weight_decay"] == scales["weight_decay"] == 0.0
    assert all(parameter.ndim >= 2 for parameter in matrices["params"]) and all(p.ndim < 2 for p in vectors["params"])
    assert [names[parameter] for parameter in scales["params"]] == ["logit_scale"] and scales["ceiling"] == CEILING
    assert sum(len(group["params"]) for group in (matrices, vectors, scales)) == len(names)
    assert not {names[p] for p in matrices["params"]} & {"vision_model.embeddings.class_embedding", "logit_scale"}


def test_a_temperature_stays_at_its_ceiling_and_comes_back_at_once():
    """A loss that wants a higher scale for 50 steps, then a lower one."""
    plain, held = (torch.nn.Parameter(torch.tensor([CEILING - 0.02])) for _ in range(2))
    optimizers = (
        torch.optim.AdamW([plain], lr=0.01, weight_decay=0.0),
        PretrainAdamW([{"params": [held], "weight_decay": 0.0, "ceiling": CEILING}], lr=0.01),
    )
    for step in range(80):
        for parameter, optimizer in zip((plain, held), optimizers, strict=True):
            optimizer.zero_grad()
            (bounded_scale(parameter, 100.0) * (-1 if step < 50 else 3)).sum().backward()
            optimizer.step()
        assert float(held) <= CEILING + 1e-6
        if step == 49:
            assert float(plain) > CEILING + 0.4 and float(held) == torch.tensor(CEILING)
    assert float(held) < CEILING - 0.1 and float(plain) > CEILING  # still on its way back: its scale has not moved


def test_the_average_is_the_sum_written_out():
    """Three parameters, one without a gradient; AdamW itself is not disturbed by it."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5), torch.randn(2)]
    gradients = [[torch.randn_like(value) for value in start] for _ in range(6)]
    decay, runs = 0.8, []
    for kind in (PretrainAdamW, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        options = {"ema_decay": decay} if kind is PretrainAdamW else {"fused": True}
        optimizer, path = kind([{"params": parameters}], lr=0.1, weight_decay=0.1, **options), []
        for step in gradients:
            for parameter, gradient in zip(parameters[:2], step, strict=False):
                parameter.grad = gradient.clone()
            optimizer.step()
            path.append([parameter.detach().clone() for parameter in parameters])
        runs.append((parameters, path, optimizer))
    (ours, path, optimizer), (theirs, *_) = runs
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for number in range(2):
        average = start[number].double() * decay**6
        for step in range(6):
            average += (1 - decay) * decay ** (5 - step) * path[step][number].double()
        torch.testing.assert_close(optimizer.state[ours[number]]["ema"].double(), average, rtol=1e-5, atol=1e-6)
    assert ours[2] not in optimizer.state and torch.equal(ours[2], start[2])


def test_its_bound_and_norm_of_the_gradient_are_torchs():
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3), torch.randn(5)]
    for bound in (0.5, 100.0, 0.0):
        ours, theirs = ([torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients] for _ in range(2))
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        optimizer = PretrainAdamW([{"params": ours}], max_grad_norm=bound, lr=0.1)
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, bound or math.inf)
        torch.optim.AdamW(theirs, lr=0.1, fused=True).step()
        assert torch.equal(optimizer._global_grad_norm, norm)
        assert all(torch.equal(a, b) and torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))

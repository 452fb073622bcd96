"""QuickGELU against transformers' own module and the formula in float64."""

import pytest
import torch
from transformers import CLIPModel
from transformers.activations import QuickGELUActivation

from encoder.activation import QuickGELU, fuse_quick_gelu
from encoder.config import tiny
from encoder.model import ClocModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_the_stock_module_s_bit_for_bit_and_gradients_the_formula_s(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(50, 33, generator=generator, dtype=torch.float64)).to(dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, 60.0, -60.0], dtype=dtype)
    weight = torch.randn(50, 33, generator=generator, dtype=torch.float64).to(dtype)
    values.requires_grad_()
    ours = QuickGELU()(values)
    assert torch.equal(ours, QuickGELUActivation()(values))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(QuickGELU(), values)(values), ours)
    (gradient,) = torch.autograd.grad(ours, values, weight)
    exact = values.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact * torch.sigmoid(1.702 * exact), exact, weight.double())
    (stock,) = torch.autograd.grad(QuickGELUActivation()(values), values, weight)
    error, stock_error = ((each.double() - expected).abs().max() for each in (gradient, stock))
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    assert error <= 1.1 * stock_error + 1e-14  # the fused kernel costs no accuracy


def test_derivative_by_finite_differences():
    values = torch.linspace(-5, 5, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), (values,))


def test_keeps_its_input_alone_for_the_backward_pass():
    def kept(activation) -> int:
        values, sizes = torch.ones(1000, requires_grad=True), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
            result = activation(2 * values)  # the factor's own saved tensor is a scalar
        del result
        return sum(sizes.values())

    assert kept(QuickGELU()) == 4000
    assert kept(QuickGELUActivation()) >= 8000


def test_every_layer_of_a_cloc_has_it_and_a_stock_clip_takes_it():
    model = ClocModel(tiny())
    kinds = [type(module) for module in model.modules()]
    assert QuickGELUActivation not in kinds
    assert kinds.count(QuickGELU) == 2 + 2 + 2  # two layers of either tower, two Prompters
    clip = CLIPModel(model.config)
    names = list(clip.state_dict())
    fuse_quick_gelu(clip)
    assert list(clip.state_dict()) == names
    assert QuickGELUActivation not in [type(module) for module in clip.modules()]

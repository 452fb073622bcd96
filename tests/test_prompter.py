"""The factored Prompter against the plain thing: one stock CLIP encoder layer per prompt over [prompt tokens, image tokens]."""

import math

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from encoder.config import tiny
from encoder.prompter import BoxHead, Prompter, sinusoids

B, N, R = 3, 17, 7
IMAGE_INDEX = torch.tensor([0, 2, 2, 0, 2, 0, 2])  # image 1 has no prompt, the others several, out of order


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3


def stock_layer(prompter: Prompter) -> CLIPEncoderLayer:
    """transformers' own layer with one head and the Prompter's weights."""
    config, ours = prompter.config, prompter.layer
    vision = config.vision_config
    stock = CLIPEncoderLayer(
        CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=ours.fc1.out_features,
            num_attention_heads=1,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
            attn_implementation="sdpa",  # the eager one has its softmax in float32
        )
    ).double()
    pairs = {"layer_norm1": ours.layer_norm1, "layer_norm2": ours.layer_norm2, "mlp.fc1": ours.fc1, "mlp.fc2": ours.fc2}
    pairs |= {f"self_attn.{name}": getattr(ours, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    state = {f"{name}.{kind}": getattr(module, kind).data for name, module in pairs.items() for kind in ("weight", "bias")}
    missing, unexpected = stock.load_state_dict(state, strict=True)
    assert not missing and not unexpected
    return stock


def naive(prompter: Prompter, stock: CLIPEncoderLayer, prompts, tokens) -> torch.Tensor:
    """A loop over prompts: concatenate, run the stock layer, pool, project."""
    config, features = prompter.config, []
    if config.prompter_tokens == "patches":
        tokens = tokens[:, 1:]
    for prompt, image in zip(prompts, IMAGE_INDEX.tolist(), strict=True):
        sequence = torch.cat([prompt, tokens[image]])[None]
        hidden = stock(sequence, attention_mask=None)
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
        if config.prompter_readout == "prompt":
            hidden = hidden[: len(prompt)]
        features.append((prompter.layer_norm(hidden)).mean(0) @ prompter.projection.weight.T)
    return torch.stack(features)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tokens_seen", ["all", "patches"])
@pytest.mark.parametrize("readout", ["mean", "prompt"])
@pytest.mark.parametrize("kind", ["box", "text"])
def test_equals_one_stock_layer_per_prompt_in_value_and_gradient(kind, readout, tokens_seen, activation):
    config = tiny(prompter_readout=readout, prompter_tokens=tokens_seen, prompter_mlp_ratio=2.5)
    config.vision_config.hidden_act = activation
    prompter = Prompter(config).double()
    randomise(prompter, 0)
    stock = stock_layer(prompter)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(B, N, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(R, 2 if kind == "box" else 1, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(R, config.projection_dim, generator=generator, dtype=torch.float64)

    ours, reference = prompter.read(prompts, tokens, IMAGE_INDEX), naive(prompter, stock, prompts, tokens)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)

    ours_grads = torch.autograd.grad((ours * weight).sum(), [tokens, prompts, *prompter.layer.parameters()])
    names = [name for name, _ in prompter.layer.named_parameters()]
    stock_parameters = dict(stock.named_parameters())
    order = [
        stock_parameters[name if name.startswith("layer_norm") else ("mlp." if name.startswith("fc") else "self_attn.") + name]
        for name in names
    ]
    reference_grads = torch.autograd.grad((reference * weight).sum(), [tokens, prompts, *order])
    for name, got, expected in zip(["tokens", "prompts", *names], ours_grads, reference_grads, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        assert ((got - expected).abs().max() / scale) < 1e-9, name


@pytest.mark.parametrize("readout", ["mean", "prompt"])
def test_prompts_do_not_see_each_other_and_none_is_fine(readout):
    prompter = Prompter(tiny(prompter_readout=readout)).double()
    randomise(prompter, 2)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(B, N, 32, generator=generator, dtype=torch.float64)
    prompts = torch.randn(R, 2, 32, generator=generator, dtype=torch.float64)
    together = prompter.read(prompts, tokens, IMAGE_INDEX)
    alone = torch.cat([prompter.read(prompts[i : i + 1], tokens, IMAGE_INDEX[i : i + 1]) for i in range(R)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)

    tokens.requires_grad_()
    none = prompter.read(prompts[:0], tokens, IMAGE_INDEX[:0])
    assert none.shape == (0, 16)
    none.sum().backward()  # a rank without regions still runs backward, with zero gradients everywhere
    assert tokens.grad is not None and not tokens.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in prompter.layer.parameters())


def test_sinusoids_are_the_written_formula():
    points = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.123, 0.77]])
    got = sinusoids(points, 16, 0.5, 32.0)
    assert got.shape == (3, 16)
    frequencies = [0.5 * (32.0 / 0.5) ** (k / 3) for k in range(4)]
    for point, row in zip(points.tolist(), got.tolist(), strict=True):
        expected = []
        for coordinate in point:
            angles = [2 * math.pi * coordinate * frequency for frequency in frequencies]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(expected, abs=2e-5)


def test_box_prompt_is_its_two_corners_each_with_its_own_embedding():
    prompter = Prompter(tiny())
    randomise(prompter, 4)
    prompter.float()
    box = torch.tensor([[0.1, 0.2, 0.6, 0.9]])
    prompts = prompter.box_prompts(box)
    assert prompts.shape == (1, 2, 32)
    expected = sinusoids(box.reshape(2, 2), 32, 0.5, 32.0) + prompter.corner_embedding
    torch.testing.assert_close(prompts[0], expected)
    plain = Prompter(tiny(box_corner_embedding=False))
    assert plain.corner_embedding is None
    point = plain.box_prompts(torch.tensor([[0.3, 0.4, 0.3, 0.4]]))
    torch.testing.assert_close(point[0, 0], point[0, 1])  # without the embedding the corners differ by place alone


def test_joint_box_prompt_is_an_mlp_over_both_corners_in_value_and_gradient():
    prompter = Prompter(tiny(box_token="joint"))
    randomise(prompter, 5)
    prompter.float()
    assert prompter.corner_embedding is None  # the order of the two in the MLP's input says which corner is which
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.3, 0.0, 0.35, 0.8]])
    prompts = prompter.box_prompts(boxes)
    assert prompts.shape == (2, 1, 32)
    fc1, fc2 = prompter.box_input.fc1, prompter.box_input.fc2
    rows = []
    for box in boxes:
        encoded = torch.cat([sinusoids(box[:2], 32, 0.5, 32.0), sinusoids(box[2:], 32, 0.5, 32.0)])
        inner = fc1.weight @ encoded + fc1.bias
        rows.append(fc2.weight @ (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) + fc2.bias)
    torch.testing.assert_close(prompts[:, 0], torch.stack(rows), rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, 32)
    ours = torch.autograd.grad((prompts[:, 0] @ weight).sum(), list(prompter.box_input.parameters()))
    reference = torch.autograd.grad((torch.stack(rows) @ weight).sum(), list(prompter.box_input.parameters()))
    for got, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readout", ["mean", "prompt"])
def test_joint_box_token_through_the_layer_is_the_naive_layer_with_one_prompt_token(readout):
    prompter = Prompter(tiny(box_token="joint", prompter_readout=readout)).double()
    randomise(prompter, 6)
    tokens = torch.randn(B, N, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    boxes = torch.rand(R, 2, 2, generator=torch.Generator().manual_seed(8)).sort(dim=1).values.reshape(R, 4)
    prompts = prompter.box_prompts(boxes)
    ours = prompter.read(prompts, tokens, IMAGE_INDEX)
    torch.testing.assert_close(ours, naive(prompter, stock_layer(prompter), prompts, tokens), rtol=2e-5, atol=2e-5)


def test_a_prompter_of_texts_alone_has_no_box_parameters():
    names = {name for name, _ in Prompter(tiny(box_token="joint"), boxes=False).named_parameters()}
    assert not [name for name in names if name.startswith(("box_input", "corner_embedding"))]


def test_text_prompt_projects_and_normalises_where_asked():
    feat = torch.randn(3, 16) * 5
    raw, unit = Prompter(tiny()), Prompter(tiny(normalize_text_prompt=True))
    unit.load_state_dict(raw.state_dict())
    torch.testing.assert_close(raw.text_prompts(feat)[:, 0], raw.text_input(feat))
    torch.testing.assert_close(unit.text_prompts(feat), unit.text_prompts(feat * 7))
    torch.testing.assert_close(unit.text_prompts(feat)[:, 0], raw.text_input(feat / feat.norm(dim=-1, keepdim=True)))


def test_box_head_is_two_layers_with_gelu_and_a_linear_end():
    head = BoxHead(tiny(box_head_width=24))
    feat = torch.randn(5, 16) * 10
    inner = feat @ head.fc1.weight.T + head.fc1.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(head(feat), gelu @ head.fc2.weight.T + head.fc2.bias)
    assert head.fc1.out_features == 24 and BoxHead(tiny()).fc1.out_features == 32

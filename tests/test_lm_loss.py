"""The language model's loss in blocks against stock Llava's: value and gradients, also where the embeddings are the head."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from encoder.errors import DataError
from mllm.lm_loss import BlockLoss, LossHead, choose_block, use_training_loss


def tiny_llava(tied: bool) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=52, image_seq_length=4)
    return LlavaForConditionalGeneration(config).double()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(0, 50, (3, 13))
    input_ids[:, 1:5] = 52
    labels = input_ids.clone()
    labels[:, :7] = -100
    labels[1, 7:] = -100  # a row without supervision
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}


def assert_same_gradients(ours, stock, **tolerance) -> None:
    theirs = dict(stock.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(theirs)
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:  # the tower's last layer is not read
            assert parameter.grad is None and "vision_tower" in name
        else:
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def plain_loss(model, inputs: dict, tokens: int | None) -> torch.Tensor:
    """From all logits, in their own precision: stock Llava makes its loss in float32."""
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    return cross_entropy(logits, labels, reduction="sum") / ((labels != -100).sum() if tokens is None else tokens)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("block", "tokens"), [(5, None), (5, 40), (1000, 40)])
def test_loss_and_gradients_are_those_of_the_whole_matrix(tied, block, tokens):
    stock = tiny_llava(tied).train()
    ours = copy.deepcopy(stock)
    use_training_loss(ours, block)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    expected = plain_loss(stock, batch(), tokens)
    got = ours(**batch(), num_items_in_batch=None if tokens is None else torch.tensor(tokens))
    assert got.keys() == {"loss"}
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=0)
    expected.backward()
    got.loss.backward()
    assert_same_gradients(ours, stock, rtol=1e-9, atol=1e-14)


def test_without_blocks_it_is_stock_llavas_bit_by_bit():
    stock = tiny_llava(True).float().train()
    ours = copy.deepcopy(stock)
    use_training_loss(ours, 0)
    inputs = {**batch(), "pixel_values": batch()["pixel_values"].float()}
    expected, got = (model(**inputs, num_items_in_batch=torch.tensor(40)).loss for model in (stock, ours))
    assert torch.equal(got, expected)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize("block", [0, 4])
def test_right_tokens_are_those_of_greedy_decoding(block):
    stock = tiny_llava(False).eval()
    ours = copy.deepcopy(stock)
    use_training_loss(ours, block)
    inputs = batch()
    with torch.no_grad():
        guess = stock(**inputs).logits[:, :-1].argmax(-1)
        inputs["labels"][0, 8:10] = guess[0, 7:9]  # two right answers for sure
        expected = (guess == inputs["labels"][:, 1:]).sum(1)
        got = ours(**inputs)
    assert got.right_B.tolist() == expected.tolist() and expected[0] >= 2 and got.right_B[1] == 0


def test_only_supervised_tokens_reach_the_head_in_blocks(monkeypatch):
    model = tiny_llava(False)
    use_training_loss(model, 4)
    seen = []
    real = BlockLoss.forward
    monkeypatch.setattr(BlockLoss, "forward", lambda ctx, hidden, *rest: (seen.append(len(hidden)), real(ctx, hidden, *rest))[1])
    model(**batch())
    assert seen == [2 * 6]


def test_bf16_sums_blocks_in_float32():
    """Against float64 the gradient of the head is as near with 64 blocks as with one."""
    torch.manual_seed(2)
    hidden, labels = torch.randn(512, 16), torch.randint(0, 40, (512,))
    exact = torch.nn.Linear(16, 40, bias=False).double()
    cross_entropy(exact(hidden.bfloat16().double()), labels, reduction="sum").backward()
    errors = []
    for block in (8, 512):
        head = LossHead(16, 40, bias=False).bfloat16()
        head.weight.data.copy_(exact.weight)
        loss, _ = head(hidden.bfloat16(), labels, block)
        loss.backward()
        assert loss.dtype == torch.float32 and head.weight.grad.dtype == torch.bfloat16
        errors.append((head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm())
    assert errors[0] < 1.2 * errors[1] < 0.02


def test_autocast_reaches_the_head():
    """float32 weights under bf16 autocast, as without DeepSpeed: the logits are bf16 products, the gradients float32."""
    model = tiny_llava(True).float()
    use_training_loss(model, 4)
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**{**inputs, "pixel_values": inputs["pixel_values"].float()}).loss
    loss.backward()
    plain = tiny_llava(True).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(**{**inputs, "pixel_values": inputs["pixel_values"].float()}).loss
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert loss.dtype == torch.float32 and model.lm_head.weight.grad.dtype == torch.float32


def test_which_vocabularies_take_blocks():
    assert [choose_block(None, size) for size in (1024, 8192, 32064, 151936)] == [0, 0, 523, 110]
    assert choose_block(0, 152064) == 0 and choose_block(7, 100) == 7
    model = tiny_llava(False)
    model.lm_head = torch.nn.Linear(24, 53)
    with pytest.raises(DataError, match="output layer has a bias"):
        use_training_loss(model, 4)

"""The language model's loss in blocks of tokens: no (tokens x vocabulary) matrix is ever whole in memory.

torch 2.13 brings `linear_cross_entropy` with the same idea; this package runs on 2.8 too, and counts right answers on the
way. (B rows, L tokens of a row, T supervised tokens of a batch, D the language model's width, V vocabulary.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad
from transformers import LlavaForConditionalGeneration
from transformers.utils import ModelOutput

from encoder.errors import DataError
from mllm.conversation import IGNORE

LARGE_VOCABULARY = 8192  # above it the matrix of all logits outgrows a language model's own activations
BLOCK_LOGITS = 2**24  # of a block, as its tokens are chosen there: 64 MiB in float32


@dataclass
class LossOutput(ModelOutput):
    """loss: scalar; right_B: tokens of each row that greedy decoding would have got, outside training only."""

    loss: Tensor | None = None
    right_B: Tensor | None = None


class BlockLoss(torch.autograd.Function):
    """Cross entropy of `hidden_TD @ weight_VD.T`, summed; its gradients are made in the forward pass, block by block."""

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """-> (sum of losses, float32 or wider; (T,) bool: the label has the largest logit)."""
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_TD) if learns_hidden else None
        # Sums of many blocks: bf16 would lose the small ones.
        weight_grad = torch.zeros_like(weight_VD, dtype=wide) if learns_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        right_T = torch.empty_like(labels_T, dtype=torch.bool)
        for start in range(0, len(labels_T), block):
            part = slice(start, start + block)
            labels, rows = labels_T[part, None], hidden_TD[part]
            logits = (rows @ weight_VD.T).to(wide)
            right_T[part] = logits.argmax(1) == labels_T[part]
            normaliser = logits.logsumexp(1, keepdim=True)
            loss += (normaliser - logits.gather(1, labels)).sum()
            if not (learns_hidden or learns_weight):
                continue
            slope = logits.sub_(normaliser).exp_()  # the softmax, less one at the label: the loss' gradient by the logits
            slope.scatter_add_(1, labels, slope.new_full(labels.shape, -1))
            slope = slope.to(hidden_TD.dtype)
            if learns_hidden:
                hidden_grad[part] = slope @ weight_VD
            if learns_weight:
                weight_grad.addmm_(slope.T, rows) if wide == rows.dtype else weight_grad.add_(slope.T @ rows)
        ctx.grads = hidden_grad, weight_grad if weight_grad is None else weight_grad.to(weight_VD.dtype)
        ctx.mark_non_differentiable(right_T)
        return loss, right_T

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _):
        grads, ctx.grads = ctx.grads, ()  # scaled in place: the head's is as large as the head
        return *(None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in grads), None, None


class LossHead(nn.Linear):
    """A language model's output layer that also makes the loss.

    It is one module's forward, because ZeRO-3 has a layer's weight whole only while the layer runs.
    """

    def forward(self, hidden: Tensor, labels_T: Tensor | None = None, block: int = 0):
        """Hidden states (..., D) -> logits (..., V); with labels_T of hidden (T, D): `BlockLoss`' two results."""
        if labels_T is None:
            return linear(hidden, self.weight, self.bias)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            return BlockLoss.apply(hidden.to(dtype), self.weight.to(dtype), labels_T, block)


def choose_block(asked: int | None, vocabulary: int) -> int:
    """Tokens of a block, 0 for the plain loss; `asked` is the recipe's `loss_block`."""
    if asked is not None:
        return asked
    return max(1, BLOCK_LOGITS // vocabulary) if vocabulary > LARGE_VOCABULARY else 0


def use_training_loss(model: LlavaForConditionalGeneration, block: int) -> None:
    """From now on `model(**batch)` gives a `LossOutput`, without keeping logits; made in blocks unless `block` is 0.

    The loss is what stock Llava's is: over `num_items_in_batch` supervised tokens if given, else the batch's own.
    """
    head = model.lm_head
    if block:
        if head.bias is not None:
            raise DataError("the language model's output layer has a bias, which loss_block cannot take; pass --loss_block 0")
        model.lm_head = LossHead(head.in_features, head.out_features, bias=False, device="meta")
        model.lm_head.weight = head.weight  # also where it is the embeddings'
        model.lm_head.train(head.training)

    def forward(labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs) -> LossOutput:
        hidden_BLD = model.model(**inputs)[0]
        next_BL = pad(labels[:, 1:], (0, 1), value=IGNORE)
        supervised_BL = next_BL != IGNORE
        if block:
            total, right_T = model.lm_head(hidden_BLD[supervised_BL], next_BL[supervised_BL], block)
            loss = total / (supervised_BL.sum() if num_items_in_batch is None else num_items_in_batch)
        else:
            logits_BLV = model.lm_head(hidden_BLD)
            counted = {"num_items_in_batch": num_items_in_batch}
            loss = model.loss_function(logits=logits_BLV, labels=labels, vocab_size=logits_BLV.shape[-1], **counted)
            if not model.training:
                right_T = logits_BLV[supervised_BL].argmax(1) == next_BL[supervised_BL]
        if model.training:
            return LossOutput(loss=loss)
        right_BL = torch.zeros_like(supervised_BL)
        right_BL[supervised_BL] = right_T
        return LossOutput(loss=loss, right_B=right_BL.sum(1))

    model.forward = forward

"""AdamW for pretraining: which parameters decay, a ceiling for the temperatures, a running average of the weights."""

import math

import torch
from torch import Tensor


def parameter_groups(model: torch.nn.Module, weight_decay: float, max_logit_scale: float = 100.0) -> list[dict]:
    """`PretrainAdamW`'s groups: matrices decay; vectors and scalars (biases, norms, CLS) do not; temperatures have a ceiling."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [p for name, p in trained if name.endswith("logit_scale")]
    others = [p for name, p in trained if not name.endswith("logit_scale")]
    return [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "ceiling": math.log(max_logit_scale)},
    ]


class PretrainAdamW(torch.optim.AdamW):
    """AdamW that puts a group's parameters back to its `ceiling` after each step, and keeps their average.

    Both are done element by element on what it updates, and the average, `ema`, is optimizer state like the moments. So it
    makes no difference whether that is the model's parameters or, under ZeRO, a rank's flat float32 part of them: DeepSpeed
    shards the average, saves it and restores it.

    ema_decay: of the average, which starts at the initial weights; 0 keeps none
    max_grad_norm: the gradient is cut to this norm, 0 for no bound, and its norm kept where DeepSpeed looks for it; None
        leaves both to the engine
    """

    def __init__(self, groups: list[dict], ema_decay: float = 0.0, max_grad_norm: float | None = None, **options):
        super().__init__(groups, fused=True, **options)  # one pass over memory in place of a dozen
        self.ema_decay, self.max_grad_norm = ema_decay, max_grad_norm

    @torch.no_grad()
    def step(self) -> None:
        updated = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is not None:
            gradients = [p.grad for p, _ in updated]
            self._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
            if self.max_grad_norm:
                torch._foreach_mul_(gradients, (self.max_grad_norm / (self._global_grad_norm + 1e-6)).clamp(max=1.0))
        # AdamW starts a parameter's state where it finds none, so the average joins it after the first step.
        initial = {p: p.clone() for p, _ in updated if self.ema_decay and not self.state[p]}
        super().step()
        for p, group in updated:
            if group.get("ceiling") is not None:
                p.clamp_(max=group["ceiling"])
        if self.ema_decay:
            for p, weights in initial.items():
                self.state[p]["ema"] = weights
            parameters = [p for p, _ in updated]
            torch._foreach_lerp_([self.state[p]["ema"] for p in parameters], parameters, 1 - self.ema_decay)


def averaged_weights(engine) -> dict[str, Tensor]:
    """The running average of every trained parameter, by name, float32 on the CPU; on rank 0, elsewhere empty.

    engine: a DeepSpeed engine on `PretrainAdamW` that has taken or loaded a step. Every rank must call.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed 0.19 connects parameters and state once, after the first group's first step: the other groups have no
        # state then, and a run that was loaded at its end takes no step at all.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    averages = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            if engine.zero_optimization_stage():
                average = safe_get_full_optimizer_state(parameter, "ema")
            else:
                average = engine.optimizer.state[parameter]["ema"]
            if engine.global_rank == 0:
                averages[name] = average.detach().float().cpu()
    return averages

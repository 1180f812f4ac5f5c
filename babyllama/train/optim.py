"""Parameter groups by role, AdamW, and the learning rate over a run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from babyllama.model import Llama
from babyllama.train.recipe import Plan


def role(name: str) -> str:
    """What a parameter is there for: "gain", "vocabulary" (both tables) or "matrix"."""
    if name.endswith("norm.weight"):
        return "gain"
    return "vocabulary" if name in ("tok_embeddings.weight", "lm_head.weight") else "matrix"


def adamw(model: Llama, plan: Plan) -> torch.optim.AdamW:
    """AdamW over three groups; only matrices decay: a gain or a rare token's row would be pulled to 0 for nothing.

    Source: arXiv:1711.05101. `fused` updates all parameters in one pass over memory.
    """
    members: dict[str, list[Tensor]] = {"matrix": [], "vocabulary": [], "gain": []}
    for name, weight in model.named_parameters():
        members[role(name)].append(weight)
    decay = {"matrix": plan.weight_decay, "vocabulary": 0.0, "gain": 0.0}
    groups: list[dict[str, Any]] = [
        {"params": members[kind], "weight_decay": decay[kind]} for kind in members
    ]
    fused = plan.device == "cpu" or plan.device.startswith("cuda")
    return torch.optim.AdamW(
        groups, lr=plan.learning_rate, betas=(plan.beta1, plan.beta2), eps=1e-10, fused=fused
    )


def learning_rate(plan: Plan, progress: float) -> float:
    """At `progress` in [0, 1) of the run: a linear rise over the warm-up, then linear to 0 at the end.

    A decay all the way to 0 is worth a good part of a run's compute: arXiv:2502.15938.
    """
    rise = (progress + 1e-3) / plan.warmup if plan.warmup else 1.0
    fall = (1 - progress) / (1 - plan.warmup)
    return plan.learning_rate * max(0.0, min(1.0, rise, fall))


# ---- to and from files ---------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's memory by parameter name: "norm.weight.exp_avg" and so on."""
    return {
        f"{name}.{key}": optimizer.state[weight][key]
        for name, weight, key in _entries(model)
        if optimizer.state[weight]
    }


def load_optimizer(model: Llama, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimiser back its memory. Raises KeyError when a parameter's is missing."""
    for name, weight, key in _entries(model):
        tensor = tensors[f"{name}.{key}"]
        counts_on_cpu = key == "step" and not optimizer.defaults["fused"]  # as torch itself keeps it
        optimizer.state[weight][key] = tensor if counts_on_cpu else tensor.to(weight.device)


def _entries(model: Llama) -> Iterator[tuple[str, Tensor, str]]:
    for name, weight in model.named_parameters():
        for key in MOMENTS:
            yield name, weight, key

"""Weights for tests: large, so that no part of a model is nearly linear, and no mistake is too small to be seen."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def randomised(model: Model, spread: float = 0.15, *, seed: int = 0, gain: float = 0.0) -> Model:
    """The model, with every number drawn from Normal(0, spread), and those of its norms from Normal(gain, spread)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(gain if name.endswith("norm.weight") else 0.0, spread, generator=generator)
    return model

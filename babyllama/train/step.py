"""The loss of a step and its gradients, by PyTorch's own differentiation, on any device.

What training does to the model beyond model.py hangs on it from outside, as hooks: dropout on what each branch adds to
the residual stream, and a norm after the embedding. Both leave a plain Llama behind: dropout does nothing afterwards,
and the norm is folded into the embedding's rows (`folded`). On a CPU cpu.py computes the same faster; on a CUDA GPU
torch.compile does, where a run is long enough to pay for it (`Plan.compile`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.data.batches import IGNORE
from babyllama.model import Llama, Tap, no_tap
from babyllama.train.recipe import Plan


@runtime_checkable
class Step(Protocol):
    """One batch after another; what a loop needs to know of how it is differentiated."""

    def __call__(self, tokens: Tensor, targets: Tensor, counted: int, step: int, part: int = 0) -> float:
        """Nats of a batch (B, T) by the targets counted in all parts of a step; the gradients are in `.grad`.

        `part` 0 begins a step, the later ones add to its gradients.
        """
        ...

    rows_at_once: int  # of `logits`; work on fewer takes as long

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V): what the plain Llama with these weights answers, in the plan's precision."""
        ...


class PlainStep:
    """model.py, differentiated by PyTorch."""

    rows_at_once = 1

    def __init__(self, model: Llama, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.keys = torch.empty(0, dtype=torch.int64)  # of dropout, in this step: one for each site
        parts = ("attention", "feed_forward")
        names = [f"layers.{i}.{part}" for i in range(plan.model.n_layers) for part in parts]
        self.sites = [model.get_submodule(name) for name in ["tok_embeddings", *names]]
        self.nats = nats  # or what torch.compile makes of it, from the first batch on

    def __call__(self, tokens: Tensor, targets: Tensor, counted: int, step: int, part: int = 0) -> float:
        if part == 0:
            self.model.zero_grad()
        if self.plan.compile and self.nats is nats:
            torch.compiler.reset()  # what earlier runs of this process had compiled counts towards a limit
            self.nats = torch.compile(nats, fullgraph=True, dynamic=False)
        self.keys = torch.tensor(dropout_keys(self.plan, step, part), dtype=torch.int64, device=tokens.device)
        hooks = [one.register_forward_hook(partial(self._after, i)) for i, one in enumerate(self.sites)]
        try:
            loss = self.nats(self, tokens, targets) / counted
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return loss.item()

    def _after(self, site: int, module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if site == 0 and self.plan.embedding_norm:
            output = F.rms_norm(output, output.shape[-1:], eps=self.model.config.norm_eps)
        if self.plan.dropout > 0:
            mask = dropout_mask(output, self.keys[site], self.plan.dropout)
            output = (output.float() * mask).to(output.dtype)
        return output

    def logits(self, tokens: Tensor) -> Tensor:
        return products(self.model, tokens, self.plan)


def nats(step: PlainStep, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of a batch: the function that is compiled."""
    return loss_sum(products(step.model, tokens, step.plan), targets)


def products(model: Llama, tokens: Tensor, plan: Plan, tap: Tap = no_tap) -> Tensor:
    """The model's logits, with matrix products in the plan's precision."""
    with torch.autocast(plan.device.partition(":")[0], torch.bfloat16, enabled=plan.precision == "bfloat16"):
        return model(tokens, tap=tap)


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORE, in float32."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


# ---- dropout, a function of (seed, step, part, place) --------------------------------------------


def dropout_keys(plan: Plan, step: int, part: int) -> list[int]:
    """32 bits for each site: the embedding, then each layer's attention and feed-forward."""
    sites = 2 * plan.model.n_layers + 1 if plan.dropout > 0 else 0
    names = (f"dropout {plan.seed} {step} {part} {site}" for site in range(sites))
    return [
        int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little") for name in names
    ]


def dropout_mask(like: Tensor, key: int | Tensor, rate: float) -> Tensor:
    """0 where a number is dropped, 1 / (1 - rate) elsewhere: kernels.random_bits of the number's place in the batch."""
    bits = torch.arange(like.numel(), device=like.device)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        bits = bits ^ key
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
        bits = bits ^ (bits >> 15)
    return ((bits >= int(rate * 2**32)).float() / (1 - rate)).view(like.shape)


# ---- the norm after the embedding ----------------------------------------------------------------


def fold(embedding: Tensor, eps: float) -> Tensor:
    """The rows that a norm after the embedding would give: with them, the model without that norm is the same."""
    return embedding * (embedding.square().mean(-1, keepdim=True) + eps).rsqrt()


@contextmanager
def folded(model: Llama, plan: Plan) -> Iterator[Llama]:
    """The model as the plain Llama that it is saved as; as it is trained again afterwards."""
    if not plan.embedding_norm:
        yield model
        return
    weight = model.tok_embeddings.weight
    trained = weight.detach().clone()
    weight.data.copy_(fold(trained, model.config.norm_eps))
    try:
        yield model
    finally:
        weight.data.copy_(trained)

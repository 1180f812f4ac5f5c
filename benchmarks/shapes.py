"""The shapes that the benchmarks train, and the plan that babyllama itself makes for one of them."""

from dataclasses import dataclass, replace
from typing import Any

from babyllama import costs
from babyllama.model import Config
from babyllama.train import recipe
from babyllama.train.recipe import Plan


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    context: int  # tokens a row
    batch_size: int  # rows a step

    @property
    def config(self) -> Config:
        return Config(
            vocab_size=self.vocab_size,
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            max_seq_len=self.context,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context


SHAPES = {
    shape.name: shape
    for shape in (
        # What `make story` trained when these comparisons began.
        Shape(name="quickstart", dim=160, n_layers=4, n_heads=5, vocab_size=2048, context=256, batch_size=9),
        # llama2.c, train.py: dim, n_layers, n_heads, max_seq_len; batch_size of the command in its first lines;
        # vocabulary 4096 of README.md, "custom tokenizers".
        Shape(
            name="llama2.c-15M", dim=288, n_layers=6, n_heads=6, vocab_size=4096, context=256, batch_size=8
        ),
        Shape(name="512x8", dim=512, n_layers=8, n_heads=8, vocab_size=4096, context=256, batch_size=8),
    )
}


def training_flops(config: Config, context: int) -> int:
    """FLOPs of training on one token: 6 N + 12 n_layers dim context, N the parameters of every matrix that multiplies
    (those of the blocks and the head), the whole square of attention counted. The convention of babyllama/costs.py."""
    return costs.training_flops(config, context).total


def size_of(config: Config) -> str:
    """As `--size` names this very shape."""
    return f"{config.dim}x{config.n_layers}x{config.n_heads}"


def plan_for(config: Config, *, text_bytes: int, train_tokens: int, **options: Any) -> Plan:
    """What babyllama plans for a model of this very shape. `options` are those of `recipe.plan`, `settings` among them.

    Everything that follows from the size, such as the learning rate, is the recipe's. Raises what `recipe.plan` does.
    """
    text = {"text_bytes": text_bytes, "train_tokens": train_tokens}
    found = recipe.plan(vocab_size=config.vocab_size, size=size_of(config), **text, **options)
    return replace(found, model=replace(config, max_seq_len=found.context))

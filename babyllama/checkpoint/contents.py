"""What a model on disk must hold, whatever its format: sizes within reason, tensors in their shapes, finite numbers."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from babyllama.errors import InputError, UsageError
from babyllama.model import Config

LARGEST = {
    "vocab_size": 2**20,
    "dim": 2**16,
    "n_layers": 2**10,
    "n_heads": 2**10,
    "n_kv_heads": 2**10,
    "head_dim": 2**12,
    "hidden_dim": 2**18,
    "max_seq_len": 2**24,
}
KINDS = {"tie_embeddings": bool, "norm_eps": float, "rope_theta": float}  # everything else is a whole number
SHOWN = 8  # of all that is wrong with the tensors of a file

Shape = tuple[int, ...]
Refuse = Callable[[str, str], InputError]  # (key, what was found) -> the error of this format


# ---- sizes ---------------------------------------------------------------------------------------


def config_from(values: Mapping[str, Any], names: Mapping[str, str], refuse: Refuse) -> Config:
    """The Config of the `values` that a file holds, by our names; each is called `names[ours]` in what is refused."""
    checked = {}
    for ours, value in values.items():
        theirs = names.get(ours, ours)
        checked[ours] = (
            value if ours == "rope_scaling" else number(value, KINDS.get(ours, int), theirs, refuse)
        )
        if ours in LARGEST and not 0 < value <= LARGEST[ours]:
            raise refuse(theirs, f"is {value}, expected 1 to {LARGEST[ours]:,}")
    try:
        return Config(**checked)
    except UsageError as error:
        raise refuse(names.get(error.where, error.where), error.found) from None


def number(value: Any, kind: type, key: str, refuse: Refuse) -> Any:
    """`value` as a bool, int or float; whatever else a file can hold there is refused."""
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = type(value) in (int, float) and abs(value) < 2**53 and (kind is float or value == int(value))
    if not fits:
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise refuse(key, f"is {value!r:.60}, expected {expected}")
    return kind(value)


def check_ids(ids: int, config: Config) -> None:
    """Raises InputError E309 for a tokenizer of more `ids` than the model has rows."""
    if ids > config.vocab_size:
        found = f"has ids up to {ids - 1:,}, the model knows {config.vocab_size:,}"
        raise InputError("E309", "the tokenizer", found, "use the tokenizer that the model was trained with")


# ---- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its numbers stand one after the other from byte `begin` on. Equal ones are the same."""

    shape: Shape
    dtype: torch.dtype
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shapes(config: Config) -> dict[str, Shape]:
    """The tensors of a Llama of these sizes, by our names, in the order of model.Llama."""
    D, F, V = config.dim, config.hidden_dim, config.vocab_size
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "attention_norm": (D,),
        "attention.wq": (queries, D),
        "attention.wk": (keys, D),
        "attention.wv": (keys, D),
        "attention.wo": (D, queries),
        "ffn_norm": (D,),
        "feed_forward.w_gate": (F, D),
        "feed_forward.w_up": (F, D),
        "feed_forward.w_down": (D, F),
    }
    found: dict[str, Shape] = {"tok_embeddings.weight": (V, D)}
    for i in range(config.n_layers):
        found |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    found["norm.weight"] = (D,)
    if not config.tie_embeddings:
        found["lm_head.weight"] = (V, D)
    return found


def compare(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: object, says: str) -> None:
    """Raises InputError E203 naming what is missing, unexpected or of another shape than `says` says."""
    unexpected, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    problems = [f"{name} is missing" for name in missing[:SHOWN]]
    for name in unexpected[:SHOWN]:
        near = get_close_matches(plain(name), missing, 1) if len(missing) < 100 else []
        problems.append(f"{plain(name)} is not part of a Llama" + (f" (nearest: {near[0]})" if near else ""))
    misshapen = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    problems += [
        f"{name} has shape {plain(found[name])}, {says} says {expected[name]}" for name in misshapen[:SHOWN]
    ]
    if problems:
        more = len(missing) + len(unexpected) + len(misshapen) - len(problems[:SHOWN])
        shown = "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more else "")
        raise InputError("E203", where, shown, f"use {says} and the weights of one and the same model")


def plain(name: object) -> str:
    """A name from a file, fit to be printed: control characters and letters beyond ASCII escaped, not too long."""
    return ascii(str(name))[1:-1][:100]


class Weights(Mapping[str, Tensor]):
    """Tensors of a model on disk by our names, in float32, each read when it is asked for and kept by nobody.

    Raises InputError E211 for a tensor with a number that is not finite.
    """

    def __init__(self, config: Config, read: Callable[[str], Tensor], where: object) -> None:
        self.config, self._read, self._where = config, read, where
        self._shapes = shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        weight = self._read(name).float()
        assert weight.shape == shape, (name, weight.shape, shape)
        wrong = math.prod(shape) - int(weight.isfinite().sum())
        if wrong:
            found = f"{name} holds {wrong:,} numbers that are not finite"
            raise InputError(
                "E211", self._where, found, "use another copy, or an earlier step, of this model"
            )
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

"""Logits to ids: one token for each row. numpy only, so that every engine shares it.

    logits ─ repetition penalty ─ temperature ─ top-k ─ top-p ─ min-p ─► probabilities ─ draw ─► id

The order matters, and is the one of the Hugging Face library, so that a setting means the same in both.
Letters: B rows, V entries of the vocabulary.

Sources: [CTRL] arXiv:1909.05858  [top-k] arXiv:1805.04833  [top-p] arXiv:1904.09751  [min-p] arXiv:2407.01082
         [Philox] Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from babyllama.errors import NumericalError, UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    temperature         divides the logits; below 1 the likely get likelier. 0: always the likeliest token.
    top_k               keep the k likeliest tokens; of equals the lowest ids. 0: all.
    top_p               keep the fewest likeliest tokens whose probabilities sum to at least top_p, in (0, 1].
    min_p               keep tokens at least min_p times as probable as the likeliest, in [0, 1).
    repetition_penalty  above 1 makes the tokens of the prompt and of the text so far less likely.
    seed                in [0, 2^64): the same seed gives the same text.

    Raises UsageError E102 for a value outside its range.
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, rule, allowed) in RANGES.items():
            value = getattr(self, name)
            number = _number(value, kind)
            if number is None or not allowed(number):
                fix = f"choose another, or leave it out for {getattr(Sampling, name)}"
                raise UsageError("E102", name, f"{name} ({value!r}) must be {rule}", fix)
            object.__setattr__(self, name, number)  # 1 for 1.0 is welcome


RANGES: dict[str, tuple[Callable[[Any], int | float], str, Callable[[Any], bool]]] = {
    "temperature": (float, "a number, 0 or above", lambda x: 0 <= x < math.inf),
    "top_k": (int, "a whole number, 0 or above", lambda x: x >= 0),
    "top_p": (float, "a number above 0, at most 1", lambda x: 0 < x <= 1),
    "min_p": (float, "a number from 0 to below 1", lambda x: 0 <= x < 1),
    "repetition_penalty": (float, "a number above 0", lambda x: 0 < x < math.inf),
    "seed": (int, "a whole number from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64),
}


def _number(value: object, kind: Callable[[Any], int | float]) -> int | float | None:
    """The value as an int or a float of Python; None where it is no such number, as True is none."""
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return None
    try:
        return kind(value)
    except OverflowError:  # a whole number that no float can hold
        return None


STRATEGIES = MappingProxyType(
    {
        "greedy": Sampling(temperature=0),
        "random": Sampling(),
        "random-cool": Sampling(temperature=0.7),
        "top-k": Sampling(top_k=40),
        "top-k-cool": Sampling(top_k=40, temperature=0.7),
        "top-p": Sampling(top_p=0.9),
        "top-p-cool": Sampling(top_p=0.9, temperature=0.7),
    }
)
"""Seven ways to decode, by name, in the order in which to show them: at temperature 1, and cooled to 0.7."""


# ---- from logits to probabilities ----------------------------------------------------------------


def penalise(
    logits: Float[np.ndarray, "B V"], seen: Bool[np.ndarray, "B V"], penalty: float | int
) -> Float64[np.ndarray, "B V"]:
    """Logits with those of `seen` tokens made smaller: divided by the penalty if positive, multiplied if not.

    `seen` is True for each token in the row's prompt or in its text so far, however often it stands there.
    Dividing a negative logit would make its token likelier. Source: [CTRL], section 4.1, which only divides.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        penalised = np.where(scores > 0, scores / penalty, scores * penalty)
    largest = np.finfo(np.float64).max  # a finite logit stays finite under any penalty
    penalised = np.where(np.isfinite(scores), np.clip(penalised, -largest, largest), scores)
    return np.where(seen, penalised, scores)


def probabilities(logits: Float[np.ndarray, "B V"], sampling: Sampling) -> Float64[np.ndarray, "B V"]:
    """The distribution that each row's token is drawn from: temperature, then top-k, top-p and min-p.

    Each filter looks at what the one before it left, scaled to sum to 1, and keeps at least the likeliest token.
    At temperature 0 all of the probability lies on the largest logit (of equals: on the lowest id).
    The repetition penalty comes before this: see penalise. A logit of -inf has probability 0.

    Raises NumericalError E502 for a row with NaN or +inf, or with nothing but -inf.
    """
    refuse_non_finite(logits, [f"row {row}" for row in range(len(logits))])
    scores = logits.astype(np.float64)
    if sampling.temperature == 0:
        chosen = np.zeros_like(scores)
        chosen[np.arange(len(scores)), scores.argmax(axis=1)] = 1
        return chosen
    with np.errstate(over="ignore", under="ignore"):  # cold tails go to exp(-inf) = 0, as they should
        weights = np.exp((scores - scores.max(axis=1, keepdims=True)) / sampling.temperature)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return weights / weights.sum(axis=1, keepdims=True)

    # Likeliest first, every filter keeps a beginning of the row. Sorted by logit: in great heat the logits
    # still differ where the weights no longer do. Stable: of equals the lowest id comes first.
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(weights, order, axis=1)
    if sampling.top_k > 0:
        ordered[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        ordered /= ordered.sum(axis=1, keepdims=True)
        before = np.zeros_like(ordered)  # the probability of all likelier tokens
        before[:, 1:] = ordered.cumsum(axis=1)[:, :-1]
        ordered[before >= sampling.top_p] = 0  # so the token that crosses top_p stays
    ordered[ordered < sampling.min_p * ordered[:, :1]] = 0
    kept = np.empty_like(ordered)
    np.put_along_axis(kept, order, ordered, axis=1)
    return kept / kept.sum(axis=1, keepdims=True)


def refuse_non_finite(logits: Float[np.ndarray, "B V"], places: Sequence[str]) -> None:
    """Raise NumericalError E502 unless every row has a finite logit and no NaN or +inf.

    Without it the damage goes on quietly: argmax takes a NaN for the largest number.
    """
    broken = np.isnan(logits) | (logits == np.inf)
    for row, place in enumerate(places):
        found = None
        if broken[row].any():
            found = f"{broken[row].sum()} of {logits.shape[1]} logits are NaN or +inf"
        elif not np.isfinite(logits[row]).any():
            found = f"all {logits.shape[1]} logits are -inf: no token is possible"
        if found:
            raise NumericalError("E502", place, found, "run in float32, or load an earlier saved step")


# ---- from probabilities to ids -------------------------------------------------------------------


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) for each (seed, stream, position), the same on every machine and in any order.

    53 bits of the Philox 4x64 generator with the seed as its key and (0, position, stream, 0) as its counter:
    nothing is carried from one token to the next, so nothing has to be saved. Source: [Philox].
    """
    bits = np.random.Philox(key=seed, counter=[0, position, stream, 0]).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def sample(
    logits: Float[np.ndarray, "B V"],
    sampling: Sampling,
    seen: Bool[np.ndarray, "B V"] | None,
    streams: Sequence[int],
    positions: Sequence[int],
) -> Int64[np.ndarray, " B"]:
    """One token id for each row.

    seen       tokens of the row's prompt and text so far; None where sampling.repetition_penalty is 1.
    streams    which stream of random numbers each row draws from: usually its number.
    positions  where in the row its new token will stand.

    A row's id depends on its own logits, seed, stream and position, and on nothing else in the batch.
    Raises NumericalError E502 for logits that are not finite, at temperature 0 too.
    """
    places = [f"row {row}, token {position}" for row, position in zip(streams, positions, strict=True)]
    refuse_non_finite(logits, places)
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(axis=1).astype(np.int64)
    sums = probabilities(logits, sampling).cumsum(axis=1)
    draws = [uniform(sampling.seed, *place) for place in zip(streams, positions, strict=True)]
    # The first id whose sum is above the draw; a token of probability 0 never is.
    chosen = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(sums, draws, strict=True)]
    return np.array(chosen, dtype=np.int64)

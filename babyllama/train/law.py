"""How many bits per byte a run will reach, told before it starts: a law fitted to this project's own runs.

    bits = hardness · (floor + width · N^-0.34 + data · D^-0.28)
       D = U · (1 + R · (1 - e^(-(epochs - 1) / R))),    R = 15

N is the number of parameters that are multiplied with, U the bytes of the training text, `epochs` how often a run sees
them, and D what those are worth together: text seen again teaches less each time, and all repetitions together no more
than R further copies of it would. N and D count in millions. The form and the three powers are those of others
(arXiv:2203.15556 and arXiv:2305.16264): our runs are too few to tell them. floor, width and data are our own, in
law.json, and `python benchmarks/law.py` fits them again.

Texts differ in what there is to learn about them. `hardness` is a measure of that which costs a second: the bits per
byte that a table of token triples needs on the held-out text.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAW = Path(__file__).with_name("law.json")
MOST_TOKENS = 1_000_000  # of the training text, for the table: with more, a long text would seem easy
WIDTH_POWER, DATA_POWER, REUSE = 0.34, 0.28, 15.0


@dataclass(frozen=True)
class Reached:
    """One run that was made by the recipe, and what it reached."""

    text: str
    hardness: float
    parameters: int
    text_bytes: int
    epochs: float
    bits_per_byte: float


@dataclass(frozen=True)
class Law:
    floor: float
    width: float
    data: float
    spread: float  # standard deviation of measured / told of each text, where the numbers were fitted to the others

    def bits(self, hardness: float, parameters: int, text_bytes: int, epochs: float) -> float:
        """Bits per byte on the held-out text at the end of a run."""
        few, little = _terms(parameters, text_bytes, epochs)
        return hardness * (self.floor + self.width * few + self.data * little)


def worth(text_bytes: int, epochs: float) -> float:
    """Bytes of fresh text that `epochs` passes over `text_bytes` are worth."""
    if epochs <= 1:
        return text_bytes * epochs
    return text_bytes * (1 + REUSE * (1 - math.exp(-(epochs - 1) / REUSE)))


def _terms(parameters: int, text_bytes: int, epochs: float) -> tuple[float, float]:
    """How much too small the model is, and how little it has read."""
    return (parameters / 1e6) ** -WIDTH_POWER, (worth(text_bytes, epochs) / 1e6) ** -DATA_POWER


# ---- the table of triples ------------------------------------------------------------------------


def hardness(train: NDArray[Any], held_out: NDArray[Any], byte_lengths: Sequence[int]) -> float:
    """Bits per byte that the counts of single tokens, pairs and triples in `train` need on `held_out`.

    Each count is smoothed with the next shorter one by the method of Witten and Bell: what followed a context T times
    out of n times for the first time will do so again with probability T / (n + T).
    """
    ids, new = np.asarray(train[-MOST_TOKENS:]).astype(np.int64), np.asarray(held_out).astype(np.int64)
    V = len(byte_lengths)
    share = np.full(len(new) - 2, 1 / V)
    for order in (1, 2, 3):
        seen = _windows(ids, order, V)
        grams, counts = np.unique(seen, return_counts=True)
        contexts, first = np.unique(grams // V, return_index=True)
        kinds = np.diff(np.append(first, len(grams)))  # different tokens after each context
        totals = np.add.reduceat(counts, first)
        asked = _windows(new, order, V)[3 - order :]
        found = _look_up(grams, counts, asked)
        after, fresh = _look_up(contexts, totals, asked // V), _look_up(contexts, kinds, asked // V)
        known = after > 0
        share[known] = (found[known] + fresh[known] * share[known]) / (after[known] + fresh[known])
    bytes_ = np.asarray(byte_lengths)[new[2:]].sum()
    return float(-np.log2(share).sum() / bytes_)


def _windows(ids: NDArray[np.int64], order: int, V: int) -> NDArray[np.int64]:
    """Each token with the order - 1 before it, as one number."""
    number = np.zeros(len(ids) - order + 1, dtype=np.int64)
    for back in range(order):
        number = number * V + ids[back : len(ids) - order + 1 + back]
    return number


def _look_up(
    keys: NDArray[np.int64], values: NDArray[np.int64], asked: NDArray[np.int64]
) -> NDArray[np.int64]:
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)


# ---- fitting -------------------------------------------------------------------------------------


def fit(runs: Sequence[Reached]) -> Law:
    """The law with the smallest relative errors; its spread comes from texts left out of the fit one after another."""
    texts = sorted({run.text for run in runs})
    whole, errors = _fit(runs), []
    for text in texts:
        others = _fit([run for run in runs if run.text != text]) if len(texts) > 1 else whole
        errors += [math.log(run.bits_per_byte / told(run, others)) for run in runs if run.text == text]
    return replace(whole, spread=float(np.sqrt(np.mean(np.square(errors)))))


def told(run: Reached, law: Law) -> float:
    return law.bits(run.hardness, run.parameters, run.text_bytes, run.epochs)


def _fit(runs: Sequence[Reached]) -> Law:
    scale = np.array([run.hardness / run.bits_per_byte for run in runs])
    terms = [(1.0, *_terms(run.parameters, run.text_bytes, run.epochs)) for run in runs]
    floor, width, data = map(float, _not_negative(scale[:, None] * np.array(terms)))
    return Law(floor, width, data, 0.0)


def _not_negative(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares for columns · x = 1 with no x below 0.

    The best of the free solutions on some of the columns, of those that have no negative part.
    """
    ones, count = np.ones(len(columns)), columns.shape[1]
    best, least = np.zeros(count), math.inf
    for size in range(count, 0, -1):
        for use in map(list, combinations(range(count), size)):
            part = columns[:, use]
            x = np.linalg.lstsq(part, ones, rcond=None)[0]
            error = float(np.square(part @ x - 1).sum())
            if (x >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[use] = x
    return best


# ---- law.json ------------------------------------------------------------------------------------


def read() -> tuple[Law, list[Reached]]:
    """The law, and the runs that it was fitted to."""
    value = json.loads(LAW.read_text(encoding="utf-8"))
    return Law(**value["law"]), [Reached(**run) for run in value["runs"]]


def write(law: Law, runs: Sequence[Reached], path: Path = LAW) -> None:
    value = {"law": asdict(law), "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

"""Token ids -> (tokens, targets), as a function of the step: nothing to save but the number of the step."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babyllama.errors import InputError, UsageError

IGNORE = -100  # a target that does not count; the value torch's cross_entropy skips by default
ROUNDS = 6


class Batches:
    """Training windows of `context` tokens, `batch_size` a step, in an order that only (seed, step) decides.

    Every id but the first is something to predict: M = len(ids) - 1 targets, thought of as a ring. Each epoch
    cuts the ring at a place of its own into ceil(M / context) windows and visits them in an order of its own, so
    that each target comes exactly once and the cuts differ from epoch to epoch. The last window is shorter, and
    its missing targets are IGNORE. Epochs follow one another without a gap: a batch may hold windows of two.

    ids        one dimension, from `Corpus.train_ids` or `val_ids` or any array of integers.
    context    tokens a row sees, at most.
    seed       any integer.

    Raises InputError E303 when there are fewer than context + 1 ids, UsageError E102 for sizes below 1.
    """

    def __init__(self, ids: NDArray[Any], context: int, batch_size: int, seed: int = 0) -> None:
        if context < 1 or batch_size < 1:
            raise UsageError(
                "E102",
                "context, batch_size",
                f"{context} and {batch_size}, expected at least 1",
                "use positive numbers",
            )
        if len(ids) < context + 1:
            raise InputError(
                "E303",
                "ids",
                f"have {len(ids)} tokens, need {context + 1}: the context ({context}) and one to predict",
                f"use more text, or a shorter context:  --set context={max(len(ids) - 1, 1)}",
            )
        self.ids, self.context, self.batch_size, self.seed = ids, context, batch_size, seed
        self.targets = len(ids) - 1
        self.windows = -(-self.targets // context)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """tokens and targets (B, T) of a step, counted from 0.

        Raises InputError E307 when the file behind the ids has become shorter.
        """
        refuse_shorter(self.ids)
        rows = step * self.batch_size + np.arange(self.batch_size)
        epochs, turns = rows // self.windows, rows % self.windows
        window = np.empty_like(rows)
        offset = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            window[here] = _shuffled(turns[here], self.windows, f"{self.seed}/{epoch}")
            offset[here] = _hash(f"{self.seed}/{epoch}/offset") % self.targets

        index = window[:, None] * self.context + np.arange(self.context)  # (B, T), place in this epoch
        place = (index + offset[:, None]) % self.targets  # (B, T), place on the ring
        tokens = np.asarray(self.ids[place]).astype(np.int64)
        targets = np.asarray(self.ids[place + 1]).astype(np.int64)
        targets[index >= self.targets] = IGNORE
        return tokens, targets


def refuse_shorter(ids: NDArray[Any]) -> None:
    """Raises InputError E307 when the file behind mapped ids has become shorter: touching what it lost would kill the
    process with a bus error."""
    file = getattr(ids, "_mmap", None)  # np.memmap keeps its mapping there, views of it too
    if file is not None and file.size() < len(file):
        raise InputError(
            "E307",
            str(getattr(ids, "filename", None) or "ids"),
            f"has {file.size()} bytes, had {len(file)} when it was opened",
            "prepare the text again and resume:  babyllama data TEXT --out DIR --overwrite",
        )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _shuffled(places: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Where each of `places` stands in the permutation of 0 .. size-1 that key names, without a table.

    A Feistel network cuts a number of 2h bits into halves and ROUNDS times replaces (left, right) by
    (right, left ^ mix(right, round)). Each round can be undone whatever mix is, so the whole is a permutation of
    0 .. 4^h - 1. That is up to 4 times too many numbers; one that falls outside is sent through again until it
    falls inside, which keeps it a permutation (it follows its own cycle back in).

    Source: M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988;
    J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002 (cycle walking); mix: SplitMix64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(_hash(f"{key}/{round}")) for round in range(ROUNDS)]
    value = places.astype(np.uint64)
    outside = np.full(len(value), True)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value[outside] = (left << half) | right
        outside = value >= size
    return value.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits in, 64 well-stirred bits out; array arithmetic wraps around by itself."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

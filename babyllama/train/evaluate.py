"""How well a model predicts a text: bits per byte, which do not depend on the tokenizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.errors import InputError

LOGITS_AT_ONCE = 2**22  # numbers: 16 MiB, and as much again for their softmax
TOKENS_AT_ONCE = 2**14  # of a small vocabulary: what the layers hold of each token counts too


@dataclass(frozen=True)
class Score:
    """`bits_per_byte` = nats / (ln 2 · bytes of the text), with its standard error over the parts of the text."""

    bits_per_byte: float
    error: float | None  # None: one part has no spread
    nats_per_token: float
    tokens: int
    bytes: int


@torch.inference_mode()
def score(
    logits: Callable[[Tensor], Tensor],
    ids: np.ndarray,
    byte_lengths: Sequence[int],
    context: int,
    max_tokens: int | None = None,
    device: str = "cpu",
    after_bos: tuple[int, Sequence[int]] | None = None,
    rows_at_once: int = 1,
) -> Score:
    """Score every token of `ids` but the first exactly once, after at least context / 2 others where there are so many.

    logits        tokens (B, T) -> logits (B, T, V)
    byte_lengths  bytes of text that each id stands for; special tokens cost bits and add no bytes
    after_bos     the BOS id, and the lengths of ids that follow it, where those differ: SentencePiece's dummy space
    rows_at_once  `logits` is asked for multiples of so many, but for the last
    max_tokens    score only about so many, evenly taken from the whole text

    Raises InputError E303 when there is nothing to score.
    """
    stride = max(1, context // 2)
    starts = list(range(0, len(ids) - 1, stride))
    if max_tokens is not None and max_tokens < len(ids):
        most = min(max(1, max_tokens // stride), len(starts))
        starts = [starts[i * len(starts) // most] for i in range(most)]
    lengths = np.asarray(byte_lengths)
    bos_id, first_lengths = (-1, lengths) if after_bos is None else (after_bos[0], np.asarray(after_bos[1]))
    nats, sizes, tokens = [], [], 0
    rows = max(1, min(LOGITS_AT_ONCE // (context * len(lengths)), TOKENS_AT_ONCE // context))
    rows = max(1, rows // rows_at_once) * rows_at_once
    for at in range(0, len(starts), rows):
        inputs, targets = np.zeros((2, len(starts[at : at + rows]), context), dtype=np.int64)
        counted = np.zeros(targets.shape, dtype=bool)
        for row, new in enumerate(starts[at : at + rows]):
            begin, end = max(0, new + stride - context), min(new + stride, len(ids) - 1)
            inputs[row, : end - begin], targets[row, : end - begin] = ids[begin:end], ids[begin + 1 : end + 1]
            counted[row, new - begin : end - begin] = True  # what lies before is there to be looked at
        found = logits(torch.from_numpy(inputs).to(device)).float()
        losses = F.cross_entropy(
            found.flatten(0, 1), torch.from_numpy(targets).to(device).flatten(), reduction="none"
        )
        nats.append(
            np.where(counted, losses.view(targets.shape).cpu().numpy().astype(np.float64), 0).sum(axis=1)
        )
        bytes_ = np.where(inputs == bos_id, first_lengths[targets], lengths[targets])
        sizes.append(np.where(counted, bytes_, 0).sum(axis=1))
        tokens += int(counted.sum())
    nats_by_part, bytes_by_part = np.concatenate(nats or [[]]), np.concatenate(sizes or [[]])
    total = int(bytes_by_part.sum())
    if total == 0:
        raise InputError("E303", "the text to score", "holds no predictable byte", "give a longer text")
    ratio = nats_by_part.sum() / total
    parts, off = len(nats_by_part), nats_by_part - ratio * bytes_by_part
    spread = None if parts < 2 else float(np.sqrt((off**2).sum() * parts / (parts - 1)) / total)
    return Score(
        bits_per_byte=float(ratio / math.log(2)),
        error=None if spread is None else spread / math.log(2),
        nats_per_token=float(nats_by_part.sum() / tokens),
        tokens=tokens,
        bytes=total,
    )

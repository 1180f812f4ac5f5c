"""Prompts to more tokens, with a torch model on any device.

prompts ─ prefill, a chunk at a time ─► logits ─ sample ─► tokens ─► you
                                          ▲                  │
                                          └──── decode ◄─────┘   one token of each row at a time

for token in generate(model, [prompt], max_tokens=200):
    print(token.id)

for completion in complete(model, prompts, max_tokens=200, stop_ids=tokenizer.eos_ids):
    print(completion.ids, completion.reason)
"""

from collections.abc import Iterator, Sequence, Set
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from babyllama.errors import InputError, UsageError
from babyllama.generate.cache import KVCache
from babyllama.generate.sample import Sampling, sample
from babyllama.model import Llama

Reason = Literal["stop", "length"]


class Token(NamedTuple):
    """A new token: which prompt it goes on, its id, and where in that row it stands (0: the first of all)."""

    row: int
    id: int
    position: int


class Completion(NamedTuple):
    """What was added to one prompt, without the token that stopped it; "length": no room or no leave for more."""

    ids: list[int]
    reason: Reason


class Generation(Iterator[Token]):
    """The tokens of a running generation. `reasons[row]` says why a row ended; None: it goes on."""

    def __init__(self, tokens: Iterator[Token], reasons: list[Reason | None]) -> None:
        self._tokens, self.reasons = tokens, reasons

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, row: int) -> None:
        """End a row from outside: nothing more of it is yielded. For stops that only the text shows."""
        self.reasons[row] = "stop"


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop_ids: Set[int] = frozenset(),
    vocab_size: int | None = None,
    prefill_chunk: int = 256,
    max_len: int | None = None,
    streams: Sequence[int] | None = None,
) -> Generation:
    """Continue every prompt, all in one batch, and yield each token as soon as it is chosen.

    model          in eval mode while this runs, and then as it was before.
    prompts        token ids, with the BOS where the model wants one. Their lengths may differ.
    max_tokens     new tokens for each prompt, at most. 0 gives none.
    stop_ids       a row ends at any of these; the id itself is not yielded.
    vocab_size     ids that may be chosen: those below. None: all; a tokenizer may know fewer than the model has rows.
    prefill_chunk  prompt tokens in one pass: bounds the memory, changes nothing else.
    max_len        prompt and new tokens together, at most; None: the model's max_seq_len.
    streams        the stream of random numbers for each prompt; None: its row. A prompt with the same seed and
                   stream is continued alike in any batch (but for rounding in the model: see the note below).

    Note: a matrix product may round differently for another batch size, chunk or device. Where two tokens are
    within that (some 1e-6) of each other, a text may part from its twin.

    Raises InputError E311 (a prompt longer than max_len), E309 (an id that the model does not have);
    UsageError E102 (a number out of range, an empty prompt): at once. NumericalError E502, MachineError E404:
    while it runs.
    """
    context = model.config.max_seq_len
    limit = _whole("max_len", context if max_len is None else max_len, 1, context)
    _whole("max_tokens", max_tokens, 0)
    _whole("prefill_chunk", prefill_chunk, 1)
    most = model.config.vocab_size
    vocab_size = _whole("vocab_size", most if vocab_size is None else vocab_size, 1, most)
    for row, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt {row}"
        _check_prompt(where, prompt, limit, model.config.vocab_size)
    streams = [
        _whole("streams", stream, 0, 2**64 - 1)
        for stream in (range(len(prompts)) if streams is None else streams)
    ]
    if len(streams) != len(prompts):
        found = f"{len(streams)} streams for {len(prompts)} prompts"
        raise UsageError("E102", "streams", found, "give one stream for each prompt, or none at all")

    rows = [list(prompt) for prompt in prompts]
    ends = [min(len(row) + max_tokens, limit) for row in rows]  # how long each may get
    reasons: list[Reason | None] = [
        "length" if len(row) == end else None for row, end in zip(rows, ends, strict=True)
    ]
    return Generation(
        _tokens(model, rows, ends, reasons, sampling, stop_ids, vocab_size, prefill_chunk, streams), reasons
    )


def complete(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    stop_ids: Set[int] = frozenset(),
    vocab_size: int | None = None,
    prefill_chunk: int = 256,
    max_len: int | None = None,
    streams: Sequence[int] | None = None,
) -> list[Completion]:
    """The same, when all of it is there: one Completion for each prompt, in their order. See generate."""
    generation = generate(
        model,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        prefill_chunk=prefill_chunk,
        max_len=max_len,
        streams=streams,
    )
    ids: list[list[int]] = [[] for _ in prompts]
    for token in generation:
        ids[token.row].append(token.id)
    reasons: list[Reason] = [reason for reason in generation.reasons if reason]  # each row has one by now
    return [Completion(*row) for row in zip(ids, reasons, strict=True)]


def _tokens(
    model: Llama,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    reasons: list[Reason | None],
    sampling: Sampling,
    stop_ids: Set[int],
    vocab_size: int,
    prefill_chunk: int,
    streams: Sequence[int],
) -> Iterator[Token]:
    """The loop. It writes `reasons`, and heeds those that others write. Knows no Generation, so that one whose
    caller leaves is closed at once, with its cache."""
    if None not in reasons:
        return
    training = model.training
    model.eval()
    try:
        rows = [prompt if reason is None else [] for prompt, reason in zip(prompts, reasons, strict=True)]
        lengths = [len(row) for row in rows]
        seen = None
        if sampling.repetition_penalty != 1:
            seen = np.zeros((len(rows), model.config.vocab_size), dtype=bool)
            for row, prompt in enumerate(rows):
                seen[row, prompt] = True
        room = max(end for end, reason in zip(ends, reasons, strict=True) if reason is None)
        weight = model.tok_embeddings.weight
        cache = KVCache(model.config, len(rows), room, weight.device, weight.dtype)
        logits = _prefill(model, cache, rows, prefill_chunk)  # (B, V)

        while running := [row for row, reason in enumerate(reasons) if reason is None]:
            ids = sample(
                logits[running, :vocab_size],
                sampling,
                None if seen is None else seen[running, :vocab_size],
                [streams[row] for row in running],
                [lengths[row] for row in running],
            )
            fresh: list[list[int]] = [[] for _ in rows]
            for row, id in zip(running, ids.tolist(), strict=True):
                if reasons[row] is not None:  # stopped from outside, while this loop stood at a yield
                    continue
                if id in stop_ids:
                    reasons[row] = "stop"
                    continue
                fresh[row], position = [id], lengths[row]
                lengths[row] += 1
                if seen is not None:
                    seen[row, id] = True
                if lengths[row] == ends[row]:
                    reasons[row] = "length"
                yield Token(row, id, position)
            pieces = [piece if reason is None else [] for piece, reason in zip(fresh, reasons, strict=True)]
            if any(pieces):
                logits = _pass(model, cache, pieces)
    finally:
        model.train(training)


def _prefill(model: Llama, cache: KVCache, prompts: list[list[int]], chunk: int) -> Float[np.ndarray, "B V"]:
    """Work through the prompts, all from their beginnings; the logits after the last token of each."""
    logits = np.zeros((len(prompts), model.config.vocab_size), dtype=np.float32)
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        here = [row for row, piece in enumerate(pieces) if piece]  # the others have ended before
        logits[here] = _pass(model, cache, pieces)[here]
    return logits


def _pass(model: Llama, cache: KVCache, pieces: list[list[int]]) -> Float[np.ndarray, "B V"]:
    """One pass of the model over the next tokens of every row: the logits after the last one of each.

    Rows are filled up on the right to the width of the widest. A row without tokens is all filling: it computes
    what nobody reads, into slots that nobody sees.
    """
    counts, width = [len(piece) for piece in pieces], max(map(len, pieces))
    filled = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
    tokens = torch.tensor(filled, device=cache.lengths.device)  # (B, T)
    last = [max(count - 1, 0) for count in counts]
    with torch.inference_mode():  # here and not around a yield, where it would leak to the caller
        logits = model(tokens, cache)[range(len(last)), last].float().cpu()  # (B, V)
    cache.advance(counts)
    return logits.numpy()


def _whole(name: str, value: int, least: int, most: int | None = None) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        rule = f"a whole number from {least} " + ("up" if most is None else f"to {most}")
        raise UsageError("E102", name, f"{name} ({value!r}) must be {rule}", f"choose another {name}")
    return int(value)


def _check_prompt(where: str, prompt: Sequence[int], limit: int, vocab_size: int) -> None:
    if len(prompt) == 0:
        raise UsageError("E102", where, "no tokens, so nothing to continue", "begin it with the BOS token")
    if len(prompt) > limit:
        found = f"prompt {len(prompt)} tokens, context {limit}"
        raise InputError("E311", where, found, f"shorten it to {limit} tokens, less what should be added")
    strangers = [id for id in prompt if not 0 <= id < vocab_size]
    if strangers:
        found = f"token {strangers[0]} is not among the {vocab_size} of the model"
        raise InputError("E309", where, found, "encode it with the tokenizer the model was trained with")

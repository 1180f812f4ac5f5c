"""Contexts and continuations -> log-likelihoods: the sum of ln P(token | all before it) over a continuation.

    trunk      what the continuations of one context begin with, worked on once
    branches   how each goes on from there, from the trunk's keys and values

        A lamp gives light, and so does a ─┬─ candle.
                                           └─ fire in the stove.

Only tokens of continuations are scored, and the last token of each is never an input. Logits are made only where a
token is scored, so many at once that a long text needs no more memory for them than a short one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from babyllama.errors import NumericalError
from babyllama.generate.cache import KVCache
from babyllama.model import Llama
from babyllama.text.tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB; logits of one token at least
TOKENS_AT_ONCE = 2**9  # inputs of one pass; more are no faster on a CPU, and need more filling up
FOR_A_GPU = 16  # times as much of both

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""(done, in all); in pairs, where no continuation is longer than the context"""


class Pair(NamedTuple):
    """The ids of a context, at least one, and of what follows it."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """`nats` = ln P(continuation | context), at most 0; `greedy`: each token of it is the likeliest in its place."""

    nats: float
    greedy: bool


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """The ids of (context, continuation), with the border where lm-eval has it.

    White space at the end of a context is moved to the continuation, since a token begins with its space. Both are
    encoded as one text; the continuation is what comes after as many ids as the context has alone. Where that leaves
    nothing (the border lies within a token), it begins at the first id that the context alone does not have.

    BOS stands first where the tokenizer's file asks for it, and always before a continuation without a context.
    Source: [lm-eval] api/model.py, TemplateLM._encode_pair.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + after) for context, after in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    alone = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    whole = tokenizer.encode_batch([context + after for context, after in moved])
    return [
        _split(tokenizer, alone[context], ids) if context else Pair([tokenizer.bos_id], ids)
        for (context, _), ids in zip(moved, whole, strict=True)
    ]


def _split(tokenizer: Tokenizer, context: list[int], whole: list[int]) -> Pair:
    bos = [tokenizer.bos_id]
    beginning = bos if tokenizer.puts_bos else []
    if len(whole) > len(context) or whole == context:
        return Pair([*beginning, *context], whole[len(context) :])
    border = _shared(context, whole)
    return Pair([*beginning, *whole[:border]] or bos, whole[border:])


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def likelihoods(model: Llama, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Likelihood]:
    """The log-likelihood of each continuation, in the order of the pairs. An empty one has 0 nats and is greedy.

    A context that leaves its continuation too little room is cut from the left. A continuation that is itself longer
    than the model's context is scored in windows, each token once; all but the first window begin full.

    Raises NumericalError E502 when a logit is not finite; MachineError E404 without memory for the cache.
    Source: [lm-eval] utils.py, get_rolling_token_windows.
    """
    wanted: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, pair in enumerate(pairs):
        for window in _windows(pair, model.config.max_seq_len):
            wanted[tuple(window.context)][tuple(window.continuation)].append(number)
    trees = [_Tree.of(before, list(after)) for before, after in wanted.items()]
    trees.sort(key=lambda tree: len(tree.trunk), reverse=True)  # too little memory shows at once
    limit = TOKENS_AT_ONCE * (1 if model.tok_embeddings.weight.device.type == "cpu" else FOR_A_GPU)

    found = [Likelihood(0.0, True)] * len(pairs)
    done, total = 0, sum(len(numbers) for after in wanted.values() for numbers in after.values())
    for batch in _batches(trees, lambda tree: limit // len(tree.trunk)):
        for tree, scored in zip(batch, _score(model, batch, limit), strict=True):
            for targets, part in zip(tree.targets, scored, strict=True):
                numbers = wanted[tree.before][targets]
                for number in numbers:
                    nats, greedy = found[number]
                    found[number] = Likelihood(nats + part.nats, greedy and part.greedy)
                done += len(numbers)
        if progress is not None:
            progress(done, total)
    return found


def _windows(pair: Pair, longest: int) -> Iterator[Pair]:
    """The same in parts of which all but the last id fit into `longest` inputs."""
    before, targets = pair
    if 0 < len(targets) <= longest:
        yield Pair(before[-(longest + 1 - len(targets)) :], targets)
    elif targets:
        yield Pair(before[-1:], targets[:longest])
        for start in range(longest, len(targets), longest):
            end = min(start + longest, len(targets))
            yield Pair(targets[end - longest - 1 : start], targets[start:end])


@dataclass(frozen=True)
class _Tree:
    """The continuations of one context, as far as they share their inputs and beyond."""

    before: tuple[int, ...]
    targets: list[tuple[int, ...]]
    trunk: tuple[int, ...]
    branches: list[tuple[int, ...]]  # of each of the targets; empty where the trunk holds all inputs

    @classmethod
    def of(cls, before: tuple[int, ...], targets: list[tuple[int, ...]]) -> "_Tree":
        inputs = [before + each[:-1] for each in targets]
        shared = _shared(min(inputs), max(inputs))  # the first and the last in order differ the earliest
        return cls(before, targets, inputs[0][:shared], [each[shared:] for each in inputs])

    def predicted(self, number: int) -> Iterator[tuple[int, int]]:
        """(position, target) of the tokens of a continuation; the trunk's first token has position 0."""
        return enumerate(self.targets[number], len(self.before) - 1)


def _batches(items: list[T], rows_at_once: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours, as many as the first of them allows."""
    start = 0
    while start < len(items):
        batch = items[start : start + max(1, rows_at_once(items[start]))]
        yield batch
        start += len(batch)


@torch.inference_mode()
def _score(model: Llama, trees: Sequence[_Tree], limit: int) -> list[list[Likelihood]]:
    """For each tree the likelihoods of its targets: one pass over the trunks, then passes over the branches.

    Rows are filled up on the right: what is there comes after every token that is looked at, and attention never looks
    ahead.
    """
    weight = model.tok_embeddings.weight
    lengths = [len(tree.trunk) for tree in trees]
    forks = [(row, number) for row, tree in enumerate(trees) for number in range(len(tree.targets))]
    forks = [(row, number) for row, number in forks if trees[row].branches[number]]
    forks.sort(key=lambda fork: len(trees[fork[0]].branches[fork[1]]), reverse=True)
    cache = KVCache(model.config, len(trees), max(lengths), weight.device, weight.dtype) if forks else None
    residual = model.residual(_filled([tree.trunk for tree in trees], weight.device), cache)  # (B, T, D)

    found = [[Likelihood(0.0, True)] * len(tree.targets) for tree in trees]
    places = [
        _Place(row, position, target, row, number)
        for row, tree in enumerate(trees)
        for number in range(len(tree.targets))
        for position, target in tree.predicted(number)
        if position < len(tree.trunk)
    ]
    _add(found, places, model, residual)

    def at_once(fork: tuple[int, int]) -> int:
        width = len(trees[fork[0]].branches[fork[1]])
        return min(limit // width, 4 * limit // (max(lengths) + width))  # inputs; slots of the cache

    for batch in _batches(forks, at_once):
        assert cache is not None
        rows = [row for row, _ in batch]
        branches = [trees[row].branches[number] for row, number in batch]
        forked = _forked(model, cache, rows, [lengths[row] for row in rows], max(map(len, branches)))
        residual = model.residual(_filled(branches, weight.device), forked)  # (B, T, D)
        places = [
            _Place(at, position - lengths[row], target, row, number)
            for at, (row, number) in enumerate(batch)
            for position, target in trees[row].predicted(number)
            if position >= lengths[row]
        ]
        _add(found, places, model, residual)
    if not all(math.isfinite(each.nats) for tree in found for each in tree):
        what = "a log-likelihood is not finite"
        raise NumericalError("E502", "the model", what, "check the weights that it was loaded from")
    return found


class _Place(NamedTuple):
    """Where in a pass a target is predicted, and whose it is."""

    row: int
    position: int
    target: int
    tree: int
    number: int


def _add(found: list[list[Likelihood]], places: list[_Place], model: Llama, residual: Tensor) -> None:
    """Add what each target costs at its place to the likelihood that it is part of."""
    wanted: dict[tuple[int, int], list[_Place]] = defaultdict(list)
    for place in places:
        wanted[place.row, place.position].append(place)
    at_once = LOGITS_AT_ONCE * (1 if residual.device.type == "cpu" else FOR_A_GPU) // model.config.vocab_size
    for spots in _batches([*wanted], lambda _: at_once):
        row, position = torch.tensor(spots, device=residual.device).T
        logits = model.head(residual[row, position]).float()  # (N, V)
        here = [(at, place) for at, spot in enumerate(spots) for place in wanted[spot]]
        at, target = torch.tensor([(at, place.target) for at, place in here], device=residual.device).T
        greedy = logits.argmax(-1)[at] == target
        # not log_softmax: on a CPU it adds a large vocabulary up one by one in float32 (2e-5 off for SmolLM2's tokens)
        nats = (logits[at, target] - logits.logsumexp(-1)[at]).clamp(max=0)
        for (_, place), cost, likeliest in zip(here, nats.tolist(), greedy.tolist(), strict=True):
            before = found[place.tree][place.number]
            found[place.tree][place.number] = Likelihood(before.nats + cost, before.greedy and likeliest)


def _filled(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)  # (B, T)


def _forked(model: Llama, cache: KVCache, rows: list[int], lengths: list[int], room: int) -> KVCache:
    """A cache whose row i begins with what `cache` has in rows[i], and has `room` slots more."""
    longest, weight = cache.max_len, model.tok_embeddings.weight
    forked = KVCache(model.config, len(rows), longest + room, weight.device, weight.dtype)
    forked.keys[:, :, :, :longest] = cache.keys[:, rows]
    forked.values[:, :, :, :longest] = cache.values[:, rows]
    forked.advance(lengths)
    return forked

"""The cache, by itself against lists, and with the model against the model without it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from babyllama.errors import InputError, MachineError
from babyllama.generate.cache import KVCache
from babyllama.model import Config, Llama

TINY = Config(vocab_size=11, dim=12, n_layers=2, n_heads=6, n_kv_heads=2, max_seq_len=40)  # hd = 2
HEADS = pytest.mark.parametrize("n_kv_heads", [6, 2], ids=["MHA", "GQA 6/2"])


def fed(model: Llama, cache: KVCache, pieces: list[Tensor]) -> list[Tensor]:
    """Logits (V) of every token of each row: pieces[row] are that row's next tokens, filled up on the right."""
    counts = [len(piece) for piece in pieces]
    tokens = torch.full((len(pieces), max(counts)), 3)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
    with torch.no_grad():
        logits = model(tokens, cache)
    cache.advance(counts)
    return [logits[row, :count] for row, count in enumerate(counts)]


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def random_tokens(model: Llama, length: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


# ---- with the model ------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 150])
def test_logits_with_the_cache_in_chunks_equal_those_without_it(
    random_llama: Callable[..., Llama], n_kv_heads: int, chunk: int, fused: bool
) -> None:
    model = random_llama(n_kv_heads=n_kv_heads)
    tokens = random_tokens(model, 150)[None].expand(2, -1)
    cache = KVCache(model.config, 2, 150)
    with torch.no_grad():
        whole = model(tokens)
        parts = []
        for start in range(0, 150, chunk):
            parts.append(model(tokens[:, start : start + chunk], cache, fused=fused))
            cache.advance([parts[-1].shape[1]] * 2)
    assert far(torch.cat(parts, dim=1), whole) < 1e-5


@HEADS
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_rows_of_different_lengths_give_the_logits_of_each_alone(
    random_llama: Callable[..., Llama], n_kv_heads: int, chunk: int
) -> None:
    model = random_llama(n_kv_heads=n_kv_heads)
    rows = [random_tokens(model, length, seed=length) for length in (1, 90, 17, 64, 65)]
    cache = KVCache(model.config, len(rows), 130)
    found: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, 90, chunk):  # prompts of different lengths, then ten tokens more for each
        for row, logits in enumerate(fed(model, cache, [tokens[start : start + chunk] for tokens in rows])):
            found[row].append(logits)
    more = random_tokens(model, 10 * len(rows), seed=99).view(10, len(rows))
    for step in more:
        for row, logits in enumerate(fed(model, cache, list(step[:, None]))):
            found[row].append(logits)
    assert cache.lengths.tolist() == [len(tokens) + 10 for tokens in rows]
    for row, tokens in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.cat((tokens, more[:, row]))[None])[0]
        assert far(torch.cat(found[row]), alone) < 1e-5, row


def test_no_position_is_off_by_one_when_tokens_come_one_by_one(random_llama: Callable[..., Llama]) -> None:
    model = random_llama(n_kv_heads=2)
    cache = KVCache(model.config, 1, 60)
    tokens = random_tokens(model, 60)
    for position in range(60):
        (step,) = fed(model, cache, [tokens[position : position + 1]])
        with torch.no_grad():
            whole = model(tokens[None, : position + 1])[0, -1:]
        assert far(step, whole) < 1e-5, position


def test_unused_slots_of_equal_rows_are_not_even_read(random_llama: Callable[..., Llama]) -> None:
    model = random_llama(n_kv_heads=2)
    tokens, cache = random_tokens(model, 20), KVCache(model.config, 2, 32)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    parts = [fed(model, cache, [piece, piece]) for piece in (tokens[:7], tokens[7:8], tokens[8:])]
    with torch.no_grad():
        whole = model(tokens[None])[0]
    for row in range(2):
        assert far(torch.cat([part[row] for part in parts]), whole) < 1e-5


@pytest.mark.parametrize("poison", [1e4, -1e4, 1e30])
def test_unused_slots_of_unequal_rows_do_not_count(random_llama: Callable[..., Llama], poison: float) -> None:
    model = random_llama(n_kv_heads=2)
    rows, more = [random_tokens(model, 5), random_tokens(model, 23)], random_tokens(model, 8, seed=4)

    def logits(value: float) -> Tensor:
        cache, parts = KVCache(model.config, 2, 40), []
        cache.keys.fill_(value)
        cache.values.fill_(value)
        parts += fed(model, cache, rows)
        for row, length in enumerate(cache.lengths.tolist()):  # what padding left behind is poisoned as well
            cache.keys[:, row, :, length:] = value
            cache.values[:, row, :, length:] = value
        for id in more:
            parts += fed(model, cache, [id[None], id[None]])
        return torch.cat(parts)

    assert torch.equal(logits(poison), logits(0.0))


def test_the_cache_takes_the_precision_it_is_made_with(random_llama: Callable[..., Llama]) -> None:
    model = random_llama(n_kv_heads=2).to(torch.bfloat16)
    cache = KVCache(model.config, 2, 16, dtype=torch.bfloat16)
    first, second = fed(model, cache, [random_tokens(model, 4), random_tokens(model, 9)])
    assert first.dtype == second.dtype == cache.keys.dtype == torch.bfloat16
    assert torch.isfinite(first).all() and torch.isfinite(second).all()


# ---- by itself -----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 6), min_size=3, max_size=3)), max_size=6)
)
def test_it_holds_what_three_growing_lists_would_hold(passes: list[tuple[int, list[int]]]) -> None:
    cache = KVCache(TINY, 3, 40)
    rows: list[list[Tensor]] = [[], [], []]
    made = 0.0
    for T, wanted in passes:
        counts = [min(count, T) for count in wanted]
        before, S = [len(row) for row in rows], max(map(len, rows)) + T
        for layer in range(2):
            k = torch.arange(made, made + 3 * 2 * T * 2).view(3, 2, T, 2)
            made += k.numel()
            keys, values = cache.append(layer, k, -k)
            assert keys.shape == values.shape == (3, 2, S, 2)
            if layer == 0:
                for row, held in enumerate(rows):
                    held.extend(k[row].unbind(dim=1))
            for row, length in enumerate(before):
                fresh = slice(length, length + T)
                assert torch.equal(keys[row, :, fresh], k[row]) and torch.equal(
                    values[row, :, fresh], -k[row]
                )
                if layer == 0 and length:
                    held = torch.stack(rows[row][:length], dim=1)
                    assert torch.equal(keys[row, :, :length], held)
                    assert torch.equal(values[row, :, :length], -held)
        for row, (length, count) in enumerate(zip(before, counts, strict=True)):
            del rows[row][length + count :]  # the rest was padding
        cache.advance(counts)
        assert cache.lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("lengths", [[8, 8], [8, 3]], ids=["equal", "unequal"])
def test_what_it_gives_is_a_view_and_not_a_copy(lengths: list[int]) -> None:
    cache = KVCache(TINY, 2, 40)
    k = torch.ones(2, 2, 8, 2)
    cache.append(0, k, k)
    cache.advance(lengths)
    keys, values = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert keys.data_ptr() == cache.keys[0].data_ptr() and values.data_ptr() == cache.values[0].data_ptr()


@pytest.mark.parametrize("lengths", [[10, 10], [10, 4]], ids=["equal", "unequal"])
def test_it_is_full_at_exactly_max_len(lengths: list[int]) -> None:
    cache = KVCache(TINY, 2, 12)
    k = torch.ones(2, 2, 10, 2)
    cache.append(0, k, k)
    cache.advance(lengths)
    keys, _ = cache.append(0, k[:, :, :2], k[:, :, :2])  # 12 of 12
    assert keys.shape[2] == 12
    cache.advance([2, 2])
    with pytest.raises(InputError, match="13 tokens, room for 12") as caught:
        cache.append(0, k[:, :, :1], k[:, :, :1])
    assert caught.value.code == "E311"


def test_a_cache_too_large_for_any_memory_is_a_machine_error() -> None:
    with pytest.raises(MachineError, match="1125899906842624 tokens") as caught:
        KVCache(TINY, 1, 2**50)
    assert caught.value.code == "E404"

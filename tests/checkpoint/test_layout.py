"""The order of the rows of wq and wk: by the drawing, there and back, and by what a score must not change."""

import pytest
import torch
from torch import Tensor

from babyllama.checkpoint.layout import halves_to_pairs, pairs_to_halves
from babyllama.model import Config, rope_frequencies, rope_tables, rotate

HEADS = pytest.mark.parametrize(("n_heads", "hd"), [(1, 2), (2, 8), (6, 8), (3, 10), (12, 64)])


def test_the_rows_move_as_drawn() -> None:
    names = ["a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2"]
    moved = pairs_to_halves(torch.arange(16)[:, None], 2).flatten().tolist()
    assert [names[row] for row in moved[:8]] == ["a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2"]
    assert moved[8:] == [row + 8 for row in moved[:8]], "the second head is ordered by itself"


@HEADS
@pytest.mark.parametrize("rest", [(), (5,), (3, 2)])
def test_there_and_back_is_exact(n_heads: int, hd: int, rest: tuple[int, ...]) -> None:
    weight = torch.randn(n_heads * hd, *rest)
    halves = pairs_to_halves(weight, n_heads)
    assert torch.equal(halves_to_pairs(halves, n_heads), weight)
    assert torch.equal(pairs_to_halves(halves_to_pairs(weight, n_heads), n_heads), weight)
    assert torch.equal(halves, weight) == (hd == 2)


def turned_by_complex_numbers(x: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE with neighbours as pairs: (T, heads, hd) -> the same, x[2i] + x[2i + 1] j times e^(position · f_i j)."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    angles = torch.arange(x.shape[0])[:, None].double() * frequencies.double()
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(6, 6), (6, 2), (12, 4)])
def test_the_score_of_every_query_and_key_is_that_of_the_other_layout(n_heads: int, n_kv_heads: int) -> None:
    hd, T = 8, 40
    config = Config(vocab_size=4, dim=n_heads * hd, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv_heads)
    generator = torch.Generator().manual_seed(0)
    wq = torch.randn(n_heads * hd, config.dim, generator=generator)
    wk = torch.randn(n_kv_heads * hd, config.dim, generator=generator)
    x = torch.randn(T, config.dim, generator=generator)
    rope = rope_tables(config, torch.arange(T)[None])

    def scores_in_pairs() -> Tensor:
        frequencies = rope_frequencies(config)
        q = turned_by_complex_numbers((x @ wq.T).view(T, n_heads, hd), frequencies)
        k = turned_by_complex_numbers((x @ wk.T).view(T, n_kv_heads, hd), frequencies)
        return torch.einsum("thd,shd->hts", q, k.repeat_interleave(n_heads // n_kv_heads, dim=1))

    def scores_in_halves(wq: Tensor, wk: Tensor) -> Tensor:
        q = rotate((x @ wq.T).view(1, T, n_heads, hd).transpose(1, 2), rope)[0]
        k = rotate((x @ wk.T).view(1, T, n_kv_heads, hd).transpose(1, 2), rope)[0]
        return q @ k.repeat_interleave(n_heads // n_kv_heads, dim=0).transpose(1, 2)

    expected = scores_in_pairs()
    found = scores_in_halves(pairs_to_halves(wq, n_heads), pairs_to_halves(wk, n_kv_heads))
    size = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * size
    assert (scores_in_halves(wq, wk) - expected).abs().max() > 0.1 * size, "this test would not see a mistake"
    for heads in (1, 2 * n_kv_heads):
        wrong = scores_in_halves(pairs_to_halves(wq, n_heads), pairs_to_halves(wk, heads))
        assert (wrong - expected).abs().max() > 0.1 * size, "k must be given its own number of heads"


def test_rows_that_are_no_heads_are_refused() -> None:
    for function in (pairs_to_halves, halves_to_pairs):
        with pytest.raises(AssertionError, match="20 rows are not 6 heads"):
            function(torch.zeros(20, 3), 6)

"""Batches: each token a target once per epoch, a function of (seed, step), clear when the file shrinks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.data.batches import IGNORE, Batches, _shuffled
from babyllama.errors import InputError, UsageError

SIZES = st.tuples(st.integers(2, 120), st.integers(1, 40), st.integers(1, 9)).filter(lambda s: s[0] > s[1])


def _windows(batches: Batches, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows first .. first + count - 1 of the endless sequence of windows, one batch after another."""
    steps = range(first // batches.batch_size, -(-(first + count) // batches.batch_size))
    drawn = [batches.batch(step) for step in steps]
    rows = [np.concatenate([pair[side] for pair in drawn]) for side in (0, 1)]
    skip = first - steps[0] * batches.batch_size
    return rows[0][skip : skip + count], rows[1][skip : skip + count]


@given(SIZES, st.integers(0, 2**40), st.integers(0, 5))
def test_every_token_but_the_first_is_a_target_exactly_once_per_epoch(
    sizes: tuple[int, int, int], seed: int, epoch: int
) -> None:
    length, context, batch_size = sizes
    batches = Batches(np.arange(length), context, batch_size, seed)
    tokens, targets = _windows(batches, epoch * batches.windows, batches.windows)
    counted = targets != IGNORE
    assert Counter(targets[counted].tolist()) == Counter(range(1, length))
    assert (targets[counted] == tokens[counted] + 1).all()  # a target is the token after its input


@given(SIZES, st.integers(0, 99))
def test_a_row_reads_the_text_in_order(sizes: tuple[int, int, int], seed: int) -> None:
    length, context, batch_size = sizes
    batches = Batches(np.arange(length), context, batch_size, seed)
    tokens, _ = _windows(batches, 0, batches.windows)
    assert ((np.diff(tokens, axis=1) - 1) % (length - 1) == 0).all()


def test_missing_targets_only_end_the_last_window_of_an_epoch() -> None:
    batches = Batches(np.arange(1, 24), context=5, batch_size=2, seed=3)
    _, targets = _windows(batches, 0, batches.windows)
    assert sorted((targets == IGNORE).sum(axis=1)) == [0, 0, 0, 0, 3]
    short = targets[(targets == IGNORE).any(axis=1)][0]
    assert (short[:2] != IGNORE).all()


@given(SIZES, st.integers(0, 10**12))
def test_a_batch_depends_on_seed_and_step_only(sizes: tuple[int, int, int], step: int) -> None:
    length, context, batch_size = sizes
    ids = np.arange(length, dtype=np.uint16)
    walked = Batches(ids, context, batch_size, seed=7)
    for earlier in range(3):
        walked.batch(earlier)
    resumed = Batches(ids, context, batch_size, seed=7)
    for one, other in zip(walked.batch(step), resumed.batch(step), strict=True):
        assert (one == other).all()
        assert one.shape == (batch_size, context)
        assert one.dtype == np.int64


def test_interruptions_lose_and_repeat_nothing() -> None:
    ids = np.arange(1000)
    whole = Batches(ids, 16, 4, seed=1)
    uninterrupted = [whole.batch(step)[1] for step in range(64)]
    pieces = []
    for stop in (5, 6, 30, 64):  # a new process each time; all it is told is the step
        resumed = Batches(ids, 16, 4, seed=1)
        pieces += [resumed.batch(step)[1] for step in range(len(pieces), stop)]
    assert all((a == b).all() for a, b in zip(uninterrupted, pieces, strict=True))
    seen = np.concatenate(pieces)[: 4 * whole.windows]
    assert set(Counter(seen[seen != IGNORE].tolist()).values()) == {4}


def test_seeds_and_epochs_have_their_own_order_and_cuts() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        batches = Batches(np.arange(500), 8, 1, seed)
        return _windows(batches, number * batches.windows, batches.windows)[0][:, 0].tolist()

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 3  # windows begin elsewhere, too
    jumps = {tuple((np.diff(order) % 499).tolist()) for order in orders}  # the same wherever the first cut is
    assert len(jumps) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_the_shuffle_is_a_permutation(size: int) -> None:
    for key in ("a", "b"):
        assert sorted(_shuffled(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_shuffle_leaves_no_trace_of_the_order() -> None:
    order = _shuffled(np.arange(10_000), 10_000, "key")
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.005


def test_the_shuffle_puts_every_window_anywhere() -> None:
    first = Counter(int(_shuffled(np.zeros(1, np.int64), 7, f"{seed}")[0]) for seed in range(2100))
    assert set(first) == set(range(7))
    assert all(
        200 < count < 400 for count in first.values()
    )  # 300 each, give or take 5.7 standard deviations


def test_a_batch_far_away_is_as_quick_as_the_first() -> None:
    ids = np.broadcast_to(np.uint16(3), (10**12,))  # no table of so many windows fits anywhere
    tokens, targets = Batches(ids, 128, 8).batch(10**9)
    assert (tokens == 3).all()
    assert (targets == 3).all()


@pytest.mark.parametrize(("length", "context"), [(1, 1), (2, 2), (16, 16), (0, 1)])
def test_fewer_than_context_and_one_tokens_is_e303(length: int, context: int) -> None:
    with pytest.raises(InputError, match=f"have {length} tokens, need {context + 1}") as error:
        Batches(np.zeros(length, np.uint16), context, 1)
    assert error.value.code == "E303"
    assert f"--set context={max(length - 1, 1)}" in error.value.fix


@given(st.integers(1, 50))
def test_context_and_one_tokens_are_enough(context: int) -> None:
    tokens, targets = Batches(np.arange(context + 1), context, 2).batch(0)
    assert (targets != IGNORE).all()
    assert (np.sort(targets) == np.arange(1, context + 1)).all()
    assert (np.sort(tokens) == np.arange(context)).all()


@pytest.mark.parametrize(("context", "batch_size"), [(0, 1), (1, 0), (-1, 1)])
def test_sizes_below_one_are_e102(context: int, batch_size: int) -> None:
    with pytest.raises(UsageError) as error:
        Batches(np.arange(9), context, batch_size)
    assert error.value.code == "E102"


def test_three_passes_show_every_target_three_times() -> None:
    batches = Batches(np.arange(101), context=10, batch_size=3)
    assert batches.windows == 10
    seen = np.concatenate([batches.batch(step)[1].ravel() for step in range(10)])  # three passes
    assert [*np.unique(seen[seen != IGNORE], return_counts=True)[1]] == [3] * 100


@pytest.mark.parametrize("view", [slice(None), slice(0, 5000), slice(7000, None)])
def test_a_file_cut_short_during_training_is_e307_not_a_crash(tmp_path: Path, view: slice) -> None:
    path = tmp_path / "train.bin"
    np.arange(10_000, dtype="<u2").tofile(path)
    batches = Batches(np.memmap(path, dtype="<u2", mode="r")[view], 16, 4)
    batches.batch(0)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"train\.bin") as error:
        batches.batch(1)
    assert error.value.code == "E307"

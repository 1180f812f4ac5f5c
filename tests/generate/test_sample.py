"""From logits to ids, against the definitions written out slowly, against transformers, and by counting."""

import math
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from babyllama.errors import NumericalError, UsageError
from babyllama.generate import sample as module
from babyllama.generate.sample import STRATEGIES, Sampling, penalise, probabilities, sample, uniform

INF, NAN = math.inf, math.nan
GREEDY = Sampling(temperature=0)


def one(logits: list[float], **settings: Any) -> list[float]:
    """The probabilities of one row."""
    return probabilities(np.array([logits], dtype=float), Sampling(**settings))[0].tolist()


def logs(*numbers: float) -> list[float]:
    return [math.log(number) for number in numbers]


def random_logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (rows, vocab))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [-1, -1e-300, NAN, INF, -INF, 10**400, True],
        "top_k": [-1, -(2**70), True],
        "top_p": [0, 0.0, -0.1, 1.0000001, 2, NAN, INF, True],
        "min_p": [-0.1, 1, 1.0, NAN, INF, False],
        "repetition_penalty": [0, 0.0, -1.5, NAN, INF, 10**400, True],
        "seed": [-1, 2**64, True],
    }.items(),
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=name) as caught:
            Sampling(**{name: value})
        assert (caught.value.code, caught.value.where) == ("E102", name), value
        assert repr(value) in caught.value.found


def test_what_is_not_a_number_is_refused_without_type_checks_and_without_torch() -> None:
    program = """if True:
        import sys
        from babyllama.errors import UsageError
        from babyllama.generate.sample import Sampling
        wrong = ["0.5", None, [1], 1j, b"1"]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
            for value in wrong + ([0.5, 1.0] if name in ("top_k", "seed") else []):
                try:
                    Sampling(**{name: value})
                except UsageError as error:
                    assert (error.code, error.where) == ("E102", name), error
                else:
                    raise SystemExit(f"{name}={value!r} was taken")
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_the_ends_of_the_ranges_are_allowed() -> None:
    for settings in (
        {"top_p": 1},
        {"top_p": 5e-324},
        {"min_p": 0},
        {"temperature": 0},
        {"temperature": -0.0},
    ):
        assert sum(one([0.1, 0.2, 0.3], **settings)) == pytest.approx(1)
    assert Sampling(seed=2**64 - 1, top_k=2**70).seed == 2**64 - 1


def test_numbers_of_other_kinds_are_taken_as_what_they_are() -> None:
    taken = Sampling(temperature=1, top_p=np.float64(0.5), repetition_penalty=2)
    assert taken == Sampling(temperature=1.0, top_p=0.5, repetition_penalty=2.0)
    assert type(taken.temperature) is float and type(taken.top_p) is float


def test_there_are_seven_strategies_greedy_and_three_ways_at_two_temperatures() -> None:
    assert list(STRATEGIES) == [
        "greedy", "random", "random-cool", "top-k", "top-k-cool", "top-p", "top-p-cool",
    ]  # fmt: skip
    assert STRATEGIES["greedy"].temperature == 0
    for name in ("random", "top-k", "top-p"):
        warm, cool = STRATEGIES[name], STRATEGIES[f"{name}-cool"]
        assert 0 < cool.temperature < warm.temperature == 1
        assert (warm.top_k, warm.top_p) == (cool.top_k, cool.top_p)
        assert (warm.top_k > 0, warm.top_p < 1) == (name == "top-k", name == "top-p")


# ---- the distribution ----------------------------------------------------------------------------


def by_definition(logits: list[float], settings: Sampling) -> list[float]:
    """The same distribution a token at a time; skips what hangs on the last bit of a sum."""
    order = sorted(range(len(logits)), key=lambda id: (-logits[id], id))
    weight = {id: math.exp((logits[id] - max(logits)) / settings.temperature) for id in order}
    kept = order[: settings.top_k] if settings.top_k else order
    total, mass, nucleus = math.fsum(weight[id] for id in kept), 0.0, []
    for id in kept:
        nucleus.append(id)
        mass += weight[id] / total
        assume(settings.top_p == 1 or abs(mass - settings.top_p) > 1e-9)
        if mass >= settings.top_p:
            break
    if settings.top_p < 1:
        kept = nucleus
    share = {id: weight[id] / weight[kept[0]] for id in kept}
    assume(all(abs(share[id] - settings.min_p) > 1e-9 for id in kept if settings.min_p))
    kept = [id for id in kept if share[id] >= settings.min_p]
    total = math.fsum(weight[id] for id in kept)
    return [weight[id] / total if id in kept else 0.0 for id in range(len(logits))]


@given(
    st.lists(st.one_of(st.sampled_from([-INF, -1.0, 0.0, 0.5, 1.0]), st.floats(-20, 20)), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.7, 1.0, 1.9, 50.0]),
    st.integers(0, 14),
    st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
)  # fmt: skip
def test_probabilities_are_what_the_definitions_say(logits, temperature, top_k, top_p, min_p) -> None:
    assume(max(logits) > -INF)
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = by_definition(logits, settings)
    found = probabilities(np.array([logits]), settings)[0]
    assert (found > 0).tolist() == [p > 0 for p in expected]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.05), (5, 0.5, 0.3)],
)
def test_probabilities_equal_those_of_transformers(penalty, temperature, top_k, top_p, min_p) -> None:
    rows, vocab = 4, 101
    logits = random_logits(rows, vocab)
    past = np.random.default_rng(1).integers(0, vocab, (rows, 30))
    processors = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor(past), scores)

    seen = np.zeros((rows, vocab), dtype=bool)
    np.put_along_axis(seen, past, True, axis=1)
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = probabilities(penalise(logits, seen, penalty), settings)
    np.testing.assert_allclose(found, scores.softmax(dim=-1).numpy(), rtol=1e-9, atol=1e-12)


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    kept = one(logs(0.5, 0.3, 0.15, 0.05), top_p=0.9)
    assert kept == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])


def test_top_p_is_of_each_row_by_itself() -> None:
    logits = np.array([[50.0, 0.0, 0.0, 0.0], logs(0.25, 0.25, 0.25, 0.25), logs(0.05, 0.15, 0.3, 0.5)])
    together = probabilities(logits, Sampling(top_p=0.6))
    assert together[0].tolist() == [1, 0, 0, 0]
    assert [np.count_nonzero(row) for row in together] == [1, 3, 2]
    for row, alone in zip(together, logits, strict=True):
        assert row.tolist() == one(alone.tolist(), top_p=0.6)


@pytest.mark.parametrize("settings", [{"top_p": 1e-9}, {"top_p": 5e-324}, {"top_k": 1}, {"min_p": 0.999999}])
def test_the_narrowest_filter_keeps_one_token(settings: dict[str, float]) -> None:
    for logits in random_logits(5, 50):
        assert np.flatnonzero(one(logits.tolist(), **settings)).tolist() == [int(logits.argmax())]


def test_of_equal_logits_the_lowest_ids_are_kept() -> None:
    assert one([0, 1, 1, 1, 1], top_k=2) == [0, 0.5, 0.5, 0, 0]
    assert one([1, 1, 1, 1], top_p=0.5) == [0.5, 0.5, 0, 0]
    assert one([1, 1, 1, 1], temperature=0) == [1, 0, 0, 0]
    assert one([1, 1, 1, 1], min_p=0.9) == [0.25] * 4  # all as likely as the likeliest


def test_neutral_settings_leave_the_softmax_of_the_model() -> None:
    logits = random_logits(3, 40).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    for settings in (Sampling(), Sampling(top_k=40), Sampling(top_k=10**6), Sampling(min_p=1e-300)):
        np.testing.assert_allclose(probabilities(logits, settings), exact, rtol=1e-13)


@pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-308, 1e-40, 1e-6])
@pytest.mark.parametrize("extra", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_greedy_and_tiny_temperatures_choose_the_largest_logit(temperature, extra) -> None:
    logits = random_logits(20, 30).astype(np.float32)
    settings = Sampling(temperature=temperature, **extra)
    assert probabilities(logits, settings).tolist() == np.eye(30)[logits.argmax(axis=1)].tolist()
    assert (sample(logits, settings, None, range(20), range(20)) == logits.argmax(axis=1)).all()


def test_an_immense_temperature_is_uniform_over_what_the_filters_allow() -> None:
    hot = {"temperature": 1e308}
    assert one([-INF, 3, -5, 0], **hot) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert one([-INF, 3, -5, 4], **hot, top_k=2) == pytest.approx([0, 0.5, 0, 0.5])


def test_memory_grows_with_the_vocabulary_and_not_with_its_square() -> None:
    logits = random_logits(2, 50_000)
    for settings in (GREEDY, Sampling(), Sampling(temperature=0.8, top_k=100, top_p=0.9, min_p=0.01)):
        tracemalloc.start()
        probabilities(logits, settings)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 * logits.nbytes


def test_extreme_logits_neither_overflow_nor_become_nan() -> None:
    for dtype in (np.float32, np.float64):
        largest = float(np.finfo(dtype).max)
        for temperature in (1e-300, 1.0, 1e300):
            logits = np.array([[largest, 0.0, -largest]], dtype=dtype)
            found = probabilities(logits, Sampling(temperature=temperature, top_p=0.9))
            assert np.isfinite(found).all() and found.sum() == pytest.approx(1)


# ---- the repetition penalty ----------------------------------------------------------------------


def test_the_penalty_makes_a_seen_token_less_likely_whatever_the_sign_of_its_logit() -> None:
    logits = np.array([[2.0, -2.0, 0.0, 2.0, -2.0, -INF]])
    seen = np.array([[True, True, True, False, False, True]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 0.0, 2.0, -2.0, -INF]]
    assert penalise(logits, seen, 0.5).tolist() == [[4.0, -1.0, 0.0, 2.0, -2.0, -INF]]
    assert logits.tolist() == [[2.0, -2.0, 0.0, 2.0, -2.0, -INF]], "the model's logits were changed"


def test_no_penalty_turns_finite_logits_into_infinite_ones() -> None:
    logits, seen = np.array([[3e38, -3e38, 1.0]]), np.ones((1, 3), dtype=bool)
    for penalty in (1e-300, 1e300):
        assert np.isfinite(penalise(logits, seen, penalty)).all()


def test_the_penalty_can_change_what_greedy_chooses() -> None:
    logits, seen = np.array([[2.0, 1.5], [-1.0, -1.5]]), np.array([[True, False], [True, False]])
    assert sample(logits, Sampling(temperature=0, repetition_penalty=2), seen, [0, 1], [0, 0]).tolist() == [
        1,
        1,
    ]
    assert sample(logits, GREEDY, None, [0, 1], [0, 0]).tolist() == [0, 0]


# ---- logits that are no numbers ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[NAN, 1.0, 2.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [NAN, -INF, -INF]])
@pytest.mark.parametrize("settings", [GREEDY, Sampling(), Sampling(top_p=0.9), Sampling(temperature=1e-40)])
def test_logits_that_are_not_finite_are_an_error_for_greedy_too(bad: list[float], settings: Sampling) -> None:
    logits = np.array([[0.0, 1.0, 2.0], bad], dtype=np.float32)
    with pytest.raises(NumericalError) as caught:
        sample(logits, settings, None, [0, 7], [3, 41])
    assert caught.value.code == "E502" and caught.value.where == "row 7, token 41"
    with pytest.raises(NumericalError, match="row 1"):
        probabilities(logits, settings)


def test_a_forbidden_token_is_never_drawn_not_even_by_the_ends_of_the_random_numbers(monkeypatch) -> None:
    logits = np.array([[-INF, -INF, 1.0, -INF, 2.0, -INF]])
    for draw, id in ((0.0, 2), (1 - 2.0**-53, 4)):
        monkeypatch.setattr(module, "uniform", lambda *place, draw=draw: draw)
        for settings in (Sampling(), Sampling(temperature=1e308), Sampling(top_p=0.999)):
            assert sample(logits, settings, None, [0], [0]).tolist() == [id]


# ---- drawing -------------------------------------------------------------------------------------


def test_evenly_spread_draws_fall_on_each_token_in_proportion_to_its_probability(monkeypatch) -> None:
    draws = 5000
    monkeypatch.setattr(module, "uniform", lambda seed, stream, position: (position + 0.5) / draws)
    logits = random_logits(1, 12, spread=1.0)
    settings = Sampling(temperature=0.9, top_k=9, top_p=0.95)
    ids = sample(np.repeat(logits, draws, axis=0), settings, None, [0] * draws, range(draws))
    counts = np.bincount(ids, minlength=12)
    assert np.abs(counts - draws * probabilities(logits, settings)[0]).max() <= 1


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_probabilities_along_positions_streams_and_seeds() -> None:
    draws, logits = 8000, random_logits(1, 8, spread=1.0)
    expected = draws * probabilities(logits, Sampling())[0]
    many = np.repeat(logits, draws, axis=0)
    along_positions = sample(many, Sampling(seed=5), None, [0] * draws, range(draws))
    along_streams = sample(many, Sampling(seed=5), None, range(draws), [0] * draws)
    along_seeds = np.array([sample(logits, Sampling(seed=seed), None, [0], [0])[0] for seed in range(draws)])
    for ids in (along_positions, along_streams, along_seeds):
        # 7 degrees of freedom: above 29.9 once in 10,000 fair trials
        assert chi_square(np.bincount(ids, minlength=8), expected) < 29.9


def test_a_draw_says_nothing_of_the_next_position_stream_or_seed() -> None:
    cells, side = 16, 40
    draws = np.array([[[uniform(s, r, p) for p in range(side)] for r in range(side)] for s in range(3)])
    for axis in range(3):
        here, there = (
            draws.take(range(draws.shape[axis] - 1), axis),
            draws.take(range(1, draws.shape[axis]), axis),
        )
        pairs = (here * 4).astype(int) * 4 + (there * 4).astype(int)
        counts = np.bincount(pairs.ravel(), minlength=cells)
        # 15 degrees of freedom: above 44.3 once in 10,000
        assert chi_square(counts, np.full(cells, pairs.size / cells)) < 44.3, axis


def test_the_random_numbers_are_the_same_on_every_machine() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 3, 511)]
    assert [uniform(*place) for place in places] == [
        0.011546754286331562,
        0.21185954403345741,
        0.6436367332217984,
        0.3035680343067586,
        0.5089222670799541,
    ]


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    logits, rows = np.zeros((64, 1000)), range(64)
    first, again, other = (sample(logits, Sampling(seed=seed), None, rows, rows) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).sum() > 60


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = random_logits(6, 50)
    seen = np.random.default_rng(2).random((6, 50)) < 0.3
    settings = Sampling(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=11)
    together = sample(logits, settings, seen, range(6), [9, 4, 4, 0, 2, 7])
    for row, position in enumerate([9, 4, 4, 0, 2, 7]):
        alone = sample(logits[row : row + 1], settings, seen[row : row + 1], [row], [position])
        assert alone[0] == together[row]

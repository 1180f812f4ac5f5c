"""The law of what a run reaches: its formula, the measure of a text, and fits that find what was put in."""

import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest

from babyllama.train import law
from babyllama.train.law import Law, hardness, worth

TRUE = Law(floor=0.55, width=0.12, data=0.2, spread=0.0)


def test_text_seen_again_is_worth_less_each_time_and_never_more_than_so_many_copies():
    assert worth(1000, 0.5) == 500 and worth(1000, 1.0) == 1000
    gains = np.diff([worth(1000, float(epochs)) for epochs in range(1, 40)])
    assert (gains > 0).all() and (np.diff(gains) < 0).all()
    assert worth(1000, 1e9) == pytest.approx(16_000)
    assert worth(1000, 1.001) - 1000 == pytest.approx(1.0, rel=1e-3), "at first as good as new"


def test_the_formula_by_hand():
    assert TRUE.bits(2.0, 1_000_000, 1_000_000, 1.0) == pytest.approx(2.0 * (0.55 + 0.12 + 0.2))
    expected = 1.5 * (0.55 + 0.12 * 8**-0.34 + 0.2 * 0.25**-0.28)
    assert TRUE.bits(1.5, 8_000_000, 500_000, 0.5) == pytest.approx(expected)


def test_more_of_everything_is_never_told_to_be_worse():
    for change in ({"parameters": 4_000_000}, {"text_bytes": 3_000_000}, {"epochs": 6.0}):
        given = {"hardness": 2.0, "parameters": 1_000_000, "text_bytes": 1_000_000, "epochs": 2.0}
        assert TRUE.bits(**{**given, **change}) < TRUE.bits(**given)


# ---- hardness ------------------------------------------------------------------------------------


def plainly(train: list[int], held_out: list[int], lengths: list[int]) -> float:
    """The same, written as the method of Witten and Bell reads: one token and one context after another."""

    def share(context: tuple[int, ...], token: int) -> float:
        shorter = share(context[1:], token) if context else 1 / len(lengths)
        size = len(context)
        after = [train[i + size] for i in range(len(train) - size) if tuple(train[i : i + size]) == context]
        if not after:
            return shorter
        return (after.count(token) + len(set(after)) * shorter) / (len(after) + len(set(after)))

    bits = [-math.log2(share(tuple(held_out[i - 2 : i]), held_out[i])) for i in range(2, len(held_out))]
    return sum(bits) / sum(lengths[token] for token in held_out[2:])


@pytest.mark.parametrize("seed", range(4))
def test_hardness_is_that_of_smoothed_triples(seed):
    chance = np.random.default_rng(seed)
    train, new = chance.integers(0, 5, 60), chance.integers(0, 6, 30)  # 5 never occurs in the training text
    lengths = [1, 2, 3, 1, 4, 2, 1]
    assert hardness(train, new, lengths) == pytest.approx(plainly(train.tolist(), new.tolist(), lengths))


def test_a_text_that_repeats_itself_is_easy_and_noise_is_as_hard_as_it_gets():
    pattern, noise = np.tile(np.arange(16), 500), np.random.default_rng(0).integers(0, 16, 8000)
    lengths = [1] * 16
    assert hardness(pattern, pattern[:400], lengths) < 0.1
    assert hardness(noise, np.random.default_rng(1).integers(0, 16, 8000), lengths) == pytest.approx(
        4, abs=0.5
    )


def test_only_the_end_of_a_very_long_text_is_counted(monkeypatch):
    monkeypatch.setattr(law, "MOST_TOKENS", 400)
    pattern, noise = np.tile(np.arange(16), 25), np.random.default_rng(0).integers(0, 16, 4000)
    both = np.concatenate([noise, pattern])
    assert hardness(both, pattern, [1] * 16) == hardness(pattern, pattern, [1] * 16)


# ---- fitting -------------------------------------------------------------------------------------


def runs(noise: float = 0.0) -> list[law.Reached]:
    chance, found = np.random.default_rng(0), []
    for text, hard, size in (("a", 2.0, 1_000_000), ("b", 2.6, 300_000), ("c", 1.7, 5_000_000)):
        for parameters in (200_000, 800_000, 3_000_000, 9_000_000):
            for epochs in (0.3, 1.0, 4.0, 16.0):
                bits = TRUE.bits(hard, parameters, size, epochs) * math.exp(chance.normal(0, noise))
                found.append(law.Reached(text, hard, parameters, size, epochs, bits))
    return found


def test_a_fit_finds_the_law_that_made_the_runs():
    found = law.fit(runs())
    assert (found.floor, found.width, found.data) == pytest.approx((0.55, 0.12, 0.2), rel=1e-6)
    assert found.spread < 1e-6


def test_with_noise_it_still_tells_what_it_has_not_seen():
    found = law.fit(runs(noise=0.01))
    unseen = law.Reached("d", 2.2, 2_000_000, 2_000_000, 3.0, TRUE.bits(2.2, 2_000_000, 2_000_000, 3.0))
    assert law.told(unseen, found) == pytest.approx(unseen.bits_per_byte, rel=0.01)
    assert 0.007 < found.spread < 0.03


def test_the_spread_is_that_of_texts_left_out():
    odd = [replace(r, bits_per_byte=r.bits_per_byte * 1.2) if r.text == "b" else r for r in runs()]
    inside = math.sqrt(np.mean([math.log(r.bits_per_byte / law.told(r, law.fit(odd))) ** 2 for r in odd]))
    assert law.fit(odd).spread > 1.2 * inside and law.fit(odd).spread > 0.08


def test_no_part_of_a_law_is_below_zero():
    inside = law._not_negative(np.array([[1.0, 1.0], [1.2, 0.8], [0.7, 1.3]]))
    assert inside == pytest.approx([0.5, 0.5])
    numbers = law._not_negative(np.array([[1.0, 1.0], [1.0, 2.0], [1.1, 3.0]]))
    assert numbers[1] == 0 and numbers[0] == pytest.approx(1.0, abs=0.05)
    # one column alone is nearer than the only two that leave nothing below 0
    columns = np.array([[1.2, 3.0, 0.5], [1.0, 0.1, 0.8], [0.8, 0.1, 0.1]])
    assert law._not_negative(columns) == pytest.approx([3.0 / 3.08, 0, 0])


# ---- law.json ------------------------------------------------------------------------------------


def test_the_law_that_comes_with_the_package_is_the_fit_of_the_runs_beside_it():
    found, made_from = law.read()
    again = law.fit(made_from)
    assert astuple(again) == pytest.approx(astuple(found), rel=1e-6)
    assert len({run.text for run in made_from}) >= 2 and len(made_from) >= 12
    off = [abs(law.told(run, found) / run.bits_per_byte - 1) for run in made_from]
    assert np.mean(off) < 0.05 and found.spread < 0.1


def test_a_law_that_was_written_is_read_again(tmp_path, monkeypatch):
    law.write(TRUE, runs()[:3], tmp_path / "law.json")
    monkeypatch.setattr(law, "LAW", tmp_path / "law.json")
    assert law.read() == (TRUE, runs()[:3])
    assert json.loads((tmp_path / "law.json").read_text(encoding="utf-8"))["law"]["floor"] == 0.55

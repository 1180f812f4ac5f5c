"""This text, this machine, these minutes: the plan, what may change it, and what is refused."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from babyllama import costs, machine
from babyllama.errors import BabyLlamaError
from babyllama.machine import Precision
from babyllama.model import Config, RopeScaling
from babyllama.train import law, recipe
from babyllama.train.recipe import (
    SETTINGS,
    SHAPES,
    Plan,
    Text,
    forecast,
    parse_count,
    plan,
    plan_from_json,
    plan_to_json,
)

BYTES = [20_000, 200_000, 2_000_000, 20_000_000, 2_000_000_000]
MINUTES = [0.1, 1, 10, 100, 1000, 10_000]


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """Two cores, 64 GiB, 100 GFLOP/s: nothing depends on the machine that runs the tests."""
    monkeypatch.setattr(machine, "measure_precision", lambda device: Precision("float32", 1e11, 0.0))
    monkeypatch.setattr(machine, "best_device", lambda: "cpu")
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    monkeypatch.setattr(machine, "logical_cores", lambda: 2)
    monkeypatch.setattr(machine, "memory", lambda: (2**36, 2**36))


def planned(text_bytes=1_000_000, train_tokens=None, **options) -> Plan:
    tokens = text_bytes // 3 if train_tokens is None else train_tokens
    return plan(vocab_size=1024, text_bytes=text_bytes, train_tokens=tokens, **options)


def refused(code, **options) -> BabyLlamaError:
    with pytest.raises(BabyLlamaError) as caught:
        planned(**options)
    assert caught.value.code == code, caught.value
    return caught.value


def parameters(plan: Plan) -> int:
    return costs.parameters(plan.model).total


# ---- text and time -------------------------------------------------------------------------------


def test_more_time_gives_a_larger_model_or_the_same_and_so_does_more_text_where_time_is_long():
    sizes = [[parameters(planned(text, minutes=minutes)) for minutes in MINUTES] for text in BYTES]
    for row in sizes:
        assert row == sorted(row)
    longest = [row[-1] for row in sizes]
    assert longest == sorted(longest)
    assert sizes[0][0] == min(map(min, sizes)) < sizes[2][2] < sizes[-1][-1], "and each of them counts"
    assert sizes[-1][0] < sizes[-1][-1] and sizes[0][-1] < sizes[-1][-1]


@pytest.mark.parametrize("text_bytes", BYTES)
@pytest.mark.parametrize("minutes", MINUTES)
def test_the_largest_model_is_taken_that_text_and_time_allow(text_bytes, minutes):
    def allowed(one: Plan) -> bool:
        seen = recipe.tokens_per_second(one, 1e11) * minutes * 60 * (1 - recipe.OVERHEAD)
        few = parameters(one) <= recipe.PARAMETERS_PER_BYTE * text_bytes
        return few and seen >= recipe.TOKENS_PER_PARAMETER * parameters(one)

    chosen = planned(text_bytes, minutes=minutes)
    shape = (chosen.model.dim, chosen.model.n_layers, chosen.model.n_heads)
    larger = [
        planned(text_bytes, minutes=minutes, size=str(costs.parameters(model).total))
        for dim, n_layers, n_heads in SHAPES[SHAPES.index(shape) + 1 :]
        for model in [Config(vocab_size=1024, dim=dim, n_layers=n_layers, n_heads=n_heads)]
    ]
    assert shape == SHAPES[0] or allowed(chosen)
    assert not any(map(allowed, larger))
    largest = recipe.LARGEST_STEP * chosen.model.dim + chosen.context
    assert chosen.batch_size >= 1 and chosen.tokens_per_step <= largest
    assert chosen.tokens_per_step <= max(chosen.context, text_bytes // 3), "no more than an epoch in a step"


def test_a_faster_machine_trains_a_larger_model(monkeypatch):
    slow = planned(20_000_000, minutes=10)
    monkeypatch.setattr(machine, "measure_precision", lambda device: Precision("bfloat16", 1e11, 3e12))
    fast = planned(20_000_000, minutes=10)
    assert parameters(fast) > parameters(slow)
    assert (slow.precision, fast.precision) == ("float32", "bfloat16")
    by_choice = planned(20_000_000, minutes=10, settings={"precision": "float32"})
    assert by_choice.precision == "float32" and by_choice.model == slow.model


def test_a_number_of_steps_does_not_depend_on_the_speed_of_the_machine(monkeypatch):
    before = planned(steps=100)
    monkeypatch.setattr(machine, "measure_precision", lambda device: Precision("float32", 1e9, 0.0))
    assert planned(steps=100) == before
    assert (before.steps, before.seconds) == (100, 0.0)


@pytest.mark.parametrize("tokens", ["20M", 3_000_000, "100k", 1])
def test_a_number_of_tokens_ends_the_run_at_the_step_that_reaches_it_on_any_machine(monkeypatch, tokens):
    asked = parse_count("--tokens", tokens)
    before = planned(tokens=tokens)
    assert before.seconds == 0.0
    assert asked <= before.steps * before.tokens_per_step < asked + before.tokens_per_step
    monkeypatch.setattr(machine, "measure_precision", lambda device: Precision("float32", 1e9, 0.0))
    assert planned(tokens=tokens) == before
    larger = planned(tokens=tokens, settings={"batch_size": 2 * before.batch_size, "optimizer": "adamw"})
    assert larger.steps == math.ceil(asked / larger.tokens_per_step)


def test_more_tokens_are_for_a_larger_model_in_larger_steps():
    few, many = planned(tokens="100k"), planned(tokens="10M")
    assert parameters(many) > parameters(few) and many.tokens_per_step > few.tokens_per_step


def test_small_models_learn_faster_and_none_faster_than_the_limit():
    adamw = {"optimizer": "adamw"}
    rates = [
        planned(size=size, steps=9, settings=adamw).learning_rate for size in ("100k", "1M", "10M", "100M")
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] == 0.004 and rates[-1] < rates[0] / 1.5


@pytest.mark.parametrize(
    ("given", "seconds"), [({}, 600.0), ({"minutes": 2}, 120.0), ({"minutes": 0.5}, 30.0)]
)
def test_minutes_become_seconds_and_ten_is_the_default(given, seconds):
    chosen = planned(**given)
    assert (chosen.seconds, chosen.steps) == (seconds, 0)


def test_the_context_adapts_to_a_short_text():
    contexts = [planned(train_tokens=tokens, steps=9).context for tokens in (40, 600, 1500, 10**4, 10**6)]
    assert contexts == sorted(contexts) and contexts[0] < contexts[2] < contexts[-1]
    for tokens in (40, 600, 3000, 10**4, 10**6):
        chosen = planned(train_tokens=tokens, steps=9)
        assert chosen.context < tokens and chosen.model.max_seq_len == chosen.context


@pytest.mark.parametrize(("size", "tokens", "context"), [
    ("160x4x5", 10**6, 128), ("192x5x6", 10**6, 256), ("768x12x12", 10**6, 256), ("768x12x12", 3000, 128),
])  # fmt: skip
def test_narrow_models_have_shorter_rows(size, tokens, context):
    assert planned(train_tokens=tokens, steps=9, size=size).context == context
    assert planned(train_tokens=tokens, steps=9, size=size, settings={"context": 40}).context == 40


def test_text_that_is_seen_more_often_is_learned_with_more_dropout_and_decay():
    plans = [planned(minutes=10, train_tokens=tokens, size="1M") for tokens in (10**4, 10**6, 10**7, 10**9)]
    dropped, decays = [each.dropout for each in plans], [each.weight_decay for each in plans]
    assert dropped == sorted(dropped, reverse=True) and decays == sorted(decays, reverse=True)
    assert (dropped[0], dropped[-1]) == (0.3, 0.0) and (decays[0], decays[-1]) == (0.5, 0.1)


def test_the_output_matrix_learns_more_slowly_from_text_that_is_seen_again():
    def rate(epochs: float, **settings: object) -> float:
        plan = planned(train_tokens=10**6, tokens=round(epochs * 10**6), size="1M", settings=settings)
        assert plan.steps * plan.tokens_per_step == pytest.approx(epochs * 10**6, rel=0.01)
        return plan.head_rate

    rates = [rate(0.8), rate(1), rate(2), rate(3.5), rate(9)]
    assert rates == pytest.approx([0.007, 0.007, 0.0035, 0.002, 0.0017], abs=1e-4)
    assert rate(9, head_rate=0.01) == 0.01 and rate(9, optimizer="adamw") == 0


def test_dropout_is_for_models_that_can_learn_their_text_by_heart():
    """Passes times parameters decide, for each byte of the text: ten are too few for any."""

    def dropout(parameters: int, epochs: float, text_bytes: int = 10**6) -> float:
        tokens = text_bytes // 3
        steps = round(epochs * tokens / planned(text_bytes, tokens, steps=1).tokens_per_step)
        chosen = planned(text_bytes, tokens, steps=steps, size=str(parameters))
        by_heart = recipe.multiplied(chosen.model) * epochs / text_bytes
        assert chosen.dropout == pytest.approx(min(0.3, max(0, 0.17 * math.log2(by_heart / 10))), abs=0.011)
        return chosen.dropout

    assert dropout(1_000_000, 4) == 0 < dropout(5_000_000, 4) < dropout(5_000_000, 6)
    assert dropout(5_000_000, 1) == 0 < dropout(5_000_000, 3, 500_000)


def test_muon_moves_the_matrices_where_steps_are_large_enough_for_it():
    small, large = planned(minutes=1, size="15M"), planned(minutes=10, size="1M")
    assert small.tokens_per_step < 6 * small.model.dim and large.tokens_per_step >= 6 * large.model.dim
    assert (small.optimizer, large.optimizer) == ("adamw", "muon")
    assert large.head_rate > 0 and large.embedding_norm and large.clip == 0.0
    chosen = planned(minutes=10, size="1M", settings={"optimizer": "adamw"})
    assert chosen.optimizer == "adamw" and chosen.learning_rate == pytest.approx(0.004)


# ---- what a plan is expected to reach ------------------------------------------------------------


def test_a_forecast_by_hand():
    text = Text(1_000_000, 300_000)
    chosen = planned(minutes=2, size="1M", settings={"optimizer": "adamw"})
    told = forecast(chosen, text, 2.0)
    flops = costs.training_flops(chosen.model, chosen.context).total
    share = 0.9 * chosen.model.dim / (chosen.model.dim + 102)
    assert told.tokens_per_second == pytest.approx(1e11 * share / flops)
    assert told.epochs == pytest.approx(told.tokens_per_second * 120 * (1 - recipe.OVERHEAD) / 300_000)
    numbers, multiplied = law.read()[0], recipe.multiplied(chosen.model)
    assert multiplied == parameters(chosen) - 1024 * chosen.model.dim
    assert told.bits_per_byte == pytest.approx(numbers.bits(2.0, multiplied, 1_000_000, told.epochs))
    assert told.spread == numbers.spread and told.bytes == recipe.memory(chosen)["cpu"]


def test_half_of_the_cores_are_half_as_fast():
    text = Text(1_000_000, 300_000)
    both, one = (planned(minutes=2, size="1M", settings={"threads": n, "optimizer": "adamw"}) for n in (2, 1))
    speeds = [forecast(each, text, 2.0).tokens_per_second for each in (both, one)]
    assert speeds[0] == pytest.approx(2 * speeds[1])


def test_muon_is_chosen_by_the_rows_that_were_asked_for():
    few, many = {"batch_size": 1}, {"batch_size": 1, "accumulation": 16}
    assert planned(minutes=20).optimizer == planned(minutes=20, settings=many).optimizer == "muon"
    assert planned(minutes=20, settings=few).optimizer == "adamw"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_table_without_a_norm_behind_it_moves_as_slowly_as_matrices_under_adamw(optimizer):
    asked = {"optimizer": optimizer, "embedding_norm": False}
    rate = planned(steps=100, size="1M", settings={"optimizer": "adamw"}).learning_rate
    assert planned(steps=100, size="1M", settings=asked).embedding_rate == rate
    assert planned(steps=100, size="1M", settings={"optimizer": optimizer}).embedding_rate > 4 * rate


@pytest.mark.parametrize(("rows", "optimizer"), [(5, "adamw"), (6, "muon")])
def test_muon_is_taken_from_four_fifths_of_its_step_on_and_exactly_there(rows, optimizer):
    """Of 960 tokens at a width of 160; in floating point 0.8 · 6 · 160 is above 768."""
    asked = {"batch_size": rows, "context": 128}
    assert planned(minutes=3, size="160x4x5", settings=asked).optimizer == optimizer


@pytest.mark.parametrize("polynomials", [3, 5])
@pytest.mark.parametrize("by_head", [False, True])
def test_muon_takes_its_time(by_head, polynomials):
    more = {"batch_size": 8, "muon_by_head": by_head, "muon_polynomials": polynomials}
    of = {name: {"optimizer": name, **more} for name in ("adamw", "muon")}
    fast, slow = (
        recipe.tokens_per_second(planned(minutes=2, size="1M", settings=of[name]), 1e11) for name in of
    )
    chosen = planned(minutes=2, size="1M", settings=of["muon"])
    model, tokens = chosen.model, chosen.tokens_per_step
    whole, head = 6 * model.dim**3, 4 * model.head_dim**2 * model.dim + 2 * model.head_dim**3
    attention = 4 * (model.n_heads * head if by_head else whole)
    others = 3 * (4 * model.dim**2 * model.hidden_dim + 2 * model.dim**3)
    extra = model.n_layers * polynomials * (attention + others) / (0.4 * 1e11)
    assert tokens / slow == pytest.approx(tokens / fast + extra)


def test_evaluations_take_a_small_part_of_a_run_if_they_are_large_enough():
    """Each token is scored in a window of which half counts, forward only: two thirds of a token that is learned."""
    for tokens, evaluations, expected in ((1e6, 8, 3750), (1e6, 4, 7500), (1e5, 8, 2048), (1e8, 8, 16384)):
        chosen = planned(tokens=str(int(tokens)), size="1M", settings={"evaluations": evaluations})
        assert chosen.evaluation_tokens == pytest.approx(expected, rel=0.01), (tokens, evaluations)
    assert planned(tokens="1M", size="1M", settings={"evaluations": 0}).evaluation_tokens == 16384
    assert planned(tokens="1M", size="1M", settings={"evaluation_tokens": 77}).evaluation_tokens == 77
    assert planned(tokens="1M", size="1M", settings={"context": 1000}).evaluation_tokens == 8000


def test_a_text_is_enough_for_so_many_minutes_and_more_text_for_more():
    chosen = planned(minutes=10, size="1M")
    minutes = [
        forecast(chosen, Text(tokens * 3, tokens), 2.0).enough_minutes for tokens in (10**4, 10**6, 10**8)
    ]
    assert minutes == sorted(minutes) and minutes[0] < minutes[1] < minutes[2]


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_a_shape_gives_this_shape_and_nearby_sizes_too(shape):
    dim, n_layers, n_heads = shape
    context = 128 if dim < 192 else 256
    model = Config(vocab_size=1024, dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=context)
    own = costs.parameters(model).total
    for size in (own, own * 1.1, own / 1.1):
        assert planned(size=str(size), steps=1).model == model


def test_between_two_shapes_the_nearer_ratio_decides():
    small, large = (parameters(planned(size=size, steps=1)) for size in ("500k", "1M"))
    assert small < large
    middle = math.sqrt(small * large)
    assert parameters(planned(size=f"{middle * 0.98:.0f}", steps=1)) == small
    assert parameters(planned(size=f"{middle * 1.02:.0f}", steps=1)) == large


@pytest.mark.parametrize(
    ("text", "number"),
    [("260k", 260e3), ("3M", 3e6), ("15m", 15e6), ("1.5M", 1.5e6), ("1B", 1e9), ("2K", 2e3), ("123456", 123456.0),
     ("1e6", 1e6)],
)  # fmt: skip
def test_a_size_is_read_as_a_person_writes_it(text, number):
    assert parse_count("--size", text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "M", "big", "0", "0M", "-3M", "nan", "inf", "3MM", "3 apples", "1,5M"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BabyLlamaError) as caught:
        parse_count("--size", text)
    assert caught.value.code == "E102"


# ---- settings ------------------------------------------------------------------------------------

OTHER = {
    "context": 48, "batch_size": 3, "accumulation": 2, "optimizer": "muon", "learning_rate": 0.0123,
    "embedding_rate": 0.05, "head_rate": 0.007, "gain_rate": 0.006, "schedule": "wsd", "warmup": 0.25, "decay": 0.5,
    "final": 0.1, "beta1": 0.8, "beta2": 0.9, "momentum": 0.9, "muon_polynomials": 4,
    "muon_by_head": True, "normuon": True, "weight_decay": 0.3,
    "weight_decay_falls": True, "cautious": True, "average": 0.05, "dropout": 0.1, "embedding_norm": True,
    "clip": 2.5, "precision": "bfloat16", "threads": 1, "evaluations": 3, "evaluation_tokens": 500, "save_every": 11,
    "save_seconds": 12.5, "compile": True,
}  # fmt: skip
RATES = {name: OTHER[name] for name in ("embedding_rate", "head_rate", "gain_rate")}
MUON = {"optimizer": "muon", "embedding_norm": True, **RATES}


def test_every_setting_of_a_plan_is_tried_here():
    assert {*OTHER, "model", "steps", "seconds", "seed", "device"} == {field.name for field in fields(Plan)}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("written", [str, lambda value: value], ids=["as text", "as it is"])
def test_a_setting_reaches_the_plan_as_what_it_is(name, written):
    chosen = planned(steps=9, settings={name: written(OTHER[name])})
    assert getattr(chosen, name) == OTHER[name] and type(getattr(chosen, name)) is type(OTHER[name])
    rest = planned(steps=9)
    if name == "context":
        assert chosen.model == replace(rest.model, max_seq_len=48)
    else:
        assert chosen == replace(rest, **{name: OTHER[name]}), "and changes nothing else"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"learnig_rate": 1}, "E101"),
        ({"model": "large"}, "E101"),
        ({"steps": 3}, "E101"),
        ({"seed": 3}, "E101"),
        ({"device": "cpu"}, "E101"),
        ({"precision": "float8"}, "E101"),
        ({"batch_size": "four"}, "E102"),
        ({"batch_size": "1.5"}, "E102"),
        ({"batch_size": None}, "E102"),
        ({"batch_size": 1.9}, "E102"),
        ({"batch_size": True}, "E102"),
        ({"batch_size": 10**400}, "E102"),
        ({"threads": math.inf}, "E102"),
        ({"batch_size": 0}, "E102"),
        ({"accumulation": -1}, "E102"),
        ({"learning_rate": "nan"}, "E102"),
        ({"learning_rate": "inf"}, "E102"),
        ({"weight_decay": -0.1}, "E102"),
        ({"warmup": 1}, "E102"),
        ({"beta2": 1.0}, "E102"),
        ({"clip": -1}, "E102"),
        ({"threads": 10**6}, "E102"),
        ({"evaluation_tokens": 0}, "E102"),
        ({"save_every": -1}, "E102"),
        ({"threads": 0}, "E102"),
        ({"optimizer": "sgd"}, "E101"),
        ({"schedule": ""}, "E101"),
        ({"cautious": "perhaps"}, "E101"),
        ({"cautious": 1}, "E101"),
        ({"normuon": None}, "E101"),
        ({"embedding_rate": -1}, "E102"),
        ({"head_rate": "inf"}, "E102"),
        ({"gain_rate": "nan"}, "E102"),
        ({"decay": 0}, "E102"),
        ({"decay": 1.5}, "E102"),
        ({"final": -0.1}, "E102"),
        ({"final": 2}, "E102"),
        ({"momentum": 1}, "E102"),
        ({"average": -1}, "E102"),
        ({"dropout": 1}, "E102"),
        ({"dropout": -0.5}, "E102"),
    ],
)
def test_settings_that_are_unknown_or_ill_typed_have_a_code_and_their_name(settings, code):
    (name,) = settings
    assert name in refused(code, steps=9, settings=settings).where


def test_a_part_of_muon_asks_for_muon():
    wide = {"steps": 9, "size": "512x8x8"}  # with steps too small for it
    assert planned(**wide).optimizer == "adamw"
    assert planned(**wide, settings={"normuon": True}).optimizer == "muon"


def test_a_part_of_muon_is_refused_beside_adamw():
    assert refused("E103", steps=9, settings={"normuon": "true", "optimizer": "adamw"}).where == "normuon"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimizer", ["adamw", "muon"]),
        ("schedule", ["linear", "wsd", "cosine"]),
        ("precision", ["float32", "bfloat16"]),
        ("cautious", ["true", "false"]),
    ],
)
def test_a_word_that_is_none_of_a_settings_words_is_told_all_of_them(name, words):
    said = refused("E101", steps=9, settings={name: "sideways"})
    assert "sideways" in said.found and all(word in said.fix for word in words)
    for word in words:
        chosen = planned(steps=9, settings={**RATES, name: word})
        assert getattr(chosen, name) == {"true": True, "false": False}.get(word, word)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_needs_a_rate_for_each_role_that_is_not_its_own(tied):
    model = Config(vocab_size=9, dim=8, n_layers=1, n_heads=1, tie_embeddings=tied)
    needed = {name: rate for name, rate in RATES.items() if not (tied and name == "head_rate")}
    Plan(model=model, context=8, batch_size=1, steps=1, optimizer="muon", **needed)
    for name in needed:
        rest = {other: rate for other, rate in needed.items() if other != name}
        with pytest.raises(BabyLlamaError, match=name) as caught:
            Plan(model=model, context=8, batch_size=1, steps=1, optimizer="muon", **rest)
        assert caught.value.code == "E103"


def test_token_vectors_are_normalised_only_where_the_head_is_another_matrix():
    for tied in (False, True):
        model = Config(vocab_size=9, dim=8, n_layers=1, n_heads=1, tie_embeddings=tied)
        if not tied:
            assert Plan(model=model, context=8, batch_size=1, steps=1, embedding_norm=True).embedding_norm
            continue
        with pytest.raises(BabyLlamaError) as caught:
            Plan(model=model, context=8, batch_size=1, steps=1, embedding_norm=True)
        assert caught.value.code == "E103"


def test_a_size_may_be_a_shape():
    chosen = planned(size="288x6x4", steps=9).model
    assert (chosen.dim, chosen.n_layers, chosen.n_heads) == (288, 6, 4)
    dim, n_layers, n_heads = SHAPES[3]
    asked = {"minutes": 5, "size": f"{dim}x{n_layers}x{n_heads}"}
    assert planned(**asked) == planned(minutes=5, size=str(parameters(planned(**asked))))
    for wrong in ("288x6x5", "0x1x1", "288x6", "288x6x6x6", "-288x6x6"):
        assert wrong in str(refused("E102", size=wrong, steps=9))
    refused("E102", size="9" * 5000 + "x1x1", steps=9)  # more digits than Python reads as a number


def test_an_unknown_setting_is_told_what_to_do_instead():
    def instead(name: str) -> str:
        return refused("E101", steps=9, settings={name: 1}).fix

    assert instead("learnig_rate").startswith("did you mean learning_rate?")
    assert instead("muon").startswith("known: ") and all(name in instead("muon") for name in SETTINGS)
    assert instead("vocab_size").endswith("--vocab-size")
    assert "--size" in instead("n_layers") and "context" in instead("max_seq_len")
    assert planned(size=3_000_000, steps=9) == planned(size="3M", steps=9)


def test_the_settings_of_the_caller_are_left_as_they_were():
    settings = {"context": "32", "precision": "float32"}
    planned(steps=9, settings=settings)
    assert settings == {"context": "32", "precision": "float32"}


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"minutes": 1, "steps": 1}, "E103"),
        ({"minutes": 0}, "E102"),
        ({"minutes": math.nan}, "E102"),
        ({"minutes": math.inf}, "E102"),
        ({"steps": 0}, "E102"),
        ({"steps": -5}, "E102"),
        ({"device": "abacus"}, "E101"),
        ({"steps": 5, "seed": -1}, "E102"),
        ({"steps": 5, "seed": 2**63}, "E102"),
        ({"size": "huge"}, "E102"),
    ],
)
def test_an_impossible_wish_is_refused(options, code):
    refused(code, **options)


def test_a_plan_ends_after_steps_or_after_seconds_and_never_after_both_or_neither():
    for both in ({"steps": 5, "seconds": 5.0}, {}):
        with pytest.raises(BabyLlamaError) as caught:
            Plan(model=Config(vocab_size=9, dim=8, n_layers=1, n_heads=1), context=8, batch_size=1, **both)
        assert caught.value.code == "E103"


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_a_text_shorter_than_a_row_is_refused_and_one_token_more_is_taken(tokens):
    refused("E303", train_tokens=tokens, steps=9)
    assert planned(train_tokens=17, steps=9).context == 16
    said = refused("E303", train_tokens=64, steps=9, settings={"context": 64})
    assert "64" in said.found and "65" in said.found
    assert planned(train_tokens=65, steps=9, settings={"context": 64}).batch_size == 1


def test_more_than_fits_in_memory_is_refused_and_what_fits_is_not(monkeypatch):
    chosen = planned(size="10M", steps=9)
    needed = recipe.memory(chosen)["cpu"]
    monkeypatch.setattr(machine, "memory", lambda: (2**36, int(needed / recipe.MEMORY_SHARE * 1.01)))
    assert planned(size="10M", steps=9) == chosen
    monkeypatch.setattr(machine, "memory", lambda: (2**36, int(needed / recipe.MEMORY_SHARE * 0.99)))
    said = refused("E404", size="10M", steps=9)
    assert "--size" in said.fix and f"batch_size={chosen.batch_size // 4}" in said.fix
    planned(size="10M", steps=9, settings={"batch_size": chosen.batch_size // 4})
    monkeypatch.setattr(machine, "memory", lambda: (None, None))
    assert planned(size="10M", steps=9) == chosen, "not known is not too little"


@pytest.mark.parametrize("available", [2**28, 2**30, 2**32])
def test_where_no_size_is_asked_for_one_is_chosen_that_fits_in_memory(monkeypatch, available):
    freely = planned(20_000_000, minutes=10_000)
    monkeypatch.setattr(machine, "memory", lambda: (2**36, available))
    chosen = planned(20_000_000, minutes=10_000)
    assert recipe.memory(chosen)["cpu"] <= recipe.MEMORY_SHARE * available
    if recipe.memory(freely)["cpu"] > available:
        assert parameters(chosen) < parameters(freely)
        refused("E404", text_bytes=20_000_000, minutes=10_000, size=str(parameters(freely)))


def test_so_many_steps_or_tokens_are_the_same_on_every_machine(monkeypatch):
    few = [planned(steps=100), planned(tokens="100k"), planned(tokens="30M")]
    monkeypatch.setattr(machine, "physical_cores", lambda: 64)
    monkeypatch.setattr(machine, "logical_cores", lambda: 128)
    many = [planned(steps=100), planned(tokens="100k"), planned(tokens="30M")]
    assert [replace(one, threads=2) for one in many] == few


def test_threads_beyond_the_cores_promise_nothing(monkeypatch):
    monkeypatch.setattr(machine, "logical_cores", lambda: 4)
    speed = Precision("float32", 1e11, 0.0)
    peaks = [recipe._peak("cpu", "float32", threads, speed) for threads in (1, 2, 4)]
    assert peaks == [5e10, 1e11, 1e11]


def test_a_budget_that_is_used_up_still_has_a_plan_and_a_forecast():
    chosen = planned(minutes=0.01, used=30.0)
    told = forecast(chosen, Text(1_000_000, 333_333), 2.0, used=30.0)
    assert 0 < told.epochs < 0.1 and 2 < told.bits_per_byte < 20


def test_the_step_of_a_gpu_is_sized_by_the_speed_of_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "has_device", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    speed = Precision("bfloat16", 1e11, 1e12)
    chosen = planned(2_000_000, minutes=3, device="cuda", speed=speed)
    seen = recipe._tokens(chosen, 1e12, 0.0)
    assert chosen.tokens_per_step == pytest.approx(seen / recipe.STEPS, rel=0.3)


def test_a_step_is_compiled_on_a_gpu_where_the_run_is_long_enough(monkeypatch):
    monkeypatch.setattr(machine, "has_device", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(machine, "memory", lambda: (2**40, 2**40))
    on_gpu = {"device": "cuda:0", "speed": Precision("bfloat16", 1e11, 1e12), "size": "3M"}
    assert [planned(minutes=minutes, **on_gpu).compile for minutes in (8.9, 9)] == [False, True]
    assert [planned(minutes=10, used=used, **on_gpu).compile for used in (50.0, 70.0)] == [True, False]
    assert not planned(minutes=60, **{**on_gpu, "device": "mps"}).compile
    assert [planned(steps=steps, **on_gpu).compile for steps in (10, 100_000)] == [False, True]
    assert planned(minutes=1, settings={"compile": "true"}, **on_gpu).compile
    assert not planned(minutes=60, settings={"compile": "false"}, **on_gpu).compile
    assert not planned(minutes=60).compile


def test_on_a_gpu_what_trains_lies_there_and_what_is_saved_here(monkeypatch):
    monkeypatch.setattr(machine, "has_device", lambda device: True)
    speed = machine.Precision("bfloat16", 1e13, 1e14)
    asked = {"size": "10M", "steps": 9, "device": "cuda", "speed": speed}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    trained, saved = recipe.memory(planned(**asked)).values()
    assert saved < trained
    least = {"there": trained / recipe.MEMORY_SHARE + 1, "here": saved / recipe.MEMORY_SHARE + 1}
    for less in ("", "there", "here"):
        there, here = (int(room / (2 if name == less else 1)) for name, room in least.items())
        fits = not less
        monkeypatch.setattr(machine, "memory", lambda here=here: (here, here))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, there=there: (there, there))
        assert planned(**asked).device == "cuda" if fits else refused("E404", **asked)


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"threads": 1}, False),
        ({"precision": "bfloat16"}, False),
        ({"average": 0.1}, True),
        ({"optimizer": "adamw"}, True),
        ({"embedding_norm": False}, False),
        ({"accumulation": 4}, None),
        ({"device": "cuda:0"}, False),
    ],
)
def test_the_memory_of_a_plan_follows_its_settings(change, more):
    model = Config(vocab_size=99, dim=24, n_layers=3, n_heads=6, max_seq_len=16)
    before = Plan(model=model, context=16, batch_size=4, steps=1, threads=2, **MUON)
    after = replace(before, **change)
    held, changed = recipe.memory(before)["cpu"], recipe.memory(after)[after.device]
    assert (changed == held) if more is None else (changed > held) == more and changed != held


def test_a_save_is_part_of_the_memory_of_a_plan():
    model = Config(vocab_size=99, dim=24, n_layers=3, n_heads=6, max_seq_len=16)
    plan = Plan(model=model, context=16, batch_size=4, steps=1, threads=2, average=0.1)
    step = costs.training_bytes(model, 4, 16, workers=2, average=True)
    weights = 4 * costs.parameters(model).total
    assert step.weights == weights and step.optimizer == 3 * weights, "AdamW's two numbers, and the average"
    assert recipe.memory(plan) == {"cpu": step.total + 7 * weights}
    there = costs.training_bytes(model, 4, 16, device="cuda", average=True)
    assert recipe.memory(replace(plan, device="cuda:0")) == {"cuda:0": there.total, "cpu": 10 * weights}
    normed = replace(plan, embedding_norm=True)
    step = costs.training_bytes(model, 4, 16, workers=2, average=True, embedding_norm=True)
    assert recipe.memory(normed) == {"cpu": step.total + 7 * weights + 2 * 4 * 99 * 24}


# ---- to and from run.json ------------------------------------------------------------------------

SCALINGS = [None, RopeScaling(kind="linear", factor=4.0), RopeScaling(kind="llama3", factor=32.0)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_written_down_and_read_is_the_same(scaling, tied):
    model = Config(
        vocab_size=99, dim=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, hidden_dim=40, max_seq_len=77,
        norm_eps=1e-6, rope_theta=5e5, rope_scaling=scaling, tie_embeddings=tied,
    )  # fmt: skip
    for end in ({"steps": 5}, {"seconds": 0.1}):
        chosen = Plan(model=model, **end, **{**OTHER, "embedding_norm": not tied})
        again = plan_from_json(json.loads(json.dumps(plan_to_json(chosen))))
        assert again == chosen and type(again.model.rope_scaling) is type(scaling)


def test_a_plan_written_before_muon_had_a_choice_goes_on_as_it_was():
    value = plan_to_json(planned(minutes=9, size="1M", settings={"optimizer": "muon"}))
    assert (value["muon_polynomials"], value["muon_by_head"]) == (3, True)
    del value["muon_polynomials"], value["muon_by_head"]
    before = plan_from_json(value)
    assert (before.muon_polynomials, before.muon_by_head) == (5, False)


def test_a_plan_of_a_later_version_is_refused_and_not_half_understood():
    value = plan_to_json(planned(steps=9)) | {"temperature": 0.1}
    with pytest.raises(BabyLlamaError, match="temperature") as caught:
        plan_from_json(value)
    assert caught.value.code == "E101"

"""The benchmarks in a tiny form, and their arithmetic against what was computed by hand."""

import csv
import json
import math
import random
import statistics
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablate
import law
import peers
import training
from ablate import Cell
from shapes import SHAPES, Shape, training_flops

from babyllama import machine
from babyllama import model as mathematics
from babyllama.model import Llama
from babyllama.train import loop, recipe
from babyllama.train.evaluate import score
from babyllama.train.recipe import Plan

BENCHMARKS = Path(training.__file__).parent
TINY = Shape(name="tiny", dim=32, n_layers=2, n_heads=2, vocab_size=300, context=16, batch_size=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 KB of sentences from forty words, one of them with letters of two bytes."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghilmnorstu", k=draw.randint(2, 7))) for _ in range(39)] + ["élève"]
    sentences = [" ".join(draw.choices(words, k=draw.randint(4, 9))) + ".\n\n" for _ in range(900)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(sentences), encoding="utf-8")
    return path


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / program), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def rows(markdown: str) -> dict[str, list[str]]:
    """The cells of each line of a table, by the first of them."""
    found = {}
    for line in markdown.splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
            found[name] = cells
    return found


# ---- throughput: arithmetic


def test_flops_of_training_are_those_computed_by_hand():
    shape = SHAPES["llama2.c-15M"]
    matrices = 6 * (4 * 288 * 288 + 3 * 288 * 768)  # four of attention, three of the feed-forward, six layers
    head, attention = 4096 * 288, 12 * 6 * 288 * 256
    assert training_flops(shape.config, 256) == 6 * (matrices + head) + attention


def test_ratios_are_taken_round_by_round():
    speeds = {"plain": [100.0, 50.0, 200.0], "other": [200.0, 150.0, 300.0]}
    assert training.ratios(speeds, "plain") == {"plain": [1.0, 1.0, 1.0], "other": [1.5, 2.0, 3.0]}


def test_the_table_of_throughput_holds_medians_spread_and_shares():
    shape = SHAPES["quickstart"]
    speeds = {"plain": [1000.0, 2000.0, 3000.0], "other": [2000.0, 4000.0, 6000.0]}
    flops = training_flops(shape.config, shape.context)
    peaks = {"bf16": 2000.0 * flops * 10, "float32": 2000.0 * flops * 2}
    table = rows(training.throughput_table(shape, speeds, peaks, {"plain": 3 * 2**20, "other": None}))
    gigaflops = f"{2000 * flops / 1e9:,.0f}"
    assert table["plain"] == ["2,000 (1,000 to 3,000)", "1.00 (1.00 to 1.00)", gigaflops, "10 %", "50 %", "3"]
    assert table["other"][:2] == ["4,000 (2,000 to 6,000)", "2.00 (2.00 to 2.00)"]
    assert table["other"][3:] == ["20 %", "100 %", "-"]


def test_a_turn_counts_whole_steps_and_takes_at_least_one():
    taken = []
    assert training.turn(lambda: taken.append(1), 10, 0.0) > 0
    assert taken == [1]


def test_the_peak_is_a_speed():
    assert 1e8 < training.matrix_peak(torch.float32, size=128, seconds=0.01) < 1e14


# ---- peers


@pytest.mark.parametrize("recipe", peers.QUALITY.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_names_its_source_and_tries_five_rates(recipe):
    assert recipe.source and len(set(recipe.rates)) == 5


def test_schedules_rise_and_end_where_they_are_documented_to():
    nano, theirs = peers.NANOGPT, peers.TRANSFORMERS
    assert theirs.learning_rate(2.0, 0.25) == pytest.approx(1.5)  # linear, without warm-up
    assert theirs.learning_rate(2.0, 1.0) == 0
    assert nano.learning_rate(1e-3, 0.025) == pytest.approx(0.5e-3)  # half of its warm-up
    assert nano.learning_rate(1e-3, 0.05 + 0.95 / 2) == pytest.approx(0.55e-3)  # half-way down to a tenth
    assert nano.learning_rate(1e-3, 1.0) == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["plain float32", "plain bf16", "transformers float32", "litgpt bf16"])
def test_a_peer_has_the_same_parameters_and_learns(name):
    recipe = peers.THROUGHPUT[name]
    if why := peers.missing(recipe):
        pytest.skip(f"{name}: {why}")
    one = peers.contestant(recipe, TINY)
    assert isinstance(one, peers.PlainLoop)
    tokens, targets = one.batches.batch(0)
    one.batch = lambda: (torch.from_numpy(tokens), torch.from_numpy(targets))  # the same batch each time
    assert one.tokens_per_step == tokens.size == TINY.tokens_per_step
    assert one.model(torch.from_numpy(tokens)).shape == (*tokens.shape, TINY.vocab_size)
    plain = peers.contestant(peers.PLAIN, TINY)
    count = [sum(weight.numel() for weight in each.model.parameters()) for each in (one, plain)]
    assert count[0] == count[1]
    losses = [one.step(0.0) for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.5)
    assert losses[-1] < losses[0] - 0.5


def test_a_missing_peer_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in (peers.missing(peers.TRANSFORMERS) or "")
    assert "huggingface-hub" in (peers.missing(peers.LITGPT) or "")
    assert peers.missing(peers.OURS) is None


def test_accumulated_batches_give_the_gradient_of_one():
    recipe = peers.replace(peers.PLAIN, context=16, clip=0.0)
    ids = np.random.default_rng(0).integers(300, size=4000).astype(np.uint16)
    whole, parts = peers.replace(recipe, rows=8), peers.replace(recipe, rows=2, accumulation=4)
    loops = [peers.PlainLoop(one, TINY.config, ids, rate=1e-3) for one in (whole, parts)]
    losses = [each.step() for each in loops]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*(each.model.parameters() for each in loops), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_random_windows_predict_the_next_id():
    recipe = peers.replace(peers.PLAIN, windows="random", context=16, rows=5)
    one = peers.PlainLoop(recipe, TINY.config, np.arange(300, dtype=np.uint16), rate=1e-3)
    tokens, targets = one.batch()
    assert tokens.shape == (5, 16) and torch.equal(tokens + 1, targets)


def test_the_first_weights_of_a_recipe_are_those_it_names():
    model = peers.build(
        peers.LLAMA2C, peers.config_of(peers.replace(peers.LLAMA2C, shape=(128, 8, 4)), 500), 1
    )
    layer = model.layers[0]
    assert layer.attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.feed_forward.w_down.weight.std().item() == pytest.approx(0.005, rel=0.05)  # 0.02 / √16
    assert model.lm_head is None


def test_babyllama_is_held_after_each_step_of_its_own_loop():
    one = peers.contestant(peers.OURS, TINY)
    try:
        assert one.plan.model == TINY.config and one.tokens_per_step == TINY.tokens_per_step
        for _ in range(3):
            one.step()
    finally:
        one.close()
    assert not one.thread.is_alive()


def test_what_stops_babyllama_is_told():
    with pytest.raises(Exception, match="has 4 tokens"):
        peers.OurLoop(TINY, np.zeros(4, dtype=np.uint16))


# ---- quality: texts


def test_a_text_is_cut_between_characters():
    data = ("a" * 8 + "é" + "b").encode()  # the first 9.9 of 11 bytes end inside é
    assert training.split(data) == ("a" * 8 + "é", "b")
    assert training.split(b"0123456789") == ("012345678", "9")


@pytest.mark.parametrize("recipe", [peers.NANOGPT, peers.TRANSFORMERS], ids=lambda recipe: recipe.name)
def test_every_byte_of_the_hold_out_is_scored_once(text, recipe):
    train, hold_out = training.split(text.read_bytes())
    found = peers.encoder(recipe, train, hold_out)
    ids = np.array(found.encode(hold_out))
    blind = lambda tokens: torch.zeros(*tokens.shape, found.vocab_size)  # noqa: E731
    scored = score(blind, ids, found.byte_lengths, 32)
    assert scored.bytes == len(hold_out.encode())
    expected = (len(ids) - 1) * math.log2(found.vocab_size) / scored.bytes
    assert scored.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_a_stopped_clock_leaves_out_what_is_inside():
    clock = training.Clock(launched=training.time.time() - 5)
    before = clock.now()
    with clock.stopped():
        training.time.sleep(1.0)
    assert clock.now() - before < 0.9
    assert 4.9 < clock.cold() < 5.9


# ---- the programs


def test_contestants_take_turns():
    names = ["plain float32", "babyllama"]
    speeds = training.compare(TINY, names, rounds=3, seconds=0.01)
    assert list(speeds) == names
    assert all(len(each) == 3 and min(each) > 0 for each in speeds.values())


def test_throughput_runs():
    done = run(
        "training.py", "--throughput", "--shape", "quickstart", "--rounds", "2", "--seconds", "0.05",
        "--threads", "1", "--only", "babyllama",
    )  # fmt: skip
    found = rows(done.stdout)["babyllama"]
    assert found[1] == "1.00 (1.00 to 1.00)"
    assert int(found[-1].replace(",", "")) > 100  # MiB, torch alone needs more


def test_quality_runs_and_draws(text, tmp_path):
    pytest.importorskip("matplotlib")
    call = (
        "training.py", "--quality", str(text), "--minutes", "0.1", "--clock", "warm", "--points", "2",
        "--threads", "1", "--only", "babyllama", "nanoGPT", "--out", str(tmp_path),
    )  # fmt: skip
    done = run(*call)
    results = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [one["name"] for one in results] == ["babyllama", "nanoGPT"]
    hold_out = training.split(text.read_bytes())[1]
    for one in results:
        assert 0 < one["bits_per_byte"] < 8
        assert 0 < one["warm"] < one["cold"]
        assert {point["scored_bytes"] for point in one["curve"]} == {len(hold_out.encode())}
        assert one["curve"][-1]["bits_per_byte"] == one["bits_per_byte"]
    if results[0]["steps"] > 9:  # else there is hardly a time to count
        assert results[0]["agrees"] == pytest.approx(1, abs=0.1)
    assert set(rows(done.stdout)) >= {"babyllama", "nanoGPT"}
    with (tmp_path / "curves.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(len(one["curve"]) for one in results)
    again = run(*call, "--figure", str(tmp_path / "curve"))
    assert again.stdout.startswith(done.stdout)  # nothing was trained again
    for theme in ("light", "dark"):
        assert (tmp_path / f"curve-{theme}.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_best_rate_is_tuned_for_the_model_of_the_whole_run(text, tmp_path, monkeypatch, capsys):
    """And one with which a run diverges is not the best. Contestants take turns, seed after seed."""
    asked: list[dict[str, Any]] = []

    def child(python: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        bits = {1e-3: math.nan, 3e-4: 2.1}.get(request["rate"], 2.2)
        told = {"steps": 1, "tokens": 1, "warm": 1.0, "cold": 2.0, "flops": 1, "parameters": 1}
        told |= {"vocabulary": 1, "context_bytes": 1}
        curve = [{"steps": 1, "cold": 1, "warm": 1, "bits_per_byte": each} for each in (1.9, bits)]
        return {**told, "bits_per_byte": bits, "curve": curve}

    monkeypatch.setattr(training, "child", child)
    call = ["--quality", str(text), "--minutes", "15", "--tune", "1", "--tuned-only", "--seeds", "2"]
    call += ["--only", "nanoGPT", "llama2.c", "--out", str(tmp_path)]
    training.main(call)
    tuning, runs = asked[:10], asked[10:]
    assert {(one["minutes"], one["planned_minutes"], one["seed"]) for one in tuning} == {(1, 1, 1)}
    assert [(one["name"], one["seed"]) for one in runs] == [
        ("nanoGPT", 1), ("llama2.c", 1), ("nanoGPT", 2), ("llama2.c", 2),
    ]  # fmt: skip
    assert runs[0]["rate"] == 3e-4 and runs[1]["rate"] == 5e-4
    assert len({json.dumps(one["speed"]) for one in asked}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")][1:7] == [
        "nanoGPT", "15", "0.0003 (tuned at 1)", "1", "2.1000", "1.9000",
    ]  # fmt: skip
    assert "nanoGPT, 15 minutes, rate 0.0003 (tuned at 1): median 2.1000, 2.1000 to 2.1000, 2 seeds" in lines
    training.main(call)
    assert len(asked) == 14  # nothing was run again
    monkeypatch.setattr(training, "code", lambda ours: "later")
    training.main(call)
    assert len(asked) == 28
    asked.clear()
    call[call.index("--only") + 1 : call.index("--out")] = ["babyllama", "transformers float32"]
    training.main(call)
    assert {(one["minutes"], one["planned_minutes"]) for one in asked} == {(1, 15), (15, 15)}


def test_rates_may_be_given_and_a_run_that_fails_is_left_out(text, tmp_path, monkeypatch, capsys):
    def child(python: str, request: dict[str, Any]) -> dict[str, Any]:
        if request["rate"] == 0.5:
            raise SystemExit("nanoGPT: failed, see above")
        told = {"steps": 1, "tokens": 1, "warm": 1.0, "cold": 2.0, "flops": 1, "parameters": 1}
        told |= {"vocabulary": 1, "context_bytes": 1, "bits_per_byte": 2 + request["rate"]}
        return {**told, "curve": [{"steps": 1, "cold": 1, "warm": 1, "bits_per_byte": 2.0}]}

    monkeypatch.setattr(training, "child", child)
    call = ["--quality", str(text), "--minutes", "15", "--only", "nanoGPT", "--out", str(tmp_path)]
    training.main([*call, "--rate", "0.25", "0.5", "0.125"])
    said = capsys.readouterr()
    rates = [line.split("|")[3].strip() for line in said.out.splitlines() if line.startswith("| nanoGPT")]
    assert rates == ["0.25 (given)", "0.125 (given)"] and "failed" in said.err
    assert len(ablate.read_lines(tmp_path / "runs.jsonl")) == 2  # what failed is tried again


def test_a_slower_peer_may_have_a_smaller_model(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    request = {
        "planned_minutes": 4,
        "threads": 1,
        "speed": {"best": "float32", "float32": 4e11, "bfloat16": 0.0},
    }
    found = [
        training._shaped(request, peers.QUALITY[name], 2048, 1_900_000)
        for name in ("transformers bf16", "transformers bf16, smaller")
    ]
    assert recipe.SHAPES.index(found[0].shape) - recipe.SHAPES.index(found[1].shape) == 1
    assert [each.context for each in found] == [256, 128], "and rows that suit its width"


def test_an_ablation_runs_and_names_what_it_does_not_know(text, tmp_path):
    cells = [
        "--cell",
        "tied: tie_embeddings=true, embedding_norm=false, init=gpt2",
        "--cell",
        "odd: no_such_setting=1",
    ]
    size = ["--seconds", "3", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    done = run("ablate.py", "mine", "--text", str(text), *size, *cells)
    found = rows(done.stdout)
    assert "not known to this version" in found["odd"][1] and "no_such_setting" in found["odd"][1]
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    plain, tied = lines[1:]
    assert (plain["cell"], tied["cell"]) == ("as it is", "tied")
    assert plain["parameters"] > tied["parameters"]
    assert 2.4 < plain["training_seconds"] < 3.6  # of processor time, which the loop took for the clock
    assert plain["training_seconds"] <= plain["processor_seconds"]
    again = run("ablate.py", "mine", "--text", str(text), *size, *cells[:2])
    assert rows(again.stdout)["tied"] == found["tied"]
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 3  # nothing was run again


def test_the_law_is_fitted_to_runs_of_this_code_that_the_recipe_might_have_made(tmp_path, monkeypatch):
    def line(**more: object) -> str:
        told = {
            "text": "fairy-tales",
            "bits_per_byte": 1.8,
            "epochs": 1.0,
            "parameters": 10**6,
            "multiplied": 9,
            "content": "named",
        }
        kept = told | {"code": "now"} | more
        return json.dumps(kept)

    lines = [line(), line(code="before"), line(epochs=0.9), line(text="another"), line(bits_per_byte=1.7)]
    lines.append(line(content="another text of this name", bits_per_byte=1.6))
    monkeypatch.setattr(law, "OUT", str(tmp_path))
    (tmp_path / "law.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokens = int(recipe.TOKENS_PER_PARAMETER * 10**6)
    corpus = SimpleNamespace(train_ids=range(tokens), train_bytes=5, val_ids=[])
    monkeypatch.setattr(ablate, "prepared", lambda request, vocab_size: corpus)
    monkeypatch.setattr(ablate, "code", lambda: "now")
    monkeypatch.setattr(law, "hardness", lambda corpus: 2.0)
    assert [run.bits_per_byte for run in law.made_runs()] == [1.8, 1.7]


# ---- ablations: arithmetic


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423), (200, 1.9719)]
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(df, t):
    assert ablate.t_quantile(df) == pytest.approx(t, abs=5e-5)


def test_an_interval_is_the_one_computed_by_hand():
    ours, baseline = {1: 2.09, 2: 2.18, 3: 2.27, 7: 1.0}, {1: 2.10, 2: 2.20, 3: 2.30, 4: 9.0}
    mean, half, n = ablate.paired(ours, baseline)
    assert (mean, n) == (pytest.approx(-0.02), 3)  # of −0.01, −0.02, −0.03: deviation 0.01
    assert half == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert ablate.paired({1: 2.0}, baseline)[1:] == (None, 1)


def line(cell: Cell, seed: int, bits: float, **more: object) -> dict[str, object]:
    told = {"steps": 100, "tokens_per_second": 1000.0, "training_seconds": 2.0, "parameters": 12345}
    return {**WHERE, **ablate.identity(cell, seed), "bits_per_byte": bits, **told, "code": "c0de", **more}


WHERE = {"text": "words", "seconds": 2.0, "clock": "processor", "base": {}}
CELLS = [Cell("baseline"), Cell("better", {"clip": 0.5}), Cell("not run", {"shape": (64, 2, 2)})]


def test_the_table_of_an_ablation():
    lines = [line(CELLS[0], seed, 2 + seed / 10) for seed in (1, 2, 3)]
    lines += [line(CELLS[1], seed, 2 + seed / 10 - 0.1 - seed / 1000) for seed in (1, 2, 3)]
    lines.append(line(CELLS[1], 9, 1.0, seconds=60.0))  # another budget
    found = rows(ablate.table(lines, CELLS, WHERE))
    assert found["baseline"][:4] == ["2.2000", "baseline", "", "3"]
    half = 4.3027 * statistics.stdev([0.101, 0.102, 0.103]) / math.sqrt(3)
    assert found["better"] == [
        "2.0980", f"**−0.1020 ± {half:.4f}**", "-", "3", "100", "1,000", "2.0", "12,345",
    ]  # fmt: skip
    assert found["not run"][0] == "-"
    assert "versions" not in ablate.table(lines, CELLS, WHERE)
    assert "2 versions" in ablate.table([*lines, line(CELLS[0], 4, 2.0, code="other")], CELLS, WHERE)


def test_an_interrupted_ablation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, asked = tmp_path / "x.jsonl", []
    head = {**WHERE, "head": {"plan": {"context": 256}}}
    done = [head, line(CELLS[0], 1, 2.0), line(CELLS[2], 1, 2.0)]
    path.write_text("".join(json.dumps(one) + "\n" for one in done) + '{"text": "words", "seco')  # cut short

    def ask(request, core):
        asked.append((request["settings"], request["seed"]))
        if request["settings"]:
            return {"bits_per_byte": 1.9, "steps": 5}
        return {"failed": "exit 1"}

    monkeypatch.setattr(ablate, "ask", ask)
    options = ablate.parser().parse_args(["x", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)])
    options.base = {}
    ablate.measure(CELLS, WHERE, options, path)
    shape, clip = {"shape": [64, 2, 2]}, {"clip": 0.5}
    assert asked == [(clip, 1), (clip, 2), (shape, 2), ({}, 2)]  # seed 2 begins with the second cell
    asked.clear()
    ablate.measure(CELLS, WHERE, options, path)
    assert asked == [({}, 2)]  # only what failed
    asked.clear()
    options = ablate.parser().parse_args(
        ["x", "--seeds", "1", "--jobs", "1", "--anew", "--out", str(tmp_path)]
    )
    options.base = {}
    monkeypatch.setattr(ablate, "code", lambda: "a later version")
    monkeypatch.setattr(ablate, "ask", lambda *of: {"plan": {}} if of[0]["do"] == "head" else ask(*of))
    ablate.measure(CELLS, WHERE, options, path)
    assert [settings for settings, _ in asked] == [{}, clip, shape]
    assert {line["code"] for line in ablate.results(path, options)} == {"a later version"}


def test_two_jobs_share_the_work(tmp_path, monkeypatch):
    asked, begun, both = [], [], threading.Barrier(2)

    def ask(request, core):
        if request["do"] == "head":
            return {"plan": {"context": 256}}
        begun.append(None)
        if len(begun) <= 8:  # of nine, the last has nobody beside it
            both.wait(20)  # broken unless a second one asks meanwhile
        asked.append((json.dumps(request["settings"]), request["seed"]))
        return {"bits_per_byte": 1.9, "steps": 5}

    monkeypatch.setattr(ablate, "ask", ask)
    monkeypatch.setattr(ablate, "cores", lambda jobs: [None] * jobs)
    options = ablate.parser().parse_args(["x", "--seeds", "3", "--jobs", "2", "--out", str(tmp_path)])
    options.base = {}
    ablate.measure(CELLS, WHERE, options, tmp_path / "x.jsonl")
    assert len(asked) == len(set(asked)) == 9
    assert len(ablate.read_lines(tmp_path / "x.jsonl")) == 10


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path, chance = tmp_path_factory.mktemp("words") / "words.txt", random.Random(1)
    path.write_text("".join(f"{chance.choice(['the', 'a', 'one', 'no'])} king. " for _ in range(20_000)))
    return path


def test_an_ablation_scores_the_whole_validation_text(words, tmp_path):
    request = {"text": str(words), "data": str(tmp_path), "seconds": 0.5, "clock": "processor", "seed": 1}
    request |= {"base": {"size": "64x2x2"}, "settings": {"size": "64x2x2"}}
    head = ablate.ask({**request, "do": "head"}, None)
    found = ablate.ask({**request, "do": "run", "head": head}, None)
    assert found["scored_bytes"] == head["val_bytes"] > 5_000 and found["steps"] > 0
    assert found["training_seconds"] <= 0.6


@pytest.mark.parametrize(
    ("settings", "spreads"),
    [
        ({"init": "gpt2"}, {"embedding": 0.02, "head": 0.02, "inner": 0.02, "outputs": 0.01}),
        ({"outputs_spread": 0.03}, {"embedding": 2 / 128, "head": 2 / 128, "inner": 0.02, "outputs": 0.03}),
        (
            {"embedding_spread": 0.8, "head_spread": 0.1},
            {"embedding": 0.8, "head": 0.1, "inner": 0.02, "outputs": 0.0},
        ),
        (
            {"init": "gpt2", "inner_spread": 0.5},
            {"embedding": 0.02, "head": 0.02, "inner": 0.5, "outputs": 0.01},
        ),
    ],
)
def test_weights_begin_with_the_spreads_of_their_cell(words, tmp_path, monkeypatch, settings, spreads):
    found: dict[str, float] = {}

    def look(run, plan, corpus, **_):
        model = Llama(plan.model, seed=1)
        layer = model.layers[1]
        looked_at = {
            "embedding": model.tok_embeddings,
            "head": model.lm_head,
            "inner": layer.feed_forward.w_up,
        }
        looked_at |= {"outputs": layer.attention.wo}
        found.update({role: float(each.weight.detach().std()) for role, each in looked_at.items()})
        assert layer.ffn_norm.weight.eq(1).all()
        raise SystemExit

    monkeypatch.setattr(loop, "train", look)
    monkeypatch.setattr(
        mathematics, "init_std", mathematics.init_std
    )  # what a run puts there ends with this test
    request = {"text": str(words), "data": str(tmp_path), "seconds": 9.0, "base": {}, "seed": 1}
    request["base"] = {"size": "128x2x2"}  # where the vocabulary's are below 0.02 without a cell
    request |= {"head": ablate.first_plan(request)}
    with pytest.raises(SystemExit):
        ablate.one_run({**request, "settings": settings})
    assert found == pytest.approx(spreads, rel=0.06)


def test_at_equal_tokens_the_speed_of_the_machine_is_out_of_a_difference():
    """Half a bit for each doubling of the tokens, 0.03 for the cell, and a large effect of each seed."""
    lines, chance = [], random.Random(3)
    for at, cell in enumerate(CELLS[:2]):
        for seed, speed in enumerate([(800, 1000, 1200, 900, 1100), (1500, 1000, 1400, 1300, 1600)][at], 1):
            bits = 2 + 0.1 * seed - 0.5 * math.log2(speed / 1000) - 0.03 * at + chance.gauss(0, 0.001)
            lines.append(line(cell, seed, bits, tokens_per_second=float(speed)))
    found = rows(ablate.table(lines, CELLS, WHERE))["better"]
    mean, half = (float(part.strip("*")) for part in found[2].replace("−", "-").split(" ± "))
    assert mean == pytest.approx(-0.03, abs=0.005) and half < 0.01
    raw = float(found[1].strip("*").replace("−", "-").split(" ± ")[0])
    assert raw < -0.2, "nearly all of which is speed"
    alike = [line(cell, seed, 2.0 + seed) for cell in CELLS[:2] for seed in (1, 2, 3, 4, 5)]
    assert rows(ablate.table(alike, CELLS, WHERE))["better"][2] == "-"
    few = [each for each in lines if each["seed"] <= 3]
    assert rows(ablate.table(few, CELLS, WHERE))["better"][2] == "-"


def test_a_slope_that_is_hardly_known_makes_nothing_of_a_faster_cell():
    """One cell is always 15 % faster, the machine is steady: how much that is worth, nobody can tell from these."""
    wrong = 0
    for attempt in range(40):
        lines, chance = [], random.Random(attempt)
        for at, cell in enumerate(CELLS[:2]):
            for seed in range(1, 6):
                speed = 1000 * 1.15**at * math.exp(chance.gauss(0, 0.005))
                bits = 2 - 0.16 * math.log(speed / 1000) + chance.gauss(0, 0.006)
                lines.append(line(cell, seed, bits, tokens_per_second=speed))
        wrong += "**" in rows(ablate.table(lines, CELLS, WHERE))["better"][2]
    assert wrong <= 6, "one of twenty intervals of 95 % may miss"


def test_a_cell_with_the_settings_of_another_is_not_run_again(capsys, tmp_path):
    ablate.main(["size", "--cell", "list: shape=[64, 2, 2]", "--table", "--out", str(tmp_path)])
    assert "list is the same as 64 wide, 2 layers" in capsys.readouterr().out, "a tuple there, a list here"
    twice = ["--cell", "one: clip=1", "--cell", "the same: clip=1", "--cell", "base:"]
    ablate.main(["mine", *twice, "--table", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert list(rows(said))[1:] == ["as it is", "one"]
    assert "the same is the same as one" in said and "base is the same as as it is" in said
    with pytest.raises(SystemExit, match="no group"):
        ablate.main(["--cell", "one: clip=1", "--table"])


def test_what_is_in_a_text_counts_not_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one")
    folder, file = ablate.content(str(tmp_path / "a")), ablate.content(str(tmp_path / "two.txt"))
    ablate.content.cache_clear()
    (tmp_path / "a" / "one.txt").write_text("two")
    (tmp_path / "two.txt").write_text("two")
    assert folder != ablate.content(str(tmp_path / "a")) and file != ablate.content(str(tmp_path / "two.txt"))
    assert ablate.content("shakespeare") == "named"


SPEED = {"best": "float32", "float32": 5e11, "bfloat16": 0.0}
LENGTHS = {"text_bytes": 1_900_000, "train_tokens": 550_000}  # about those of the fairy tales


def first(seconds: float, monkeypatch: pytest.MonkeyPatch, **base: Any) -> dict[str, Any]:
    """A request for cells of a run of so many seconds, with what `ablate.first_plan` would put into it."""
    monkeypatch.setattr(machine, "measure_precision", lambda device: machine.Precision(**SPEED))
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    corpus = SimpleNamespace(vocab_size=2048, train_bytes=LENGTHS["text_bytes"], val_bytes=1000)
    corpus.train_ids = range(LENGTHS["train_tokens"])
    monkeypatch.setattr(ablate, "prepared", lambda request, vocab_size: corpus)
    request = {"seconds": seconds, "base": base, "seed": 1, "settings": {}}
    return {**request, "head": ablate.first_plan(request)}


def planned(request: dict[str, Any], cell: Cell) -> Plan:
    settings = {**request["base"], **ablate.as_json(cell.settings)}
    return ablate.cell_plan({**request, "settings": settings}, settings.get("vocab_size", 2048), **LENGTHS)


@pytest.mark.parametrize("group", ablate.GROUPS)
def test_cells_of_a_group_differ(group, monkeypatch):
    cells, request = ablate.GROUPS[group], first(3000, monkeypatch)
    assert len({cell.name for cell in cells}) == len(cells)
    begin = ("init", *ablate.SPREADS)  # what is no part of a plan
    baseline, *plans = (
        repr((planned(request, cell), {name: cell.settings.get(name) for name in begin})) for cell in cells
    )
    assert len(set(plans)) == len(plans)
    # whose numbers may hold what this text and time would have
    listed = group in ("vocabulary", "batch", "size", "context", "defaults")
    assert plans.count(baseline) <= listed


def test_a_cell_changes_what_it_names_and_what_comes_with_it(monkeypatch):
    request = first(3000, monkeypatch)
    baseline = planned(request, ablate.AS_IT_IS)
    assert baseline.dropout > 0 and baseline.optimizer == "muon"

    def changed(name: str) -> set[str]:
        cell = next(each for each in ablate.GROUPS["defaults"] if each.name == name)
        plan = planned(request, cell)
        return {key for key in vars(plan) if getattr(plan, key) != getattr(baseline, key)}

    assert changed("not cautious") == {"cautious"}
    assert changed("weight decay 0") == {"weight_decay"}
    assert changed("without embedding norm") == {"embedding_norm", "embedding_rate"}
    assert changed("tied") == {"model", "embedding_norm", "embedding_rate"}
    rates = {"learning_rate", "embedding_rate", "head_rate", "gain_rate"}
    own = {"muon_by_head", "muon_polynomials"}
    assert changed("AdamW") == {"optimizer", *rates, *own, "beta1", "cautious", "clip"}


def test_a_slower_or_faster_cell_keeps_the_rate_that_goes_by_passes(monkeypatch):
    request = first(300, monkeypatch)
    baseline = planned(request, ablate.AS_IT_IS)
    lowest, highest = recipe.HEAD_RATES
    assert lowest < baseline.head_rate < highest
    for cell in (Cell("heads together", {"muon_by_head": False}), Cell("shorter rows", {"context": 64})):
        assert planned(request, cell) != baseline and planned(request, cell).head_rate == baseline.head_rate
    assert planned(request, Cell("another rate", {"head_rate": 0.01})).head_rate == 0.01


def test_what_a_cell_says_of_its_size_comes_before_the_base(monkeypatch):
    request = first(3000, monkeypatch, size="600k")
    tied = planned(request, Cell("tied", {"tie_embeddings": True, "embedding_norm": False}))
    usual = planned(request, Cell("untied", {"embedding_norm": False}))
    assert tied.model == replace(usual.model, tie_embeddings=True)
    assert planned(request, Cell("wide", {"shape": [192, 5, 6]})).model.dim == 192
    request = first(3000, monkeypatch, shape=[128, 4, 4])
    assert planned(request, Cell("wide", {"size": "192x5x6"})).model.dim == 192


def test_the_runs_of_the_law_are_all_of_different_sizes(monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(ablate, "main", asked.append)
    law.make_runs(longer=3, jobs=2)
    assert len(asked) == len(law.TEXTS) * len(law.SIZES) and all("--anew" in each for each in asked)
    for number, arguments in enumerate(asked):
        given = ablate.parser().parse_args(arguments)
        sizes = list(law.SIZES.values())[number % len(law.SIZES)]
        cells = [ablate.parse_cell(cell).settings["size"] for cell in given.cell]
        assert (dict(map(ablate.parse_setting, given.set))["size"], *cells) == sizes
        options = {"vocab_size": 2048, "minutes": 1, "device": "cpu", **LENGTHS}
        assert len({recipe.plan(size=size, **options).model for size in sizes}) == len(sizes)
        assert given.seconds == [3 * list(law.SIZES)[number % len(law.SIZES)]]


def test_a_shape_for_every_cell_is_planned_for_as_such(monkeypatch):
    request = first(3000, monkeypatch, shape=[128, 4, 4])
    usual, head = planned(first(3000, monkeypatch), ablate.AS_IT_IS), request["head"]["plan"]
    found = planned(request, ablate.AS_IT_IS)
    assert found.model.dim == head["model"]["dim"] == 128 != usual.model.dim
    assert (found.batch_size, found.dropout) == (head["batch_size"], head["dropout"])
    assert found.batch_size < usual.batch_size


@pytest.mark.parametrize(
    ("base", "cell", "context"),
    [
        ({"size": "600k"}, {}, 128),
        ({"size": "600k"}, {"size": "3M"}, 256),
        ({"size": "600k"}, {"size": "3M", "context": 64}, 64),
        ({"shape": [128, 4, 4]}, {"shape": [192, 5, 6]}, 256),
        ({"shape": [192, 5, 6]}, {"shape": [128, 4, 4]}, 128),
    ],
)
def test_a_cell_of_another_size_has_the_rows_of_its_own(monkeypatch, base, cell, context):
    found = planned(first(3000, monkeypatch, **base), Cell("another", cell))
    assert (found.context, found.model.max_seq_len) == (context, context)


def test_cells_from_the_command_line():
    cell = ablate.parse_cell("two words: optimizer=muon, average=0.05, cautious=True, shape=[64, 2, 2]")
    given = {"optimizer": "muon", "average": 0.05, "cautious": True, "shape": [64, 2, 2]}
    assert cell == Cell("two words", given)
    with pytest.raises(SystemExit):
        ablate.parse_setting("no value")

"""One loop: the right gradient, the same bits after any interruption, and nothing lost when something breaks."""

import copy
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from weights import randomised

from babyllama import api, machine
from babyllama.checkpoint import folder
from babyllama.checkpoint.run import Run
from babyllama.data.batches import IGNORE, Batches
from babyllama.errors import BabyLlamaError, InputError, MachineError, NumericalError
from babyllama.model import Config, Llama
from babyllama.train import evaluate, loop
from babyllama.train.cpu import CPUStep
from babyllama.train.loop import Compiling, Evaluated, NotCompiled, Outcome, Saved, Skipped, Started, Stepped
from babyllama.train.recipe import Plan

SMALL = {
    "size": "100k",
    "context": 32,
    "batch_size": 4,
    "threads": 1,
    "device": "cpu",
    "precision": "float32",
}
STEPS = 24


def train(text, out, steps=STEPS, tell=lambda event: None, **settings) -> Run:
    return api.train(
        text, out=out, steps=steps, tell=tell, **{**SMALL, "save_every": 4, "evaluations": 2, **settings}
    )


def final(run: Run) -> dict[str, bytes]:
    folder = run.folder(run.steps()[-1])
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optim.safetensors")}


class PulledPlugError(Exception):
    pass


def stop_at(step, kind=Stepped):
    def tell(event):
        if isinstance(event, kind) and event.step == step:
            raise PulledPlugError

    return tell


def test_a_budget_that_was_gone_before_the_first_step_still_gives_a_model(prepared, tmp_path):
    options = {name: SMALL[name] for name in ("threads", "device", "precision")}
    run = api.train(prepared, out=tmp_path / "run", minutes=1e-4, **options)
    assert run.steps() == [1] and run.state(1)["done"] and run.best() == 1


# ---- resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    return train(prepared, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("at", [1, 4, 5, 17, 23])
def test_an_interrupted_run_ends_with_the_same_bits(prepared, tmp_path, uninterrupted, at):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(at))
    run = api.resume(tmp_path / "run")
    assert run.steps()[-1] == STEPS
    assert final(run) == final(uninterrupted)


def test_a_run_interrupted_again_and_again_ends_with_the_same_bits(prepared, tmp_path, uninterrupted):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(3))
    for at in (6, 9, 13, 22):
        with pytest.raises(PulledPlugError):
            api.resume(tmp_path / "run", tell=stop_at(at))
    assert final(api.resume(tmp_path / "run")) == final(uninterrupted)


def test_a_damaged_newest_step_is_passed_over_and_the_bits_are_the_same(prepared, tmp_path, uninterrupted):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(17))
    run, events = Run(tmp_path / "run"), []
    path = run.folder(16) / "optim.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    api.resume(run.path, tell=events.append)
    started = next(event for event in events if isinstance(event, Started))
    assert started.step == 12 and [problem.code for problem in started.passed_over] == ["E204"]
    assert final(run) == final(uninterrupted)
    assert any(line["event"] == "passed over" for line in run.metrics())


def test_a_step_that_the_disk_cannot_read_is_passed_over(prepared, tmp_path, uninterrupted, monkeypatch):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(17))
    run, events, read = Run(tmp_path / "run"), [], folder.file_sha256
    broken = run.folder(16) / "optim.safetensors"

    def fails(path):
        if path == broken and not any(isinstance(event, Stepped) for event in events):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(folder, "file_sha256", fails)
    api.resume(run.path, tell=events.append)
    started = next(event for event in events if isinstance(event, Started))
    assert started.step == 12 and [problem.code for problem in started.passed_over] == ["E205"]
    assert "cannot be read" in started.passed_over[0].found
    assert final(run) == final(uninterrupted)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_a_step_that_cannot_be_read_just_now_ends_the_attempt_and_is_kept(
    prepared, tmp_path, uninterrupted, monkeypatch, number
):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(17))
    run, read = Run(tmp_path / "run"), folder.file_sha256

    def fails(path):
        if path == run.folder(16) / "optim.safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "file_sha256", fails)
        with pytest.raises(BabyLlamaError) as caught:
            api.resume(run.path)
    assert caught.value.code == "E403" and run.newest_intact() == (16, [])
    assert final(api.resume(run.path)) == final(uninterrupted)


def test_damaged_metrics_do_not_keep_a_run_from_going_on(prepared, tmp_path, uninterrupted):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(9))
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{\n{"event": "st')
    run = api.resume(tmp_path / "run")
    assert final(run) == final(uninterrupted)
    for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_a_step_can_be_chosen_and_gives_the_same_bits(prepared, tmp_path, uninterrupted):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(17))
    assert final(api.resume(tmp_path / "run", step=12)) == final(uninterrupted)


def test_evaluations_samples_and_saves_change_no_weight(prepared, tmp_path, uninterrupted):
    run = train(prepared, tmp_path / "run", save_every=0, evaluations=7, evaluation_tokens=64)
    assert final(run)["model.safetensors"] == final(uninterrupted)["model.safetensors"]


def test_the_seed_decides_everything(prepared, tmp_path, uninterrupted):
    assert final(train(prepared, tmp_path / "same")) == final(uninterrupted)
    assert final(train(prepared, tmp_path / "other", seed=2)) != final(uninterrupted)


def test_every_step_is_told_once_in_the_metrics_however_often_it_was_taken(prepared, tmp_path):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(15), save_every=7)
    run = api.resume(tmp_path / "run")
    steps = [line["step"] for line in run.metrics() if line["event"] == "evaluation"]
    assert steps == [12, 24]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_saves_and_the_run_goes_on(prepared, tmp_path, uninterrupted, number):
    events = []

    def tell(event):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 6:
            os.kill(os.getpid(), number)

    run = train(prepared, tmp_path / "run", tell=tell)
    outcome = events[-1]
    assert isinstance(outcome, Outcome) and outcome.stopped_by == number and outcome.step == 6
    assert run.steps()[-1] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert final(api.resume(run.path)) == final(uninterrupted)


def test_a_second_interrupt_is_not_held_up(prepared, tmp_path):
    def tell(event):
        if isinstance(event, Stepped) and event.step in (6, 7):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path / "run", tell=tell)
    assert Run(tmp_path / "run").newest_intact()[0] == 4


def test_a_finished_run_resumed_is_scored_again_and_not_trained(uninterrupted):
    before, events = final(uninterrupted), []
    api.resume(uninterrupted.path, tell=events.append)
    assert not any(isinstance(event, Stepped | Saved) for event in events)
    assert events[-1].score is not None and final(uninterrupted) == before
    assert [line["event"] for line in uninterrupted.metrics()].count("finished") == 1


def test_the_last_score_stays_in_the_metrics_until_there_is_another(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": null}\n')  # damaged, and JSON all the same

    def stop(event):
        if isinstance(event, Started):
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        api.resume(run.path, tell=stop)
    assert [line["event"] for line in run.metrics()].count("finished") == 1
    api.resume(run.path)
    assert [line["event"] for line in run.metrics()].count("finished") == 1
    assert all(line["step"] is not None for line in run.metrics())


def test_a_signal_during_the_last_score_ends_the_run_at_once_and_loses_nothing(
    prepared, tmp_path, uninterrupted
):
    score, events = loop._Training.finish, []

    def finish(self):
        os.kill(os.getpid(), signal.SIGINT)
        return score(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Training, "finish", finish)
        train(prepared, tmp_path / "run", tell=events.append)
    assert events[-1] == loop.Outcome(STEPS, None, signal.SIGINT)
    events.clear()
    run = api.resume(tmp_path / "run", tell=events.append)
    assert not any(isinstance(event, Stepped) for event in events) and events[-1].score is not None
    assert final(run) == final(uninterrupted)


def test_of_much_held_out_text_a_run_of_steps_scores_a_part(prepared, tmp_path, corpus):
    events = []
    train(prepared, tmp_path / "run", tell=events.append, evaluation_tokens=64)
    learned = STEPS * 4 * 32
    assert 64 < events[-1].score.tokens < 0.1 * learned < corpus.val_bytes


def test_a_run_ends_with_its_time_and_its_schedule_with_it(prepared, tmp_path, monkeypatch):
    now, events = iter(np.arange(0, 1e6, 0.02)), []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))  # 0.02 s a look
    run = api.train(prepared, out=tmp_path / "run", minutes=0.1, tell=events.append, **SMALL)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert 5.5 < steps[-1].seconds <= 6.1
    assert steps[-1].learning_rate < 0.05 * max(step.learning_rate for step in steps)
    evaluated = [event.step for event in events if isinstance(event, Evaluated)]
    assert len(evaluated) > 2 and evaluated[-1] == steps[-1].step
    assert steps[-1].seconds < run.state(run.steps()[-1])["seconds"] <= 6.3, "the last evaluation counts"


def test_what_was_used_before_the_first_step_is_part_of_the_time(prepared, tmp_path, monkeypatch, corpus):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=60.0, evaluations=0)
    now, events = iter(np.arange(0, 1e6, 1.0)), []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    run = Run.create(tmp_path / "run", {})
    loop.train(run, plan, corpus, tell=events.append, used=40.0)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert 41 <= steps[0].seconds < 50 and len(steps) < 20
    assert 57 < run.state(run.steps()[-1])["seconds"] <= 61


def test_the_schedule_begins_with_the_first_step_whatever_was_used_before(corpus, tmp_path, monkeypatch):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=60.0, evaluations=0, warmup=0.2)
    now, events = iter(np.arange(0, 1e6, 0.5)), []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    loop.train(Run.create(tmp_path / "run", {}), plan, corpus, tell=events.append, used=30.0)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert steps[0].learning_rate < 0.3 * plan.learning_rate
    assert max(step.learning_rate for step in steps) > 0.95 * plan.learning_rate
    assert steps[0].progress < 0.2 and steps[-1].progress >= 1


def test_what_is_compiled_at_first_use_is_part_of_the_time_but_not_of_the_progress(
    corpus, tmp_path, monkeypatch
):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=60.0, evaluations=0, warmup=0.2)
    now, calls, events = [0.0], [], []
    differentiate = CPUStep.__call__

    def slow_at_first(self, *batch):
        calls.append(batch)
        now[0] += 20.0 if len(calls) == 1 else 1.0
        return differentiate(self, *batch)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(CPUStep, "__call__", slow_at_first)
    loop.train(Run.create(tmp_path / "run", {}), plan, corpus, tell=events.append)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert steps[0].progress == pytest.approx(1 / 40, rel=0.1) and steps[0].seconds == 21
    assert steps[0].learning_rate < 0.1 * plan.learning_rate
    assert len(steps) == 40 and steps[-1].seconds == 60


# ---- torch.compile -------------------------------------------------------------------------------


def compiles_as(monkeypatch, when="called", error=None):
    """torch.compile returns its function, or fails with `error`: at once, when its result is called, or behind that."""

    def compile_(function, **options):
        def call(*inputs):
            if error is not None and when == "called":
                raise error
            found = function(*inputs)
            if error is not None:
                found.register_hook(fail)
            return found

        def fail(*gradient):
            raise error

        if error is not None and when == "at once":
            raise error
        return call

    monkeypatch.setattr(torch, "compile", compile_)


class FromABackendError(RuntimeError):
    """As torch's own: a heading, and inside it what was wrong."""

    def __init__(self):
        super().__init__("backend='inductor' raised:\n much else")
        self.inner_exception = RuntimeError("An exception occurred:\n\nno compiler\nand much about it")


@pytest.mark.parametrize("when", ["at once", "called", "backward"])
def test_a_step_that_cannot_be_compiled_runs_as_it_is(prepared, tmp_path, monkeypatch, when):
    events = []
    expected = train(prepared, tmp_path / "expected", dropout=0.1)
    compiles_as(monkeypatch, when, FromABackendError())
    run = train(prepared, tmp_path / "run", tell=events.append, compile=True, dropout=0.1)
    told = [event for event in events if isinstance(event, Compiling | NotCompiled)]
    assert told == [Compiling(), NotCompiled("no compiler")]
    assert [event.step for event in events if isinstance(event, Stepped)] == list(range(1, STEPS + 1))
    assert final(run) == final(expected), "what was tried before the first step has left nothing behind"
    (line,) = (line for line in run.metrics() if line["event"] == "not compiled")
    assert line["step"] == 0 and line["problem"].startswith("backend")


def test_memory_that_ends_while_a_step_is_compiled_is_told_as_such(prepared, tmp_path, monkeypatch):
    gone = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    compiles_as(monkeypatch, "called", gone)
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run", compile=True)
    assert caught.value.code == "E404" and "batch_size=2" in caught.value.fix


@pytest.mark.parametrize(
    ("seconds", "takes", "compiled"), [(1000, 100, True), (2000, 100, False), (1150, 400, True)]
)
def test_a_resumed_run_is_compiled_again_if_there_is_time_left_for_it(
    corpus, tmp_path, monkeypatch, seconds, takes, compiled
):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=2500.0, evaluations=5, compile=True)
    now, events = [0.0], []
    take_step, run = loop._Training.take_step, Run.create(tmp_path / "run", {})

    def slow_step(self, progress):
        now[0] += 50.0
        return take_step(self, progress)

    def stop(event):
        if isinstance(event, Saved) and run.state(event.step)["seconds"] >= seconds:
            raise PulledPlugError

    def compile_(function, **options):
        now[0] += takes
        return lambda *inputs: function(*inputs)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop._Training, "take_step", slow_step)
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(PulledPlugError):
        loop.train(run, plan, corpus, tell=stop)
    before = run.state(run.steps()[-1])
    loop.train(run, plan, corpus, tell=events.append)
    told = [event for event in events if isinstance(event, Compiling | NotCompiled)]
    assert told == [Compiling() if compiled else NotCompiled("too little time is left")]
    first = next(event for event in events if isinstance(event, Stepped))
    assert first.seconds == before["seconds"] + 50 + takes * compiled
    trained = before["seconds"] - before["used"] + 50
    assert first.progress == pytest.approx(trained / (2500 - takes - takes * compiled), rel=0.01)
    evaluated = [line for line in run.metrics() if line["event"] == "evaluation"]
    assert len(evaluated) == 5, "one may have become due while the resumed run was compiled"


@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_a_run_whose_gpu_is_gone_goes_on_with_the_step_of_the_device_there_is(
    prepared, tmp_path, monkeypatch, there
):
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(5))
    run, events = Run(tmp_path / "run"), []
    settings = folder.read_sealed(run.path / "run.json")
    settings["plan"] |= {"device": "cuda:7", "compile": True, "precision": "bfloat16"}
    (run.path / "run.json").write_bytes(folder.sealed(settings))
    monkeypatch.setattr(machine, "best_device", lambda: there)
    monkeypatch.setattr(machine, "measure_precision", lambda device: machine.Precision("float32", 1e11, 0.0))
    monkeypatch.setattr(api, "check_device", lambda device: None)
    if there == "cuda":
        monkeypatch.setattr(api, "_train", lambda run, told, step, tell: tell(told))
    api.resume(run.path, tell=events.append)
    chosen = events[0].plan
    assert (chosen.device, chosen.precision, chosen.compile) == (there, "float32", there == "cuda")
    assert there == "cuda" or events[-1].step == STEPS


@pytest.mark.cuda
def test_a_compiled_run_on_a_gpu_learns_what_one_that_is_not_compiled_does(prepared, tmp_path):
    """In processes of their own, since the checks of types that tests run with cannot be compiled."""
    scores = []
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        words = f"--device cuda --size 100k --steps 20 --set dropout=0.1 --set compile={compiled}".split()
        words = ["train", str(prepared), "--out", str(out), *words]
        done = subprocess.run([sys.executable, "-m", "babyllama", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("Compiling" in done.stdout) == (compiled == "true") and "not compiled" not in done.stdout
        scores += [line["bits_per_byte"] for line in Run(out).metrics() if line["event"] == "finished"]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("step_takes", [0.3, 0.4, 0.7])
def test_a_run_whose_time_ends_before_a_save_has_its_last_weights_judged(
    corpus, tmp_path, monkeypatch, step_takes, killed
):
    """Here every step is saved, and seconds pass between the two: the time ends there, most likely.

    Then one more step is taken: a step that was saved is never saved again, since that would remove it first.
    """
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(
        model=config, context=16, batch_size=2, seconds=60.0, evaluations=1, average=0.1, save_every=1
    )
    now, averages = [0.0], []
    take_step, better = loop._Training.take_step, loop._Training._better_of_average

    def slow_step(self, progress):
        now[0] += step_takes
        return take_step(self, progress)

    run, saved = Run.create(tmp_path / "run", {}), []

    def tell(event):
        if isinstance(event, Stepped):
            now[0] += 3.0
        if isinstance(event, Saved):
            saved.append(event.step)
        if isinstance(event, Saved) and killed and run.state(event.step)["seconds"] >= 60:
            raise PulledPlugError

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop._Training, "take_step", slow_step)
    monkeypatch.setattr(
        loop._Training, "_better_of_average", lambda self, last: averages.append(1) or better(self, last)
    )
    if killed:
        with pytest.raises(PulledPlugError):
            loop.train(run, plan, corpus, tell=tell)
        assert averages == [], "the time did not end before a save"

    def tell_again(event):
        if isinstance(event, Saved):
            saved.append(event.step)

    outcome = loop.train(run, plan, corpus, tell=tell_again if killed else tell)
    state = run.state(outcome.step)
    assert state["done"] and state["bits_per_byte"] is not None and run.best() == outcome.step
    assert len(saved) == len(set(saved))
    assert averages == [1]


@pytest.mark.parametrize(("evaluated", "average"), [(1, 0.0), (600, 0.0), (600, 0.1)])
def test_the_last_score_is_part_of_the_time(tmp_path, monkeypatch, corpus, evaluated, average):
    """And so is the evaluation before it, though it is the first."""
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=1000.0, evaluations=0)
    plan = replace(plan, evaluation_tokens=evaluated, average=average)
    now, scored, events = [0.0], [], []
    take_step, score = loop._Training.take_step, loop._Training._score

    def step_for_five_seconds(self, progress):
        now[0] += 5.0
        return take_step(self, progress)

    def score_ten_tokens_a_second(self, logits, max_tokens):
        found = score(self, logits, max_tokens)
        now[0] += found.tokens / 10
        scored.append(found.tokens)
        return found

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop._Training, "take_step", step_for_five_seconds)
    monkeypatch.setattr(loop._Training, "_score", score_ten_tokens_a_second)
    loop.train(Run.create(tmp_path / "run", {}), plan, corpus, tell=events.append)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert 950 - evaluated / 10 * (2 if average else 1) < steps[-1].seconds < 1000 and 980 < now[0] < 1006
    assert 100 <= scored[-1] <= 200 < len(corpus.val_ids), "a fiftieth of the time, at ten tokens a second"


@pytest.fixture
def timed(corpus, tmp_path, monkeypatch):
    """A run of 60 seconds on a clock that goes a second at each look."""
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=60.0, evaluations=4, average=0.1)
    now = iter(np.arange(0, 1e6, 1.0))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    run = Run.create(tmp_path / "run", {})
    return run, lambda tell: loop.train(run, plan, corpus, tell=tell)


def test_a_timed_run_that_is_done_is_not_trained_further(timed):
    run, train = timed
    train(lambda event: None)
    step, events = run.steps()[-1], []
    before = (run.folder(step) / "model.safetensors").read_bytes()
    assert run.state(step)["done"]
    outcome = train(events.append)
    assert outcome.score is not None and not any(isinstance(event, Stepped | Saved) for event in events)
    assert run.steps()[-1] == step and (run.folder(step) / "model.safetensors").read_bytes() == before


def test_a_timed_run_that_goes_on_stands_where_it_stood(timed):
    run, train = timed
    last = []

    def stop(event):
        if isinstance(event, Stepped):
            last.append(event)
        if isinstance(event, Saved) and last[-1].progress > 0.4:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        train(stop)
    stood, saved = last[-1], run.state(run.steps()[-1])
    assert saved["seconds"] >= stood.seconds + 1 and saved["reserved"] > 0, (
        "the evaluation has taken time, too"
    )
    events = []
    train(events.append)
    first = next(event for event in events if isinstance(event, Stepped))
    assert first.progress > stood.progress and first.seconds > saved["seconds"]
    assert 56 < run.state(run.steps()[-1])["seconds"] <= 62


def test_one_step_is_learned_from_though_the_time_was_gone_before_it(corpus, tmp_path):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=1.0, evaluations=0)
    run = Run.create(tmp_path / "run", {})
    outcome = loop.train(run, plan, corpus, used=5.0)
    assert outcome.step == 1 and run.state(1)["done"]
    fresh = Llama(config, seed=plan.seed).state_dict()["lm_head.weight"]
    assert not torch.equal(load_file(run.folder(1) / "model.safetensors")["lm_head.weight"], fresh)


@pytest.mark.parametrize("better", [True, False])
def test_the_average_of_the_weights_is_kept_where_it_predicts_better(prepared, tmp_path, monkeypatch, better):
    scored = []

    def score(self, logits, max_tokens):
        found = real(self, logits, max_tokens)
        scored.append(found.bits_per_byte)
        if self.progress >= 1 and len(scored) == 3:  # after two evaluations of what was trained
            averaged.update({n: w.clone() for n, w in self.model.named_parameters()})
            found = replace(found, bits_per_byte=scored[1] + (-0.01 if better else 0.01))
        return found

    averaged, real, events = {}, loop._Training._score, []
    monkeypatch.setattr(loop._Training, "_score", score)
    run = train(prepared, tmp_path / "run", average=0.1, tell=events.append)
    kept = load_file(run.folder(STEPS) / "model.safetensors")
    moments = load_file(run.folder(STEPS) / "optim.safetensors")
    assert torch.equal(averaged["norm.weight"], moments["norm.weight.average"])
    assert moments["average.progress"] == 1 and not averaged["norm.weight"].eq(1).all()
    assert torch.equal(kept["model.norm.weight"], averaged["norm.weight"]) == better
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    assert last.score.bits_per_byte == pytest.approx(scored[1] - 0.01 if better else scored[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2, "average": 0.05},
        {"embedding_norm": True, "average": 0.05, "dropout": 0.1},
        {
            "optimizer": "muon", "embedding_rate": 0.02, "head_rate": 0.004, "gain_rate": 0.004,
            "normuon": True, "cautious": True, "embedding_norm": True, "threads": 2,
        },
        {"precision": "bfloat16", "accumulation": 2},
    ],
)  # fmt: skip
def test_every_kind_of_memory_survives_an_interruption(prepared, tmp_path, settings, monkeypatch):
    # a machine of one core refuses two threads
    monkeypatch.setattr(machine, "logical_cores", lambda *given: 2)
    whole = train(prepared, tmp_path / "whole", **settings)
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=stop_at(10), **settings)
    assert Run(tmp_path / "run").steps()[-1] == 8
    api.resume(tmp_path / "run")
    assert final(Run(tmp_path / "run")) == final(whole)


def test_a_norm_after_the_embedding_is_folded_into_what_is_saved(prepared, tmp_path, corpus):
    run = train(prepared, tmp_path / "run", embedding_norm=True)
    folder = run.folder(STEPS)
    saved, trained = load_file(folder / "model.safetensors"), load_file(folder / "optim.safetensors")
    rows, raw = saved["model.embed_tokens.weight"], trained[loop.TRAINED]
    size = raw.square().mean(-1, keepdim=True)
    assert torch.allclose(rows, raw / (size + 1e-5).sqrt(), rtol=1e-4)
    assert 0.01 < float(size.sqrt().mean()) < 0.9, "so that the fold is no matter of taste"
    finished = run.metrics()[-1]["bits_per_byte"]
    llama, ids = api.load(folder), np.asarray(corpus.val_ids)
    tokenizer = corpus.tokenizer
    after_bos = tokenizer.bos_id, tokenizer.byte_lengths(tokenizer.bos_id)
    again = evaluate.score(llama.model, ids, tokenizer.byte_lengths(), 32, after_bos=after_bos)
    assert again.bits_per_byte == pytest.approx(finished, abs=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = lambda tokens: theirs(tokens, use_cache=False).logits  # noqa: E731
    again = evaluate.score(logits, ids, tokenizer.byte_lengths(), 32, after_bos=after_bos)
    assert again.bits_per_byte == pytest.approx(finished, abs=1e-5)
    shown = []
    plan = replace(api.plan_from_json(run.settings["plan"]), steps=3, evaluations=1)
    loop.train(
        Run.create(tmp_path / "shown", {}),
        plan,
        corpus,
        sample=lambda model: shown.append(copy.deepcopy(model)) or "",
    )
    assert shown[0].tok_embeddings.weight.square().mean(-1).min() > 0.9, (
        "as rows begin with 0.02, and the norm's eps"
    )


# ---- the gradient --------------------------------------------------------------------------------


class OneBatch:
    """In place of Batches: rows whose targets are of very different number."""

    def __init__(self, tokens, targets):
        self.rows = tokens, targets

    def batch(self, step):
        return self.rows


def gradients(corpus, tmp_path, batch_size, accumulation, rows):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=2, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=batch_size, accumulation=accumulation, steps=1, clip=0.0)
    training = loop._Training(
        Run.create(tmp_path / f"{batch_size}", {}), plan, corpus, lambda event: None, None, 0.0
    )
    training.batches = OneBatch(*rows)
    training.restore(None)
    randomised(training.model, 0.3)
    kept = {}
    training.optimizer.step = lambda progress: kept.update(
        {n: w.grad.clone() for n, w in training.model.named_parameters()}
    )
    loss, norm = training.take_step(0.0)
    return loss, norm, kept


def test_accumulated_gradients_are_those_of_the_whole_batch_with_ragged_targets(corpus, tmp_path):
    chance = np.random.default_rng(0)
    tokens = chance.integers(0, corpus.vocab_size, (8, 16))
    targets = chance.integers(0, corpus.vocab_size, (8, 16))
    for row, length in enumerate((16, 1, 3, 16, 2, 9, 1, 16)):
        targets[row, length:] = IGNORE
    whole_loss, whole_norm, whole = gradients(corpus, tmp_path, 8, 1, (tokens, targets))
    parts_loss, parts_norm, parts = gradients(corpus, tmp_path, 1, 8, (tokens, targets))
    assert whole_loss == pytest.approx(parts_loss, rel=1e-6) and whole_norm == pytest.approx(
        parts_norm, rel=1e-5
    )
    for name, grad in whole.items():
        assert (grad - parts[name]).abs().max() <= 1e-6 * max(1.0, float(grad.abs().max())), name


def test_a_learning_rate_of_zero_changes_nothing(corpus, tmp_path):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, steps=1, seed=5)
    training = loop._Training(Run.create(tmp_path / "run", {}), plan, corpus, lambda event: None, None, 0.0)
    training.restore(None)
    training.take_step(1.0)  # the schedule's end
    fresh = Llama(config, seed=5).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in training.model.state_dict().items())


# ---- when something breaks -----------------------------------------------------------------------


def before_steps(monkeypatch, do):
    """Call do(training) before each step."""

    def take_step(self, progress):
        do(self)
        return real(self, progress)

    real = loop._Training.take_step
    monkeypatch.setattr(loop._Training, "take_step", take_step)


def spoil_gradients(monkeypatch, steps, value=float("nan"), names=("layers.0.attention.wo.weight",)):
    """Some values in the gradients of these weights, at these steps (counted from 1)."""

    def take_step(self, progress):
        if self.step + 1 not in steps:
            return real(self, progress)
        right, weights = self.differentiate, dict(self.model.named_parameters())

        def differentiate(*given):
            loss = right(*given)
            for name in names:
                weights[name].grad.view(-1)[3] = value
            return loss

        self.differentiate = differentiate
        try:
            return real(self, progress)
        finally:
            self.differentiate = right

    real = loop._Training.take_step
    monkeypatch.setattr(loop._Training, "take_step", take_step)


def spoil_weight(at, change):
    """change(model) before the step of this number, counted from 1."""
    return lambda training: change(training.model) if training.step + 1 == at else None


@pytest.mark.parametrize(
    ("spoil", "began"),
    [
        (lambda m: m.layers[1].feed_forward.w_up.weight, "layers.1.feed_forward.up"),
        (lambda m: m.layers[0].attention.wk.weight, "layers.0.attention.k"),
        (lambda m: m.layers[1].ffn_norm.weight, "layers.1.ffn_norm.output"),
        (lambda m: m.norm.weight, "norm.output"),
        (lambda m: m.lm_head.weight, "logits"),
    ],
)
def test_three_steps_that_are_not_finite_end_the_run_and_name_where_it_began(
    prepared, tmp_path, monkeypatch, spoil, began
):
    def change(model):
        spoil(model).data.view(-1)[0] = float("nan")

    before_steps(monkeypatch, spoil_weight(11, change))
    with pytest.raises(NumericalError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.code == "E501" and caught.value.where == "step 13"
    assert f"beginning at {began}" in caught.value.found
    lowered = {word.partition("=")[0] for word in caught.value.fix.split() if "_rate=" in word}
    run = Run(tmp_path / "run")
    given = {name for name, value in run.settings["plan"].items() if name.endswith("_rate") and value}
    assert lowered == given and "learning_rate" in given
    assert run.steps() == [4, 8] and run.newest_intact() == (8, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.0.attention.wo.weight", "tok_embeddings.weight", "norm.weight"])
def test_of_gradients_the_one_nearest_the_output_is_named(prepared, tmp_path, monkeypatch, name, value):
    spoil_gradients(monkeypatch, range(3, 99), value, {name, "tok_embeddings.weight"})
    with pytest.raises(NumericalError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.where == "step 5" and f"the gradient of {name}" in caught.value.found


def test_a_loss_that_is_not_finite_is_named_when_all_before_it_is(prepared, tmp_path, monkeypatch):
    real = loop.loss_sum
    monkeypatch.setattr(loop, "loss_sum", lambda logits, targets: real(logits, targets) / 0)
    before_steps(monkeypatch, lambda training: setattr(training, "differentiate", lambda *given: math.inf))
    with pytest.raises(NumericalError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.where == "step 3" and "beginning at the loss" in caught.value.found


def test_a_step_that_is_not_finite_is_skipped_counted_told_and_kept(prepared, tmp_path, monkeypatch, corpus):
    state = {}

    def look(training):
        tensors = {
            **training.model.state_dict(),
            **training.optimizer.tensors(),
        }
        state[training.step] = {name: tensor.clone() for name, tensor in tensors.items()}

    spoil_gradients(monkeypatch, {7})
    before_steps(monkeypatch, look)
    events = []
    run = train(prepared, tmp_path / "run", tell=events.append)
    assert state[6].keys() == state[7].keys()
    assert all(torch.equal(tensor, state[7][name]) for name, tensor in state[6].items()), (
        "nothing was learned"
    )
    assert any(not torch.equal(tensor, state[8][name]) for name, tensor in state[7].items())

    skipped = [event for event in events if isinstance(event, Skipped)]
    assert [(event.step, event.in_a_row) for event in skipped] == [(7, 1)]
    assert np.isfinite(skipped[0].loss) and np.isnan(skipped[0].gradient_norm)
    steps = [event.step for event in events if isinstance(event, Stepped)]
    assert steps == [each for each in range(1, STEPS + 1) if each != 7]
    assert run.state(STEPS)["skipped"] == 1 and run.state(STEPS)["skipped_in_a_row"] == 0
    lines = [line for line in run.metrics() if line["event"] == "skipped"]
    assert [(line["step"], line["began"], line["gradient_norm"]) for line in lines] == [
        (7, "the gradient of layers.0.attention.wo.weight", "nan")
    ]
    assert 7 not in [line["step"] for line in run.metrics() if line["event"] == "step"]

    (path,) = run.path.glob("skipped-*")
    with safe_open(path, "np") as file:
        about, tokens, targets = file.metadata(), file.get_tensor("tokens"), file.get_tensor("targets")
    assert about["step"] == "7" and about["batch"] == "6" and about["seed"] == "1"
    assert about["began"] == "the gradient of layers.0.attention.wo.weight"
    expected = Batches(corpus.train_ids, 32, 4, seed=1).batch(6)
    assert (tokens == expected[0]).all() and (targets == expected[1]).all()


def test_a_run_with_skipped_steps_in_it_resumes_to_the_same_bits(prepared, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, {1, 6, 7, 12, 24})
    whole = train(prepared, tmp_path / "whole")
    for stop in (1, 7):  # in a row of them; only there does the count of those in a row matter

        def terminate(event, stop=stop):
            if isinstance(event, Skipped) and event.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        run = train(prepared, tmp_path / f"stopped at {stop}", tell=terminate)
        assert run.steps()[-1] == stop
        with pytest.raises(PulledPlugError):
            api.resume(run.path, tell=stop_at(12, Skipped))
        api.resume(run.path)
        assert final(run) == final(whole)
        told = {"skipped", "skipped_in_a_row"}
        assert {name: run.state(STEPS)[name] for name in told} == {"skipped": 5, "skipped_in_a_row": 1}
        lines = [line["step"] for line in run.metrics() if line["event"] == "skipped"]
        assert lines == [1, 6, 7, 12, 24]


def test_a_resumed_run_remembers_how_many_steps_in_a_row_were_skipped(prepared, tmp_path, monkeypatch):
    def terminate(event):
        if isinstance(event, Skipped) and event.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    spoil_gradients(monkeypatch, {6, 7, 8})
    run = train(prepared, tmp_path / "run", tell=terminate)
    with pytest.raises(NumericalError) as caught:
        api.resume(run.path)
    assert caught.value.where == "step 8"


def test_what_is_due_at_a_skipped_step_waits_for_a_good_one(prepared, tmp_path, monkeypatch):
    events = []
    spoil_gradients(monkeypatch, {8, 12, 13})
    train(prepared, tmp_path / "run", tell=events.append)
    assert [event.step for event in events if isinstance(event, Saved)] == [4, 9, 14, 16, 20, 24]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [14, 24]


def test_of_skipped_steps_the_newest_four_are_kept(prepared, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, {2, 4, 6, 8, 10, 12})
    run = train(prepared, tmp_path / "run")
    kept = sorted(path.name for path in run.path.glob("skipped-*"))
    assert kept == [f"skipped-{step:08d}.safetensors" for step in (6, 8, 10, 12)]


@pytest.mark.parametrize("kind", ["weight", "memory"])
def test_what_is_not_finite_is_never_saved_though_no_loss_shows_it(
    prepared, tmp_path, monkeypatch, kind, corpus
):
    unseen = next(id for id in range(corpus.vocab_size) if id not in set(corpus.train_ids.tolist()))

    def spoil(training):
        if training.step == 9:
            memory = training.optimizer.tensors()
            squares = next(tensor for name, tensor in memory.items() if name.endswith("exp_avg_sq"))
            tensor = training.model.tok_embeddings.weight.data[unseen] if kind == "weight" else squares
            tensor.fill_(float("inf"))

    before_steps(monkeypatch, spoil)
    with pytest.raises(NumericalError) as caught:
        train(
            prepared, tmp_path / "run", evaluations=0, embedding_norm=False
        )  # its norm would show it in the gradient
    assert caught.value.code == "E501" and caught.value.where == "step 12"
    assert "tok_embeddings.weight" in caught.value.found and "not saved" in caught.value.found
    assert Run(tmp_path / "run").steps() == [4, 8]


def test_a_clock_that_jumps_changes_nothing(prepared, tmp_path, monkeypatch, uninterrupted):
    year, looks = 366 * 86400, []

    def jumping():
        looks.append(None)
        return 1.7e9 + year * (-1) ** len(looks)

    monkeypatch.setattr(time, "time", jumping)
    events = []
    with pytest.raises(PulledPlugError):
        train(prepared, tmp_path / "run", tell=lambda event: (events.append(event), stop_at(17)(event)))
    run = Run(tmp_path / "run")
    for age, step in enumerate(run.steps()):  # the newest step is the oldest by its times
        for path in [*run.folder(step).iterdir(), run.folder(step)]:
            os.utime(path, (1e9 - age * year, 1e9 - age * year))
    api.resume(run.path, tell=events.append)
    started = [event.step for event in events if isinstance(event, Started)]
    seconds = [event.seconds for event in events if isinstance(event, Stepped)]
    assert started == [0, 16] and final(run) == final(uninterrupted)
    assert all(0 <= each < 300 for each in seconds)
    assert all(event.tokens_per_second > 0 for event in events if isinstance(event, Stepped))


def test_a_full_disk_in_the_middle_of_a_save_loses_nothing(prepared, tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setattr("babyllama.checkpoint.folder.os.fsync", fails_from(60))
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.code == "E401"
    monkeypatch.undo()
    run = Run(tmp_path / "run")
    assert run.newest_intact()[1] == []
    assert final(api.resume(run.path)) == final(uninterrupted)


def fails_from(number):
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) >= number:
            raise OSError(28, "No space left on device")

    return fsync


def test_metrics_that_cannot_be_written_do_not_stop_training(prepared, tmp_path, monkeypatch):
    def full(self, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "record", full)
    monkeypatch.setattr(Run, "metrics", full)
    events = []
    assert train(prepared, tmp_path / "run", tell=events.append).steps()[-1] == STEPS
    assert events[-1].score is not None


@pytest.mark.parametrize(
    ("rows", "remedy"), [(4, "--set batch_size=2 --set accumulation=2"), (1, "--set context=")]
)
def test_memory_that_runs_out_is_said_with_a_remedy(rows, remedy, prepared, tmp_path, monkeypatch):
    def out_of_memory(self, rate):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    monkeypatch.setattr(loop._Training, "take_step", out_of_memory)
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run", batch_size=rows)
    assert caught.value.code == "E404" and remedy in caught.value.fix


def test_memory_that_runs_out_in_the_last_score_is_no_reason_to_start_again(prepared, tmp_path, monkeypatch):
    def out_of_memory(self):
        raise MemoryError

    monkeypatch.setattr(loop._Training, "finish", out_of_memory)
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.code == "E404" and "babyllama eval" in caught.value.fix
    assert Run(tmp_path / "run").state(STEPS)["done"]


def test_memory_that_runs_out_in_the_last_save_is_not_called_a_complete_run(prepared, tmp_path, monkeypatch):
    def out_of_memory(self, *what):
        raise MemoryError

    monkeypatch.setattr(Run, "save", out_of_memory)
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run", evaluations=0, save_every=0)
    assert caught.value.code == "E404" and "babyllama eval" not in caught.value.fix


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here: not Linux")
def test_the_memory_that_is_told_before_is_about_what_is_used(prepared, tmp_path):
    program = """
import sys
from babyllama import api
from babyllama.train import loop
told = []
def tell(event):
    if isinstance(event, api.Planned):
        told.append(event.forecast.bytes)
options = {"steps": 3, "evaluations": 1, "device": "cpu", "precision": "float32", "threads": 2}
api.train(sys.argv[1], out=sys.argv[2], tell=tell, size="128x4x4", context=64, batch_size=4, **options)
print(told[0] / loop.peak_memory())
"""
    command = [sys.executable, "-c", program, str(prepared), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.75 < float(done.stdout) < 1.3


def test_the_memory_told_is_that_of_this_program(tmp_path, monkeypatch):
    status = tmp_path / "status"
    monkeypatch.setattr(loop, "PROCESS_STATUS", status)
    status.write_text("VmPeak:\t  999 kB\nVmHWM:\t  123 kB\nVmRSS:\t  99 kB\n")
    assert (loop.peak_memory(), loop.held_memory()) == (123 * 1024, 99 * 1024)
    for unusable in ("", "VmHWM:", "VmHWM: many kB"):
        status.write_text(unusable)
        told = loop.peak_memory()
        assert told is None or told > 2**20


def test_changed_data_is_noticed_on_resume(texts, tmp_path):
    with pytest.raises(PulledPlugError):
        train(texts, tmp_path / "run", tell=stop_at(6))
    path = tmp_path / "run" / "data" / "train.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        api.resume(tmp_path / "run")
    assert caught.value.code == "E307"


def test_held_out_text_cut_short_while_training_is_e307_not_a_crash(texts, tmp_path):
    def tell(event):
        if isinstance(event, Stepped) and event.step == 3:
            os.truncate(tmp_path / "run" / "data" / "val.bin", 10)

    with pytest.raises(InputError, match=r"val\.bin") as caught:
        train(texts, tmp_path / "run", tell=tell)
    assert caught.value.code == "E307"


def test_a_state_that_lacks_a_part_is_refused(prepared, tmp_path):
    run = train(prepared, tmp_path / "run", steps=8)
    folder = run.folder(8)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    state = json.loads(files.pop("state.json"))
    del state["seconds"]
    run.save(8, files, state)
    with pytest.raises(BabyLlamaError) as caught:
        api.resume(run.path)
    assert caught.value.code == "E206"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reported_bits_per_byte_are_those_of_the_saved_model(prepared, tmp_path, corpus, precision):
    """In float32, whatever the precision of the run."""
    events = []
    run = train(prepared, tmp_path / "run", tell=events.append, evaluation_tokens=10**9, precision=precision)
    last = next(event for event in reversed(events) if isinstance(event, Evaluated))
    saved = api.load(run.folder(STEPS))
    bos = corpus.tokenizer.bos_id
    after_bos = bos, corpus.tokenizer.byte_lengths(bos)
    lengths = corpus.tokenizer.byte_lengths()
    found = evaluate.score(saved.model, np.asarray(corpus.val_ids), lengths, 32, after_bos=after_bos)
    assert events[-1].score.bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert (last.score.bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)) == (
        precision == "float32"
    )
    assert run.state(STEPS)["bits_per_byte"] == last.score.bits_per_byte
    text = corpus.tokenizer.decode(corpus.val_ids.tolist())
    assert events[-1].score.bytes == len(text.encode()) == corpus.val_bytes


def test_a_plan_survives_being_written_down(prepared, tmp_path):
    events = []
    run = train(prepared, tmp_path / "run", steps=2, tell=events.append)
    plan = api.plan_from_json(json.loads(json.dumps(run.settings["plan"])))
    assert plan == next(event.plan for event in events if isinstance(event, api.Planned))
    assert plan.steps == 2 and plan.context == 32 and plan.model.max_seq_len == 32


def test_a_signal_before_the_first_step_saves_nothing_though_the_time_is_gone(corpus, tmp_path):
    config = Config(vocab_size=corpus.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=16)
    plan = Plan(model=config, context=16, batch_size=2, seconds=1.0, evaluations=0)
    run = Run.create(tmp_path / "run", {})

    def tell(event):
        if isinstance(event, Started):
            os.kill(os.getpid(), signal.SIGINT)

    outcome = loop.train(run, plan, corpus, tell=tell, used=5.0)
    assert outcome == loop.Outcome(0, None, signal.SIGINT) and run.steps() == []


def test_a_signal_before_the_first_step_leaves_a_run_that_can_be_resumed(prepared, tmp_path, uninterrupted):
    events = []

    def tell(event):
        events.append(event)
        if isinstance(event, Started):
            os.kill(os.getpid(), signal.SIGINT)

    run = train(prepared, tmp_path / "run", tell=tell)
    assert events[-1].stopped_by == signal.SIGINT and events[-1].step == 0 and run.steps() == []
    assert final(api.resume(run.path)) == final(uninterrupted)


def test_going_on_from_an_older_step_gives_up_the_later_ones(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    older = run.steps()[0]

    def tell(event):
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGTERM)

    api.resume(run.path, step=older, tell=tell)
    assert run.steps()[-1] == older + 1 and run.newest_intact() == (older + 1, [])


def test_a_step_reached_again_is_saved_though_a_damaged_one_bears_its_number(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    last, before = run.steps()[-1], run.steps()[-2]
    (run.folder(last) / "model.safetensors").write_bytes(b"")

    def tell(event):
        if isinstance(event, Stepped) and event.step == last - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    api.resume(run.path, tell=tell)
    assert before < last - 1 == run.newest_intact()[0]


def test_a_run_may_be_moved_alone_or_together_with_its_data(prepared, tmp_path, uninterrupted):
    (tmp_path / "a").mkdir()
    shutil.copytree(prepared, tmp_path / "a" / "ids")
    with pytest.raises(PulledPlugError):
        train(tmp_path / "a" / "ids", tmp_path / "a" / "run", tell=stop_at(6))
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(PulledPlugError):
        api.resume(tmp_path / "b" / "run", tell=stop_at(11))
    shutil.copytree(tmp_path / "b" / "ids", tmp_path / "a" / "ids")  # back where it was first
    (tmp_path / "b" / "run").rename(tmp_path / "run")
    assert final(api.resume(tmp_path / "run")) == final(uninterrupted)


def test_metrics_tell_of_many_steps(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    assert [line["step"] for line in run.metrics() if line["event"] == "step"] == list(range(1, STEPS + 1))

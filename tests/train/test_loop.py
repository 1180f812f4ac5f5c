"""One loop: the right gradient, the same bits after any interruption, and nothing lost when something breaks."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from babyllama import api
from babyllama.checkpoint.run import Run
from babyllama.data.batches import IGNORE
from babyllama.errors import BabyLlamaError, InputError, MachineError, NumericalError
from babyllama.model import Config, Llama
from babyllama.train import loop
from babyllama.train.loop import Evaluated, Outcome, Saved, Started, Stepped
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


def test_a_run_ends_with_its_time_and_its_schedule_with_it(prepared, tmp_path, monkeypatch):
    now, events = iter(np.arange(0, 1e6, 0.1)), []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))  # 0.1 s a look
    run = api.train(prepared, out=tmp_path / "run", minutes=0.1, tell=events.append, **SMALL)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert 5.8 < steps[-1].seconds <= 6.1
    assert steps[-1].learning_rate < 0.05 * max(step.learning_rate for step in steps)
    assert len([event for event in events if isinstance(event, Evaluated)]) == 8
    assert run.state(run.steps()[-1])["seconds"] == steps[-1].seconds


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
        Run.create(tmp_path / f"{batch_size}", {}), plan, corpus, lambda event: None, None
    )
    training.batches = OneBatch(*rows)
    training.restore(None)
    generator = torch.Generator().manual_seed(0)
    for weight in training.model.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    kept = {}
    training.optimizer.step = lambda: kept.update(
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
    training = loop._Training(Run.create(tmp_path / "run", {}), plan, corpus, lambda event: None, None)
    training.restore(None)
    training.take_step(0.0)
    fresh = Llama(config, seed=5).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in training.model.state_dict().items())


# ---- when something breaks -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_tensor(prepared, tmp_path, monkeypatch):
    def broken(self, rate):
        if self.step == 10:
            self.model.layers[1].feed_forward.w_up.weight.data[0, 0] = float("nan")
        return take_step(self, rate)

    take_step = loop._Training.take_step
    monkeypatch.setattr(loop._Training, "take_step", broken)
    with pytest.raises(NumericalError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.code == "E501" and "step 10" in caught.value.where
    run = Run(tmp_path / "run")
    assert run.steps() == [4, 8] and run.newest_intact()[0] == 8


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
    assert train(prepared, tmp_path / "run").steps()[-1] == STEPS


def test_memory_that_runs_out_is_said_with_a_remedy(prepared, tmp_path, monkeypatch):
    def out_of_memory(self, rate):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    monkeypatch.setattr(loop._Training, "take_step", out_of_memory)
    with pytest.raises(MachineError) as caught:
        train(prepared, tmp_path / "run")
    assert caught.value.code == "E404" and "batch_size=2" in caught.value.fix


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


def test_the_reported_bits_per_byte_are_those_of_the_saved_model(prepared, tmp_path, corpus):
    events = []
    run = train(prepared, tmp_path / "run", tell=events.append, evaluation_tokens=10**9)
    last = next(event for event in reversed(events) if isinstance(event, Evaluated))
    assert events[-1].score.bits_per_byte == pytest.approx(last.score.bits_per_byte, rel=1e-5)
    assert run.state(STEPS)["bits_per_byte"] == last.score.bits_per_byte
    text = corpus.tokenizer.decode(corpus.val_ids.tolist())
    assert events[-1].score.bytes == len(text.encode()) == corpus.val_bytes


def test_a_plan_survives_being_written_down(prepared, tmp_path):
    run = train(prepared, tmp_path / "run", steps=2)
    plan = api.plan_from_json(json.loads(json.dumps(run.settings["plan"])))
    assert plan == replace(plan) and plan.steps == 2 and plan.context == 32 and plan.model.max_seq_len == 32


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

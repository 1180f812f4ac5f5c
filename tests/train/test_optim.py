"""Which parameters decay, how fast they move, and an optimiser that is the same after a stop."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from babyllama import api
from babyllama.checkpoint.run import Run
from babyllama.data.batches import IGNORE, Batches
from babyllama.data.corpus import prepare
from babyllama.errors import InputError
from babyllama.model import Config, Llama
from babyllama.train import loop
from babyllama.train.loop import Evaluated, Stepped
from babyllama.train.optim import adamw, learning_rate, load_optimizer, optimizer_tensors
from babyllama.train.recipe import Plan

MATRICES = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}
GAINS = {"attention_norm", "ffn_norm", "norm"}
VOCABULARY = {"tok_embeddings", "lm_head"}


def plan(tied=False, **settings) -> Plan:
    config = Config(vocab_size=50, dim=16, n_layers=2, n_heads=2, max_seq_len=8, tie_embeddings=tied)
    return Plan(**{"model": config, "context": 8, "batch_size": 2, "steps": 9, **settings})


def ready(plan):
    model = Llama(plan.model, seed=0)
    return model, adamw(model, plan)


def take_step(model, optimizer, seed):
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(tokens).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(tied):
    chosen = plan(tied, weight_decay=0.25)
    model, optimizer = ready(chosen)
    decays = [
        (id(each), group["weight_decay"]) for group in optimizer.param_groups for each in group["params"]
    ]
    assert len(decays) == len(dict(decays)) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        assert kind in MATRICES | GAINS | VOCABULARY
        assert dict(decays)[id(weight)] == (0.25 if kind in MATRICES else 0.0), name


@pytest.mark.parametrize("tied", [False, True])
def test_decay_shrinks_matrices_and_touches_no_gain_and_no_row_of_the_vocabulary(tied):
    model, optimizer = ready(plan(tied, weight_decay=0.5, learning_rate=0.1))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if name.split(".")[-2] in MATRICES else 1.0
        assert torch.allclose(weight, before[name] * shrunk, rtol=1e-6, atol=0), name


def test_the_first_step_moves_every_number_that_has_a_gradient_by_the_learning_rate():
    model, optimizer = ready(plan(weight_decay=0.0, learning_rate=0.01))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, -1e-3)
    optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, before[name] + 0.01, rtol=0, atol=1e-6), name


def test_the_plan_decides_how_long_the_optimiser_remembers():
    model, optimizer = ready(plan(beta1=0.5, beta2=0.75))
    for number in (1.0, 0.0):
        model.norm.weight.grad = torch.full_like(model.norm.weight, number)
        optimizer.step()
    state = optimizer.state[model.norm.weight]
    assert torch.all(state["exp_avg"] == 0.5 * 0.5) and torch.all(state["exp_avg_sq"] == 0.25 * 0.75)


# ---- learning rate -------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.9])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup):
    chosen = plan(learning_rate=0.02, warmup=warmup)
    progress = np.linspace(0, 1, 2001)
    rates = np.array([learning_rate(chosen, float(each)) for each in progress])
    assert rates[-1] == 0.0 and 0 < rates[-2] < 1e-3 * 0.02 / (1 - warmup)
    assert rates.max() == pytest.approx(0.02, rel=0.003) and (rates >= 0).all() and (rates <= 0.02).all()
    peak = int(rates.argmax())
    assert abs(progress[peak] - warmup) <= 0.002
    rising, falling = rates[: peak + 1], rates[peak + 5 :]
    assert (np.diff(rising) > 0).all() and (np.diff(falling) < 0).all()
    assert np.allclose(np.diff(falling, 2), 0, atol=1e-9), "a straight line"


def test_the_first_step_of_a_run_already_learns_and_without_warm_up_at_full_rate():
    assert 0 < learning_rate(plan(warmup=0.05), 0.0) < 0.1 * plan().learning_rate
    assert learning_rate(plan(warmup=0.0), 0.0) == plan().learning_rate


def test_a_run_that_goes_over_its_time_never_learns_backwards():
    assert [learning_rate(plan(), each) for each in (1.0, 1.001, 1.5, 9.0)] == [0.0] * 4


# ---- to and from files ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_an_optimiser_given_back_its_memory_goes_on_with_the_same_bits(tied):
    chosen = plan(tied, learning_rate=0.01)
    model, optimizer = ready(chosen)
    for seed in range(3):
        take_step(model, optimizer, seed)
    written = save(optimizer_tensors(model, optimizer))
    again = Llama(chosen.model, seed=None)
    again.load_state_dict(model.state_dict())
    restored = adamw(again, chosen)
    load_optimizer(again, restored, load(written))
    assert save(optimizer_tensors(again, restored)) == written
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
        take_step(again, restored, seed)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert save(optimizer_tensors(again, restored)) == save(optimizer_tensors(model, optimizer))


def test_the_memory_of_every_parameter_is_written_by_its_name():
    model, optimizer = ready(plan())
    take_step(model, optimizer, 0)
    names = {name for name, _ in model.named_parameters()}
    assert optimizer_tensors(model, optimizer).keys() == {
        f"{name}.{kind}" for name in names for kind in ("exp_avg", "exp_avg_sq", "step")
    }


def test_a_missing_part_of_the_memory_is_a_key_error():
    model, optimizer = ready(plan())
    take_step(model, optimizer, 0)
    tensors = optimizer_tensors(model, optimizer)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(KeyError, match=name.replace(".", r"\.")):
            load_optimizer(model, adamw(model, plan()), rest)


# ---- in the loop ---------------------------------------------------------------------------------


def training(corpus, folder, **settings) -> loop._Training:
    config = Config(vocab_size=corpus.vocab_size, dim=16, n_layers=1, n_heads=1, max_seq_len=16)
    chosen = Plan(**{"model": config, "context": 16, "batch_size": 3, "steps": 9, **settings})
    made = loop._Training(Run.create(folder, {}), chosen, corpus, lambda event: None, None)
    made.restore(None)
    return made


def train(text, out, tell=lambda event: None, **settings) -> Run:
    small = {
        "size": "100k",
        "context": 32,
        "batch_size": 2,
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
    }
    return api.train(
        text, out=out, tell=tell, **small, **{"steps": 6, "save_every": 2, "evaluations": 3, **settings}
    )


def with_another_state(run: Run, step: int, **changes) -> None:
    """Save `step` again with other values in its state."""
    files = {path.name: path.read_bytes() for path in run.folder(step).iterdir()}
    kept = {name: data for name, data in files.items() if name not in ("manifest.json", "state.json")}
    run.save(step, kept, {**run.state(step), **changes})


def test_a_gradient_is_clipped_to_its_norm_and_0_clips_nothing(corpus, tmp_path):
    found = {}
    for clip in (0.0, 0.01, 1e9):
        made = training(corpus, tmp_path / str(clip), clip=clip)
        generator = torch.Generator().manual_seed(0)
        for weight in made.model.parameters():
            weight.data.normal_(0, 0.3, generator=generator)
        made.optimizer.step = lambda: None
        made.optimizer.zero_grad = lambda: None
        _, norm = made.take_step(0.1)
        squares = sum(float(weight.grad.double().square().sum()) for weight in made.model.parameters())
        found[clip] = norm, math.sqrt(squares)
    told, whole = found[0.0]
    assert whole > 0.1 and told == pytest.approx(whole, rel=1e-5)
    assert found[1e9] == pytest.approx(found[0.0], rel=1e-5)
    assert found[0.01] == pytest.approx((whole, 0.01), rel=1e-3), "what is told is the norm before clipping"


def test_the_loss_of_a_step_is_the_mean_over_the_targets_that_are_there(corpus, tmp_path):
    made = training(corpus, tmp_path / "run")
    tokens, targets = made.batches.batch(0)
    targets[:, 2:] = IGNORE
    made.batches.batch = lambda step: (tokens, targets)
    loss, _ = made.take_step(0.0)
    with torch.no_grad():
        known = made.model(torch.from_numpy(tokens))[:, :2].log_softmax(-1)
    expected = -known.gather(-1, torch.from_numpy(targets[:, :2, None])).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert loss == pytest.approx(math.log(corpus.vocab_size), rel=0.05)


def test_the_seed_decides_the_first_weights_and_the_rows(corpus, tmp_path):
    made = training(corpus, tmp_path / "run", seed=3, accumulation=2)
    expected = Llama(made.plan.model, seed=3).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in made.model.state_dict().items())
    rows = Batches(corpus.train_ids, 16, 6, seed=3).batch(4)
    assert all(np.array_equal(*each) for each in zip(made.batches.batch(4), rows, strict=True))


def test_each_step_sees_the_rows_of_its_number(prepared, tmp_path, monkeypatch):
    seen, batch = [], Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, step: seen.append(step) or batch(self, step))
    run = train(prepared, tmp_path / "run")
    assert seen == [0, 1, 2, 3, 4, 5]
    api.resume(run.path, step=4)
    assert seen[6:] == [4, 5]


def test_a_resumed_run_remembers_its_seconds_and_its_best_score(prepared, tmp_path):
    run, events = train(prepared, tmp_path / "run"), []
    with_another_state(run, 4, seconds=1000.0, best_bits_per_byte=1e-3)
    api.resume(run.path, step=4, tell=events.append)
    seconds = [event.seconds for event in events if isinstance(event, Stepped)]
    assert 1000 < seconds[0] < seconds[1] < 1100
    assert run.state(6)["seconds"] == seconds[1] and run.state(6)["best_bits_per_byte"] == 1e-3
    best = [event.best for event in events if isinstance(event, Evaluated)]
    assert best and not any(best)


def test_metrics_tell_of_each_step_once_though_it_was_taken_twice(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    before = [(line["event"], line["step"]) for line in run.metrics()]
    api.resume(run.path, step=4)
    after = [(line["event"], line["step"]) for line in run.metrics()]
    assert after == before and len(set(after)) == len(after) > 6


def test_a_run_does_not_go_on_with_another_text_prepared_in_the_same_place(texts, tmp_path):
    prepare(texts, tmp_path / "ids", vocab_size=300)
    run = train(tmp_path / "ids", tmp_path / "run")
    prepare(texts, tmp_path / "ids", vocab_size=300, seed=1, overwrite=True)
    with pytest.raises(InputError) as caught:
        api.resume(run.path)
    assert caught.value.code == "E307"


def test_a_step_asked_for_whose_memory_is_damaged_by_one_bit_is_refused(prepared, tmp_path):
    run = train(prepared, tmp_path / "run")
    path = run.folder(4) / "optim.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        api.resume(run.path, step=4)
    assert caught.value.code == "E204"


def test_a_saved_step_without_all_of_the_memory_is_not_gone_on_from(prepared, tmp_path):
    run = train(prepared, tmp_path / "run", steps=2)
    path = run.folder(2) / "optim.safetensors"
    tensors = load(path.read_bytes())
    del tensors["norm.weight.exp_avg_sq"]
    path.write_bytes(save(tensors))
    with_another_state(run, 2)
    with pytest.raises(InputError, match=r"norm\.weight\.exp_avg_sq") as caught:
        api.resume(run.path)
    assert caught.value.code == "E206"

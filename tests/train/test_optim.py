"""Which parameters decay, how fast they move, and an optimiser that is the same after a stop."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from babyllama import api
from babyllama.checkpoint.run import Run
from babyllama.errors import InputError
from babyllama.model import Config, Llama
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


def test_a_saved_step_without_all_of_the_memory_is_not_gone_on_from(prepared, tmp_path):
    run = api.train(
        prepared, out=tmp_path / "run", steps=2, size="100k", context=32, batch_size=2, threads=1,
        device="cpu", precision="float32",
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in run.folder(2).iterdir() if path.name != "manifest.json"}
    tensors = load(files["optim.safetensors"])
    del tensors["norm.weight.exp_avg_sq"]
    files["optim.safetensors"] = save(tensors)
    state = run.state(2)
    Run(run.path).save(2, {name: data for name, data in files.items() if name != "state.json"}, state)
    with pytest.raises(InputError, match=r"norm\.weight\.exp_avg_sq") as caught:
        api.resume(run.path)
    assert caught.value.code == "E206"

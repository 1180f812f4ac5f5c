"""Which parameters decay, how far they move, and an optimiser that is the same after a stop."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from weights import randomised

from babyllama import api
from babyllama.checkpoint.run import Run
from babyllama.data.batches import IGNORE, Batches
from babyllama.data.corpus import prepare
from babyllama.errors import InputError
from babyllama.model import Config, Llama
from babyllama.train import loop
from babyllama.train.loop import Evaluated, Stepped
from babyllama.train.optim import (
    NORMUON_BETA,
    POLYNOMIALS,
    Average,
    Muon,
    Optimizer,
    agreeing,
    by_role,
    even_rows,
    orthogonalize,
    schedule,
)
from babyllama.train.recipe import Plan

MATRICES = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}
GAINS = {"attention_norm", "ffn_norm", "norm"}
VOCABULARY = {"tok_embeddings", "lm_head"}
MUON = {"optimizer": "muon", "embedding_rate": 0.02, "head_rate": 0.01, "gain_rate": 0.005}
KINDS = {
    "adamw": {},
    "adamw, cautious": {"cautious": True},
    "muon": MUON,
    "normuon, cautious, falling": {**MUON, "normuon": True, "cautious": True, "weight_decay_falls": True},
    "muon in bfloat16": {**MUON, "precision": "bfloat16"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
PEAK = 0.0  # the progress at which a plan without warm-up has its peak rates


def plan(tied=False, **settings) -> Plan:
    config = Config(vocab_size=50, dim=16, n_layers=2, n_heads=2, max_seq_len=8, tie_embeddings=tied)
    return Plan(**{"model": config, "context": 8, "batch_size": 2, "steps": 9, "warmup": 0.0, **settings})


def ready(plan):
    model = Llama(plan.model, seed=0)
    return model, Optimizer(model, plan)


def backward(model, seed):
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(tokens).square().sum().backward()


def take_step(model, optimizer, seed):
    backward(model, seed)
    optimizer.step(seed / 9)
    model.zero_grad()


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polar_factor(matrix):
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


# ---- roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_each_parameter_has_one_role(tied):
    model = Llama(plan(tied).model)
    roles = by_role(model)
    names = [name for members in roles.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(members[name] is model.get_parameter(name) for members in roles.values() for name in members)
    assert [*roles["embedding"]] == ["tok_embeddings.weight"]
    assert [*roles["head"]] == ([] if tied else ["lm_head.weight"]), "a tied one is in the embedding"
    assert {name.split(".")[-2] for name in roles["matrix"]} == MATRICES and len(roles["matrix"]) == 2 * 7
    assert {name.split(".")[-2] for name in roles["gain"]} == GAINS and len(roles["gain"]) == 2 * 2 + 1


@pytest.mark.parametrize("tied", [False, True])
@every_kind
def test_each_parameter_is_in_one_group_and_only_matrices_decay(tied, kind):
    model, optimizer = ready(plan(tied, **{**KINDS[kind], "weight_decay": 0.25, "cautious": False}))
    give_gradients(model)
    optimizer.step(PEAK)
    decays = [
        (id(each), group["weight_decay"])
        for group in optimizer.adamw.param_groups
        for each in group["params"]
    ]
    by_muon = [
        id(each) for batch in (optimizer.muon.batches if optimizer.muon else []) for each in batch.values()
    ]
    assert len(decays) + len(by_muon) == len({*dict(decays), *by_muon}) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        part = name.split(".")[-2]
        assert part in MATRICES | GAINS | VOCABULARY
        if part in MATRICES and optimizer.plan.optimizer == "muon":
            assert id(weight) in by_muon, name
        else:
            assert dict(decays)[id(weight)] == (0.25 if part in MATRICES else 0.0), name


@pytest.mark.parametrize("tied", [False, True])
@every_kind
def test_decay_shrinks_matrices_and_touches_no_gain_and_no_row_of_the_vocabulary(tied, kind):
    model, optimizer = ready(plan(tied, **{**KINDS[kind], "weight_decay": 0.5, "learning_rate": 0.1}))
    before = weights_of(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(PEAK)
    for name, weight in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if name.split(".")[-2] in MATRICES else 1.0
        assert torch.allclose(weight, before[name] * shrunk, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("falls", [False, True])
@every_kind
def test_what_decay_takes_off_is_decay_times_rate_and_may_fall_twice(falls, kind):
    settings = {**KINDS[kind], "weight_decay": 0.5, "learning_rate": 0.1, "weight_decay_falls": falls}
    model, optimizer = ready(plan(**settings))
    before = weights_of(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(0.75)
    shrunk = 1 - 0.1 * 0.25 * 0.5 * (0.25 if falls else 1)
    for name, weight in by_role(model)["matrix"].items():
        assert torch.allclose(weight, before[name] * shrunk, rtol=1e-6, atol=0), name


@every_kind
def test_each_role_moves_by_its_own_rate_and_the_schedule(kind):
    own = {"embedding_rate": 0.02, "head_rate": 0.03, "gain_rate": 0.05}
    model, optimizer = ready(plan(**{**KINDS[kind], **own, "weight_decay": 0.0, "learning_rate": 0.01}))
    before = weights_of(model)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, -1e-3)
    optimizer.step(0.5)
    assert optimizer.rate(0.5) == 0.005
    peaks = {"embedding": 0.02, "head": 0.03, "gain": 0.05}
    if not optimizer.muon:
        peaks["matrix"] = 0.01
    for role, peak in peaks.items():
        for name, weight in by_role(model)[role].items():
            assert torch.allclose(weight, before[name] + peak / 2, rtol=0, atol=1e-6), name


def test_a_role_without_a_rate_of_its_own_has_that_of_the_matrices():
    model, optimizer = ready(plan(weight_decay=0.0, learning_rate=0.01))
    before = weights_of(model)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, -1e-3)
    optimizer.step(PEAK)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, before[name] + 0.01, rtol=0, atol=1e-6), name


# ---- AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cautious", [False, True])
def test_adamw_is_the_written_out_one(cautious):
    settings = {"learning_rate": 0.01, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "warmup": 0.4}
    model, optimizer = ready(plan(cautious=cautious, **settings))
    expected = {name: weight.double() for name, weight in weights_of(model).items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for t in range(1, 6):
        give_gradients(model, seed=t)
        rate = 0.01 * schedule(optimizer.plan, (t - 1) / 9)
        for name, weight in model.named_parameters():
            first[name] = 0.8 * first[name] + 0.2 * weight.grad.double()
            second[name] = 0.9 * second[name] + 0.1 * weight.grad.double() ** 2
            update = first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-10)
            decay = 0.3 if name.split(".")[-2] in MATRICES else 0.0
            decays = (update * expected[name] >= 0) if cautious else 1.0
            expected[name] = expected[name] - rate * (update + decay * decays * expected[name])
        optimizer.step((t - 1) / 9)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.double(), expected[name], rtol=0, atol=2e-7), name


def test_the_plan_decides_how_long_the_optimiser_remembers():
    model, optimizer = ready(plan(beta1=0.5, beta2=0.75))
    for number in (1.0, 0.0):
        model.norm.weight.grad = torch.full_like(model.norm.weight, number)
        optimizer.step(PEAK)
    state = optimizer.tensors()
    assert torch.all(state["norm.weight.exp_avg"] == 0.5 * 0.5)
    assert torch.all(state["norm.weight.exp_avg_sq"] == 0.25 * 0.75)


def test_decay_is_cautious_where_update_and_weight_agree_by_hand():
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, 0.0])
    update = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.0, 0.1])
    assert agreeing(weight, update).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{}, {**MUON, "momentum": 0.0}])
def test_cautious_decay_takes_off_only_where_the_step_goes_to_zero_too(settings):
    moved = {}
    for cautious in (False, True):
        for decay in (0.0, 0.5):
            model, optimizer = ready(
                plan(**settings, learning_rate=0.1, weight_decay=decay, cautious=cautious)
            )
            give_gradients(model)
            optimizer.step(PEAK)
            moved[cautious, decay] = weights_of(model)
    before, shares = weights_of(Llama(plan().model, seed=0)), []
    for name, old in before.items():
        if name.split(".")[-2] not in MATRICES or not old.any():
            continue
        update = old - moved[False, 0.0][name]
        agree = update * old >= 0
        taken = moved[True, 0.0][name] - moved[True, 0.5][name]
        assert torch.allclose(taken, 0.1 * 0.5 * old * agree, rtol=0, atol=1e-6), name
        assert torch.allclose(
            moved[False, 0.0][name] - moved[False, 0.5][name], 0.05 * old, rtol=0, atol=1e-6
        )
        shares.append(agree.float().mean())
    assert min(shares) > 0.3 and max(shares) < 0.7


# ---- Muon ----------------------------------------------------------------------------------------

SHAPES = [(16, 16), (64, 24), (24, 64), (3, 40), (40, 3), (1, 7)]


BANDS = {3: (0.01, 0.70, 1.27), 4: (0.003, 0.77, 1.20), 5: (0.003, 0.86, 1.13)}  # from where, to where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("polynomials", BANDS)
def test_singular_values_become_nearly_one_and_directions_stay(polynomials, shape, dtype):
    """Singular values of a matrix of norm 1, as small as promised, end in the band; U and V are those of the matrix."""
    least, lowest, highest = BANDS[polynomials]
    rank = min(shape)
    u = torch.linalg.qr(random(shape[0], rank))[0]
    v = torch.linalg.qr(random(shape[1], rank, seed=1))[0]
    values = torch.logspace(math.log10(least), 0, rank) if rank > 1 else torch.ones(1)
    values = (values / values.norm()).clamp(min=least)
    matrix = 1e-5 * (u * values) @ v.mT  # norm about 1e-5: only directions count
    result = orthogonalize(matrix[None], polynomials, dtype)[0]
    assert result.dtype == torch.float32
    slack = 0.0 if dtype == torch.float32 else 0.03
    found = torch.linalg.svdvals(result)
    if slack:  # rounding blurs the smallest directions: those above it keep the band
        found = found[: max(1, rank // 2)]
    assert found.min() >= lowest - slack and found.max() <= highest + slack
    if dtype == torch.float32:
        assert torch.linalg.matrix_norm(result - polar_factor(matrix), 2) <= 1.01 * (1 - lowest)


@pytest.mark.parametrize("polynomials", POLYNOMIALS)
def test_singular_values_go_through_the_polynomials(polynomials):
    values = torch.logspace(-4, 0, 30, dtype=torch.float64)
    u, v = (torch.linalg.qr(random(30, 30, seed=seed).double())[0] for seed in (0, 1))
    matrix = (u * values) @ v.mT
    x = values / (1.01 * values.square().sum().sqrt())
    assert len(POLYNOMIALS[polynomials]) == polynomials
    for a, b, c in POLYNOMIALS[polynomials]:
        x = a * x + b * x**3 + c * x**5
    expected = (u * x) @ v.mT
    found = orthogonalize(matrix[None].float(), polynomials)[0].double()
    assert torch.allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("polynomials", "least"), [(3, 0.01), (4, 0.003)])
def test_no_other_polynomials_of_that_degree_come_nearer_to_one(polynomials, least):
    """What marks the best of degree 5: it is as far from 1, now above and now below, at four places of its interval."""
    low, high = least, 1.0
    for number, (a, b, c) in enumerate(POLYNOMIALS[polynomials]):
        a, b, c = a * 1.01, b * 1.01**3, c * 1.01**5
        x = np.geomspace(low, high, 200_001)
        off = a * x + b * x**3 + c * x**5 - 1
        most = np.abs(off).max()
        signs = [np.sign(each) for each in off if abs(each) > most * (1 - 2e-3)]
        turns = 1 + sum(one != other for one, other in itertools.pairwise(signs))
        assert turns == 4 and signs[0] < 0, (number, turns)
        low, high = 1 - most, 1 + most
    assert high == pytest.approx(BANDS[polynomials][2], abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_orthogonalised_as_its_matrices_one_by_one(shape, dtype):
    batch = random(5, *shape) * torch.logspace(-6, 6, 5)[:, None, None]
    batch[2] = 0.0
    alone = torch.cat([orthogonalize(each[None], dtype=dtype) for each in batch])
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(orthogonalize(batch, dtype=dtype), alone, rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-22, 1e-15, 1e-9, 1.0, 1e9, 1e18])
def test_no_gradient_is_too_small_or_too_large_and_zero_stays_zero(size, dtype):
    result = orthogonalize(size * random(2, 12, 8), dtype=dtype)
    assert result.isfinite().all() and torch.linalg.svdvals(result).max() < 1.16
    if size == 0 or size >= 1e-22:
        assert bool(result.any()) == (size > 0)
    if size >= 1e-9:
        usual = orthogonalize(random(2, 12, 8), dtype=dtype)
        assert torch.allclose(result, usual, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


def muon_alone(weight, **settings):
    """Muon over one matrix. Returns the step as a function of the gradient."""
    settings = {**MUON, "weight_decay": 0.0, **settings}
    muon = Muon({"w": weight}, plan(**settings))

    def step(gradient):
        weight.grad = gradient.clone()
        muon.step(0.1, muon.plan.weight_decay)

    return step


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_nesterov_momentum_then_the_nearest_orthogonal_matrix(shape):
    """Against float64 and an SVD; the tolerance is that of the five polynomials."""
    weight, momentum = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    step, expected = muon_alone(weight, momentum=0.9), torch.zeros(shape, dtype=torch.float64)
    for t in range(4):
        gradient = random(*shape, seed=t) + (4 * torch.eye(16) if shape == (16, 16) else 0)
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        expected -= (
            0.1 * max(1, shape[0] / shape[1]) ** 0.5 * polar_factor(0.1 * gradient.double() + 0.9 * momentum)
        )
        step(gradient)
    assert (weight - expected).norm() <= 0.14 * expected.norm()


def test_the_newest_gradient_counts_by_nesterov():
    """Two gradients on two axes that do not touch: their shares in the update's direction are told by the first."""
    first, second = torch.zeros(2, 2), torch.zeros(2, 2)
    first[0, 0] = second[1, 1] = 1.0
    weight = torch.zeros(2, 2)
    step = muon_alone(weight, momentum=0.5)
    step(first)
    before = weight.clone()
    step(second)
    # momentum (1/4, 1/2), looked ahead: 1/2 · (1/4, 1/2) + 1/2 · (0, 1) = (1/8, 3/4)
    looked_ahead = torch.diag(torch.tensor([1 / 8, 3 / 4]))
    assert torch.allclose(before - weight, 0.1 * orthogonalize(looked_ahead[None])[0], atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3, 99])
def test_how_many_threads_share_the_matrices_changes_roundings_only(threads):
    found = []
    for settings in ({**MUON, "normuon": True}, {**MUON, "normuon": True, "threads": threads}):
        model, optimizer = ready(plan(**settings))
        for seed in range(3):
            take_step(model, optimizer, seed)
        found.append(model.state_dict() | optimizer.tensors())
    one, several = found
    assert one.keys() == several.keys()
    assert all(torch.allclose(one[name], several[name], rtol=1e-4, atol=1e-5) for name in one)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_precision_of_the_plan(precision):
    weight, gradient = torch.zeros(12, 8), random(12, 8)
    muon_alone(weight, precision=precision)(gradient)
    expected = {
        name: orthogonalize(gradient[None], dtype=getattr(torch, name))[0] for name in ("float32", "bfloat16")
    }
    assert torch.allclose(weight, -0.1 * 1.5**0.5 * expected[precision], rtol=0, atol=1e-6)
    assert not torch.allclose(expected["float32"], expected["bfloat16"], rtol=0, atol=1e-4), "it can be told"


@pytest.mark.parametrize("name", ["wq", "wk", "wv", "wo", "w_gate"])
@pytest.mark.parametrize("polynomials", BANDS)
def test_each_head_is_orthogonalised_by_itself(name, polynomials):
    """Heads of 4 numbers: three rows of blocks in wq, two in wk and wv, three columns of blocks in wo."""
    shape = {"wk": (8, 20), "wv": (8, 20), "wo": (20, 12)}.get(name, (12, 20))
    model = Config(vocab_size=8, dim=20, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=4, max_seq_len=8)
    chosen = plan(**{**MUON, "weight_decay": 0.0, "muon_by_head": True, "muon_polynomials": polynomials})
    weights = {f"layers.{i}.attention.{name}.weight": torch.zeros(shape) for i in range(3)}
    muon = Muon(weights, replace(chosen, model=model))
    for seed, weight in enumerate(weights.values()):
        weight.grad = random(*shape, seed=seed)
    muon.step(0.1, 0.0)
    for weight in weights.values():
        if name == "wo":
            parts = [weight.grad[:, at : at + 4] for at in range(0, 12, 4)]
            expected = torch.cat([orthogonalize(part[None], polynomials)[0] for part in parts], dim=1)
        elif name == "w_gate":
            expected = orthogonalize(weight.grad[None], polynomials)[0]
        else:
            parts = weight.grad.split(4)
            expected = torch.cat([orthogonalize(part[None], polynomials)[0] for part in parts])
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        assert torch.allclose(weight, -0.1 * scale * expected, rtol=0, atol=1e-5)


def test_heads_of_rows_and_of_columns_are_told_apart():
    """Two matrices of one shape."""
    chosen = plan(**{**MUON, "weight_decay": 0.0, "muon_by_head": True})
    wq, wo = torch.zeros(16, 16), torch.zeros(16, 16)
    muon = Muon({"layers.0.attention.wq.weight": wq, "layers.0.attention.wo.weight": wo}, chosen)
    wq.grad = random(16, 16)
    wo.grad = wq.grad.mT.clone()
    muon.step(0.1, 0.0)
    assert torch.allclose(wq, wo.mT, rtol=0, atol=1e-5)
    whole = orthogonalize(wq.grad[None])[0]
    assert not torch.allclose(wq, -0.1 * whole, rtol=0, atol=1e-3), "it can be told"


def test_rows_become_even_over_time_and_the_whole_keeps_its_norm():
    first, second = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)
    for t in range(4):
        update = random(2, 3, 5, seed=t) * torch.tensor([0.01, 1.0, 100.0])[:, None]
        result = even_rows(update, first)
        second = NORMUON_BETA * second + (1 - NORMUON_BETA) * update.square().mean(-1, keepdim=True)
        assert torch.allclose(first, second, rtol=1e-5)
        expected = update / second.sqrt()
        for matrix, whole, by_hand in zip(result, update, expected, strict=True):
            assert torch.allclose(matrix.norm(), whole.norm(), rtol=1e-5)
            assert torch.allclose(matrix / matrix.norm(), by_hand / by_hand.norm(), rtol=1e-4, atol=1e-7)
    lengths = result.norm(dim=-1)
    assert lengths.max() < 3 * lengths.min(), "where one was 10,000 times another"


def test_rows_without_an_update_stay_where_they_are():
    second = torch.zeros(2, 3, 1)
    assert not even_rows(torch.zeros(2, 3, 4), second).any() and not second.any()
    update = random(2, 3, 4)
    update[:, 1] = 0.0
    result = even_rows(update, second)
    assert result.isfinite().all() and not result[:, 1].any() and result[:, 0].any()


@every_kind
def test_a_gradient_of_zeros_moves_nothing(kind):
    model, optimizer = ready(plan(**{**KINDS[kind], "weight_decay": 0.0}))
    before = weights_of(model)
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step(PEAK)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@every_kind
def test_a_model_that_begins_with_blocks_that_do_nothing_learns(kind):
    """wo and w_down begin at 0, so the first gradients of all other matrices are exactly 0."""
    model, optimizer = ready(plan(**KINDS[kind], learning_rate=0.01))
    before = weights_of(model)
    backward(model, 0)
    assert (
        not model.layers[0].attention.wq.weight.grad.any() and model.layers[0].attention.wo.weight.grad.any()
    )
    model.zero_grad()
    for seed in range(3):
        take_step(model, optimizer, seed)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all() and not torch.equal(weight, before[name]), name
    assert all(tensor.isfinite().all() for tensor in optimizer.tensors().values())


# ---- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.9])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup):
    chosen = plan(learning_rate=0.02, warmup=warmup)
    progress = np.linspace(0, 1, 2001)
    rates = np.array([chosen.learning_rate * schedule(chosen, float(each)) for each in progress])
    assert rates[-1] == 0.0 and 0 < rates[-2] < 1e-3 * 0.02 / (1 - warmup)
    assert rates.max() == pytest.approx(0.02, rel=0.003) and (rates >= 0).all() and (rates <= 0.02).all()
    peak = int(rates.argmax())
    assert abs(progress[peak] - warmup) <= 0.002
    rising, falling = rates[: peak + 1], rates[peak + 5 :]
    assert (np.diff(rising) > 0).all() and (np.diff(falling) < 0).all()
    assert np.allclose(np.diff(falling, 2), 0, atol=1e-9), "a straight line"


def test_the_first_step_of_a_run_already_learns_and_without_warm_up_at_full_rate():
    assert 0 < schedule(plan(warmup=0.05), 0.0) < 0.1
    assert schedule(plan(warmup=0.0), 0.0) == 1.0


def test_a_run_that_goes_over_its_time_never_learns_backwards():
    assert [schedule(plan(), each) for each in (1.0, 1.001, 1.5, 9.0)] == [0.0] * 4


HALF_COSINE = (1 + math.cos(math.pi / 4)) / 2  # a quarter of the way down


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("linear", {0.099: 0.5, 0.2: 1.0, 0.4: 0.1 + 0.9 * 0.75, 0.6: 0.55, 0.8: 0.1 + 0.9 * 0.25}),
        ("wsd", {0.099: 0.5, 0.2: 1.0, 0.5: 1.0, 0.75: 1.0, 0.875: 0.55, 0.95: 0.1 + 0.9 * 0.2}),
        (
            "cosine",
            {0.099: 0.5, 0.2: 1.0, 0.4: 0.1 + 0.9 * HALF_COSINE, 0.6: 0.55, 0.8: 1 - 0.9 * HALF_COSINE},
        ),
    ],
)
def test_a_schedule_goes_through_points_worked_out_by_hand(kind, points):
    chosen = plan(schedule=kind, warmup=0.2, decay=0.25, final=0.1)
    for progress, factor in points.items():
        assert schedule(chosen, progress) == pytest.approx(factor, abs=1e-12), progress


@pytest.mark.parametrize("kind", ["linear", "wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
def test_a_schedule_has_no_jump_and_ends_exactly_where_it_should(kind, warmup, final):
    chosen = plan(schedule=kind, warmup=warmup, decay=0.8, final=final)
    factors = np.array([schedule(chosen, each / 10_000) for each in range(10_001)])
    assert factors.max() <= 1.0 and factors.min() >= 0 and factors[0] > 0
    steepest = max(1 / warmup if warmup else 0, math.pi / 2 / (1 - warmup), 1 / 0.8)
    assert np.abs(np.diff(factors)).max() <= 1.001 * steepest / 10_000
    assert [schedule(chosen, each) for each in (1.0, 1.2, 7.0)] == [final] * 3
    assert factors.max() == 1.0 or warmup == 0.3  # warm-up and decay of 1.1 of the run meet below it


# ---- to and from files ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
@every_kind
def test_an_optimiser_given_back_its_memory_goes_on_with_the_same_bits(tied, kind, steps):
    chosen = plan(tied, learning_rate=0.01, **KINDS[kind])
    model, optimizer = ready(chosen)
    for seed in range(steps):
        take_step(model, optimizer, seed)
    written = save(optimizer.tensors())
    again = Llama(chosen.model, seed=None)
    again.load_state_dict(model.state_dict())
    restored = Optimizer(again, chosen)
    restored.load(load(written))
    assert save(restored.tensors()) == written
    for seed in range(steps, steps + 3):
        take_step(model, optimizer, seed)
        take_step(again, restored, seed)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert save(restored.tensors()) == save(optimizer.tensors()) != written


def test_what_was_given_back_is_a_copy():
    model, optimizer = ready(plan())
    take_step(model, optimizer, 0)
    other, restored = ready(plan())
    restored.load(optimizer.tensors())
    before = save(optimizer.tensors())
    take_step(other, restored, 1)
    assert save(optimizer.tensors()) == before


@every_kind
def test_the_memory_of_every_parameter_is_written_by_its_name(kind):
    model, optimizer = ready(plan(**KINDS[kind]))
    expected = set()
    for role, members in by_role(model).items():
        remembered = ["step", "exp_avg", "exp_avg_sq"]
        if role == "matrix" and optimizer.muon:
            remembered = ["momentum", *(["second_moment"] if optimizer.plan.normuon else [])]
        expected |= {f"{name}.{what}" for name in members for what in remembered}
    assert optimizer.tensors().keys() == expected
    take_step(model, optimizer, 0)
    assert optimizer.tensors().keys() == expected


@every_kind
def test_a_missing_part_of_the_memory_is_a_key_error(kind):
    model, optimizer = ready(plan(**KINDS[kind]))
    take_step(model, optimizer, 0)
    tensors = optimizer.tensors()
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(KeyError, match=name.replace(".", r"\.")):
            Optimizer(model, optimizer.plan).load(rest)


# ---- average -------------------------------------------------------------------------------------


def set_all(model, number):
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(number)


def test_an_average_counts_what_is_one_half_life_older_half():
    times, numbers, half_life = [0.01, 0.03, 0.1, 0.4, 0.41, 1.0], [3.0, -2.0, 5.0, 1.0, 7.0, 4.0], 0.2
    model = Llama(plan().model)
    average = Average(model, plan(average=half_life))
    for time, number in zip(times, numbers, strict=True):
        set_all(model, number)
        average.update(model, time)
        # number i was reached at times[i], and stands for the stretch that led to it
        counts = [
            2 ** (-(time - end) / half_life) - 2 ** (-(time - begin) / half_life)
            for begin, end in zip([0.0, *times], times, strict=False)
            if end <= time
        ]
        expected = np.dot(counts, numbers[: len(counts)]) / (1 - 2 ** (-time / half_life))
        assert sum(counts) == pytest.approx(1 - 2 ** (-time / half_life))
        for name, mean in average.weights().items():
            assert torch.allclose(mean, torch.tensor(expected).float(), rtol=1e-5), name
    assert average.weights().keys() == model.state_dict().keys()


def test_an_average_does_not_depend_on_how_many_steps_a_stretch_has():
    model, results = Llama(plan().model), []
    for steps in (10, 1000):
        average = Average(model, plan(average=0.1))
        for step in range(1, steps + 1):
            set_all(model, 1.0 if step <= 0.8 * steps else 2.0)
            average.update(model, step / steps)
        results.append(float(average.weights()["norm.weight"][0]))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0] == pytest.approx(2 - 1 / 4, rel=1e-3), "two half-lives after the change"


def test_an_average_begins_with_the_first_weights_and_forgets_the_untrained_ones():
    model = Llama(plan().model, seed=0)
    average = Average(model, plan(average=0.5))
    assert all(torch.equal(mean, model.state_dict()[name]) for name, mean in average.weights().items())
    give_gradients(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(weight.grad)
    average.update(model, 0.0)
    assert not torch.equal(average.weights()["lm_head.weight"], model.lm_head.weight), "no time has passed"
    average.update(model, 1e-4)
    assert all(torch.allclose(mean, model.state_dict()[name]) for name, mean in average.weights().items())


def test_an_average_given_back_goes_on_with_the_same_bits():
    chosen = plan(average=0.3, learning_rate=0.01)
    model, optimizer = ready(chosen)
    average, end = Average(model, chosen), 9 * (1 - 0.03)
    for seed in range(3):
        take_step(model, optimizer, seed)
        average.update(model, (seed + 1) / end)
    written = save(average.tensors() | optimizer.tensors())
    assert not average.tensors().keys() & optimizer.tensors().keys()
    restored = Average(Llama(chosen.model, seed=7), chosen)
    restored.load(load(written))
    assert save(restored.tensors()) == save(average.tensors())
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
        average.update(model, (seed + 1) / end)
        restored.update(model, (seed + 1) / end)
    assert save(restored.tensors()) == save(average.tensors())
    for name in average.tensors():
        rest = {other: tensor for other, tensor in average.tensors().items() if other != name}
        with pytest.raises(KeyError, match=name.replace(".", r"\.")):
            Average(model, chosen).load(rest)


def test_weights_that_are_averaged_are_not_those_of_the_model():
    model, optimizer = ready(plan(average=0.3))
    average = Average(model, plan(average=0.3))
    take_step(model, optimizer, 0)
    average.update(model, 0.1)
    before = {name: mean.clone() for name, mean in average.weights().items()}
    take_step(model, optimizer, 1)
    assert all(torch.equal(mean, before[name]) for name, mean in average.weights().items())


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
        randomised(made.model, 0.3)
        made.optimizer.step = lambda progress: None
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
    loss, _ = made.take_step(1.0)
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
    assert (
        seconds[1] < run.state(6)["seconds"] < seconds[1] + 50 and run.state(6)["best_bits_per_byte"] == 1e-3
    )
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


def test_the_average_of_a_very_long_run_begins_with_its_first_step():
    chosen = plan(average=1.0)
    model = Llama(chosen.model, seed=1)
    average = Average(model, chosen)
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    average.update(model, 1e-18)
    assert torch.equal(average.weights()["norm.weight"], model.norm.weight)
    with torch.no_grad():
        model.norm.weight.fill_(4.0)
    average.update(model, 2e-18)
    torch.testing.assert_close(average.weights()["norm.weight"], torch.full_like(model.norm.weight, 3.0))

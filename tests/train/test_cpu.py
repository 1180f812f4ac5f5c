"""The step written out for the CPU against model.py differentiated by PyTorch; its kernels against their formulas."""

import copy
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from weights import randomised

from babyllama.data.batches import IGNORE
from babyllama.model import Config, Llama
from babyllama.train import cpu, kernels
from babyllama.train.cpu import CPUStep
from babyllama.train.recipe import Plan
from babyllama.train.step import PlainStep, dropout_keys, dropout_mask, folded

V = 101
SHAPES = {
    "heads of their own": Config(vocab_size=V, dim=32, n_layers=2, n_heads=4),
    "shared keys": Config(vocab_size=V, dim=48, n_layers=3, n_heads=6, n_kv_heads=2),
    "one key for all": Config(vocab_size=V, dim=24, n_layers=1, n_heads=4, n_kv_heads=1, rope_theta=5e5),
    "tied": Config(vocab_size=V, dim=32, n_layers=2, n_heads=4, tie_embeddings=True),
    "a head wider than its share": Config(vocab_size=V, dim=32, n_layers=2, n_heads=2, head_dim=22),
    "an odd feed-forward": Config(vocab_size=V, dim=20, n_layers=2, n_heads=2, hidden_dim=37, norm_eps=1e-3),
}


def model(config: Config, spread: float = 0.15) -> Llama:
    """Weights large enough that no part is nearly linear; gains that are not 1."""
    return randomised(Llama(config, seed=None), spread, seed=3, gain=1.0)


def plan(config: Config, context: int = 16, batch_size: int = 3, **settings) -> Plan:
    given = {"steps": 1, "threads": 2, "seed": 5, **settings}
    return Plan(model=config, context=context, batch_size=batch_size, **given)


def batch(rows: int, context: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, V, (2, rows, context), generator=generator)
    targets[0, context // 2 :] = IGNORE
    return tokens, targets, int((targets != IGNORE).sum())


def gradients(step_kind, made: Llama, given: Plan, parts: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    made = copy.deepcopy(made)
    step, loss = step_kind(made, given), 0.0
    tokens, targets, counted = batch(given.batch_size * parts, given.context)
    for part, (some, wanted) in enumerate(zip(tokens.chunk(parts), targets.chunk(parts), strict=True)):
        loss += step(some, wanted, counted, step=4, part=part)
    return loss, {name: weight.grad.clone() for name, weight in made.named_parameters()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the parameter that is farthest off: length of the difference, as a share of the length of what is right."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


# ---- equal to model.py ---------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 16, 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gives_the_loss_and_every_gradient_of_the_model(shape, context):
    made, given = model(SHAPES[shape]), plan(SHAPES[shape], context)
    loss, found = gradients(CPUStep, made, given)
    right, expected = gradients(PlainStep, made, given)
    if context == 1:  # a token attends to itself alone: q and k have no gradient, and 0 / 0 is no distance
        for name in [name for name in expected if ".wq." in name or ".wk." in name]:
            assert max(found.pop(name).abs().max(), expected.pop(name).abs().max()) < 1e-6
    assert loss == pytest.approx(right, rel=1e-6)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("shape", ["heads of their own", "shared keys"])
def test_more_positions_than_one_block_of_queries(shape, monkeypatch):
    monkeypatch.setattr(cpu, "QUERIES", 16)
    made, given = model(SHAPES[shape]), plan(SHAPES[shape], context=41, batch_size=2)
    loss, found = gradients(CPUStep, made, given)
    right, expected = gradients(PlainStep, made, given)
    assert loss == pytest.approx(right, rel=1e-6)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(("shape", "queries"), [("shared keys", 256), ("shared keys", 24), ("tied", 256)])
def test_bfloat16_is_as_far_from_the_truth_as_autocast(shape, queries, monkeypatch):
    monkeypatch.setattr(cpu, "QUERIES", queries)
    made = model(SHAPES[shape])
    right, expected = gradients(PlainStep, made, plan(SHAPES[shape], 64, 8))
    given = plan(SHAPES[shape], 64, 8, precision="bfloat16")
    loss, found = gradients(CPUStep, made, given)
    _, autocast = gradients(PlainStep, made, given)
    assert loss == pytest.approx(right, rel=2e-3)
    assert 1e-3 < distance(found, expected) < 0.05
    ratios = [float((found[n] - expected[n]).norm() / (autocast[n] - expected[n]).norm()) for n in expected]
    assert np.mean(ratios) < 1.2 and max(ratios) < 1.6


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.25}, {"embedding_norm": True}, {"dropout": 0.1, "embedding_norm": True}]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_dropout_and_the_norm_after_the_embedding(settings, parts):
    config = SHAPES["shared keys"]
    made, given = model(config), plan(config, accumulation=parts, **settings)
    loss, found = gradients(CPUStep, made, given, parts)
    right, expected = gradients(PlainStep, made, given, parts)
    plain, _ = gradients(PlainStep, made, plan(config, accumulation=parts), parts)
    assert loss == pytest.approx(right, rel=1e-6) and loss != pytest.approx(plain, rel=1e-3)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("shape", ["shared keys", "tied"])
def test_parts_of_a_step_add_up(shape):
    made = model(SHAPES[shape])
    loss, found = gradients(CPUStep, made, plan(SHAPES[shape], batch_size=2), parts=3)
    right, expected = gradients(CPUStep, made, plan(SHAPES[shape], batch_size=6))
    assert loss == pytest.approx(right, rel=1e-6)
    assert distance(found, expected) < 1e-5


def test_the_number_of_workers_changes_roundings_only():
    config = SHAPES["shared keys"]
    made = model(config)
    losses, found = zip(
        *(gradients(CPUStep, made, plan(config, batch_size=5, dropout=0.2, threads=n)) for n in (1, 2, 5, 9)),
        strict=True,
    )
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-6)
    assert max(distance(one, found[0]) for one in found[1:]) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_step_gives_the_same_bits(precision):
    config = SHAPES["tied"]
    given = plan(config, context=32, batch_size=4, precision=precision, dropout=0.1)
    made = model(config)
    first, second = gradients(CPUStep, made, given), gradients(CPUStep, made, given)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_every_buffer_has_a_free_row_behind_it():
    made = cpu.buffer(3, 4, 5, dtype=torch.bfloat16)
    assert made.shape == (3, 4, 5) and made.dtype == torch.bfloat16 and not made.any()
    assert made.untyped_storage().nbytes() == 2 * (3 * 4 * 5 + 5)


def neighbours(count: int) -> list[list[int]]:
    """Orders of `count` things in which each comes right behind each other one: E. J. Williams, 1949."""
    even = count + count % 2
    zigzag = [-(i + 1) // 2 if i % 2 else i // 2 for i in range(even)]  # 0, -1, 1, -2, 2, ...
    return [[n for n in ((step + first) % even for step in zigzag) if n < count] for first in range(even)]


def test_the_bits_do_not_depend_on_where_buffers_lie(monkeypatch):
    config, real = SHAPES["shared keys"], cpu.buffer
    made, given = model(config), plan(config, 33, 2, embedding_norm=True, threads=1)
    asked = []  # shape and type of each buffer of a step, in the order in which they are made

    def note(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        asked.append((shape, dtype))
        return real(*shape, dtype=dtype)

    def bits(order: list[int], behind: int) -> tuple[object, ...]:
        """Of a step with its buffers side by side in this order, each with so many free rows behind it."""
        arena, places, end = torch.zeros(2_000_000, dtype=torch.float32), {}, 0
        for number in order:
            shape, dtype = asked[number]
            size, row = (dtype.itemsize // 4 * count for count in (math.prod(shape), shape[-1]))
            places[number] = arena[end : end + size].view(dtype).view(shape)
            end += 16 * -(-(size + behind * row) // 16)  # torch begins at multiples of 64 bytes
        assert end < len(arena)
        waiting = (places[number] for number in range(len(asked)))
        monkeypatch.setattr(cpu, "buffer", lambda *shape, dtype=torch.float32: next(waiting))
        loss, found = gradients(CPUStep, made, given)
        return loss, *(gradient.numpy().tobytes() for gradient in found.values())

    monkeypatch.setattr(cpu, "buffer", note)
    gradients(CPUStep, made, given)
    orders = neighbours(len(asked))
    assert all(sorted(order) == list(range(len(asked))) for order in orders)
    assert len({pair for order in orders for pair in pairwise(order)}) == len(asked) * (len(asked) - 1)
    expected = bits(orders[0], 1)
    assert all(bits(order, 1) == expected for order in orders)
    if all(bits(order, 0) == expected for order in orders):
        pytest.skip("what is compiled for this processor has the same bits without free rows, too")


@pytest.mark.parametrize("kind", [CPUStep, PlainStep])
def test_a_step_leaves_nothing_behind_for_the_next(kind):
    config = SHAPES["shared keys"]
    made, given = model(config), plan(config, dropout=0.2, embedding_norm=True)
    fresh = gradients(kind, made, given)
    used = copy.deepcopy(made)
    step = kind(used, given)
    step(*batch(3, 16, seed=9), step=3)
    loss = step(*batch(3, 16), step=4)
    assert loss == fresh[0]
    assert all(torch.equal(weight.grad, fresh[1][name]) for name, weight in used.named_parameters())


def test_weights_that_an_optimiser_changed_are_the_ones_used():
    config = SHAPES["heads of their own"]
    made, given = model(config), plan(config)
    step = CPUStep(made, given)
    before = step(*batch(3, 16), step=0)
    torch.optim.SGD(made.parameters(), lr=0.5).step()
    after = step(*batch(3, 16), step=1)
    assert after < before - 0.01
    assert after == pytest.approx(gradients(PlainStep, made, given)[0], rel=1e-6)


def test_no_token_sees_a_later_one():
    config = SHAPES["shared keys"]
    step = CPUStep(model(config), plan(config, batch_size=2))
    tokens, targets, _ = batch(2, 16)
    targets[:, 9:] = IGNORE
    first = step(tokens, targets, 1, step=0)
    tokens[:, 9:] = (tokens[:, 9:] + 1) % V
    assert step(tokens, targets, 1, step=0) == first


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["tok_embeddings", "layers.0.attention.wq", "layers.1.feed_forward.w_down", "norm", "lm_head"]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_finite_does_not_pass_unnoticed(name, bad, precision):
    config = SHAPES["heads of their own"]
    made = model(config)
    weight = made.get_parameter(f"{name}.weight")
    tokens, targets, counted = batch(3, 16)
    with torch.no_grad():
        weight.view(-1)[int(tokens[1, 2]) * 32 if name == "tok_embeddings" else 7] = bad
    step = CPUStep(made, plan(config, precision=precision))
    loss = step(tokens, targets, counted, step=0)
    norms = [float(weight.grad.norm()) for weight in made.parameters()]
    assert not math.isfinite(loss) or not all(map(math.isfinite, norms))


@pytest.mark.parametrize("kind", [CPUStep, PlainStep])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_the_answers_are_those_of_the_plain_model_whatever_the_step_before_did(kind, rows):
    config = SHAPES["shared keys"]
    made = model(config)
    step = kind(made, plan(config, dropout=0.5, embedding_norm=True))
    step(*batch(3, 16), step=0)
    torch.optim.SGD(made.parameters(), lr=0.5).step()
    tokens, plain = batch(rows, 16, seed=8)[0], Llama(config)
    plain.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.allclose(step.logits(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_is_as_before_a_step():
    config, before = SHAPES["tied"], torch.get_num_threads()
    step = CPUStep(model(config), plan(config))
    torch.set_num_threads(3)
    try:
        step(*batch(3, 16), step=0)
        step.logits(batch(3, 16)[0])
        with pytest.raises(IndexError):
            step.logits(torch.full((3, 16), V))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_state_can_be_loaded_into_a_model_that_was_moved():
    config = SHAPES["tied"]
    made, given = model(config), plan(config)
    step = CPUStep(made, given)
    made.load_state_dict(model(config, spread=0.05).state_dict())
    assert step(*batch(3, 16), step=4) == pytest.approx(
        gradients(PlainStep, model(config, spread=0.05), given)[0], rel=1e-6
    )


# ---- the fold -------------------------------------------------------------------------------------------------


def test_folded_is_the_model_with_a_norm_after_the_embedding_and_is_undone():
    config = SHAPES["shared keys"]
    made, given = model(config), plan(config, embedding_norm=True)
    tokens = batch(3, 16)[0]
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    normed = made.tok_embeddings.register_forward_hook(
        lambda module, inputs, out: F.rms_norm(out, out.shape[-1:], eps=config.norm_eps)
    )
    expected = made(tokens)
    normed.remove()
    with folded(made, given) as plain:
        assert torch.allclose(plain(tokens), expected, atol=1e-5)
        assert not torch.allclose(made.tok_embeddings.weight, before["tok_embeddings.weight"], atol=1e-2)
    assert all(torch.equal(made.state_dict()[name], before[name]) for name in before)
    with folded(made, plan(config)):
        assert torch.equal(made.tok_embeddings.weight, before["tok_embeddings.weight"])


# ---- kernels -------------------------------------------------------------------------------------


compiled = njit(
    fastmath=kernels.FAST, error_model="numpy"
)  # not kept on disk: numba would not see a change in kernels


@compiled
def _exp2(x, out):
    for i in range(x.shape[0]):
        out[i] = kernels.exp2(x[i])


@compiled
def _store(x, out):
    for i in range(x.shape[0]):
        out[i] = kernels.narrow(x[i], out[i])


@compiled
def _load(x, out):
    for i in range(x.shape[0]):
        out[i] = kernels.widen(x[i])


def test_powers_of_two():
    x = np.concatenate([np.linspace(-125.9, 126.9, 100_003), np.arange(-126, 127)]).astype(np.float32)
    out = np.empty_like(x)
    _exp2(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    below = np.array([-127, -1e4, -np.inf], dtype=np.float32)
    _exp2(below, out[:3])
    assert (out[:3] == np.float32(2.0**-126)).all()


def test_a_gate_may_be_any_number():
    gate = torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0, 88.0, -88.0, 130.0, -130.0, 1e4, -1e4, 1e30, -1e30])[
        None
    ]
    up, given = torch.full_like(gate, 2.0), torch.full_like(gate, 3.0)
    both, product = torch.cat([gate, up], dim=1), torch.empty_like(gate)
    kernels.swiglu(both.numpy(), product.numpy())
    assert torch.allclose(product, 2 * F.silu(gate), rtol=1e-5, atol=1e-5)
    kernels.swiglu_backward(both.numpy(), given.numpy())
    gate.requires_grad_()
    F.silu(gate).sum().backward()
    assert torch.allclose(both[:, : gate.shape[1]], 6 * gate.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(both[:, gate.shape[1] :], 3 * F.silu(gate.detach()), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_and_read_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(2000, dtype=np.uint32) << 16) + 0x3F008000
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 1, 0xFFFF])
    x = np.concatenate([bits, ties, special.astype(np.uint32)]).view(np.float32)
    expected = torch.from_numpy(x).bfloat16()
    stored, read = np.empty(len(x), dtype=np.uint16), np.empty(len(x), dtype=np.float32)
    _store(x, stored)
    _load(stored, read)
    assert torch.equal(torch.from_numpy(read).isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(torch.from_numpy(stored).view(torch.bfloat16)[number], expected[number])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_the_same_in_both_steps_and_drops_its_share(rate):
    x = torch.ones(300, 64)
    expected = dropout_mask(x, 0x12345678, rate)
    drop = cpu.Dropout([0x12345678], rate)
    above, below = x[:100].clone(), x[100:].clone()
    drop(above.numpy(), 0, 0)
    drop(below.numpy(), 100 * 64, 0)
    assert torch.equal(torch.cat([above, below]), expected)
    assert expected.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    share = float((expected == 0).float().mean())
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / x.numel())


def test_dropout_differs_by_seed_step_part_and_place():
    config = SHAPES["shared keys"]
    given, other = plan(config, dropout=0.1), plan(config, dropout=0.1, seed=6)
    keys = [
        *dropout_keys(given, 0, 0),
        *dropout_keys(given, 1, 0),
        *dropout_keys(given, 0, 1),
        *dropout_keys(other, 0, 0),
    ]
    assert len(keys) == 4 * 7 == len(set(keys))
    masks = [dropout_mask(torch.ones(64, 64), key, 0.5).flatten() for key in keys[:8]]
    correlation = np.corrcoef(np.stack([mask.numpy() for mask in masks]))
    assert np.abs(correlation - np.eye(8)).max() < 4.5 / 64  # deviations of an independent one


def test_neighbours_are_dropped_independently():
    mask = dropout_mask(torch.ones(512, 512), 77, 0.5) / 2
    centred = mask - 0.5
    for shifted in (centred.roll(1, 1), centred.roll(1, 0), centred.roll(7, 1)):
        assert abs(float((centred * shifted).mean())) < 4 * 0.25 / 512


@pytest.mark.parametrize(
    "hindrance",
    [
        "caching.CacheImpl._locator_classes = []",  # no folder that may be written to
        "caching.IndexDataCacheFile.save = lambda *given: open('/dev/full', 'w', buffering=1).write('x' * 2**17)",
    ],
)
def test_a_kernel_is_compiled_anew_where_nothing_can_be_kept(hindrance, tmp_path):
    package = tmp_path / "babyllama"
    shutil.copytree(Path(kernels.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import numba.core.caching as caching\n"
        f"{hindrance}\n"
        "import numpy as np\n"
        "from babyllama.train import kernels\n"
        "total = np.zeros(3, np.float32)\n"
        "kernels.add_up(np.ones((2, 3), np.float32), total, False)\n"
        "print(total.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[2.0, 2.0, 2.0]\n", done.stderr
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.mark.parametrize(("ending", "kept"), [("nbi", 0), ("nbi", 50), ("nbc", 0), ("nbc", 50)])
def test_a_kernel_is_compiled_anew_where_what_was_kept_is_cut_short(ending, kept, tmp_path):
    package = tmp_path / "babyllama"
    shutil.copytree(Path(kernels.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import numpy as np\n"
        "from babyllama.train import kernels\n"
        "total = np.zeros(3, np.float32)\n"
        "kernels.add_up(np.ones((2, 3), np.float32), total, False)\n"
        "print(total.tolist())\n"
    )
    for turn in range(3):  # the third finds what the second mended
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == "[2.0, 2.0, 2.0]\n", done.stderr
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files and all(path.stat().st_size > kept for path in files)
        if turn == 0:
            for path in files:
                os.truncate(path, kept)

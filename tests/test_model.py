"""What is true of babyllama/model.py whatever the weights: properties, shapes, refusals, and that it learns."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from weights import randomised

from babyllama.errors import UsageError
from babyllama.model import (
    LAYER_TAPS,
    Cache,
    Config,
    Llama,
    RMSNorm,
    RopeScaling,
    attend,
    attend_fused,
    hidden_width,
    init_std,
    rope_frequencies,
    rope_tables,
    rotate,
    tap_names,
)

SMALL: dict[str, Any] = dict(vocab_size=61, dim=48, n_layers=2, n_heads=6, n_kv_heads=2, max_seq_len=64)


def small(**changes: Any) -> Config:
    return Config(**(SMALL | changes))


def random_llama(seed: int = 0, **changes: Any) -> Llama:
    """A small model whose every weight matters: Normal(0, 0.15), gains about 1."""
    return randomised(Llama(small(**changes), seed=None), seed=seed, gain=1.0)


def random_tokens(rows: int = 2, length: int = 12, seed: int = 0, vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(model: Llama, tokens: Tensor, cache: Cache | None = None) -> dict[str, Tensor]:
    """Every intermediate value of one pass, by name."""
    values: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        assert name not in values, f"{name} was shown twice"
        values[name] = tensor.detach()
        return tensor

    with torch.no_grad():
        model(tokens, cache=cache, tap=keep)
    return values


class PlainCache:
    """The least that model.py asks of a cache. Slots that nothing was written to hold large garbage."""

    def __init__(self, lengths: list[int], config: Config, slots: int = 64) -> None:
        self.lengths = torch.tensor(lengths)
        shape = (len(lengths), config.n_kv_heads, slots, config.head_dim)
        self.stored = [
            (9.0 * normal(*shape, seed=1), 9.0 * normal(*shape, seed=2)) for _ in range(config.n_layers)
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        length = k.shape[2]
        keys, values = (stored.to(k.dtype) for stored in self.stored[layer])
        for row, start in enumerate(self.lengths.tolist()):
            keys[row, :, start : start + length] = k[row]
            values[row, :, start : start + length] = v[row]
        seen = int(self.lengths.max()) + length
        return keys[:, :, :seen], values[:, :, :seen]


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dim, multiple_of, multiplier, width",
    [
        ("Llama 7B", 4096, 256, 1.0, 11008),
        ("Llama 13B", 5120, 256, 1.0, 13824),
        ("Llama 2 70B", 8192, 4096, 1.3, 28672),
        ("Llama 3 8B", 4096, 1024, 1.3, 14336),
        ("Llama 3.2 1B", 2048, 256, 1.5, 8192),
    ],
)
def test_hidden_width_is_that_of_the_released_models(
    name: str, dim: int, multiple_of: int, multiplier: float, width: int
) -> None:
    assert hidden_width(dim, multiple_of, multiplier) == width


@given(dim=st.integers(1, 20_000), multiple_of=st.integers(1, 4096))
def test_hidden_width_is_the_first_multiple_from_eight_thirds_of_dim_on(dim: int, multiple_of: int) -> None:
    width = hidden_width(dim, multiple_of)
    assert width % multiple_of == 0
    assert width - multiple_of < 8 * dim // 3 <= width


def test_a_zero_means_derive_and_every_field_then_holds_its_value() -> None:
    config = Config(vocab_size=100, dim=96, n_layers=1, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (6, 16, hidden_width(96))
    config = Config(vocab_size=100, dim=90, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=20, hidden_dim=77)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (3, 20, 77)


def test_the_sizes_of_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().dim = 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        RopeScaling(kind="linear", factor=2.0).factor = 4.0
    assert dataclasses.replace(small(), n_layers=3).n_layers == 3
    with pytest.raises(TypeError):
        Config(61, 48, 2, 6)


@pytest.mark.parametrize(
    "field, changes",
    [
        *[(name, {name: 0}) for name in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")],
        *[(name, {name: -4}) for name in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")],
        *[(name, {name: -2}) for name in ("n_kv_heads", "head_dim", "hidden_dim")],
        *[(name, {name: value}) for name in ("norm_eps", "rope_theta") for value in (0.0, -1.0, math.nan, math.inf)],
        ("dim", dict(dim=49)),  # not a multiple of 6 heads
        ("n_kv_heads", dict(n_kv_heads=4)),  # does not divide 6
        ("n_kv_heads", dict(n_kv_heads=12)),  # more than there are query heads
        ("head_dim", dict(head_dim=7)),  # RoPE turns pairs
        ("head_dim", dict(dim=42)),  # the same, derived: 42 / 6
    ],
)  # fmt: skip
def test_an_impossible_size_is_refused_by_its_name(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        small(**changes)
    assert (caught.value.code, caught.value.where) == ("E102", field)
    assert caught.value.found.startswith(field) and field in caught.value.fix


# ---- RMSNorm -------------------------------------------------------------------------------------


def norm_of(dim: int, eps: float = 1e-5, seed: int = 0) -> RMSNorm:
    norm = RMSNorm(dim, eps)
    torch.nn.init.normal_(norm.weight, 1.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return norm


def test_rmsnorm_is_its_formula() -> None:
    norm, x = norm_of(64), normal(2, 5, 64)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert RMSNorm(64, 1e-5)(x).square().mean(-1).sub(1).abs().max() < 1e-4  # each token has length sqrt(dim)


def test_rmsnorm_treats_each_token_by_itself() -> None:
    norm, x = norm_of(64), normal(2, 5, 64)
    whole = norm(x)
    for row in range(2):
        for t in range(5):
            assert torch.equal(whole[row, t], norm(x[row, t]))
    x[1, 3] *= 50  # one token grows: no other feels it
    assert torch.equal(norm(x)[0], whole[0])
    assert torch.equal(norm(x)[1, [0, 1, 2, 4]], whole[1, [0, 1, 2, 4]])


@pytest.mark.parametrize("scale", [-3.0, 1e-2, 1e4])
def test_rmsnorm_does_not_see_the_scale_of_its_input(scale: float) -> None:
    norm, x = norm_of(64, eps=1e-12), normal(3, 64)
    torch.testing.assert_close(norm(scale * x), math.copysign(1.0, scale) * norm(x), rtol=1e-5, atol=1e-6)


def test_rmsnorm_does_not_subtract_the_mean() -> None:
    x = normal(3, 64) + 10.0
    assert (RMSNorm(64, 1e-5)(x).mean(-1) > 0.9).all()  # a LayerNorm would give 0


def test_eps_of_rmsnorm_is_added_to_the_mean_square_inside_the_root() -> None:
    x = torch.full((1, 64), 1e-3)
    expected = 1e-3 / math.sqrt(1e-6 + 1e-5)  # 0.30; with eps outside of the root it would be 0.99
    torch.testing.assert_close(RMSNorm(64, 1e-5)(x), torch.full((1, 64), expected))
    assert torch.equal(RMSNorm(64, 1e-5)(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_rmsnorm_computes_in_float32_whatever_comes_in() -> None:
    # 300² is more than float16 can hold: squared there, the mean is infinite and the output 0.
    large = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(64, 1e-5).half()(large), torch.ones(1, 64, dtype=torch.float16))
    # In bfloat16 the one rounding is that of the result.
    x = normal(64, 256).bfloat16()
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(RMSNorm(256, 1e-5).bfloat16()(x), exact.bfloat16())


# ---- RoPE ----------------------------------------------------------------------------------------


def turned(x: Tensor, position: int, config: Config) -> Tensor:
    """One vector (hd) at one position."""
    return rotate(x.view(1, 1, 1, -1), rope_tables(config, torch.tensor([[position]]))).flatten()


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_fall_from_one_to_nearly_one_over_theta(theta: float) -> None:
    frequencies = rope_frequencies(small(head_dim=32, rope_theta=theta)).double()
    expected = torch.tensor([theta ** (-2 * i / 32) for i in range(16)], dtype=torch.float64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


def test_rotation_keeps_the_length_of_every_pair() -> None:
    config = small(head_dim=32)
    x = normal(2, 3, 50, 32)
    positions = torch.stack([torch.arange(50), torch.arange(100_000, 100_050)])
    y = rotate(x, rope_tables(config, positions))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    after, before = (
        vectors.unflatten(-1, (2, 16)).norm(dim=-2) for vectors in (y, x)
    )  # of (x[i], x[i + hd/2])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (y - x)[:, :, 1:].abs().max() > 1  # and it does turn them


def test_score_of_rotated_vectors_depends_on_their_distance_only() -> None:
    config, generator = small(head_dim=32), torch.Generator().manual_seed(0)
    for pair in range(100):
        q, k = normal(32, seed=2 * pair), normal(32, seed=2 * pair + 1)
        distance, shift = torch.randint(1, 100, (2,), generator=generator).tolist()
        here = turned(q, distance, config) @ turned(k, 0, config)
        there = turned(q, distance + shift, config) @ turned(k, shift, config)
        assert abs(here - there) <= 1e-5 * q.norm() * k.norm()


def test_score_of_rotated_vectors_does_depend_on_their_distance() -> None:
    config, q, k = small(head_dim=32), normal(32, seed=0), normal(32, seed=1)
    scores = torch.stack([turned(q, position, config) @ turned(k, 0, config) for position in range(20)])
    assert scores.diff().abs().min() > 1e-3
    backwards = turned(q, 0, config) @ turned(k, 3, config)
    assert (scores[3] - backwards).abs() > 1e-2  # before is not after: cos alone could not tell


def test_at_position_zero_nothing_turns() -> None:
    x = normal(1, 3, 1, 32)
    assert torch.equal(rotate(x, rope_tables(small(head_dim=32), torch.tensor([[0]]))), x)


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    config, x = small(head_dim=32), normal(2, 3, 40, 32)
    positions = torch.stack([torch.arange(40), torch.arange(7, 47)])
    frequencies = torch.tensor([10000.0 ** (-2 * i / 32) for i in range(16)], dtype=torch.float64)
    angles = (positions[..., None] * frequencies)[:, None]  # (B, 1, T, hd/2)
    z = torch.complex(x[..., :16].double(), x[..., 16:].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    torch.testing.assert_close(
        rotate(x, rope_tables(config, positions)).double(), torch.cat((z.real, z.imag), -1), rtol=0, atol=1e-5
    )


def test_linear_scaling_reads_position_p_as_p_over_factor() -> None:
    plain, scaled = small(), small(rope_scaling=RopeScaling(kind="linear", factor=4.0))
    positions = torch.arange(0, 400, 4)[None]
    for ours, expected in zip(
        rope_tables(scaled, positions), rope_tables(plain, positions // 4), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones() -> None:
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=6.0, original_max_seq_len=1024
    )
    plain, scaled = (rope_frequencies(small(head_dim=64, rope_scaling=s)) for s in (None, scaling))
    turns = 1024 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 6], plain[turns > 6]) and (turns > 6).any()
    assert torch.equal(scaled[turns < 2], plain[turns < 2] / 8) and (turns < 2).any()
    between = (turns > 2) & (turns < 6)
    assert between.any() and ((plain / 8 < scaled) & (scaled < plain))[between].all()


def test_tables_stay_right_at_position_100000_when_the_model_is_bfloat16() -> None:
    config = small(n_heads=2, n_kv_heads=1, n_layers=1)
    model = random_llama(n_heads=2, n_kv_heads=1, n_layers=1).to(torch.bfloat16)
    assert list(model.buffers()) == []  # nothing that a cast could round
    cos, sin = rope_tables(config, torch.tensor([[100_000]]))
    angles = 100_000 * rope_frequencies(config).double()
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), rtol=0, atol=5e-3)
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), rtol=0, atol=5e-3)

    cache = PlainCache([100_000], config, slots=100_001)
    values = record(model, random_tokens(1, 1), cache)
    for name in ("q", "k"):
        before = values[f"layers.0.attention.{name}"].double()
        z = torch.complex(before[..., :12], before[..., 12:]) * torch.polar(torch.ones_like(angles), angles)
        after = values[f"layers.0.attention.{name}_rotated"]
        assert after.dtype == torch.bfloat16
        error = (after.double() - torch.cat((z.real, z.imag), -1)).abs().max() / before.abs().max()
        assert error < 0.01  # a rounding of bfloat16; tables in bfloat16 would be wrong by 1


def test_rotation_adds_one_rounding_only() -> None:
    x, rope = normal(1, 4, 50, 32).bfloat16(), rope_tables(small(head_dim=32), torch.arange(50)[None])
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).bfloat16())


def test_frequencies_are_float32_whatever_the_default_type_is() -> None:
    expected = rope_frequencies(small())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rope_frequencies(small()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- attention -----------------------------------------------------------------------------------

HEADS = pytest.mark.parametrize("n_kv_heads", [6, 2, 1])


@HEADS
def test_attention_is_its_formula_with_query_heads_sharing_in_groups(n_kv_heads: int) -> None:
    """softmax(q·k / √hd) v by loops over rows, heads and queries: heads 0, 1, 2 of 6/2 share the first key head."""
    q, k, v = (
        normal(2, 6, 5, 8, seed=1),
        normal(2, n_kv_heads, 5, 8, seed=2),
        normal(2, n_kv_heads, 5, 8, seed=3),
    )
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for function in (attend, attend_fused):
        result = function(q, k, v, mask)
        for b in range(2):
            for h in range(6):
                for t in range(5):
                    keys, values = k[b, h * n_kv_heads // 6], v[b, h * n_kv_heads // 6]
                    exponentials = [
                        math.exp(float(q[b, h, t] @ keys[s]) / math.sqrt(8)) for s in range(t + 1)
                    ]
                    expected = sum(e * values[s] for s, e in enumerate(exponentials)) / sum(exponentials)
                    torch.testing.assert_close(result[b, h, t], expected, rtol=1e-5, atol=1e-5)


def test_softmax_is_computed_in_float32() -> None:
    q, k, v = (normal(2, 4, 40, 16, seed=seed).bfloat16() for seed in range(3))
    seen: dict[str, Tensor] = {}
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    attend(q, k, v, mask, lambda name, tensor: seen.setdefault(name, tensor))
    assert seen["weights"].dtype == torch.bfloat16
    assert torch.equal(seen["weights"], seen["masked_scores"].float().softmax(-1).bfloat16())


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = random_llama(), random_tokens()
    for t in range(1, 12):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1 + random_tokens(2, 12 - t, seed=t) % 60) % 61
        assert (changed[:, t:] != tokens[:, t:]).all()
        with torch.no_grad():
            for fused in (False, True):
                before, after = model(tokens, fused=fused), model(changed, fused=fused)
                assert torch.equal(before[:, :t], after[:, :t])
                assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("fused", [False, True], ids=["written-out", "fused"])
def test_every_token_changes_its_own_and_all_later_logits(fused: bool) -> None:
    model, tokens = random_llama(), random_tokens()
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        with torch.no_grad():
            difference = (model(tokens, fused=fused) - model(changed, fused=fused)).abs().amax(-1)
        assert (difference[:, t:] > 1e-4).all()


def test_rows_of_a_batch_do_not_change_one_another() -> None:
    model, tokens = random_llama(), random_tokens(3)
    with torch.no_grad():
        whole = model(tokens)
        for row in range(3):
            torch.testing.assert_close(
                model(tokens[row : row + 1]), whole[row : row + 1], rtol=1e-5, atol=1e-5
            )


def test_order_of_the_tokens_matters() -> None:
    """With one layer, the last logits of [a, b, c] and [b, a, c] differ by the rotation only."""
    model = random_llama(n_layers=1)
    with torch.no_grad():
        one, other = model(torch.tensor([[3, 9, 5]]))[0, -1], model(torch.tensor([[9, 3, 5]]))[0, -1]
    assert (one - other).abs().max() > 1e-2


def test_masked_scores_are_minus_infinity_exactly_above_the_diagonal_and_weights_sum_to_one() -> None:
    values = record(random_llama(), random_tokens())
    above = torch.ones(12, 12, dtype=torch.bool).triu(1).expand(2, 6, 12, 12)
    for layer in range(2):
        scores, masked, weights = (
            values[f"layers.{layer}.attention.{name}"] for name in ("scores", "masked_scores", "weights")
        )
        assert scores.isfinite().all()
        assert torch.equal(masked.isneginf(), above)
        assert torch.equal(masked[~above], scores[~above])
        assert torch.equal(weights == 0, above)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 12), rtol=0, atol=1e-6)


def gradients(model: Llama, logits: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Of a random weighing of the logits, so that every logit counts."""
    model.zero_grad()
    (logits * normal(*logits.shape, seed=seed)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close_in_scale(one: Tensor, other: Tensor, name: str) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@HEADS
def test_fused_attention_equals_the_written_out_one_in_value_and_gradient(
    n_kv_heads: int, cached: bool
) -> None:
    model, tokens = random_llama(n_kv_heads=n_kv_heads), random_tokens(length=24)
    logits, slopes = [], []
    for fused in (False, True):
        cache = PlainCache([5, 9], model.config) if cached else None
        logits.append(model(tokens, cache=cache, fused=fused))
        slopes.append(gradients(model, logits[-1]))
    assert_close_in_scale(logits[1].detach(), logits[0].detach(), "logits")
    assert slopes[0].keys() == slopes[1].keys() == dict(model.named_parameters()).keys()
    for name in slopes[0]:
        assert_close_in_scale(slopes[1][name], slopes[0][name], name)


@pytest.mark.parametrize("fused", [False, True], ids=["written-out", "fused"])
def test_minus_infinity_in_the_scores_gives_finite_gradients(fused: bool) -> None:
    model = random_llama()
    for cache in (None, PlainCache([0, 7], model.config)):
        for name, gradient in gradients(model, model(random_tokens(), cache=cache, fused=fused)).items():
            assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("fused", [False, True], ids=["written-out", "fused"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass(chunk: int, fused: bool) -> None:
    model, tokens = random_llama(), random_tokens(length=20)
    cache, parts = PlainCache([0, 0], model.config), []
    with torch.no_grad():
        for part in tokens.split(chunk, dim=1):
            parts.append(model(part, cache=cache, fused=fused))
            cache.lengths += part.shape[1]
        assert_close_in_scale(torch.cat(parts, dim=1), model(tokens), "logits")


def test_rows_of_different_length_in_a_cache_are_as_if_each_were_alone() -> None:
    model, tokens = random_llama(), random_tokens(3, 16)
    lengths = [0, 5, 11]
    cache = PlainCache([0, 0, 0], model.config)
    with torch.no_grad():
        model(tokens[:, :11], cache=cache)
        cache.lengths = torch.tensor(lengths)  # what was written beyond them is garbage now
        after = torch.stack([tokens[row, n : n + 4] for row, n in enumerate(lengths)])
        together = model(after, cache=cache)
        for row, n in enumerate(lengths):
            alone = model(tokens[row : row + 1, : n + 4])[0, n:]
            assert_close_in_scale(together[row], alone, f"row {row}")


# ---- looking inside ------------------------------------------------------------------------------

TAP_SHAPES = {
    "attention_norm.input": "BTD", "attention_norm.output": "BTD",
    "attention.q": "BHTh", "attention.k": "BKTh", "attention.v": "BKTh",
    "attention.q_rotated": "BHTh", "attention.k_rotated": "BKTh",
    "attention.scores": "BHTS", "attention.masked_scores": "BHTS", "attention.weights": "BHTS",
    "attention.heads": "BHTh", "attention.output": "BTD", "after_attention": "BTD",
    "ffn_norm.input": "BTD", "ffn_norm.output": "BTD",
    "feed_forward.gate": "BTF", "feed_forward.up": "BTF", "feed_forward.product": "BTF",
    "feed_forward.output": "BTD", "after_feed_forward": "BTD",
}  # fmt: skip
LETTERS = dict(B=2, T=12, S=12, D=48, F=128, V=61, H=6, K=2, h=8)


def test_a_pass_shows_the_names_that_are_listed_in_their_order_with_their_shapes() -> None:
    model = random_llama()
    values = record(model, random_tokens())
    assert list(values) == tap_names(model.config)
    assert list(TAP_SHAPES) == list(LAYER_TAPS)
    outside = {"embeddings": "BTD", "norm.input": "BTD", "norm.output": "BTD", "logits": "BTV"}
    for name, tensor in values.items():
        letters = outside.get(name) or TAP_SHAPES[name.split(".", 2)[2]]
        assert tensor.shape == tuple(LETTERS[letter] for letter in letters), name


def test_scores_reach_over_the_cache() -> None:
    model = random_llama()
    values = record(model, random_tokens(), PlainCache([3, 8], model.config))
    assert list(values) == tap_names(model.config)
    assert values["layers.1.attention.weights"].shape == (2, 6, 12, 20)
    masked = values["layers.1.attention.masked_scores"].isneginf()
    for row, length in enumerate((3, 8)):
        for t in range(12):
            assert masked[row, :, t].any(0).tolist() == [slot > length + t for slot in range(20)]


def test_each_shown_value_follows_from_those_before_it() -> None:
    model = random_llama()
    values = record(model, random_tokens())

    def same(name: str, expected: Tensor) -> None:
        torch.testing.assert_close(
            values[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}"
        )

    rope = rope_tables(model.config, torch.arange(12)[None])
    above = torch.ones(12, 12, dtype=torch.bool).triu(1)
    with torch.no_grad():
        stream = model.tok_embeddings.weight[random_tokens()]
        same("embeddings", stream)
        for i, block in enumerate(model.layers):
            of = {name: values[f"layers.{i}.{name}"] for name in LAYER_TAPS}
            here, attention, forward = f"layers.{i}.", block.attention, block.feed_forward
            same(here + "attention_norm.input", stream)
            same(here + "attention_norm.output", block.attention_norm(stream))
            for name, heads in (("q", 6), ("k", 2), ("v", 2)):
                flat = of["attention_norm.output"] @ getattr(attention, f"w{name}").weight.T
                same(f"{here}attention.{name}", flat.unflatten(-1, (heads, 8)).transpose(1, 2))
            same(here + "attention.q_rotated", rotate(of["attention.q"], rope))
            same(here + "attention.k_rotated", rotate(of["attention.k"], rope))
            k, v = (of[f"attention.{name}"][:, [0, 0, 0, 1, 1, 1]] for name in ("k_rotated", "v"))
            same(here + "attention.scores", of["attention.q_rotated"] @ k.mT / math.sqrt(8))
            same(here + "attention.masked_scores", of["attention.scores"].masked_fill(above, -math.inf))
            same(here + "attention.weights", of["attention.masked_scores"].softmax(-1))
            same(here + "attention.heads", of["attention.weights"] @ v)
            merged = torch.cat([of["attention.heads"][:, head] for head in range(6)], dim=-1)
            same(here + "attention.output", merged @ attention.wo.weight.T)
            same(here + "after_attention", stream + of["attention.output"])
            same(here + "ffn_norm.input", of["after_attention"])
            same(here + "ffn_norm.output", block.ffn_norm(of["after_attention"]))
            gate = of["ffn_norm.output"] @ forward.w_gate.weight.T
            same(here + "feed_forward.gate", gate)
            same(here + "feed_forward.up", of["ffn_norm.output"] @ forward.w_up.weight.T)
            same(here + "feed_forward.product", gate * gate.sigmoid() * of["feed_forward.up"])
            same(here + "feed_forward.output", of["feed_forward.product"] @ forward.w_down.weight.T)
            stream = of["after_attention"] + of["feed_forward.output"]
            same(here + "after_feed_forward", stream)
        same("norm.input", stream)
        same("norm.output", model.norm(stream))
        assert model.lm_head is not None
        same("logits", values["norm.output"] @ model.lm_head.weight.T)


def test_a_tap_that_returns_what_it_was_given_changes_nothing() -> None:
    model, tokens = random_llama(), random_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens, tap=lambda name, tensor: tensor), model(tokens, fused=False))


@pytest.mark.parametrize("name", tap_names(small()))
def test_what_a_tap_returns_is_used_from_there_on(name: str) -> None:
    model, tokens = random_llama(), random_tokens()
    names = tap_names(model.config)
    before = record(model, tokens)

    def other(place: str, tensor: Tensor) -> Tensor:
        after[place] = tensor
        return tensor + normal(*tensor.shape) if place == name else tensor

    after: dict[str, Tensor] = {}
    with torch.no_grad():
        logits = model(tokens, tap=other)
    assert (logits - before["logits"]).abs().max() > 1e-3
    for earlier in names[: names.index(name) + 1]:
        assert torch.equal(after[earlier], before[earlier]), earlier


# ---- the whole -----------------------------------------------------------------------------------


def test_parameters_have_their_names_and_shapes_and_nothing_else_is_stored() -> None:
    expected = {"tok_embeddings.weight": (61, 48), "norm.weight": (48,), "lm_head.weight": (61, 48)}
    for i in range(2):
        expected |= {
            f"layers.{i}.attention_norm.weight": (48,),
            f"layers.{i}.attention.wq.weight": (60, 48),
            f"layers.{i}.attention.wk.weight": (20, 48),
            f"layers.{i}.attention.wv.weight": (20, 48),
            f"layers.{i}.attention.wo.weight": (48, 60),
            f"layers.{i}.ffn_norm.weight": (48,),
            f"layers.{i}.feed_forward.w_gate.weight": (128, 48),
            f"layers.{i}.feed_forward.w_up.weight": (128, 48),
            f"layers.{i}.feed_forward.w_down.weight": (48, 128),
        }
    model = Llama(small(head_dim=10))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    assert list(model.buffers()) == []
    for module in model.modules():  # no mask or table hidden in an attribute, where .to() does not see it
        assert not [name for name, value in vars(module).items() if isinstance(value, Tensor | list | tuple)]


def test_all_layers_share_one_mask_and_one_table_and_the_fused_pass_makes_no_mask() -> None:
    model, tokens, calls = random_llama(n_layers=3), random_tokens(), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[1]))
    with torch.no_grad():
        model(tokens, fused=False)
        assert len(calls) == 3 and calls[0].mask.shape == (1, 1, 12, 12)
        assert all(call.mask is calls[0].mask and call.rope is calls[0].rope for call in calls)
        calls.clear()
        model(tokens)
        assert len(calls) == 3 and all(call.mask is None and call.rope is calls[0].rope for call in calls)


def test_gains_of_the_two_norms_of_a_block_are_two() -> None:
    model, tokens = random_llama(), random_tokens()
    before = record(model, tokens)
    with torch.no_grad():
        model.layers[1].attention_norm.weight.mul_(2.0)
    after = record(model, tokens)
    changed, kept = (f"layers.1.{norm}_norm.weight" for norm in ("attention", "ffn"))
    assert model.get_parameter(changed).data_ptr() != model.get_parameter(kept).data_ptr()
    torch.testing.assert_close(
        after["layers.1.attention_norm.output"], 2 * before["layers.1.attention_norm.output"]
    )
    ffn_input = after["layers.1.ffn_norm.input"]
    normed = ffn_input * torch.rsqrt(ffn_input.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(after["layers.1.ffn_norm.output"], normed * model.get_parameter(kept))


def test_under_autocast_the_residual_stream_and_the_norms_stay_float32() -> None:
    model, tokens = random_llama(), random_tokens()
    expected = record(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = record(model, tokens)
    for name, tensor in values.items():
        wide = name == "embeddings" or "norm." in name or ".after_" in name
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert (values["logits"] - expected["logits"]).abs().max() < 0.02 * expected["logits"].abs().max()


INIT_STD = {
    "tok_embeddings.weight": 2 / 128,
    "attention.wq.weight": 0.02,
    "attention.wk.weight": 0.02,
    "attention.wv.weight": 0.02,
    "attention.wo.weight": 0.0,
    "feed_forward.w_gate.weight": 0.02,
    "feed_forward.w_up.weight": 0.02,
    "feed_forward.w_down.weight": 0.0,
    "lm_head.weight": 2 / 128,
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_each_new_parameter_has_the_spread_that_its_name_asks_for(tied: bool) -> None:
    sizes = dict(vocab_size=500, dim=128, n_heads=4, n_kv_heads=4, head_dim=48, hidden_dim=384)
    model = Llama(small(**sizes, tie_embeddings=tied), seed=3)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all(), name
            continue
        std = INIT_STD[name.split(".", 2)[2] if name.startswith("layers.") else name]
        assert init_std(name, tuple(weight.shape)) == pytest.approx(std), name
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03), name
        assert abs(float(weight.detach().mean())) <= 0.03 * std, name
        if std:  # a bell, not a box or one that was cut: 4.6% lie beyond two spreads, 0.27% beyond three
            size = weight.detach().abs() / std
            assert float((size > 2).float().mean()) == pytest.approx(0.0455, rel=0.15), name
            assert (size > 3).any(), name


def test_a_new_model_is_a_function_of_its_seed_and_sizes_only() -> None:
    torch.manual_seed(1)
    first = Llama(small(), seed=7).state_dict()
    torch.manual_seed(2)
    second, other = Llama(small(), seed=7).state_dict(), Llama(small(), seed=8).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        if not name.endswith(("norm.weight", "wo.weight", "w_down.weight")):
            assert not torch.equal(weight, other[name]), name


def test_every_block_of_a_new_model_is_the_identity() -> None:
    values = record(Llama(small()), random_tokens())
    assert torch.equal(values["norm.input"], values["embeddings"])
    assert values["layers.0.feed_forward.product"].abs().max() > 0.01  # yet there is something to learn from


def test_making_a_model_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    Llama(small())
    Llama(small(), seed=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("factor", {"factor": 0.0}),
        ("factor", {"factor": -2.0}),
        ("factor", {"factor": math.nan}),
        ("low_freq_factor", {"low_freq_factor": 0.0}),
        ("original_max_seq_len", {"original_max_seq_len": 0}),
        ("high_freq_factor", {"low_freq_factor": 4.0, "high_freq_factor": 4.0}),
    ],
)
def test_an_impossible_scaling_is_refused_by_its_name(field: str, changes: dict) -> None:
    with pytest.raises(UsageError) as caught:
        RopeScaling(**({"kind": "llama3", "factor": 8.0} | changes))
    assert (caught.value.code, caught.value.where) == ("E102", field)


@pytest.mark.parametrize("dim", [64, 128, 256, 1024])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_of_a_new_model_is_that_of_knowing_nothing(tied: bool, dim: int) -> None:
    sizes = {"dim": dim, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4}
    model = Llama(small(vocab_size=2048, **sizes, tie_embeddings=tied))
    tokens = random_tokens(8, 65, vocab_size=2048)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(math.log(2048), abs=0.05)


@pytest.mark.parametrize("fused", [False, True], ids=["written-out", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_batch_is_learned_by_heart(tied: bool, fused: bool) -> None:
    model = Llama(small(tie_embeddings=tied))
    tokens = random_tokens(4, 17)
    tokens[:, 0] = torch.arange(4)  # rows that begin alike could not be told apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = F.cross_entropy(model(tokens[:, :-1], fused=fused).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break
    assert float(loss.detach()) < 0.01


def test_a_tied_model_uses_its_embedding_twice_and_has_it_once() -> None:
    tied, untied = random_llama(tie_embeddings=True), random_llama()
    assert tied.lm_head is None
    assert "lm_head.weight" not in tied.state_dict()
    count = {id(model): sum(weight.numel() for weight in model.parameters()) for model in (tied, untied)}
    assert count[id(untied)] - count[id(tied)] == 61 * 48
    values = record(tied, random_tokens())
    torch.testing.assert_close(
        values["logits"], values["norm.output"] @ tied.tok_embeddings.weight.detach().T
    )
    values = record(untied, random_tokens())
    assert untied.lm_head is not None
    torch.testing.assert_close(values["logits"], values["norm.output"] @ untied.lm_head.weight.detach().T)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_made_without_memory_and_then_filled_is_the_model(tied: bool) -> None:
    model, tokens = random_llama(tie_embeddings=tied), random_tokens()
    with torch.device("meta"):
        empty = Llama(model.config, seed=None)
    assert all(weight.is_meta for weight in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty(tokens), model(tokens))
        assert torch.equal(empty.double()(tokens), model.double()(tokens))


def test_a_state_that_lacks_a_weight_or_has_one_too_many_is_refused() -> None:
    model = Llama(small())
    state = model.state_dict()
    weight = state.pop("layers.1.ffn_norm.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*layers\.1\.ffn_norm"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*bias"):
        model.load_state_dict(state | {"layers.1.ffn_norm.weight": weight, "lm_head.bias": torch.zeros(61)})


def test_wrong_shapes_are_refused_where_tests_check_them() -> None:
    """The check on the check: shapes written in signatures are verified on every call in this test run."""
    with pytest.raises(Exception, match="Type-check"):
        Llama(small())(torch.zeros(2, 5))  # float ids
    with pytest.raises(Exception, match="Type-check"):
        rotate(normal(1, 2, 5, 8), rope_tables(small(), torch.arange(4)[None]))  # a table for 4 tokens, not 5

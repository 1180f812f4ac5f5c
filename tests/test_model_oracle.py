"""babyllama/model.py against transformers.LlamaForCausalLM: the same logits and the same gradients.

Both get the same weights, all from Normal(0, 0.15) and gains about 1. Such weights make attention sharp, so a
wrong layout, mask or frequency is an error as large as the logits; with the usual 0.02 it hides in the noise.
Equal means: the largest difference in a tensor is at most 1e-5 of the largest number in it.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from weights import randomised

from babyllama.model import Config, Llama, RMSNorm, RopeScaling, rope_frequencies, rope_tables

TOLERANCE = 1e-5

HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_up": "mlp.up_proj",
    "feed_forward.w_down": "mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}

SIZES: dict[str, Any] = dict(vocab_size=199, dim=96, n_layers=2, n_heads=6, hidden_dim=160, max_seq_len=512)
LLAMA3_8 = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=64)
LLAMA3_32 = RopeScaling(kind="llama3", factor=32.0, original_max_seq_len=64)
LINEAR = RopeScaling(kind="linear", factor=4.0)
CASES: dict[str, dict[str, Any]] = {
    "MHA": {},
    "MHA tied": dict(tie_embeddings=True),
    "GQA 6/2": dict(n_kv_heads=2),
    "GQA 6/2 tied": dict(n_kv_heads=2, tie_embeddings=True),
    "GQA 12/4": dict(n_heads=12, n_kv_heads=4),
    "one key head": dict(n_kv_heads=1),
    "wide heads": dict(n_kv_heads=2, head_dim=32),  # 6 * 32 is more than dim
    "narrow heads": dict(n_kv_heads=3, head_dim=10),  # 6 * 10 is less
    "theta 500000": dict(n_kv_heads=2, rope_theta=500000.0),
    "linear": dict(n_kv_heads=2, rope_scaling=LINEAR),
    "llama3 by 8": dict(n_kv_heads=2, rope_theta=500000.0, rope_scaling=LLAMA3_8),
    "llama3 by 32": dict(n_kv_heads=2, rope_theta=500000.0, rope_scaling=LLAMA3_32, tie_embeddings=True),
    "eps 1e-6": dict(norm_eps=1e-6),
}


def hf_name(ours: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = ours.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"model.layers.{parts[1]}.{HF_NAMES['.'.join(parts[2:])]}.weight"
    return HF_NAMES[parts[0]] + ".weight"


def hf_config(config: Config, **changes: Any) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope["rope_type"] = config.rope_scaling.kind
        rope["factor"] = config.rope_scaling.factor
        if config.rope_scaling.kind == "llama3":
            rope["low_freq_factor"] = config.rope_scaling.low_freq_factor
            rope["high_freq_factor"] = config.rope_scaling.high_freq_factor
            rope["original_max_position_embeddings"] = config.rope_scaling.original_max_seq_len
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        **changes,
    )


def pair(config: Config, seed: int, attention: str = "eager") -> tuple[Llama, LlamaForCausalLM]:
    """Our model and theirs, with the same weights."""
    ours = Llama(config, seed=None)
    randomised(ours, seed=seed, gain=1.0)
    theirs = LlamaForCausalLM(hf_config(config, attn_implementation=attention))
    parameters = dict(theirs.named_parameters())
    assert len(parameters) == len(list(ours.parameters()))
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            assert parameters[hf_name(name)].shape == weight.shape, name
            parameters[hf_name(name)].copy_(weight)
    return ours, theirs


def random_tokens(config: Config, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("fused", [False, True], ids=["written-out", "fused"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case: str, seed: int, fused: bool) -> None:
    config = Config(**(SIZES | CASES[case]))
    ours, theirs = pair(config, seed)
    tokens = random_tokens(config, 2, 161, seed)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    logits, expected = ours(inputs, fused=fused), theirs(inputs, use_cache=False).logits
    assert difference(logits, expected) <= TOLERANCE

    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), targets.flatten()).backward()
    parameters = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        gradient, expected = weight.grad, parameters[hf_name(name)].grad
        assert gradient is not None and expected is not None, name
        assert expected.abs().max() > 1e-4, f"{name}: a gradient of nothing shows nothing"
        assert difference(gradient, expected) <= TOLERANCE, name


def test_these_weights_show_a_missing_permutation() -> None:
    """The check on the check: pairs laid out as neighbours, instead of halves, differ by as much as the logits."""
    config = Config(**(SIZES | CASES["GQA 6/2"]))
    ours, theirs = pair(config, 0)
    tokens = random_tokens(config, 2, 160, 0)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if name.endswith(("wq.weight", "wk.weight")):
                halves = weight.view(-1, 2, config.head_dim // 2, config.dim)
                weight.copy_(halves.transpose(1, 2).reshape(weight.shape))
        wrong = ours(tokens)
        right = theirs(tokens, use_cache=False).logits
    assert difference(wrong, right) > 0.5
    assert (wrong.argmax(-1) == right.argmax(-1)).float().mean() < 0.5


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim, theta", [(64, 500000.0), (128, 500000.0), (48, 10000.0)])
def test_llama3_frequencies_equal_transformers_bit_for_bit(
    factor: float, head_dim: int, theta: float
) -> None:
    scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)
    config = Config(**SIZES | dict(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config(config), device=torch.device("cpu"))
    assert torch.equal(rope_frequencies(config), expected)
    unscaled = rope_frequencies(Config(**SIZES | dict(head_dim=head_dim, rope_theta=theta)))
    kinds = {"kept": expected == unscaled, "divided": expected == unscaled / factor}
    assert kinds["kept"].any() and kinds["divided"].any() and not (kinds["kept"] | kinds["divided"]).all()


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_linear_frequencies_equal_transformers_bit_for_bit(factor: float) -> None:
    config = Config(**SIZES | dict(rope_scaling=RopeScaling(kind="linear", factor=factor)))
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](hf_config(config), device=torch.device("cpu"))
    assert torch.equal(rope_frequencies(config), expected)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
def test_cos_and_sin_equal_transformers_bit_for_bit(theta: float) -> None:
    config = Config(**SIZES | dict(rope_theta=theta))
    positions = torch.tensor([[0, 1, 2, 511, 2048, 8191, 100_000]])
    rotary = LlamaRotaryEmbedding(hf_config(config))
    expected_cos, expected_sin = rotary(torch.zeros(1), positions)
    cos, sin = rope_tables(config, positions)
    assert torch.equal(cos, expected_cos[..., : config.head_dim // 2])
    assert torch.equal(sin, expected_sin[..., : config.head_dim // 2])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_logits_beyond_the_original_context_equal_transformers(factor: float) -> None:
    """Positions 8192 and later, where a missing or a wrong scaling has turned the slow pairs too far."""
    scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)
    config = Config(
        vocab_size=64, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, rope_theta=500000.0, rope_scaling=scaling
    )
    ours, theirs = pair(config, 0, attention="sdpa")
    tokens = random_tokens(config, 1, 8192 + 64, 0)
    with torch.no_grad():
        logits = ours(tokens)[:, 8192:]
        expected = theirs(tokens, use_cache=False, logits_to_keep=64).logits
    assert difference(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_rmsnorm_equals_transformers_bit_for_bit(size: float, eps: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(256, eps), LlamaRMSNorm(256, eps)
    randomised(nn.ModuleDict({"norm": ours}), gain=1.0)
    theirs.load_state_dict(ours.state_dict())
    x = (size * torch.randn(4, 33, 256)).to(dtype)
    assert torch.equal(ours.to(dtype)(x), theirs.to(dtype)(x))

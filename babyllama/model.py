"""Llama, whole: token ids in, logits out. Nothing here is about training, sampling or files.

    tokens ─ embedding ─ block × n_layers ─ RMSNorm ─ lm_head ─ logits
                           ├─ x + attention(RMSNorm(x))       tokens look at the tokens before them
                           └─ x + feed_forward(RMSNorm(x))    each token is worked on by itself

The letters of every shape in this project:
    B  sequences in a batch              V  entries of the vocabulary         H   query heads
    T  tokens in this call               D  width of the residual stream      K   key/value heads
    S  tokens attended to (cache + T)    F  width inside the feed-forward     hd  width of a head
A # before a letter allows 1 in its place, a * allows any number of axes.

Sources: [Llama] arXiv:2302.13971  [Llama 3] arXiv:2407.21783  [Attention] arXiv:1706.03762
         [GQA] arXiv:2305.13245  [RMSNorm] arXiv:1910.07467  [RoPE] arXiv:2104.09864  [GLU] arXiv:2002.05202
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from babyllama.errors import UsageError


# ---- sizes ---------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a context longer than the first one: see rope_frequencies."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _require(self, "kind", self.kind in ("linear", "llama3"), "must be linear or llama3")
        _require_positive(self)
        rule = f"must be above low_freq_factor ({self.low_freq_factor})"
        _require(self, "high_freq_factor", self.high_freq_factor > self.low_freq_factor, rule)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of one Llama. A 0 means "derive it"; once made, every field holds its real value."""

    vocab_size: int  # V
    dim: int  # D, for example 4096
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int = 0  # K: H / K query heads share one key and one value. 0: as many as n_heads
    head_dim: int = 0  # hd. 0: dim / n_heads
    hidden_dim: int = 0  # F. 0: hidden_width(dim)
    max_seq_len: int = 2048  # tokens; the context the model was made for
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False  # True: the embedding matrix is the output matrix too

    def __post_init__(self) -> None:
        fits = self.head_dim or self.n_heads < 1 or self.dim % self.n_heads == 0
        _require(self, "dim", fits, f"must be a multiple of n_heads ({self.n_heads})")
        derive = partial(object.__setattr__, self)  # the one moment a frozen dataclass may be written
        derive("n_kv_heads", self.n_kv_heads or self.n_heads)
        derive("head_dim", self.head_dim or self.dim // max(self.n_heads, 1))
        derive("hidden_dim", self.hidden_dim or hidden_width(self.dim))
        _require_positive(self)
        fits = self.n_heads % self.n_kv_heads == 0
        _require(self, "n_kv_heads", fits, f"must divide n_heads ({self.n_heads})")
        _require(self, "head_dim", self.head_dim % 2 == 0, "must be even, since RoPE turns pairs")


def hidden_width(dim: int, multiple_of: int = 32, ffn_dim_multiplier: float = 1.0) -> int:
    """F by Llama's rule: 2/3 · 4 · dim, times a multiplier, rounded up to a multiple (Llama's own: 256 and more).

    Two thirds, because SwiGLU has three matrices where a plain feed-forward of width 4 · dim has two.
    """
    return multiple_of * math.ceil(int(ffn_dim_multiplier * int(2 * 4 * dim / 3)) / multiple_of)


# ---- looking inside ------------------------------------------------------------------------------

Tap = Callable[[str, Tensor], Tensor]  # is shown a value by its name; what it returns is used from there on
LAYER_TAPS = (
    "attention_norm.input", "attention_norm.output",  # (B, T, D)
    "attention.q", "attention.k", "attention.v",  # (B, H|K, T, hd)
    "attention.q_rotated", "attention.k_rotated",  # (B, H|K, T, hd)
    "attention.scores", "attention.masked_scores", "attention.weights",  # (B, H, T, S)
    "attention.heads",  # (B, H, T, hd)
    "attention.output", "after_attention",  # (B, T, D)
    "ffn_norm.input", "ffn_norm.output",  # (B, T, D)
    "feed_forward.gate", "feed_forward.up", "feed_forward.product",  # (B, T, F)
    "feed_forward.output", "after_feed_forward",  # (B, T, D)
)  # fmt: skip


def tap_names(config: Config) -> list[str]:
    """The name of every intermediate value, in the order in which a forward pass produces them."""
    layers = [f"layers.{i}.{name}" for i in range(config.n_layers) for name in LAYER_TAPS]
    return ["embeddings", *layers, "norm.input", "norm.output", "logits"]


def no_tap(name: str, tensor: Tensor) -> Tensor:
    """Look at nothing, change nothing: the tap of a model that is only run."""
    return tensor


def inside(tap: Tap, place: str) -> Tap:
    """The same tap for a part of the model: its names get the place in front: "layers.0.attention.q"."""
    return tap if tap is no_tap else lambda name, tensor: tap(f"{place}.{name}", tensor)


# ---- RMSNorm -------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain, for each token by itself.

    LayerNorm without the mean and the bias: only the vector's length is normalised. Computed in float32 and
    rounded before the gain is applied, as Llama does. Source: [RMSNorm].
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


# ---- RoPE ----------------------------------------------------------------------------------------

Rope = tuple[Float[Tensor, "#B T half"], Float[Tensor, "#B T half"]]  # cos and sin; half = hd/2


def rope_frequencies(config: Config) -> Float[Tensor, " half"]:
    """Radians per token by which each pair of dimensions turns: theta^(-2i/hd), from 1 to nearly 1/theta.

    linear: every frequency is divided by `factor`. llama3: a pair that makes more than high_freq_factor turns
    within the original context is kept, one that makes fewer than low_freq_factor is divided by `factor`, and
    those between are blended. Source: [RoPE]; [Llama 3].
    """
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_seq_len / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_tables(config: Config, positions: Int[Tensor, "B T"]) -> Rope:
    """cos and sin of position · frequency; made anew in each pass, so never too short, rounded or stale."""
    angles = positions[..., None].float() * rope_frequencies(config).to(positions.device)  # (B, T, hd/2)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B N T hd"], rope: Rope) -> Float[Tensor, "B N T hd"]:
    """Turn each pair (x[i], x[i + hd/2]) by its angle.

    A rotation keeps lengths, and <R(m) q, R(n) k> = <q, R(n - m) k>: the score of a query at m and a key at n
    knows their distance and nothing else, though no position was added to anything. Source: [RoPE], whose
    pairs are neighbours (2i, 2i + 1); pairs of halves are the layout of Hugging Face's files, and ours.
    """
    cos, sin = rope[0][:, None], rope[1][:, None]  # (B, 1, T, hd/2): the same for every head
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---- attention -----------------------------------------------------------------------------------
@runtime_checkable
class Cache(Protocol):
    """Keys and values of earlier tokens. A token's slot is its position, so rows may differ in length."""

    lengths: Int[Tensor, " B"]  # tokens of each row before this call

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, hd) from slot lengths[b] on; give slots 0 .. S-1, S = max(lengths) + T."""
        ...


class Call(NamedTuple):
    """What all layers share in one forward pass."""

    rope: Rope
    mask: Tensor | None  # (#B, 1, T, S), True where a query may look; None: at every slot up to its own
    cache: Cache | None
    attention: Callable[..., Tensor]  # one of the two below


def attend(
    q: Float[Tensor, "B H T hd"], k: Float[Tensor, "B K S hd"], v: Float[Tensor, "B K S hd"],
    mask: Bool[Tensor, "#B 1 T S"], tap: Tap = no_tap,
) -> Float[Tensor, "B H T hd"]:  # fmt: skip
    """softmax(q kᵀ / √hd) v over what the mask lets through. Source: [Attention], equation 1; [GQA]."""
    sharing = q.shape[1] // k.shape[1]  # query heads to one key and value
    k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)  # (B, H, S, hd)
    scores = tap("scores", q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))  # (B, H, T, S)
    scores = tap("masked_scores", scores.masked_fill(~mask, -math.inf))
    weights = tap("weights", scores.float().softmax(dim=-1).to(v.dtype))  # those of one query sum to 1
    return weights @ v  # (B, H, T, hd)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tap: Tap = no_tap) -> Tensor:
    """The same in one call of PyTorch, which never stores the scores."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """A token asks (q); it and those before it answer how well they match (k) and with what (v)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], call: Call, tap: Tap) -> Float[Tensor, "B T D"]:
        B, T, _ = x.shape
        q = tap("q", self.wq(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, H, T, hd)
        k = tap("k", self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, hd)
        v = tap("v", self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, hd)
        q, k = tap("q_rotated", rotate(q, call.rope)), tap("k_rotated", rotate(k, call.rope))
        if call.cache is not None:
            k, v = call.cache.append(self.layer, k, v)  # (B, K, S, hd): of all tokens so far
        heads = tap("heads", call.attention(q, k, v, call.mask, tap))  # (B, H, T, hd)
        return tap("output", self.wo(heads.transpose(1, 2).reshape(B, T, -1)))


# ---- SwiGLU --------------------------------------------------------------------------------------
class FeedForward(nn.Module):
    """w_down(silu(w_gate x) · w_up x), with silu(g) = g · sigmoid(g).

    The gate says, for each of F features and by a smooth curve, how much of `up` gets through. Source: [GLU].
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w_gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], tap: Tap) -> Float[Tensor, "B T D"]:
        gate, up = tap("gate", self.w_gate(x)), tap("up", self.w_up(x))  # (B, T, F)
        return tap("output", self.w_down(tap("product", F.silu(gate) * up)))


# ---- the whole -----------------------------------------------------------------------------------
class Block(nn.Module):
    """One layer: two branches read the residual stream through a norm, and each adds what it found."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Float[Tensor, "B T D"], call: Call, tap: Tap) -> Float[Tensor, "B T D"]:
        normed = tap("attention_norm.output", self.attention_norm(tap("attention_norm.input", x)))
        x = tap("after_attention", x + self.attention(normed, call, inside(tap, "attention")))
        normed = tap("ffn_norm.output", self.ffn_norm(tap("ffn_norm.input", x)))
        return tap("after_feed_forward", x + self.feed_forward(normed, inside(tap, "feed_forward")))


class Llama(nn.Module):
    """For each token of each row, the logits of the token after it."""

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # what PyTorch fills new matrices with is overwritten below
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.lm_head = None
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if seed is not None:  # None: a loader will fill the weights
            self.init_weights(seed)

    def forward(
        self, tokens: Int[Tensor, "B T"], cache: Cache | None = None, tap: Tap = no_tap, fused: bool = True
    ) -> Float[Tensor, "B T V"]:
        """`fused` takes PyTorch's attention; a tap the written-out one, since only that has scores."""
        return tap("logits", self.head(self.residual(tokens, cache, tap, fused)))  # (B, T, V)

    def residual(
        self, tokens: Int[Tensor, "B T"], cache: Cache | None = None, tap: Tap = no_tap, fused: bool = True
    ) -> Float[Tensor, "B T D"]:
        """The residual stream behind the last block, normed: all but the head, for those who want few logits."""
        T = tokens.shape[1]
        fused = fused and tap is no_tap
        start = tokens.new_zeros(1) if cache is None else cache.lengths
        positions = start[:, None] + torch.arange(T, device=tokens.device)  # (#B, T)
        mask = None
        if cache is not None or not fused:
            slots = torch.arange(int(start.max()) + T, device=tokens.device)  # (S,)
            mask = (slots <= positions[..., None])[:, None]  # row t: slots up to its own
        call = Call(rope_tables(self.config, positions), mask, cache, attend_fused if fused else attend)

        x = tap("embeddings", self.tok_embeddings(tokens))  # (B, T, D): the residual stream
        for i, layer in enumerate(self.layers):
            x = layer(x, call, inside(tap, f"layers.{i}"))
        return tap("norm.output", self.norm(tap("norm.input", x)))

    def head(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        return F.linear(x, self.tok_embeddings.weight if self.lm_head is None else self.lm_head.weight)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices from Normal(0, init_std), gains 1: a function of the seed and the sizes, nothing else."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, init_std(name, weight.shape), generator=generator)


def init_std(name: str, shape: tuple[int, ...]) -> float:
    """Spread of a new matrix (out, in), our choice: 0 for the two that write into the residual stream, so that a block
    begins as the identity; else GPT-2's 0.02, or less for the vocabulary's in a wide model, so that all tokens begin
    about alike."""
    if name.endswith(("attention.wo.weight", "feed_forward.w_down.weight")):
        return 0.0
    if name in ("tok_embeddings.weight", "lm_head.weight"):
        return min(0.02, 2 / shape[1])
    return 0.02


def _require(sizes: object, name: str, holds: object, rule: str) -> None:
    if not holds:
        raise UsageError("E102", name, f"{name} ({getattr(sizes, name)}) {rule}", f"choose another {name}")


def _require_positive(sizes: object) -> None:
    for name, value in vars(sizes).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            _require(sizes, name, 0 < value < math.inf, "must be above 0")

"""What a Config costs, by component: parameters, floating-point operations, bytes. Arithmetic only, no torch.

Conventions, the same everywhere in the project:

- One multiply-add is two floating-point operations (FLOPs). Only matrix products are counted; norms,
  rotations, softmax and silu are not.
- The product of a vector with an (m, n) matrix is 2 m n FLOPs, so one token forward costs 2 FLOPs per
  matrix parameter. Looking a token up in the embedding is no product and costs nothing; the head, tied or
  not, is one.
- Attention compares each token with all T of its context: the full T x T square is counted, the half that
  the causal mask throws away is not subtracted. Scores and weighted sum are 2 n_heads head_dim T each.
- Backward costs twice as much as forward. So training on one token costs
  6 (matrices + head) + 12 n_layers n_heads head_dim T.

Source: [Scaling] arXiv:2001.08361, section 2.1; [PaLM] arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from babyllama.errors import UsageError

if TYPE_CHECKING:
    from babyllama.model import Config

FLOAT32, INT64 = 4, 8  # bytes
QUERIES = 256  # positions whose scores train/cpu.py computes at once: none above the last of them


class _Sum:
    """A frozen dataclass of numbers that belong together; `total` is their sum."""

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Component -> number, in the order of the forward pass."""
        return dict(vars(self))


@dataclass(frozen=True)
class Parameters(_Sum):
    """Trainable numbers. With a tied head the matrix is counted once, as the embedding, and `head` is 0."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def matrices(self) -> int:
        """Those of the blocks that take part in a product for every token: attention and feed-forward."""
        return self.attention + self.feed_forward


@dataclass(frozen=True)
class Flops(_Sum):
    """FLOPs for one token. `attention_scores`, the scores and the weighted sum, grows with the context."""

    attention_matrices: int
    attention_scores: int
    feed_forward: int
    head: int


@dataclass(frozen=True)
class TrainingBytes(_Sum):
    """Bytes held while training: see training_bytes for what is exact."""

    weights: int  # in float32, once
    gradients: int  # and, on a CPU, the part that each worker computes of them
    optimizer: int  # its memory between steps, and the average of the weights
    activations: int  # everything else that a step computes with


@dataclass(frozen=True)
class Costs:
    """What one Config costs with `batch_size` sequences of `context` tokens."""

    batch_size: int
    context: int
    parameters: Parameters
    forward_flops: Flops
    training_flops: Flops
    training_bytes: TrainingBytes
    cache_bytes: int


def costs(config: Config, batch_size: int = 1, context: int = 0) -> Costs:
    """All of the functions below at once. `context` 0 means the config's max_seq_len.

    Raises UsageError E102 when batch_size or context is below 1.
    """
    context = config.max_seq_len if context == 0 else context
    return Costs(
        batch_size=batch_size,
        context=context,
        parameters=parameters(config),
        forward_flops=forward_flops(config, context),
        training_flops=training_flops(config, context),
        training_bytes=training_bytes(config, batch_size, context),
        cache_bytes=cache_bytes(config, batch_size, context),
    )


def block_parameters(config: Config) -> dict[str, int]:
    """Parameters of one block, by the name of the weight, in the order of the forward pass."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "attention_norm": c.dim,
        "wq": c.dim * queries,
        "wk": c.dim * keys,
        "wv": c.dim * keys,
        "wo": queries * c.dim,
        "ffn_norm": c.dim,
        "w_gate": c.dim * c.hidden_dim,
        "w_up": c.dim * c.hidden_dim,
        "w_down": c.hidden_dim * c.dim,
    }


def parameters(config: Config) -> Parameters:
    """Numbers to train; the total equals `sum(p.numel() for p in model.parameters())`."""
    block = block_parameters(config)
    table = config.vocab_size * config.dim
    return Parameters(
        embedding=table,
        attention=config.n_layers * sum(block[name] for name in ("wq", "wk", "wv", "wo")),
        feed_forward=config.n_layers * sum(block[name] for name in ("w_gate", "w_up", "w_down")),
        norms=config.n_layers * (block["attention_norm"] + block["ffn_norm"]) + config.dim,
        head=0 if config.tie_embeddings else table,
    )


def forward_flops(config: Config, context: int) -> Flops:
    """FLOPs to push one token, with `context` tokens to attend to, through the model.

    The same for one token of a training batch of that context and for one token generated after context - 1
    others.
    """
    _check("context", context)
    n = parameters(config)
    return Flops(
        attention_matrices=2 * n.attention,
        attention_scores=4 * config.n_layers * config.n_heads * config.head_dim * context,
        feed_forward=2 * n.feed_forward,
        head=2 * config.vocab_size * config.dim,
    )


def training_flops(config: Config, context: int) -> Flops:
    """FLOPs to train on one token: forward, and twice that backward (for the inputs and for the weights)."""
    return Flops(**{name: 3 * number for name, number in forward_flops(config, context).as_dict().items()})


def training_bytes(
    config: Config,
    batch_size: int,
    context: int,
    *,
    device: str = "cpu",
    workers: int = 1,
    bytes_per_number: int = FLOAT32,
    optimizer: str = "adamw",
    average: bool = False,
    embedding_norm: bool = False,
) -> TrainingBytes:
    """Bytes that training holds between steps and within one.

    workers           threads that take rows of the batch, where the device is the CPU
    bytes_per_number  of what is multiplied: 4 in float32, 2 in bfloat16
    optimizer         "adamw" remembers two numbers for each parameter, "muon" one for each of a matrix
    average           whether an average of the weights is kept
    embedding_norm    whether the token vectors are normalised

    On a CPU these are all tensors that train/cpu.py makes and holds to the end of the run: exact, but for the free row
    behind each (cpu.buffer). Elsewhere `activations` is an estimate, in float32, of what PyTorch keeps for its own
    differentiation; products in bfloat16 mostly keep less. Not counted: what lives for a moment, and what a scoring of
    validation text takes in between.
    """
    _check("batch_size", batch_size)
    _check("context", context)
    _check("workers", workers)
    n = parameters(config)
    if device == "cpu":
        workers = min(workers, batch_size)
        multiplied = n.matrices + config.vocab_size * config.dim
        gradients = FLOAT32 * n.total + bytes_per_number * workers * multiplied
        activations = bytes_per_number * multiplied  # the matrices as they are multiplied with
        activations += FLOAT32 * config.vocab_size * (2 * config.dim + 1) if embedding_norm else 0
        activations += _buffers(config, batch_size, context, workers, bytes_per_number)
    else:
        gradients, activations = FLOAT32 * n.total, _kept_by_autograd(config, batch_size, context)
    return TrainingBytes(
        weights=FLOAT32 * n.total,
        gradients=gradients,
        optimizer=FLOAT32 * (_remembered(config, optimizer) + average * n.total),
        activations=activations,
    )


def _remembered(config: Config, optimizer: str) -> int:
    """Numbers that an optimiser keeps from step to step."""
    n, c = parameters(config), config
    if optimizer == "adamw":
        return 2 * n.total
    rows = 2 * c.dim + 2 * c.hidden_dim + (c.n_heads + 2 * c.n_kv_heads) * c.head_dim  # of a block's matrices
    return n.matrices + c.n_layers * rows + 2 * (n.total - n.matrices)


def _buffers(config: Config, batch_size: int, context: int, workers: int, bytes_per_number: int) -> int:
    """Bytes of what the workers of the step on a CPU write into, from the tokens to the gradient of the logits.

    In float32: the residual stream before each norm with its root mean square, and its gradient. In the precision of
    the products, of every layer until its gradient is due: what each norm gives, q, k, v, the attention weights, the
    heads, gate, up and their product; and once, used again by each layer: their gradients, the branch, the logits.
    """
    c, L, D, F = config, config.n_layers, config.dim, config.hidden_dim
    states, heads, keys = 2 * L + 1, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    exact = states * (D + 1) + D
    kept = states * D + L * (2 * heads + 2 * keys + 3 * F)
    used_again = 3 * D + F + 4 * heads + 4 * keys + c.vocab_size
    per_token = 2 * INT64 + FLOAT32 * exact + bytes_per_number * (kept + used_again)
    blocks = [(begin, min(begin + QUERIES, context)) for begin in range(0, context, QUERIES)]
    weights = (L + 1) * c.n_heads * sum((end - begin) * end for begin, end in blocks)  # of one row
    per_worker = FLOAT32 * (states * D + max(context, c.vocab_size) + context * c.head_dim)
    return batch_size * (context * per_token + bytes_per_number * weights) + workers * per_worker


def _kept_by_autograd(config: Config, batch_size: int, context: int) -> int:
    """Bytes at the fullest moment of PyTorch's differentiation, the start of backward, with fused attention, which
    keeps no T x T scores.

    For each token and block: 6 vectors of width dim (around the two norms), the rotated queries, the heads' output
    twice, the rotated keys, the values, and 4 vectors of width hidden_dim (gate, silu(gate), up, their product). For
    each token besides: 3 vectors of width dim (the last norm), the logits, their log-softmax and the gradient of the
    logits.
    """
    c = config
    heads = 3 * c.n_heads * c.head_dim + 2 * c.n_kv_heads * c.head_dim
    per_block = 6 * c.dim + heads + 4 * c.hidden_dim
    return FLOAT32 * batch_size * context * (c.n_layers * per_block + 3 * c.dim + 3 * c.vocab_size)


def cache_bytes(config: Config, batch_size: int, context: int, bytes_per_number: int = FLOAT32) -> int:
    """Bytes of the keys and values of `context` tokens in every block, for `batch_size` sequences."""
    _check("batch_size", batch_size)
    _check("context", context)
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return bytes_per_number * batch_size * context * per_token


def _check(name: str, value: int) -> None:
    if value < 1:
        raise UsageError("E102", name, f"is {value}, expected at least 1", f"choose a larger {name}")


def block_drawing(config: Config) -> str:
    """One block as a drawing of at most 78 columns, with the config's real widths and parameter counts.

    The line at the left is the residual stream; each branch reads it through a norm and adds its result
    back.
    """
    c = config
    counts = block_parameters(config)
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    group = c.n_heads // c.n_kv_heads
    shared = f"   each k, v for {group} query heads" if group > 1 else ""
    wide = max(len(str(width)) for width in (c.dim, c.hidden_dim, queries))

    def heads(n: int) -> str:
        return f"{n} head{'s' * (n > 1)} of {c.head_dim}"

    def norm(name: str) -> tuple[str, str]:
        return f"{name}  {c.dim}", f"{counts[name]:,}"

    def product(name: str, n_in: int, n_out: int, note: str = "") -> tuple[str, str]:
        return f"{name:<6}  {n_in:>{wide}} → {n_out:<{wide}}  {note}", f"{counts[name]:,}"

    def branch(title: str, *rows: tuple[str, str]) -> list[str]:
        top = f" ├──►┌─ {title} ".ljust(61, "─") + "┐"
        return [
            top,
            *(f" │   │ {text:<54}│{count:>16}" for text, count in rows),
            " ⊕◄──└" + "─" * 55 + "┘",
            " │",
        ]

    stream = f" x   (B, T, {c.dim})"
    lines = [
        f"{stream}{f'block 1 of {c.n_layers}':>{62 - len(stream)}}{'parameters':>16}",
        " │",
        *branch(
            "attention",
            norm("attention_norm"),
            product("wq", c.dim, queries, f"{heads(c.n_heads)}, rotated"),
            product("wk", c.dim, keys, f"{heads(c.n_kv_heads)}, rotated"),
            product("wv", c.dim, keys, heads(c.n_kv_heads)),
            (f"softmax(q kᵀ / √{c.head_dim}) v{shared}", ""),
            product("wo", queries, c.dim),
        ),
        *branch(
            "feed_forward",
            norm("ffn_norm"),
            product("w_gate", c.dim, c.hidden_dim),
            product("w_up", c.dim, c.hidden_dim),
            ("silu(gate) · up", ""),
            product("w_down", c.hidden_dim, c.dim),
        ),
        f" ▼{'one block':>60}{sum(counts.values()):>16,}",
    ]
    return "\n".join(line.rstrip() for line in lines)

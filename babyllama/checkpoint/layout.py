"""Two orders for the rows of wq and wk: one function each way, for every border that needs it.

RoPE turns the hd dimensions of a head in pairs. Which two make a pair is a matter of layout. For hd = 8, with
the rows of one head named by the pair they belong to (a, b, c, d) and their part in it (1, 2):

    pairs    a1 a2 b1 b2 c1 c2 d1 d2      neighbours: row 2i with row 2i + 1
             └──┘  └──┘  └──┘  └──┘       Meta's files, llama2.c, GGUF, and the RoPE paper

    halves   a1 b1 c1 d1 a2 b2 c2 d2      across: row i with row i + hd/2
             └───────────┘                Hugging Face's files, and babyllama/model.py
                └───────────┘ ...

Rows of q and k moved in the same way leave every score q · k as it was, so a model whose file and RoPE agree
computes the same in both. If they disagree it still runs, and talks nonsense: nothing but a comparison of
numbers shows it. Values (wv) are not turned, and have no layout.

Each head is ordered by itself, so k, with fewer heads than q, must be given its own number of heads.
"""

from jaxtyping import Shaped
from torch import Tensor

from babyllama.model import Config


def pairs_to_halves(weight: Shaped[Tensor, "rows *rest"], n_heads: int) -> Shaped[Tensor, "rows *rest"]:
    """wq (with n_heads) or wk (with n_kv_heads) of Meta, llama2.c or GGUF, for the RoPE of babyllama.model."""
    rows = weight.shape[0]
    assert rows % (2 * n_heads) == 0, f"{rows} rows are not {n_heads} heads of an even width"
    by_pair = weight.reshape(n_heads, rows // n_heads // 2, 2, *weight.shape[1:])  # (heads, hd/2, 2, ...)
    return by_pair.transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight: Shaped[Tensor, "rows *rest"], n_heads: int) -> Shaped[Tensor, "rows *rest"]:
    """The way back: wq or wk of babyllama.model, for Meta, llama2.c or GGUF."""
    rows = weight.shape[0]
    assert rows % (2 * n_heads) == 0, f"{rows} rows are not {n_heads} heads of an even width"
    by_half = weight.reshape(n_heads, 2, rows // n_heads // 2, *weight.shape[1:])  # (heads, 2, hd/2, ...)
    return by_half.transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config: Config) -> int:
    """How many heads the rows of the tensor of this name (ours) are ordered by; 0: they are not."""
    if name.endswith("attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.wk.weight") else 0

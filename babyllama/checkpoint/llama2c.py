"""llama2.c's model.bin, version 0: a header of seven int32, then every weight as float32, nothing in between.

    dim  hidden_dim  n_layers  n_heads  n_kv_heads  vocab_size  max_seq_len     little-endian; vocab_size is
                                                                                negative if the head is untied
    tok_embeddings  (V, D)          Matrices of one kind stand together, layer after layer.
    attention_norm  (L, D)          Rows of wq and wk are in pairs: see layout.py.
    wq wk wv wo     (L, out, in)
    ffn_norm        (L, D)
    w1 w2 w3        (L, out, in)    gate, down, up, in this order
    norm            (D)
    cos, sin        (S, hd/2) each  tables of RoPE, once; skipped, since the model makes its own
    lm_head         (V, D)          only if untied

The header has no place for head_dim, rope_theta and norm_eps: they are dim / n_heads, 10000 and 1e-5.
Source: https://github.com/karpathy/llama2.c, run.c and export.py
"""

import math
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from babyllama.checkpoint.layout import pairs_to_halves
from babyllama.errors import InputError, MachineError
from babyllama.model import Config

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432  # "ak42": versions 1 and 2 begin with it
SKIPPED = "tables of RoPE"


def read_llama2c(path: str | Path) -> tuple[Config, dict[str, Tensor]]:
    """The model's sizes and its weights, named and laid out as in babyllama.model.

    Raises InputError E209 where the file is not a model.bin of version 0, with its size as computed from the
    header and as found; E201 where there is no such file; MachineError E403 where it may not be read.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError("E201", path, "there is no such file", "give the path of a llama2.c model.bin")
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except PermissionError as error:
        raise MachineError("E403", path, "may not be read", "allow it, as with chmod u+r") from error
    config = _read_header(path, header, size)
    kinds = _kinds(config)
    computed = HEADER.size + 4 * sum(count * math.prod(shape) for _, count, shape in kinds)
    if size != computed:
        _refuse(path, f"has {size} bytes; its header asks for {computed}", "copy or download it again")

    numbers = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    weights: dict[str, Tensor] = {}
    start = 0
    for name, count, shape in kinds:
        for layer in range(count):
            stop = start + math.prod(shape)
            if name != SKIPPED:
                weight = torch.from_numpy(numbers[start:stop].reshape(shape).astype(np.float32))
                if name.endswith("attention.wq.weight"):
                    weight = pairs_to_halves(weight, config.n_heads)
                if name.endswith("attention.wk.weight"):
                    weight = pairs_to_halves(weight, config.n_kv_heads)
                weights[name.format(layer)] = weight
            start = stop
    return config, weights


def _read_header(path: Path, header: bytes, size: int) -> Config:
    if len(header) < HEADER.size:
        _refuse(
            path, f"has {size} bytes, fewer than the {HEADER.size} of a header", "copy or download it again"
        )
    numbers = HEADER.unpack(header)
    if numbers[0] == MAGIC:
        found = f"version {numbers[1]} of llama2.c's format is not supported, only version 0 is"
        _refuse(path, found, "export the model again with llama2.c's export.py --version 0")
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    sizes = dict(zip(names, numbers, strict=True))
    tied = sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    rule = None
    if min(sizes.values()) <= 0:
        rule = "every size must be above 0"
    elif sizes["dim"] % (2 * sizes["n_heads"]):
        rule = "dim must be a multiple of 2 · n_heads"
    elif sizes["n_heads"] % sizes["n_kv_heads"]:
        rule = "n_heads must be a multiple of n_kv_heads"
    if rule:
        found = f"has {size} bytes, and its header is not a model's ({rule}): {sizes}"
        _refuse(path, found, "give the path of a llama2.c model.bin")
    return Config(**sizes, tie_embeddings=tied)


def _kinds(config: Config) -> list[tuple[str, int, tuple[int, ...]]]:
    """What stands in the file, in its order: name, how many one after the other, shape of one."""
    D, F, V, L = config.dim, config.hidden_dim, config.vocab_size, config.n_layers
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    head = [] if config.tie_embeddings else [("lm_head.weight", 1, (V, D))]
    return [
        ("tok_embeddings.weight", 1, (V, D)),
        ("layers.{}.attention_norm.weight", L, (D,)),
        ("layers.{}.attention.wq.weight", L, (q_rows, D)),
        ("layers.{}.attention.wk.weight", L, (kv_rows, D)),
        ("layers.{}.attention.wv.weight", L, (kv_rows, D)),
        ("layers.{}.attention.wo.weight", L, (D, q_rows)),
        ("layers.{}.ffn_norm.weight", L, (D,)),
        ("layers.{}.feed_forward.w_gate.weight", L, (F, D)),  # w1
        ("layers.{}.feed_forward.w_down.weight", L, (D, F)),  # w2
        ("layers.{}.feed_forward.w_up.weight", L, (F, D)),  # w3
        ("norm.weight", 1, (D,)),
        (SKIPPED, 2, (config.max_seq_len, config.head_dim // 2)),
        *head,
    ]


def _refuse(path: Path, found: str, fix: str) -> NoReturn:
    raise InputError("E209", path, found, fix)

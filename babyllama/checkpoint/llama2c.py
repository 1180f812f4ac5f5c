"""llama2.c's model.bin: a header, then every weight, nothing in between. All numbers are little-endian.

    version 0   dim hidden_dim n_layers n_heads n_kv_heads vocab_size max_seq_len   seven int32; vocab_size is negative
                                                                                    if the head is untied
    version 1   "24ka"  version  the seven  one byte: tied  (up to byte 256)        float32 as in version 0
    version 2   the same, and behind the byte an int32: the size of a group         matrices of small whole numbers

Matrices of one kind stand together, layer after layer, in the order of `_kinds`. Rows of wq and wk are in pairs: see
layout.py. In version 2 a matrix is its int8 numbers, row by row, then a float32 scale for each group of so many.

The header has no place for head_dim, rope_theta and norm_eps: they are dim / n_heads, 10000 and 1e-5.
Source: https://github.com/karpathy/llama2.c, run.c, runq.c and export.py
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from babyllama.checkpoint.contents import LARGEST, Shape, Weights
from babyllama.checkpoint.folder import opened, read_part
from babyllama.checkpoint.layout import halves_to_pairs, heads_of, pairs_to_halves
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, rope_tables

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432  # versions 1 and 2 begin with it
NEW_HEADER = struct.Struct("<Ii7iBi")  # magic, version, the seven, tied, size of a group
BODY = 256  # byte at which the weights of versions 1 and 2 begin
VERSIONS = (0, 1, 2)
GROUP = 64  # numbers that share a scale, or half of it, and so on, until it divides every row
ROPE = "tables of RoPE"


def read_llama2c(path: str | Path) -> tuple[Config, Weights]:
    """The model's sizes and its weights, named and laid out as in babyllama.model.

    Raises InputError E209 where the file is not a model.bin, with its size as computed from the header and as found;
    E201 where there is no such file; MachineError E403 where it may not be read.
    """
    path = Path(path)
    with opened(path, code="E201") as (file, size):
        config, version, group = _read_header(path, file.read(NEW_HEADER.size), size)
    where: dict[str, tuple[int, Shape]] = {}
    at = HEADER.size if version == 0 else BODY
    for name, count, shape in _kinds(config, version):
        for layer in range(count):
            where[name.format(layer)] = at, shape
            at += _bytes(shape, version, group)
    if at != size:
        _refuse(path, f"has {size} bytes; its header asks for {at}", "copy or download it again")

    def read(name: str) -> Tensor:
        begin, shape = where[name]
        data = read_part(path, begin, length := _bytes(shape, version, group), code="E201")
        if len(data) < length:
            _refuse(path, f"ends inside {name}; it had been longer", "copy or download it again")
        numbers = math.prod(shape)
        if version == 2 and len(shape) == 2:
            scales = np.frombuffer(data, "<f4", offset=numbers)
            with np.errstate(over="ignore", invalid="ignore"):  # Weights says what is not finite
                found = np.frombuffer(data, np.int8, numbers).reshape(-1, group) * scales[:, None]
        else:
            found = np.frombuffer(data, "<f4")
        weight = torch.from_numpy(found.astype(np.float32).reshape(shape))
        heads = heads_of(name, config)
        return pairs_to_halves(weight, heads) if heads else weight

    return config, Weights(config, read, path)


def _read_header(path: Path, header: bytes, size: int) -> tuple[Config, int, int]:
    """Sizes, version, and numbers to a group (of versions 0 and 1: 1)."""
    if len(header) < HEADER.size:
        found = f"has {size} bytes, fewer than the {HEADER.size} of a header"
        _refuse(path, found, "copy or download it again")
    numbers, version, group = list(HEADER.unpack(header[: HEADER.size])), 0, 1
    tied = numbers[5] > 0
    if numbers[0] == MAGIC:
        if len(header) < NEW_HEADER.size:
            _refuse(path, f"has {size} bytes, fewer than a header", "copy or download it again")
        _, version, *numbers, flag, group = NEW_HEADER.unpack(header)
        if version not in (1, 2) or flag > 1:
            found = f"version {version} of llama2.c's format is not supported; 0, 1 and 2 are"
            _refuse(path, found, "export the model again with llama2.c's export.py --version 1")
        tied, group = bool(flag), group if version == 2 else 1
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    sizes = dict(zip(names, numbers, strict=True))
    if version == 0:
        sizes["vocab_size"] = abs(sizes["vocab_size"])
    rule = None
    if min(sizes.values()) <= 0:
        rule = "every size must be above 0"
    elif large := [name for name in names if sizes[name] > LARGEST[name]]:
        rule = f"{large[0]} may be {LARGEST[large[0]]:,} at most"
    elif sizes["dim"] % (2 * sizes["n_heads"]):
        rule = "dim must be a multiple of 2 · n_heads"
    elif sizes["n_heads"] % sizes["n_kv_heads"]:
        rule = "n_heads must be a multiple of n_kv_heads"
    elif group < 1 or sizes["dim"] % group or sizes["hidden_dim"] % group:
        rule = f"a group of {group} must divide dim and hidden_dim"
    if rule:
        found = f"has {size} bytes, and its header is not a model's ({rule}): {sizes}"
        _refuse(path, found, "give the path of a llama2.c model.bin")
    return Config(**sizes, tie_embeddings=tied), version, group


def _kinds(config: Config, version: int) -> list[tuple[str, int, Shape]]:
    """What stands in the file, in its order: name, how many one after the other, shape of one."""
    D, F, V, L = config.dim, config.hidden_dim, config.vocab_size, config.n_layers
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    table = [("tok_embeddings.weight", 1, (V, D))]
    attention_norms, ffn_norms = (
        [(f"layers.{{}}.{name}.weight", L, (D,))] for name in ("attention_norm", "ffn_norm")
    )
    attention = [
        ("layers.{}.attention.wq.weight", L, (queries, D)),
        ("layers.{}.attention.wk.weight", L, (keys, D)),
        ("layers.{}.attention.wv.weight", L, (keys, D)),
        ("layers.{}.attention.wo.weight", L, (D, queries)),
    ]
    feed_forward = [
        ("layers.{}.feed_forward.w_gate.weight", L, (F, D)),  # w1
        ("layers.{}.feed_forward.w_down.weight", L, (D, F)),  # w2
        ("layers.{}.feed_forward.w_up.weight", L, (F, D)),  # w3
    ]
    norm = [("norm.weight", 1, (D,))]
    head = [] if config.tie_embeddings else [("lm_head.weight", 1, (V, D))]
    if version == 0:
        rope = [(ROPE, 1, (2, config.max_seq_len, config.head_dim // 2))]  # cos and sin, once
        return [*table, *attention_norms, *attention, *ffn_norms, *feed_forward, *norm, *rope, *head]
    return [*attention_norms, *ffn_norms, *norm, *table, *attention, *feed_forward, *head]


def _bytes(shape: Shape, version: int, group: int) -> int:
    numbers = math.prod(shape)
    return numbers + 4 * numbers // group if version == 2 and len(shape) == 2 else 4 * numbers


def _refuse(path: Path, found: str, fix: str) -> NoReturn:
    raise InputError("E209", path, found, fix)


# ---- writing -------------------------------------------------------------------------------------


def llama2c_parts(config: Config, weights: Mapping[str, Tensor], version: int = 0) -> Iterator[bytes]:
    """The bytes of a model.bin, tensor by tensor.

    Raises UsageError E105 when llama2.c's format has no place for something of this model, E102 for another version.
    """
    if version not in VERSIONS:
        raise UsageError("E102", "--version", f"{version} is not a version of llama2.c's", "choose 0, 1 or 2")
    refusals = {
        f"rope_theta {config.rope_theta:g}, only for 10000": config.rope_theta != 10000.0,
        f"norm_eps {config.norm_eps:g}, only for 1e-05": config.norm_eps != 1e-5,
        "scaling of RoPE": config.rope_scaling is not None,
        "heads of another width than dim / n_heads": config.head_dim * config.n_heads != config.dim,
    }
    for what, refused in refusals.items():
        if refused:
            found = f"model.bin has no place for {what}"
            raise UsageError(
                "E105", "--to llama2c", found, "export it as gguf, or use its Hugging Face folder"
            )
    sizes = [config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads]
    sizes += [
        config.vocab_size if config.tie_embeddings or version else -config.vocab_size,
        config.max_seq_len,
    ]
    group = GROUP
    while config.dim % group or config.hidden_dim % group:
        group //= 2
    if version == 0:
        yield HEADER.pack(*sizes)
    else:
        head = NEW_HEADER.pack(MAGIC, version, *sizes, config.tie_embeddings, group if version == 2 else 0)
        yield head.ljust(BODY, b"\0")
    for name, count, _ in _kinds(config, version):
        for layer in range(count):
            if name == ROPE:
                yield from _rope(config)
                continue
            weight = weights[name.format(layer)].detach().float()
            if heads := heads_of(name, config):
                weight = halves_to_pairs(weight, heads)
            numbers = weight.contiguous().numpy()
            if version == 2 and numbers.ndim == 2:
                yield from _quantised(numbers.reshape(-1, group))
            else:
                yield numbers.astype("<f4").tobytes()


def _rope(config: Config) -> Iterator[bytes]:
    for table in rope_tables(config, torch.arange(config.max_seq_len)[None]):
        yield table.numpy().astype("<f4").tobytes()


def _quantised(groups: np.ndarray) -> Iterator[bytes]:
    """To whole numbers from -127 to 127, of which the largest magnitude of a group becomes the last."""
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    safe = np.where(scales == 0, np.float32(1), scales)
    yield np.round(groups / safe).astype(np.int8).tobytes()
    yield scales.astype("<f4").tobytes()

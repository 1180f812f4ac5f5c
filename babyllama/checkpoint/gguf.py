"""GGUF, the file of llama.cpp: metadata, a table of tensors, then their numbers, often in small blocks (blocks.py).

    "GGUF"  version  number of tensors  number of keys              u32 u64 u64, little-endian
    key  type  value                                                each key; an array is: type, length, elements
    name  number of axes  axes, innermost first  type  offset       each tensor
    (padding)  numbers                                              offsets count from here, in steps of `alignment`

Every length in the file is compared with what is left of the file before anything is made of it, so that reading takes
time and memory in proportion to the file, whatever it says. Rows of wq and wk are in pairs: see layout.py.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from babyllama.checkpoint.blocks import KINDS, Floats, Kind
from babyllama.checkpoint.contents import Refuse, Shape, Weights, compare, config_from, plain, shapes
from babyllama.checkpoint.folder import opened, read_part
from babyllama.checkpoint.hf import rename
from babyllama.checkpoint.layout import halves_to_pairs, heads_of, pairs_to_halves
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, RopeScaling, rope_frequencies

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # bytes, where general.alignment does not say otherwise
MOST_KEYS, MOST_TENSORS = 10_000, 20_000
LONGEST_TEXT, LONGEST_NAME = 2**20, 256  # bytes
MOST_TEXTS = 2**20  # in all arrays; Llama 3 has 280,147 merges and 128,256 tokens
MOST_LETTERS = 2**24  # bytes of all texts; in memory, small ones take six times as many
MOST_AXES = 4
LARGEST_TENSOR = 2**48  # numbers

FLOAT32, STRING, ARRAY = 6, 8, 9
SCALARS = {  # by the number of a type
    number: struct.Struct(f"<{letter}")
    for number, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
U32, U64 = SCALARS[4], SCALARS[10]
NUMBER_OF = {bool: 7, int: 4, float: 6, str: STRING}  # the types that values are written in


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: its axes, outermost first, and where its bytes are."""

    shape: tuple[int, ...]
    kind: Kind
    begin: int  # byte of the file
    bytes: int


class GGUF:
    """An open file: `metadata` by key, `tensors` by name. Numbers are read when they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises InputError E210 saying what is wrong and at which byte; E201 where there is no such file."""
        self.path = Path(path)
        with opened(self.path, code="E201") as (file, size):
            reader = _Reader(self.path, file, size)
            self.metadata, self.tensors = reader.metadata(), reader.tensors()

    def numbers(self, name: str) -> Floats:
        """A tensor in float32. Raises InputError E210 where the file has become shorter since it was opened."""
        stored = self.tensors[name]
        data = read_part(self.path, stored.begin, stored.bytes, code="E201")
        if len(data) < stored.bytes:
            raise _error(self.path, f"ends inside tensor {plain(name)}; it had been longer")
        return stored.kind.read(np.frombuffer(data, np.uint8)).reshape(stored.shape)


class _Reader:
    """Goes through the part of a file before the numbers, once, front to back."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0
        self.texts = self.letters = 0  # so far
        if self._take(min(4, self.size), "its first bytes") != MAGIC:
            self.refuse("does not begin with 'GGUF'")
        version = self._number(U32, "its version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            reason = "it was written for a big-endian machine" if swapped else "2 and 3 are read"
            self.refuse(f"has version {version}; {reason}")
        self.n_tensors = self._count(U64, "tensors", MOST_TENSORS)
        self.n_keys = self._count(U64, "keys", MOST_KEYS)

    def metadata(self) -> dict[str, Any]:
        """key -> value: a number, a text, or many of either; many numbers are an array."""
        found: dict[str, Any] = {}
        for _ in range(self.n_keys):
            key = self._text("a key", LONGEST_NAME)
            if not key or key in found:
                self.refuse(f"has the key {plain(key)} twice" if key else "has a key without a name")
            found[key] = self._value(key)
        self.alignment = found.get("general.alignment", ALIGNMENT)
        if type(self.alignment) is not int or not 0 < self.alignment <= 2**16 or self.alignment % 8:
            self.refuse(f"has alignment {plain(self.alignment)}, expected a multiple of 8")
        return found

    def tensors(self) -> dict[str, Stored]:
        table: dict[str, tuple[tuple[int, ...], Kind, int]] = {}
        for _ in range(self.n_tensors):
            name = self._text("the name of a tensor", LONGEST_NAME)
            if not name or name in table:
                self.refuse(f"has the tensor {plain(name)} twice" if name else "has a tensor without a name")
            axes = [
                self._number(U64, name) for _ in range(self._count(U32, f"axes of {plain(name)}", MOST_AXES))
            ]
            kind = KINDS.get(number := self._number(U32, name))
            if kind is None:
                known = ", ".join(each.name for each in KINDS.values())
                self.refuse(f"holds {plain(name)} in type {number}; known are {known}")
            table[name] = tuple(axes[::-1]), kind, self._number(U64, name)
        begin = -(-self.at // self.alignment) * self.alignment
        placed = {name: self._placed(name, *entry, begin) for name, entry in table.items()}
        for (_, one), (name, other) in pairwise(sorted(placed.items(), key=lambda each: each[1].begin)):
            if one.begin + one.bytes > other.begin:  # a small file could fill all memory
                self.refuse(f"has tensor {plain(name)} where another one still is")
        return placed

    def _placed(self, name: str, shape: tuple[int, ...], kind: Kind, offset: int, begin: int) -> Stored:
        if not shape or min(shape) < 1 or math.prod(shape) > LARGEST_TENSOR:
            self.refuse(f"has tensor {plain(name)} with shape {shape}")
        if shape[-1] % kind.numbers:
            rule = f"{kind.name} needs a multiple of {kind.numbers}"
            self.refuse(f"has tensor {plain(name)} with rows of {shape[-1]:,} numbers; {rule}")
        size = math.prod(shape) // kind.numbers * kind.bytes
        if offset % self.alignment:
            self.refuse(f"has tensor {plain(name)} at {offset:,}, no multiple of {self.alignment}")
        if (end := begin + offset + size) > self.size:
            found = f"has {self.size:,} bytes; tensor {plain(name)} would end at {end:,}"
            raise _error(self.path, found)
        return Stored(shape, kind, begin + offset, size)

    # ---- values ----------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        kind = self._number(U32, key)
        if kind == FLOAT32:
            return float(str(np.float32(self._number(SCALARS[kind], key))))  # 1e-5, not 0.00000999999975
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind == STRING:
            return self._text(key, LONGEST_TEXT)
        if kind != ARRAY:
            self.refuse(f"has {plain(key)} of type {kind}, which is none")
        inner, length = self._number(U32, key), self._number(U64, key)
        if inner == STRING:
            self.texts += length
            if self.texts > MOST_TEXTS:
                self.refuse(f"has {self.texts:,} texts up to {plain(key)}, at most {MOST_TEXTS:,} are read")
            self._has(U64.size * length, key)
            return [self._text(key, LONGEST_TEXT) for _ in range(length)]
        if inner not in SCALARS:
            self.refuse(f"has {plain(key)}, an array of type {inner}, which is not read")
        size = SCALARS[inner].size * length
        return np.frombuffer(self._take(size, key), np.dtype(SCALARS[inner].format))

    def _count(self, kind: struct.Struct, what: str, most: int) -> int:
        number = self._number(kind, f"the number of {what}")
        if number > most:
            self.refuse(f"announces {number:,} {what}, at most {most:,} are read")
        return number

    def _number(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack(self._take(kind.size, what))[0]

    def _text(self, what: str, longest: int) -> str:
        length = self._number(U64, what)
        if length > longest:
            self.refuse(f"has {length:,} bytes of text in {plain(what)}, at most {longest:,} are read")
        self.letters += length
        if self.letters > MOST_LETTERS:
            self.refuse(f"has more than {MOST_LETTERS:,} bytes of texts up to {plain(what)}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            self.refuse(f"has text in {plain(what)} that is not UTF-8")

    def _take(self, length: int, what: str) -> bytes:
        self._has(length, what)
        self.at += length
        return self.file.read(length)

    def _has(self, length: int, what: str) -> None:
        if length > self.size - self.at:
            self.refuse(f"announces {length:,} bytes of {plain(what)}, and {self.size - self.at:,} are left")

    def refuse(self, found: str) -> NoReturn:
        raise _error(self.path, f"{found} (before byte {self.at:,})")


def _error(path: Path, found: str) -> InputError:
    return InputError("E210", path, found, "copy or download it again, or use another file of this model")


# ---- a Llama in it -------------------------------------------------------------------------------

SIZES = {  # ours: theirs
    "dim": "llama.embedding_length",
    "n_layers": "llama.block_count",
    "n_heads": "llama.attention.head_count",
    "n_kv_heads": "llama.attention.head_count_kv",
    "hidden_dim": "llama.feed_forward_length",
    "max_seq_len": "llama.context_length",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "head_dim": "llama.rope.dimension_count",
}
NEEDED = ("dim", "n_layers", "n_heads", "hidden_dim", "max_seq_len", "norm_eps")
NAMES = {  # ours: theirs; N is the number of the layer
    "tok_embeddings.weight": "token_embd.weight",
    "layers.N.attention_norm.weight": "blk.N.attn_norm.weight",
    "layers.N.attention.wq.weight": "blk.N.attn_q.weight",
    "layers.N.attention.wk.weight": "blk.N.attn_k.weight",
    "layers.N.attention.wv.weight": "blk.N.attn_v.weight",
    "layers.N.attention.wo.weight": "blk.N.attn_output.weight",
    "layers.N.ffn_norm.weight": "blk.N.ffn_norm.weight",
    "layers.N.feed_forward.w_gate.weight": "blk.N.ffn_gate.weight",
    "layers.N.feed_forward.w_up.weight": "blk.N.ffn_up.weight",
    "layers.N.feed_forward.w_down.weight": "blk.N.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SINGLE = (  # no arrays
    *("general.architecture", "llama.expert_count", "split.count"),
    *("llama.attention.key_length", "llama.attention.value_length"),
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear"),
)
ROPE = "rope_freqs.weight"  # what each frequency is divided by, where RoPE is scaled as in Llama 3.1
SCALING = "llama.rope.scaling"  # the prefix of keys
OURS = "babyllama.rope.scaling"  # ... of those that llama.cpp has no place for
LLAMA3 = {
    "factor": f"{OURS}.factor",
    "low_freq_factor": f"{OURS}.low_freq_factor",
    "high_freq_factor": f"{OURS}.high_freq_factor",
    "original_max_seq_len": f"{OURS}.original_context_length",
}


def read_gguf(path: str | Path) -> tuple[Config, Weights, dict[str, Any]]:
    """The sizes, the weights and the metadata, in which the tokenizer is too (text/vocabularies.py).

    Raises InputError E210 (not a GGUF, or not of a Llama), E203 (tensors).
    """
    file = GGUF(path)

    def refuse(key: str, found: str) -> InputError:
        return _error(file.path, f"{key} {found}")

    for key in SINGLE:
        if isinstance(file.metadata.get(key), (list, np.ndarray)):
            raise refuse(key, "is an array, expected one value")
    if (kind := file.metadata.get("general.architecture")) != "llama":
        raise refuse("general.architecture", f"is {plain(kind)}, expected llama")
    if file.metadata.get("llama.expert_count"):
        raise refuse("llama.expert_count", "is above 0: a mixture of experts, which a Llama is not")
    parts = file.metadata.get("split.count")
    if type(parts) is int and parts > 1:
        fix = "join them with llama.cpp:  llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        raise InputError("E210", file.path, f"is one of {parts:,} parts of a model", fix)
    values = {ours: file.metadata[theirs] for ours, theirs in SIZES.items() if theirs in file.metadata}
    for ours in NEEDED:
        if ours not in values:
            raise refuse(SIZES[ours], "is missing")
    for ours, value in values.items():
        if isinstance(value, np.ndarray):  # a number for each layer
            if len(set(value.tolist())) != 1:
                raise refuse(SIZES[ours], "differs from layer to layer, which a Llama's does not")
            values[ours] = value.tolist()[0]
    table = file.tensors.get(NAMES["tok_embeddings.weight"])
    if table is None or len(table.shape) != 2:
        raise InputError("E203", file.path, "token_embd.weight is missing, or no matrix", "use another file")
    values |= {"vocab_size": table.shape[0], "tie_embeddings": NAMES["lm_head.weight"] not in file.tensors}
    values["rope_scaling"] = _scaling(file, refuse)
    config = config_from(values, SIZES, refuse)
    if ROPE in file.tensors:
        config = _with_frequencies(config, file, refuse)
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        if file.metadata.get(key, config.head_dim) != config.head_dim:
            raise refuse(key, f"is {plain(file.metadata[key])}, and RoPE turns {config.head_dim}")
    expected = {rename(name, NAMES): shape for name, shape in shapes(config).items()}
    there = {name: each.shape for name, each in file.tensors.items() if name != ROPE}
    compare(there, expected, file.path, "its metadata")

    def read(name: str) -> Tensor:
        weight = torch.from_numpy(file.numbers(rename(name, NAMES)))
        heads = heads_of(name, config)
        return pairs_to_halves(weight, heads) if heads else weight

    return config, Weights(config, read, file.path), file.metadata


def _scaling(file: GGUF, refuse: Refuse) -> RopeScaling | None:
    """What the metadata say of scaling; that of Llama 3 is not said there."""
    factor = file.metadata.get(f"{SCALING}.factor", file.metadata.get("llama.rope.scale_linear", 1.0))
    kind = file.metadata.get(f"{SCALING}.type", "linear")  # as llama.cpp takes it where it does not stand
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind != "linear":
        raise refuse(f"{SCALING}.type", f"is {plain(kind)}; linear is known, and what {ROPE} holds")
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise refuse(f"{SCALING}.factor", f"is {plain(factor)}, expected a number above 0")
    return RopeScaling(kind="linear", factor=float(factor))


def _with_frequencies(config: Config, file: GGUF, refuse: Refuse) -> Config:
    """The scaling that gives the divisors of rope_freqs.weight, which alone stand in a file of llama.cpp.

    The factor is the largest of them; the rest is Llama 3's unless keys of ours say otherwise.
    """
    stored = file.tensors[ROPE]
    if stored.shape != (config.head_dim // 2,):
        raise refuse(ROPE, f"has shape {stored.shape}, expected ({config.head_dim // 2},)")
    divisors = file.numbers(ROPE)
    ours = {name: file.metadata.get(key) for name, key in LLAMA3.items()}
    tried = [{"factor": float(divisors.max()), "original_max_seq_len": 2**k} for k in range(13, 5, -1)]
    if all(type(value) in (int, float) for value in ours.values()):
        tried.insert(0, ours)
    for settings in tried:
        try:
            found = replace(config, rope_scaling=RopeScaling(kind="llama3", **settings))
        except UsageError:
            continue
        if np.allclose(_divisors(found), divisors, rtol=1e-4, atol=0):
            return found
    raise refuse(ROPE, "does not hold what Llama 3 divides its frequencies by")


def _divisors(config: Config) -> Floats:
    """How many times slower each pair turns than it would without scaling, float32 (hd/2,)."""
    return (rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)).numpy()


# ---- writing -------------------------------------------------------------------------------------

TYPES = {
    "f32": (0, 0),
    "f16": (1, 1),
    "bf16": (30, 32),
    "q8_0": (8, 7),
    "q4_0": (2, 2),
}  # of tensors; general.file_type
BLOCKS_VERSION = 2  # general.quantization_version


def gguf_parts(
    config: Config,
    weights: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
    kind: str = "f32",
    name: str = "Llama",
) -> Iterator[bytes]:
    """The bytes of a GGUF file, tensor by tensor. `vocabulary`: the tokenizer's keys, from text/vocabularies.py.

    kind  of the matrices, one of TYPES. Norms stay float32. With q4_0 the vocabulary's two matrices are q8_0, and
          a matrix whose rows are no multiple of 32 is float16.

    Raises UsageError E101 for another kind, E105 for numbers that it cannot hold.
    """
    if kind not in TYPES:
        raise UsageError("E101", "--type", f"{kind!r} is not a type", f"choose one of {', '.join(TYPES)}")
    facts: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": name,
        "general.alignment": ALIGNMENT,
        "general.file_type": TYPES[kind][1],
        "general.quantization_version": BLOCKS_VERSION,
        "llama.vocab_size": config.vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
    }
    scaling, extra = config.rope_scaling, {}
    if scaling is not None and scaling.kind == "linear":
        facts |= {f"{SCALING}.type": "linear", f"{SCALING}.factor": float(scaling.factor)}
    elif scaling is not None:
        facts |= {theirs: getattr(scaling, ours) for ours, theirs in LLAMA3.items()}
        extra = {ROPE: torch.from_numpy(_divisors(config))}
    facts |= vocabulary

    plan: list[tuple[str, Shape, Kind]] = [
        (name, tuple(each.shape), KINDS[0]) for name, each in extra.items()
    ]
    plan += [(name, shape, _kind_for(name, shape, kind)) for name, shape in shapes(config).items()]
    table, offset = [], 0
    for name_, shape, stored in plan:
        theirs = name_ if name_ in extra else rename(name_, NAMES)
        axes = b"".join(U64.pack(axis) for axis in shape[::-1])
        number = next(number for number, each in KINDS.items() if each is stored)
        table.append(_text(theirs) + U32.pack(len(shape)) + axes + U32.pack(number) + U64.pack(offset))
        offset += _padded(math.prod(shape) // stored.numbers * stored.bytes)
    head = MAGIC + U32.pack(VERSIONS[-1]) + U64.pack(len(plan)) + U64.pack(len(facts))
    head += b"".join(_text(key) + _value(value) for key, value in facts.items()) + b"".join(table)
    yield head.ljust(_padded(len(head)), b"\0")
    for name_, _, stored in plan:
        weight = extra[name_] if name_ in extra else weights[name_].detach().float()
        if heads := heads_of(name_, config):
            weight = halves_to_pairs(weight, heads)
        if (largest := float(weight.abs().max())) > stored.largest:
            found = (
                f"{name_} holds numbers up to {largest:.3g}, {stored.name} only up to {stored.largest:.3g}"
            )
            holds = largest <= KINDS[TYPES["bf16"][0]].largest
            raise UsageError("E105", "--type", found, "take f32, or bf16" if holds else "take f32")
        data = stored.write(weight.contiguous().numpy().reshape(-1))
        yield data.ljust(_padded(len(data)), b"\0")


def _kind_for(name: str, shape: Shape, kind: str) -> Kind:
    if len(shape) == 1:
        return KINDS[0]
    if kind == "q4_0" and name in ("tok_embeddings.weight", "lm_head.weight"):
        kind = "q8_0"
    chosen = KINDS[TYPES[kind][0]]
    return chosen if shape[-1] % chosen.numbers == 0 else KINDS[TYPES["f16"][0]]


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return U64.pack(len(data)) + data


def _value(value: Any) -> bytes:
    """A value behind its type; of a list, behind the type and the number of its elements."""
    if isinstance(value, (list, tuple)):
        inner = type(value[0]) if value else str
        number = 5 if inner is int else NUMBER_OF[inner]  # signed, as llama.cpp has the types of tokens
        elements = [_text(each) if inner is str else SCALARS[number].pack(each) for each in value]
        return U32.pack(ARRAY) + U32.pack(number) + U64.pack(len(value)) + b"".join(elements)
    number = NUMBER_OF[type(value)]
    return U32.pack(number) + (_text(value) if number == STRING else SCALARS[number].pack(value))

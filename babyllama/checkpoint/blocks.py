"""Numbers as GGUF stores them: float32, or halves, or blocks of small whole numbers that share a scale.

Each kind has a function that reads blocks (n, bytes of a block) into float32 (n, numbers of a block); those that are
written have one for the way back.
Source: https://github.com/ggml-org/ggml, ggml-common.h (what a block holds) and ggml-quants.c (what is done with it)
"""

import builtins
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
LARGEST_HALF = float(np.finfo(np.float16).max)
AT_ONCE = 2**21  # numbers that are turned together, so that no tensor needs much more memory than it fills


# ---- reading -------------------------------------------------------------------------------------


def _half(block: Bytes, at: int) -> Floats:
    """The float16 at this byte of each block, as (blocks, 1)."""
    return np.ascontiguousarray(block[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(blocks, n) bytes -> (blocks, 2n) numbers from 0 to 15: all lower halves first, then all upper ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _f32(block: Bytes) -> Floats:
    return block.view("<f4")


def _f16(block: Bytes) -> Floats:
    return block.view("<f2").astype(np.float32)


def _bf16(block: Bytes) -> Floats:
    return (block.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(block: Bytes) -> Floats:
    """scale · (q - 8): a float16, 16 bytes of two q each."""
    return _half(block, 0) * (_nibbles(block[:, 2:]).astype(np.float32) - 8)


def _q4_1(block: Bytes) -> Floats:
    """scale · q + least: two float16, 16 bytes of two q each."""
    return _half(block, 0) * _nibbles(block[:, 4:]) + _half(block, 2)


def _q5_0(block: Bytes) -> Floats:
    return _half(block, 0) * (_fifth_bits(block[:, 2:6], block[:, 6:]).astype(np.float32) - 16)


def _q5_1(block: Bytes) -> Floats:
    return _half(block, 0) * _fifth_bits(block[:, 4:8], block[:, 8:]) + _half(block, 2)


def _fifth_bits(high: Bytes, low: Bytes) -> Bytes:
    """32 numbers from 0 to 31: their lower four bits as nibbles, their fifth bits as 32 bits."""
    return np.bitwise_or(_nibbles(low), np.unpackbits(high, axis=1, bitorder="little") << 4, dtype=np.uint8)


def _q8_0(block: Bytes) -> Floats:
    """scale · q: a float16, 32 signed bytes."""
    return _half(block, 0) * block[:, 2:].view(np.int8)


def _scales_and_leasts(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes -> 8 scales and 8 minima of six bits each, of the eight parts of a block of 256."""
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], axis=1)
    leasts = np.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=1)
    return scales, leasts


def _by_parts(block: Bytes, q: Bytes) -> Floats:
    """scale · (six-bit scale) · q - (scale of minima) · (six-bit minimum), for q (blocks, 8, 32)."""
    scales, leasts = _scales_and_leasts(block[:, 4:16])
    numbers = (_half(block, 0) * scales)[:, :, None] * q - (_half(block, 2) * leasts)[:, :, None]
    return numbers.reshape(len(block), 256)


def _q4_k(block: Bytes) -> Floats:
    """Eight parts of 32 numbers: of each 32 bytes, the lower halves are one part and the upper halves the next."""
    packed = block[:, 16:].reshape(-1, 4, 32)
    return _by_parts(block, np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(block: Bytes) -> Floats:
    """As q4_k, with the fifth bit of part p of all 32 numbers at bit p of 32 bytes."""
    packed, high = block[:, 48:].reshape(-1, 4, 32), block[:, None, 16:48]
    low = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    fifth = (high >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _by_parts(block, low | (fifth << 4))


def _q6_k(block: Bytes) -> Floats:
    """scale · (signed eight-bit scale of each 16) · (q - 32), q of six bits, in two halves of 128 numbers.

    Each half: 64 bytes with four bits of two numbers, 32 bytes with two bits of four.
    """
    low, high = block[:, :128].reshape(-1, 2, 2, 32), block[:, 128:192].reshape(-1, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)  # (blocks, 2, 4, 32)
    two = (high >> np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]) & 3
    q = (four | (two << 4)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = _half(block, 208) * np.ascontiguousarray(block[:, 192:208]).view(np.int8)
    return (scales[:, :, None] * q).reshape(len(block), 256)


# ---- writing -------------------------------------------------------------------------------------


def _to_f32(numbers: Floats) -> Bytes:
    return numbers.astype("<f4").view(np.uint8)


def _to_f16(numbers: Floats) -> Bytes:
    return numbers.astype("<f2").view(np.uint8)


def _to_bf16(numbers: Floats) -> Bytes:
    """To the nearest, ties to even: half of what is cut off is added before it is cut off."""
    bits = numbers.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)


def _to_q8_0(numbers: Floats) -> Bytes:
    """The scale is the largest magnitude over 127."""
    scale = np.abs(numbers).max(1, keepdims=True) / np.float32(127)
    scaled = numbers * _inverse(scale)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # halves away from zero
    return np.concatenate([scale.astype("<f2").view(np.uint8), q.view(np.uint8)], axis=1)


def _to_q4_0(numbers: Floats) -> Bytes:
    """The number of the largest magnitude becomes -8, the only end that q - 8 has no partner for."""
    largest = np.take_along_axis(numbers, np.abs(numbers).argmax(1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    q = np.clip(np.trunc(numbers * _inverse(scale) + np.float32(8.5)), 0, 15).astype(np.uint8)
    return np.concatenate([scale.astype("<f2").view(np.uint8), q[:, :16] | (q[:, 16:] << 4)], axis=1)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where everything in the block is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


# ---- the kinds -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How the numbers of a tensor are stored: `numbers` to a block of `bytes`."""

    name: str
    numbers: int
    bytes: int
    decode: Callable[[Bytes], Floats]
    encode: Callable[[Floats], Bytes] | None = None  # None: this kind is only read
    largest: float = 0.0  # magnitude that it is sure to hold, of those that are written

    def read(self, data: Bytes) -> Floats:
        """Whole blocks -> their numbers, in one dimension."""
        blocks = data.reshape(-1, self.bytes)
        found = np.empty((len(blocks), self.numbers), np.float32)
        step = AT_ONCE // self.numbers
        with np.errstate(over="ignore", invalid="ignore"):  # of bytes that are no numbers: Weights says so
            for at in range(0, len(blocks), step):
                found[at : at + step] = self.decode(np.ascontiguousarray(blocks[at : at + step]))
        return found.reshape(-1)

    def write(self, numbers: Floats) -> "builtins.bytes":
        """Numbers, as many as whole blocks hold -> their bytes. Only for kinds with `encode`."""
        assert self.encode is not None, self.name
        blocks, step = numbers.reshape(-1, self.numbers), AT_ONCE // self.numbers
        return b"".join(
            np.ascontiguousarray(self.encode(blocks[at : at + step])).tobytes()
            for at in range(0, len(blocks), step)
        )


KINDS = {  # by the number that ggml gives the type
    0: Kind("F32", 1, 4, _f32, _to_f32, math.inf),
    1: Kind("F16", 1, 2, _f16, _to_f16, LARGEST_HALF),
    2: Kind("Q4_0", 32, 18, _q4_0, _to_q4_0, LARGEST_HALF),
    3: Kind("Q4_1", 32, 20, _q4_1),
    6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1),
    8: Kind("Q8_0", 32, 34, _q8_0, _to_q8_0, LARGEST_HALF),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: Kind("BF16", 1, 2, _bf16, _to_bf16, 3.38e38),
}

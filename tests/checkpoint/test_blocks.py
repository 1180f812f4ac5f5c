"""Blocks of small numbers: what gguf's own reference makes of them, bit for bit."""

import numpy as np
import pytest

from babyllama.checkpoint.blocks import AT_ONCE, KINDS, Kind

quants = pytest.importorskip("gguf.quants")
WRITTEN = {number: kind for number, kind in KINDS.items() if kind.encode}


def names(kinds: dict[int, Kind]) -> list[str]:
    return [kind.name for kind in kinds.values()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("number", "kind"), KINDS.items(), ids=names(KINDS))
def test_any_bytes_are_read_as_the_reference_reads_them(number: int, kind: Kind) -> None:
    raw = np.random.default_rng(number).integers(0, 256, (200, 2 * kind.bytes), dtype=np.uint8)
    expected = raw.view("<f4") if number == 0 else quants.dequantize(raw, quants.GGMLQuantizationType(number))
    assert np.array_equal(kind.read(raw.reshape(-1)), expected.reshape(-1), equal_nan=True)


@pytest.mark.parametrize(("number", "kind"), WRITTEN.items(), ids=names(WRITTEN))
def test_numbers_are_written_as_the_reference_writes_them(number: int, kind: Kind) -> None:
    numbers = np.random.default_rng(number).normal(0, 1, (60, 512)).astype(np.float32)
    numbers[0, :64] = 0  # a block without a scale
    numbers[1] = np.arange(512) - 256  # halves to be rounded, the largest magnitude below 0
    numbers[2, ::32] = 1000
    expected = quants.quantize(numbers, quants.GGMLQuantizationType(number))
    assert kind.write(numbers.reshape(-1)) == expected.tobytes()


@pytest.mark.parametrize("kind", WRITTEN.values(), ids=names(WRITTEN))
def test_what_is_written_is_read_again_within_half_a_step(kind: Kind) -> None:
    numbers = np.random.default_rng(0).normal(0, 1, 4096).astype(np.float32)
    steps = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 8}  # of the largest
    largest = np.abs(numbers.reshape(-1, kind.numbers)).max(1).repeat(kind.numbers)
    error = np.abs(kind.read(np.frombuffer(kind.write(numbers), np.uint8)) - numbers)
    assert (error <= largest * steps[kind.name] * 1.01).all()
    assert steps[kind.name] == 0 or error.max() > 0


def test_large_tensors_are_turned_in_parts_that_fit_together() -> None:
    numbers = np.random.default_rng(0).normal(0, 1, AT_ONCE + 64).astype(np.float32)
    for kind in WRITTEN.values():
        data = kind.write(numbers)
        assert len(data) == len(numbers) // kind.numbers * kind.bytes
        last = kind.read(np.frombuffer(data, np.uint8))[-64:]
        assert np.array_equal(last, kind.read(np.frombuffer(kind.write(numbers[-64:]), np.uint8)))


@pytest.mark.parametrize("kind", WRITTEN.values(), ids=WRITTEN.keys())
def test_the_largest_numbers_stay_finite(kind: Kind) -> None:
    largest = min(kind.largest, float(np.finfo(np.float32).max))
    numbers = np.full(kind.numbers, -largest, np.float32)
    assert np.isfinite(kind.read(np.frombuffer(kind.write(numbers), np.uint8))).all()

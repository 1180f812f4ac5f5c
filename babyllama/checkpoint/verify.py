"""What was written, opened again by a reader that shares no code with the writer, and compared.

    hf       transformers
    gguf     llama-cpp-python if it is installed; else transformers, if RoPE is not scaled, which it does not read there
    llama2c  this package's own reader
    meta     this package's own reader

Where no independent reader is installed, our own is used, and the verdict says so.
"""

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babyllama.checkpoint.export import tokenizer_beside
from babyllama.checkpoint.hf import build
from babyllama.checkpoint.open import open_llama
from babyllama.errors import MachineError, NumericalError
from babyllama.model import Config
from babyllama.text.tokenizer import Tokenizer

# Greetings, spaces, numbers, scripts, signs: whatever a tokenizer may stumble over, and a few sentences.
TEXT = (
    "Once upon a time there was a little llama, who lived by the sea. “What is that?” she asked; it was 1805, "
    "or 42.5% of it. Über die Brücke, naïve café, Ελλάδα, Москва, 東京, 🦙🌊!\n\n  Two spaces,\ta tab.\n"
    "Then the moon rose, and the old fisherman said: It's time to go home, they'll be waiting for us."
)
BOUNDS = {  # of the difference of logits, root mean square, over that of the logits
    "f32": 1e-4,
    "f16": 1e-2,
    "bf16": 5e-2,
    "q8_0": 1e-1,
    "q4_0": 5e-1,
}
# Of the same, between llama.cpp and us on one file: it rounds what meets the weights to their kind, or to eight bits.
LLAMA_CPP = {
    "f32": 1e-4,
    "f16": 5e-3,
    "bf16": 2e-2,
    "q8_0": 5e-2,
    "q4_0": 1e-1,
}


@dataclass(frozen=True)
class Verdict:
    """How far what was written differs from what it was made of."""

    reader: str
    largest: float  # difference of two logits
    relative: float  # root mean square of the differences, over that of the logits
    tokens: int  # compared
    bits: tuple[float, float] | None  # per byte of the text, before and after; None: there was no tokenizer

    def __str__(self) -> str:
        said = (
            f"{self.reader}: logits differ by {self.largest:.2g} at most ({self.relative:.1g} of their size)"
        )
        if self.bits is None:
            return said
        before, after = self.bits
        return (
            f"{said}, bits per byte of a text in many scripts {before:.4f} before, {after:.4f} after "
            f"({after - before:+.4f})"
        )


@dataclass(frozen=True)
class Reading:
    """What a reader made of a file: the ids of the text, if it has a tokenizer, and logits (T, V) of given ids."""

    ids: list[int] | None
    logits: Tensor


def verify(
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    written: Path,
    *,
    to: str,
    kind: str = "f32",
    text: str = TEXT,
) -> Verdict:
    """Compare what `export` wrote with the model that it was given, on a text.

    Raises NumericalError E504 when ids differ, or logits by more than the kind of numbers explains; MachineError E406
    when a reader is installed and does not start.
    """
    if tokenizer is None:
        ids = [i % config.vocab_size for i in range(1, 200)]
    else:
        ids = tokenizer.prompt(text)
    ids = ids[: config.max_seq_len]
    before = _logits(config, weights, ids)
    on_disk = open_llama(written)
    ours = theirs = Reading(None, _logits(on_disk.config, on_disk.weights, ids))
    if tokenizer is not None:
        kept = Tokenizer.load(tokenizer_beside(written)) if to == "llama2c" else on_disk.tokenizer()
        ours = theirs = Reading(kept.prompt(text), ours.logits)
    reader, read = _reader(to, config)
    if read is not None:
        try:
            theirs = read(written, ids, text if tokenizer is not None else None)
        except MemoryError:
            raise
        except ReaderError as error:
            fix = "install it again, or verify nothing with --no-verify"
            raise MachineError("E406", reader, f"is installed, and does not start ({error})", fix) from error
        except Exception as error:  # whatever it says of a file that it does not like
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise _failed(written, f"{reader} does not read it ({said})") from error
    for name, found in ((OURS, ours.ids), (reader, theirs.ids)):
        if found is not None and found[: config.max_seq_len] != ids:
            pairs = enumerate(zip(found, ids, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(ids)))
            raise _failed(written, f"{name} makes other ids of the same text, from token {at} on")
    allowed = LLAMA_CPP[kind if read is _llama_cpp else "f32"]
    if (off := _relative(theirs.logits, ours.logits)) > allowed:
        raise _failed(written, f"{reader} computes other logits from it, {off:.2g} of their size apart")
    if (off := _relative(theirs.logits, before)) > BOUNDS[kind]:
        raise _failed(
            written, f"its logits are {off:.2g} of their size apart, {kind} explains {BOUNDS[kind]:g}"
        )
    bits = None
    if tokenizer is not None:
        lengths = tokenizer.byte_lengths()
        bytes_ = max(1, sum(lengths[id] for id in ids[1:]))
        bits = _bits(before, ids) / bytes_, _bits(theirs.logits, ids) / bytes_
    largest = float((theirs.logits - before).abs().max())
    return Verdict(reader, largest, off, len(ids), bits)


def _logits(config: Config, weights: Mapping[str, Tensor], ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return build(config, weights)(torch.tensor([list(ids)]))[0].float()


def _relative(found: Tensor, expected: Tensor) -> float:
    """Of logits, whose mean over the vocabulary does not matter."""
    found, expected = (each - each.mean(-1, keepdim=True) for each in (found, expected))
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)
    return float(error) if error.isfinite() else math.inf


def _bits(logits: Tensor, ids: Sequence[int]) -> float:
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(list(ids[1:])), reduction="sum")
    return float(nats) / math.log(2)


def _failed(path: Path, found: str) -> NumericalError:
    fix = "remove what was written, and report this, with the configuration of the model"
    return NumericalError("E504", path, found, fix)


# ---- readers -------------------------------------------------------------------------------------

OURS = "our own reader"
Reader = Callable[[Path, Sequence[int], str | None], Reading]


def _reader(to: str, config: Config) -> tuple[str, Reader | None]:
    """The independent reader of a format and its name; None where there is none here but ours."""

    def has(*names: str) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in names)

    if to == "hf" and has("transformers"):
        return "transformers", _transformers
    if to == "gguf" and has("llama_cpp"):
        return "llama.cpp", _llama_cpp
    if to == "gguf" and config.rope_scaling is None and has("transformers", "gguf", "accelerate"):
        return "transformers", _transformers
    return OURS, None


class ReaderError(Exception):
    """A reader is installed and does not start."""


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a library of C may say anything when it is loaded
        raise ReaderError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _transformers(path: Path, ids: Sequence[int], text: str | None) -> Reading:
    with _starting():
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    options: dict[str, Any] = {"local_files_only": True}
    if path.is_file():
        path, options["gguf_file"] = path.parent, path.name
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():  # its progress bars
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
        model.train(False)
        logits = model(torch.tensor([list(ids)])).logits[0].float()
        their_ids = None
        if text is not None:
            their_ids = AutoTokenizer.from_pretrained(path, **options)(text)["input_ids"]
    return Reading(their_ids, logits)


def _llama_cpp(path: Path, ids: Sequence[int], text: str | None) -> Reading:
    with _starting():
        from llama_cpp import Llama

    options: dict[str, Any] = {"n_ctx": len(ids) + 8, "n_batch": len(ids) + 8, "n_ubatch": len(ids) + 8}
    options |= {"type_k": 0, "type_v": 0}  # keys and values in float32
    with _silent():
        model = Llama(str(path), logits_all=True, verbose=False, **options)
        their_ids = None if text is None else model.tokenize(text.encode(), add_bos=True, special=False)
        model.eval(list(ids))
        logits = torch.tensor(model.scores[: len(ids)]).float()
        model.close()
    return Reading(their_ids, logits)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what a library writes to the screen past Python."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)

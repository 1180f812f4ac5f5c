"""Damage the files of every format that is read, and see that each is refused with a code or read, in time.

    python tests/torture/hostile_files.py --count 1000

Of each file so many copies are made with bits flipped, numbers put in their place, parts cut out, doubled or moved;
each is opened to the last number. Whatever comes of it must be a model, a tokenizer or a coded error, within a
second of processor time, and the process must live.
"""

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forks import Tally, main

from babyllama.checkpoint.gguf import gguf_parts
from babyllama.checkpoint.hf import INDEX, model_files, rename
from babyllama.checkpoint.llama2c import llama2c_parts
from babyllama.checkpoint.meta import meta_parts
from babyllama.checkpoint.open import open_llama
from babyllama.errors import BabyLlamaError
from babyllama.model import Config, Llama
from babyllama.text.export import to_gguf
from babyllama.text.tokenizer import Tokenizer

TEXT = "It was the ducklings' first summer; 1, 22, 333 of them. Größe 😀\n" * 9
NUMBERS = (
    0,
    1,
    7,
    32,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
LONGEST = 1.0  # processor seconds to open one file; tokens of a text are encoded within it too
HEAD = 4096  # bytes in which most damage is done: those that say what the others are


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after a mishap or a few."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(max(1, min(len(data), HEAD if chance.random() < 0.8 else len(data))))
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            size = chance.choice((1, 2, 4, 8))
            data[at : at + size] = struct.pack("<Q", chance.choice(NUMBERS))[:size]
        elif kind == 2:
            del data[at : at + chance.choice((1, 2, 4, 8, 100))]
        elif kind == 3:
            data[at:at] = data[at : at + chance.choice((1, 8, 64))]
        elif kind == 4:
            data = data[: chance.randrange(len(data) + 1)]
        elif kind == 5:
            other = chance.randrange(max(1, len(data)))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


def opened(path: Path) -> None:
    """The model at `path` to its last number, and its tokenizer at work."""
    model = open_llama(path)
    for _ in model.weights.values():
        pass
    if model.format != "llama2.c":
        encoded(model.tokenizer())


def encoded(tokenizer: Tokenizer) -> None:
    tokenizer.decode(tokenizer.encode(TEXT[:80], bos=True))


def pieces_of_llama2c() -> bytes:
    """A tokenizer.bin of the 256 bytes and some letters, words and their parts."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*dict.fromkeys(TEXT), "th", "the", " w", "was", " th"]
    entries = [struct.pack("<fi", -float(i), len(p.encode())) + p.encode() for i, p in enumerate(pieces)]
    return struct.pack("<i", max(len(piece.encode()) for piece in pieces)) + b"".join(entries)


def sentencepiece(pieces: list[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model: a protobuf of pieces, and of a BPE with byte fallback."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, *_varint(len(content))]) + content

    out = b""
    for piece, score, kind in pieces:
        out += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
    trainer = bytes([3 << 3, 2, *_varint(35 << 3), 1])
    return out + field(2, trainer) + field(3, bytes([3 << 3, 1, 4 << 3, 0, 5 << 3, 1]))


def _varint(value: int) -> list[int]:
    found = []
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return [*found, value]


def files_of(folder: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """The file of each format that is damaged, and what opens it."""
    tokenizer = Tokenizer.train([TEXT], 280)
    config = Config(
        vocab_size=tokenizer.vocab_size, dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_seq_len=16
    )
    weights = Llama(config, seed=1).state_dict()
    native, sharded, meta = folder / "native", folder / "sharded", folder / "meta"
    for each in (native, sharded, meta):
        each.mkdir()
    for name, content in model_files(config, weights, tokenizer).items():
        (native / name).write_bytes(content)
        (sharded / name).write_bytes(content)
    (sharded / "model.safetensors").rename(sharded / "model-1.safetensors")
    places = ", ".join(f'"{rename(name)}": "model-1.safetensors"' for name in weights)
    (sharded / INDEX).write_text(f'{{"weight_map": {{{places}}}}}', encoding="utf-8")
    for name, content in {**dict(meta_parts(config, weights)), **tokenizer.files()}.items():
        (meta / name).write_bytes(content)
    gguf, llama2c = folder / "a.gguf", folder / "model.bin"
    gguf.write_bytes(b"".join(gguf_parts(config, weights, to_gguf(tokenizer), "f16")))
    llama2c.write_bytes(b"".join(llama2c_parts(config, weights)))
    quantised = folder / "model-2.bin"
    quantised.write_bytes(b"".join(llama2c_parts(config, weights, 2)))
    (folder / "tokenizer.bin").write_bytes(pieces_of_llama2c())
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
    ]
    words = [*dict.fromkeys(TEXT.replace(" ", "▁")), "th", "the", "▁w", "▁th"]
    (folder / "tokenizer.model").write_bytes(
        sentencepiece(pieces + [(w, -float(i), 1) for i, w in enumerate(words)])
    )

    def load(path: Path) -> None:
        encoded(Tokenizer.load(path))

    def open_folder(path: Path) -> None:
        opened(path.parent)

    return {
        "safetensors": (native / "model.safetensors", opened),
        "config.json": (native / "config.json", open_folder),
        "index": (sharded / INDEX, open_folder),
        "tokenizer.json": (native / "tokenizer.json", load),
        "gguf": (gguf, opened),
        "pth": (meta / "consolidated.00.pth", opened),
        "params.json": (meta / "params.json", open_folder),
        "llama2.c": (llama2c, opened),
        "llama2.c, version 2": (quantised, opened),
        "tokenizer.bin": (folder / "tokenizer.bin", load),
        "tokenizer.model": (folder / "tokenizer.model", load),
    }


def torture(folder: Path, count: int, seed: int) -> Tally:
    torch.set_num_threads(1)
    tally, slowest = Tally(), 0.0
    for name, (path, reader) in files_of(folder).items():
        reader(path)  # undamaged it is read
        content, chance = path.read_bytes(), random.Random(f"{seed} {name}")
        for number in range(count):
            path.write_bytes(damaged(content, chance))
            began = time.process_time()
            try:
                reader(path)
                tally["read"] += 1
            except BabyLlamaError as error:
                tally["refused"] += 1
                tally.expect(
                    "\x1b" not in str(error), f"{name} {number}: {error!r} could write on a terminal"
                )
            except Exception as error:
                tally.expect(False, f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, took := time.process_time() - began)
            tally.expect(took < LONGEST, f"{name} {number}: took {took:.1f} s")
        path.write_bytes(content)
        reader(path)
    tally["milliseconds the slowest"] = round(1000 * slowest)
    return tally


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(torture, 1000, __doc__ or "")

"""Damage the files of every format that is read, make others up, and see that each is refused with a code or read.

    python tests/torture/hostile_files.py --count 1000

So many cases of each reader, shared among the files that it reads: two of three are a good file with bits flipped,
numbers put in their place, parts cut out, doubled or moved; the third is put together from parts some of which lie
(lies.py). Each is opened to the last number. Whatever comes of it must be a model, a tokenizer or a coded error, within
a second of processor time and, where the system tells (Linux), within twice the file and 64 MiB of memory; and the
process must live.

A case depends on the seed, the format and its number only. The folders of those that fail are kept.
"""

import contextlib
import ctypes
import functools
import gc
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lies
import numpy as np
import torch
from forks import Tally, ended, fork, main

from babyllama.checkpoint.gguf import GGUF, gguf_parts
from babyllama.checkpoint.hf import INDEX, WEIGHTS, model_files, rename, text_files
from babyllama.checkpoint.llama2c import llama2c_parts
from babyllama.checkpoint.meta import NAMES, PARAMS, meta_parts
from babyllama.checkpoint.open import open_llama
from babyllama.errors import BabyLlamaError, InputError
from babyllama.model import Config, Llama
from babyllama.text.export import to_gguf, to_llama2c
from babyllama.text.tokenizer import Tokenizer

SMALL = Config(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_seq_len=16)
TEXT = "It was the ducklings' first summer; 1, 22, 333 of them. Größe 😀\n" * 9
LONGEST = 1.0  # processor seconds to open one file; tokens of a text are encoded within it too
HANGS = 60  # seconds after which a case is ended
TIMES_THE_FILE, MORE_MEMORY = 2, 64 * 2**20  # bytes above what the process had
LONGEST_MESSAGE = 4000  # letters
ROOM = 2**30  # bytes of addresses that are left to a process: more would be taken from others
HEAD = 4096  # bytes in which most damage is done: those that say what the others are
MADE_UP = 3  # every third case
KEPT = 20  # failures of a format
A_CHILD = (
    25_000  # cases that one process takes: tokenizers 0.23 keeps some of each vocabulary's words for good
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after a mishap or a few."""
    data = bytearray(content)
    for _ in lies.few(chance):
        at = chance.randrange(max(1, min(len(data), HEAD if chance.random() < 0.8 else len(data))))
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            size = chance.choice((1, 2, 4, 8))
            data[at : at + size] = struct.pack("<Q", chance.choice(lies.NUMBERS))[:size]
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


# ---- formats -------------------------------------------------------------------------------------


Reads = Callable[[Path], None]
MakesUp = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A good file in a folder of its own, what opens it, and what makes up others like it."""

    name: str
    path: Path
    read: Reads
    made_up: MakesUp
    sharing: int = 1  # targets, this one among them, that share the cases of one reader


def weights(path: Path) -> None:
    """The model at `path` to its last number."""
    for _ in open_llama(path).weights.values():
        pass


def weights_of_folder(path: Path) -> None:
    weights(path.parent)


def weights_and_tokenizer(path: Path) -> None:
    model = open_llama(path)
    for _ in model.weights.values():
        pass
    encode(model.tokenizer())


def tokenizer_at(path: Path) -> None:
    encode(Tokenizer.load(path))


def tokenizer_of_folder(path: Path) -> None:
    encode(Tokenizer.load(path.parent))


def encode(tokenizer: Tokenizer) -> None:
    """And write it as other programs keep it, which they may have no place for."""
    tokenizer.decode(tokenizer.encode(TEXT[:80], bos=True))
    text_files(tokenizer)
    with contextlib.suppress(InputError):
        next(gguf_parts(SMALL, {}, to_gguf(tokenizer)))  # all that stands before the numbers
    with contextlib.suppress(InputError):
        to_llama2c(tokenizer)


def targets(folder: Path) -> list[Target]:
    """A small model, and vocabularies, in every format."""
    config = SMALL
    model = Llama(config, seed=1).state_dict()
    tokenizer = Tokenizer.train([TEXT], 280)
    native = model_files(config, model, tokenizer)
    places = {rename(name): "model-1.safetensors" for name in model}
    index = json.dumps({"weight_map": places}).encode()
    sharded = {"config.json": native["config.json"], "model-1.safetensors": native[WEIGHTS], INDEX: index}
    talks = [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "x"}]
    said = {**json.loads(native["tokenizer_config.json"]), "chat_template": talks}
    beside = {"tokenizer_config.json": json.dumps(said).encode()}
    meta = dict(meta_parts(config, model))
    header = json.loads(native[WEIGHTS][8 : 8 + int.from_bytes(native[WEIGHTS][:8], "little")])
    del header["__metadata__"]
    shapes = {rename(name, NAMES): tuple(weight.shape) for name, weight in model.items()}
    pieces: lies.Pieces = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
    pieces += [(b"<0x%02X>" % byte, 0.0, 6) for byte in range(256)]
    words = [*dict.fromkeys(TEXT.replace(" ", "▁")), "th", "the", "▁w", "▁th"]
    pieces += [(word.encode(), -float(rank), 1) for rank, word in enumerate(words)]

    found: list[Target] = []

    def add(
        name: str,
        files: Mapping[str, bytes],
        file: str,
        read: Reads,
        made_up: MakesUp | None = None,
        sharing: int = 1,
    ) -> None:
        place = folder / name
        place.mkdir()
        for each, content in files.items():
            (place / each).write_bytes(content)
        if made_up is None:  # a JSON file
            value = json.loads(files[file])
            made_up = functools.partial(lies.lying_json, value)
        found.append(Target(name, place / file, read, made_up, sharing))

    add("safetensors", native, WEIGHTS, weights, functools.partial(lies.safetensors, header))
    add("config.json", native, "config.json", weights_of_folder)
    add("index", sharded, INDEX, weights_of_folder)
    add("tokenizer.json", native, "tokenizer.json", tokenizer_at)
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        add(name, {**native, **beside}, name, tokenizer_of_folder, sharing=3)
    add("pth", meta, "consolidated.00.pth", weights, functools.partial(lies.pth, shapes))
    add("params.json", meta, PARAMS, weights_of_folder)
    for name, vocabulary in (("gguf", to_gguf(tokenizer)), ("gguf of pieces", gguf_of(pieces))):
        rows = len(vocabulary["tokenizer.ggml.tokens"])
        wide = Config(vocab_size=rows, dim=32, n_layers=1, n_heads=2, hidden_dim=32, max_seq_len=16)
        content = b"".join(gguf_parts(wide, Llama(wide, seed=1).state_dict(), vocabulary, "q4_0"))
        add(
            name,
            {"a.gguf": content},
            "a.gguf",
            weights_and_tokenizer,
            functools.partial(lies.gguf, *parts_of(content, folder)),
            sharing=2,
        )
    for version in (0, 2):
        content = b"".join(llama2c_parts(config, model, version))
        add(f"llama2.c {version}", {"a.bin": content}, "a.bin", weights, lies.llama2c, sharing=2)
    writers = {
        "tokenizer.bin": lies.tokenizer_bin,
        "tokenizer.model": lies.sentencepiece,
        "ranks": lies.tiktoken,
    }
    for name, write in writers.items():
        add(
            name,
            {"tokenizer": write(pieces)},
            "tokenizer",
            tokenizer_at,
            functools.partial(lies.pieces_as, write, pieces),
        )
    return found


def gguf_of(pieces: lies.Pieces) -> dict[str, Any]:
    """A vocabulary of SentencePiece as a GGUF has it."""
    texts, scores, kinds = zip(*pieces, strict=True)
    held = {
        "model": "llama",
        "tokens": [text.decode() for text in texts],
        "scores": [*scores],
        "token_type": [*kinds],
    }
    return {f"tokenizer.ggml.{name}": value for name, value in held.items()} | {
        "tokenizer.ggml.eos_token_id": 2
    }


def parts_of(content: bytes, folder: Path) -> tuple[list[lies.Key], dict[str, list[int]]]:
    """The keys and the tensors of a GGUF, as lies.gguf takes them."""
    path = folder / "whole.gguf"
    path.write_bytes(content)
    file, kinds = GGUF(path), {bool: 7, int: 4, float: 6, str: lies.STRING}
    keys: list[lies.Key] = []
    for name, value in file.metadata.items():
        if isinstance(value, list):
            keys.append([name, lies.ARRAY, [lies.STRING, value]])
        elif isinstance(value, np.ndarray):
            keys.append([name, lies.ARRAY, [5 if value.dtype.kind == "i" else 6, value.tolist()]])
        else:
            keys.append([name, kinds[type(value)], value])
    return keys, {name: [*each.shape[::-1]] for name, each in file.tensors.items()}


# ---- cases ---------------------------------------------------------------------------------------

CASES, REFUSED, OPENED, MICROSECONDS, BYTES = range(5)  # what a score holds; of the last two the most


class Memory:
    """How much more than before the process has held since `start`, in bytes; 0 where the system does not tell."""

    def __init__(self) -> None:
        self.peak, self.before = None, 0
        with contextlib.suppress(OSError):
            self.peak = os.open("/proc/self/clear_refs", os.O_WRONLY)
        with contextlib.suppress(OSError, AttributeError):  # glibc: what is freed goes back at once
            c = ctypes.CDLL(None)
            for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                c.mallopt(threshold, 2**17)

    def start(self) -> None:
        if self.peak is not None:
            os.write(self.peak, b"5")  # the peak is what is held now
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def more(self) -> int:
        return (
            1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before)
            if self.peak is not None
            else 0
        )


def case(target: Target, good: bytes, seed: int, number: int) -> bytes:
    chance = random.Random(f"{seed} {target.name} {number}")
    if number % MADE_UP:
        return damaged(good, chance)
    content = target.made_up(chance)
    return damaged(content, chance) if chance.random() < 0.1 else content


def attempt(target: Target, content: bytes, score: "np.ndarray", memory: Memory) -> str:
    """What is wrong with how the target takes the content; empty when it opens or refuses it as it should."""
    target.path.write_bytes(content)
    memory.start()
    began, wrong = time.process_time(), ""
    try:
        target.read(target.path)
        score[OPENED] += 1
    except BabyLlamaError as error:
        score[REFUSED] += 1
        if "\x1b" in str(error) or len(str(error)) > LONGEST_MESSAGE:
            wrong = f"could flood a terminal or write on it: {str(error)[:300]!r}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    took, more = time.process_time() - began, memory.more()
    score[MICROSECONDS] = max(score[MICROSECONDS], 1e6 * took)
    score[BYTES] = max(score[BYTES], more)
    if took > LONGEST:
        wrong = f"took {took:.1f} s"
    if more > TIMES_THE_FILE * len(content) + MORE_MEMORY:
        wrong = f"took {more / 2**20:.0f} MiB for a file of {len(content):,} bytes"
    return wrong


def work(target: Target, good: bytes, seed: int, count: int, score: "np.ndarray", kept: Path) -> None:
    """The next cases from score[CASES] on; what fails is printed and kept."""
    gc.freeze()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, whatever that does
    warnings.simplefilter("error")
    memory = Memory()
    target.path.write_bytes(good)
    target.read(target.path)  # undamaged it is read; and what libraries load at the first time is there
    with contextlib.suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, resource.RLIM_INFINITY))
    end = min(count, int(score[CASES]) + A_CHILD)
    for number in range(int(score[CASES]), end):
        score[CASES] = number
        signal.alarm(HANGS)
        try:
            content = case(target, good, seed, number)
        except Exception:
            traceback.print_exc()  # of which the last line is shown
            raise
        if wrong := attempt(target, content, score, memory):
            print(f"{target.name}, case {number}: {wrong}{keep(target, number, kept)}", flush=True)
    score[CASES] = end
    signal.alarm(0)
    target.path.write_bytes(good)
    target.read(target.path)


def keep(target: Target, number: int, kept: Path) -> str:
    """Keep the folder of a case; and say where it is."""
    if kept.exists() and len([*kept.iterdir()]) >= KEPT:
        return ""
    place = kept / f"{target.name}, case {number}"
    shutil.copytree(target.path.parent, place, dirs_exist_ok=True)
    return f"; kept in {place}"


def tried(target: Target, count: int, seed: int, folder: Path, kept: Path) -> tuple["np.ndarray", list[str]]:
    """The score of so many cases, and the failures. What ends a child does not end the others."""
    score = np.frombuffer(mmap.mmap(-1, 5 * 8), np.int64)  # which a child shares with this process
    good, said, failures = target.path.read_bytes(), folder / "said", list[str]()
    while score[CASES] < count:
        status = ended(fork(lambda: work(target, good, seed, count, score, kept), said))
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
        failures += [line for line in lines if line.startswith(f"{target.name}, case ")]
        if status:
            number = int(score[CASES])
            end = f"{target.name}, case {number}: ended with {status} {lines[-1:]}"
            failures.append(end + keep(target, number, kept))
            score[CASES] += 1
    return score, failures


def torture(folder: Path, count: int, seed: int) -> Tally:
    torch.set_num_threads(1)
    tally, kept = Tally(), Path(tempfile.gettempdir()) / f"hostile-files-{seed}"
    for target in targets(folder):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        cases = math.ceil(count / target.sharing)
        score, failures = tried(target, cases, seed, folder, kept)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        _, refused, opened, slowest, most = score.tolist()
        tally.update({"cases": cases, "refused": refused, "opened": opened})
        tally.failures += failures
        print(
            f"{target.name}: {refused:,} refused, {opened:,} opened, {len(failures)} failures; the slowest "
            f"{slowest / 1000:.0f} ms, the largest {most / 2**20:.1f} MiB; {cases / seconds:,.0f} a second",
            flush=True,
        )
    return tally


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(torture, 1000, __doc__ or "")

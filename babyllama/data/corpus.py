"""Documents -> training and validation split -> token ids on disk.

A prepared folder holds train.bin and val.bin (token ids, little-endian, each document as BOS, its ids, EOS), the
tokenizer's files, and manifest.json, which says how it was made and holds the size and sha256 of every other file.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from babyllama.checkpoint.folder import MANIFEST, new_folder, read_sealed, refused, verify_folder
from babyllama.data import library
from babyllama.data.documents import (
    PIECE,
    PREPARED,
    Document,
    Reading,
    cut,
    find_files,
    read_file,
    what_we_wrote,
)
from babyllama.errors import InputError, MachineError, UsageError
from babyllama.text.tokenizer import Tokenizer

SMALLEST_DEFAULT = 320  # ids; the smallest vocabulary that is chosen by itself
TOKENIZER_SAMPLE = 100 * 2**20  # bytes of text that a tokenizer is trained on, at most
SHORTEST_PIECE = 256  # characters, when few documents have to be cut to be split
BATCH = 2**20  # characters encoded at a time
# What the manifest tells of the data, under the names of Corpus.
TOLD = (
    *("train_documents", "val_documents", "train_bytes", "val_bytes"),
    *("duplicates", "skipped", "characters_replaced", "source"),
)

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, bytes in all or 0 if unknown); the stages are "reading", "tokenizer" and "encoding"."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared folder, verified. `train_ids` and `val_ids` are mapped from the disk, read-only.

    *_bytes              UTF-8 bytes of the text itself: what bits per byte are counted in.
    duplicates           documents left out because an equal one is there.
    skipped              files left out of a folder, by reason.
    characters_replaced  those that are U+FFFD, when bytes that are no text were let through.
    fingerprint          names these ids with this tokenizer, wherever the folder lies.
    """

    folder: Path
    tokenizer: Tokenizer
    train_ids: NDArray[Any]
    val_ids: NDArray[Any]
    train_documents: int
    val_documents: int
    train_bytes: int
    val_bytes: int
    duplicates: int
    skipped: dict[str, int]
    characters_replaced: int
    source: str
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def words_held_out(self) -> str:
        """Up to three words of the held-out text, at most 24 characters: of a sentence's beginning, if one is there.

        A model that is given none writes the beginning of a document: titles, where the documents have titles.
        """
        middle = len(self.val_ids) // 2
        text = self.tokenizer.decode(self.val_ids[middle : middle + 128].tolist()).strip("\ufffd")
        start = re.search(r"[.!?]\s+(?=\w)", text) or re.search(r"\s+(?=\w)", text)
        words = text[start.end() if start else 0 :].split()[:3]
        beginnings = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
        return next((each for each in beginnings if len(each) <= 24), "".join(words[:1])[:24])

    @staticmethod
    def stands_in(folder: str | Path) -> bool:
        """Whether there are prepared data in `folder`, intact or not. Cheap; `open` looks closer."""
        return what_we_wrote(Path(folder)) == "prepared data"

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """The corpus in a folder that `prepare` made, after every file agreed with its size and sha256.

        Raises InputError E307 (missing, damaged or changed), E208 (a newer format), E309 (ids that the tokenizer
        does not have); MachineError E403.
        """
        folder = Path(folder)
        if not cls.stands_in(folder):
            raise InputError("E307", folder, "holds no prepared data", _again(folder))
        try:
            with _coded(folder):
                manifest = verify_folder(folder)
            told = {name: manifest[name] for name in TOLD}
        except InputError as error:
            if error.code == "E208":
                raise
            raise InputError("E307", error.where, error.found, _again(folder)) from None
        except KeyError as error:
            raise InputError("E307", folder / MANIFEST, f"does not tell {error}", _again(folder)) from None
        tokenizer = Tokenizer.load(folder)
        return cls(
            folder=folder,
            tokenizer=tokenizer,
            train_ids=_map_ids(folder / "train.bin", tokenizer),
            val_ids=_map_ids(folder / "val.bin", tokenizer),
            fingerprint=hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest(),
            **told,
        )


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    field: str = "text",
    encoding: str = "utf-8",
    on_bad_text: str = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Read, split, tokenize and write a text; `out` appears complete or not at all.

    source        a file, a folder (txt, md, code, jsonl, parquet), one of `library.NAMES`, or "hub:NAME".
    vocab_size    of the tokenizer that is trained on the training side; by default what suits the text.
    tokenizer     use this one instead.
    val_fraction  share of the bytes that is held out, in (0, 0.5].
    seed          of the split, which depends on nothing else but the documents: not on names, not on order.
    field, encoding, on_bad_text  see `Reading`.
    overwrite     replace what an earlier preparation left in `out`; a folder that holds anything else is refused.

    Exact duplicates are removed first. Whole documents go to one side, unless there are so few that the share
    could not be met: then all are cut at paragraphs. The source is read three times and never held in memory;
    about 200 bytes are, for each document.

    Raises UsageError E101-E103; InputError E301 (no text), E302 (not text in this encoding), E303 (too little),
    E304 (vocab_size), E305 (binary), E306 (jsonl, parquet), E307 (source changed meanwhile), E308 (no such text);
    MachineError E401 (disk full), E403 (`out` in use or not writable), E405-E407 (downloads, libraries).
    """
    if not 0 < val_fraction <= 0.5:
        raise UsageError(
            "E102", "val_fraction", f"{val_fraction}, expected a number in (0, 0.5]", "leave it at 0.05"
        )
    if tokenizer and vocab_size is not None:
        raise UsageError(
            "E103", "vocab_size", "a tokenizer was given too, which has its own", "give only one of them"
        )
    out = Path(out)
    if out.is_symlink():
        out = out.resolve()
    _taken(out, overwrite)
    reading = Reading(field=field, encoding=encoding, on_bad_text=on_bad_text)
    texts = _open(source, out, reading)
    report = progress or (lambda stage, done, total: None)

    index = _Index.of(texts, seed, report)
    validation = _choose(index.sizes, val_fraction)
    if validation is None:  # too few documents, or too uneven ones
        piece = min(max(int(index.characters * val_fraction), SHORTEST_PIECE), PIECE, index.characters // 2)
        texts = texts.in_pieces(max(piece, 1))
        index = _Index.of(texts, seed, report)
        validation = _choose(index.sizes, val_fraction, strict=False)
    if validation is None:
        raise InputError(
            "E303",
            texts.label,
            f"have {len(index.sizes)} distinct passage ({index.size} bytes), need 2: to train on and to validate",
            "add more text; a few thousand characters are little",
        )
    train_bytes = index.size - sum(index.sizes[key] for key in validation)

    if tokenizer is None:
        documents = _tokenizer_texts(texts, index, validation, train_bytes, report)
        size = default_vocab_size(train_bytes) if vocab_size is None else vocab_size
        tokenizer = Tokenizer.train(documents, size, exact=vocab_size is not None)

    facts: dict[str, Any] = {**PREPARED}
    with _coded(out), _alone(out), new_folder(out, facts) as folder:
        counted = _encode(texts, index, validation, tokenizer, folder, report)
        for name, data in tokenizer.files().items():
            (folder / name).write_bytes(data)
        # The other files name one token that ends a text; a tokenizer may know several.
        ends = [tokenizer.eos_id, *sorted(tokenizer.eos_ids - {tokenizer.eos_id})]
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
        (folder / "generation_config.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
        facts |= {
            "source": texts.label,
            "seed": seed,
            "val_fraction": val_fraction,
            "reading": asdict(reading),
            "vocab_size": tokenizer.vocab_size,
            "dtype": _dtype(tokenizer.vocab_size).str,
            **counted,
            "duplicates": index.duplicates,
            "characters_replaced": index.replaced if on_bad_text == "replace" else 0,
            "skipped": dict(sorted(texts.skipped.items())),
        }
        if _taken(out, overwrite):
            out.rename(_aside(out))
    return Corpus.open(out)


def whole_text(
    source: str | Path, tokenizer: Tokenizer, reading: Reading, limit: int | None = None
) -> tuple[NDArray[Any], int]:
    """The ids of a text (see `prepare`) as a prepared folder would hold them, and how many documents these are.

    Nothing is split off and no duplicate left out, only documents of white space; the first `limit` that remain.

    Raises what `prepare` raises of a text that cannot be read.
    """
    texts = _open(source, None, reading)
    packed, waiting, counted, characters = bytearray(), list[str](), 0, 0
    for document in texts.read():
        if document.text.strip():
            counted += 1
            waiting.append(document.text)
            characters += len(document.text)
        if characters >= BATCH:
            packed += _pack(tokenizer.encode_batch(waiting), tokenizer)
            waiting, characters = [], 0
        if counted == limit:
            break
    if not counted:
        raise InputError("E301", texts.label, "holds no text, at most white space", "give a text")
    packed += _pack(tokenizer.encode_batch(waiting), tokenizer)
    return np.frombuffer(packed, _dtype(tokenizer.vocab_size)), counted


def default_vocab_size(bytes: int) -> int:
    """The vocabulary that suits a training text of so many bytes: about one id for each 1000, a power of two.

    Below half a megabyte the steps are finer, down to 320. More ids than that are seen too rarely to be learnt.
    """
    if bytes < 512_000:
        return max(SMALLEST_DEFAULT, bytes // 1000 // 64 * 64)
    steps = ((750_000, 512), (1_750_000, 1024), (5_000_000, 2048), (10_000_000, 4096), (20_000_000, 8192))
    return next((size for limit, size in steps if bytes < limit), 16384)


# The source, which is read several times.


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What prepare reads. `size` is in bytes, 0 if unknown; `skipped` counts files left out, by reason."""

    label: str
    read: Callable[[], Iterator[Document]]
    size: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def in_pieces(self, size: int) -> "_Source":
        """The same text as more documents, of about `size` characters."""

        def read() -> Iterator[Document]:
            for name, text in self.read():
                for number, piece in enumerate(cut([text], size), 1):
                    yield Document(f"{name}, part {number}", piece)

        return _Source(label=self.label, read=read, size=self.size, skipped=self.skipped)


def _open(source: str | Path, out: Path | None, reading: Reading) -> _Source:
    """Raises E103 when the name of a text is that of a file here too, or when `out` is or holds the source; E301,
    E305, E308, E403."""
    label, path = str(source), Path(source)
    if isinstance(source, str) and (source in library.NAMES or source.startswith("hub:")):
        if path.exists():
            fix = f"give the one that lies here by its path:  {shlex.quote('./' + source)}"
            raise UsageError("E103", source, "is the name of a text, and of a file or folder here", fix)
        return _Source(label=label, read=lambda: library.named(source, reading))
    if not path.exists() and not path.is_symlink():
        raise library.unknown(label)
    if out is not None and out.resolve() in (place := path.resolve(), *place.parents):
        raise UsageError("E103", "--out", f"{out} holds the text itself", "choose another folder:  --out DIR")
    files, skipped = find_files(path, reading)
    if not files:
        left_out = ", ".join(f"{n} × {reason}" for reason, n in sorted(skipped.items())) or "it is empty"
        raise InputError(
            "E301", path, f"no text files in it ({left_out})", "put .txt, .md, .jsonl or code files there"
        )
    with _coded(path):
        size = sum(file.stat().st_size for file in files)

    def read() -> Iterator[Document]:
        for file in files:
            yield from read_file(file, reading)

    return _Source(label=label, read=read, size=size, skipped=skipped)


@dataclass(kw_only=True)
class _Index:
    """What the first pass learns. `sizes` maps the key of each distinct document to its bytes."""

    seed: int
    sizes: dict[bytes, int] = field(default_factory=dict)
    size: int = 0  # bytes of all of them
    characters: int = 0
    duplicates: int = 0
    replaced: int = 0

    @classmethod
    def of(cls, texts: _Source, seed: int, report: Progress) -> "_Index":
        """Raises InputError E301 when there is nothing but white space."""
        index, read = cls(seed=seed), 0
        for document in texts.read():
            data = document.text.encode()
            read += len(data)
            report("reading", min(read, texts.size or read), texts.size)
            key = index.key(data)
            if not document.text.strip():
                continue
            if key in index.sizes:
                index.duplicates += 1
                continue
            index.sizes[key] = len(data)
            index.size += len(data)
            index.characters += len(document.text)
            index.replaced += document.text.count("\ufffd")
        if not index.sizes:
            raise InputError("E301", texts.label, "holds no text, at most white space", "give a text")
        return index

    def key(self, data: bytes) -> bytes:
        """Equal for equal documents, and in a random order that the seed decides: 16 bytes of a sha256."""
        return hashlib.sha256(f"{self.seed}/".encode() + data).digest()[:16]

    def distinct(self, texts: _Source, stage: str, report: Progress) -> Iterator[tuple[bytes, Document, int]]:
        """Each distinct document once, with its key and bytes. Raises E307 if the source is no longer the same."""
        seen: set[bytes] = set()
        done = 0
        for document in texts.read():
            data = document.text.encode()
            key = self.key(data)
            if not document.text.strip() or key in seen:
                continue
            if key not in self.sizes:
                raise self._changed(texts)
            seen.add(key)
            done += len(data)
            report(stage, done, self.size)
            yield key, document, len(data)
        if len(seen) < len(self.sizes):
            raise self._changed(texts)

    def _changed(self, texts: _Source) -> InputError:
        return InputError(
            "E307", texts.label, "changed while it was being read", "repeat when nothing writes to it"
        )


def _choose(sizes: dict[bytes, int], fraction: float, strict: bool = True) -> set[bytes] | None:
    """The keys of the documents held out: in the order of their keys, which is random and the same everywhere,
    until `fraction` of the bytes is reached. A document that would overshoot by half is passed over.

    None when that cannot be done with whole documents: the held-out side would have less than half or more than
    twice the bytes it should (not asked if strict is False), or one of the sides nothing.
    """
    wanted = fraction * sum(sizes.values())
    chosen, reached = set(), 0
    for key in sorted(sizes):
        if reached >= wanted:
            break
        if reached + sizes[key] <= 1.5 * wanted:
            chosen.add(key)
            reached += sizes[key]
    if not chosen:
        shortest = min(sizes, key=lambda key: (sizes[key], key))
        chosen, reached = {shortest}, sizes[shortest]
    fair = 0.5 * wanted <= reached <= 2 * wanted
    return chosen if len(chosen) < len(sizes) and (fair or not strict) else None


def _tokenizer_texts(
    texts: _Source, index: _Index, validation: set[bytes], train_bytes: int, report: Progress
) -> Iterator[str]:
    """The training documents, or as many of them, chosen by key, as make TOKENIZER_SAMPLE bytes."""
    share = int(2**32 * min(1.0, TOKENIZER_SAMPLE / train_bytes))
    for key, document, _ in index.distinct(texts, "tokenizer", report):
        if key not in validation and int.from_bytes(key[-4:]) <= share:
            yield document.text


# Writing and checking a prepared folder.


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _pack(documents: list[list[int]], tokenizer: Tokenizer) -> bytes:
    """BOS, ids, EOS of each document. An id that would not fit is an error, never wrapped around."""
    ids = [id for document in documents for id in (tokenizer.bos_id, *document, tokenizer.eos_id)]
    packed = np.array(ids, dtype=np.int64)
    assert packed.min(initial=0) >= 0 and packed.max(initial=0) < tokenizer.vocab_size
    return packed.astype(_dtype(tokenizer.vocab_size)).tobytes()


def _encode(
    texts: _Source,
    index: _Index,
    validation: set[bytes],
    tokenizer: Tokenizer,
    folder: Path,
    report: Progress,
) -> dict[str, int]:
    """Write train.bin and val.bin, in the order of the source; the counts of Corpus of both."""
    counted = Counter[str]()
    waiting: dict[str, list[str]] = {"train": [], "val": []}
    characters = Counter[str]()
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        files: dict[str, BinaryIO] = {"train": train, "val": val}

        def write(name: str) -> None:
            files[name].write(_pack(tokenizer.encode_batch(waiting[name]), tokenizer))
            waiting[name].clear()
            characters[name] = 0

        for key, document, size in index.distinct(texts, "encoding", report):
            name = "val" if key in validation else "train"
            counted[f"{name}_documents"] += 1
            counted[f"{name}_bytes"] += size
            waiting[name].append(document.text)
            characters[name] += len(document.text)
            if characters[name] >= BATCH:
                write(name)
        for name in files:
            write(name)
    return dict(counted)


def _map_ids(path: Path, tokenizer: Tokenizer) -> NDArray[Any]:
    """The ids of a file. Raises E307 unless there are some, E309 unless all are in the vocabulary."""
    dtype = _dtype(tokenizer.vocab_size)
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise InputError("E307", path, f"its {size} bytes are no ids", _again(path.parent))
    ids = np.memmap(path, dtype=dtype, mode="r")
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        if part.max() >= tokenizer.vocab_size:
            at = int(part.argmax())
            found = f"id {part[at]} at index {start + at} is outside the vocabulary of {tokenizer.vocab_size}"
            raise InputError("E309", path, found, _again(path.parent))
    return ids


def _again(folder: Path) -> str:
    """The remedy, which works as it is printed."""
    try:
        _taken(folder, overwrite=True)
        return f"prepare the text again:  babyllama data TEXT --out {shlex.quote(str(folder))} --overwrite"
    except MachineError:
        return "prepare the text again, in another folder:  babyllama data TEXT --out DIR"


def _taken(out: Path, overwrite: bool) -> bool:
    """Whether something that may be replaced stands at `out`: an empty folder, or files that `prepare` wrote and
    their manifest vouches for. Raises E403 when it is anything else, or may not be replaced."""
    with _coded(out):
        if not os.path.lexists(out):
            return False
        names = _written(out)
        others = {each.name for each in out.iterdir()} - names if out.is_dir() else {out.name}
    if others:
        found = f"holds prepared data and {min(others)}, which is not part of them"
        fix = "choose another folder:  --out DIR"
        raise MachineError("E403", out, found if names else "exists, and is no prepared data", fix)
    if names and not overwrite:
        fix = "replace it with --overwrite, or choose another --out"
        raise MachineError("E403", out, "holds prepared data", fix)
    return True


def _written(folder: Path) -> set[str]:
    """The names of the files that `prepare` wrote to `folder`; none when its manifest is not intact."""
    if Corpus.stands_in(folder):
        with suppress(InputError, KeyError, TypeError):
            return {*read_sealed(folder / MANIFEST)["files"], MANIFEST}
    return set()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the place of `out`, tidied up before and after. Raises E403 when another preparation holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".tmp-{out.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        found, fix = "is being written by another preparation", "wait for it, or choose another --out"
        raise MachineError("E403", out, found, fix) from None
    try:
        _tidy(out)
        yield
    finally:
        with suppress(OSError):
            _tidy(out)
        with suppress(OSError):
            path.unlink()
        lock.release()


def _aside(out: Path) -> Path:
    """Where prepared data wait for others to take their place."""
    return out.parent / f".del-{out.name}"


def _tidy(out: Path) -> None:
    """Finish what a preparation that failed or was killed left beside `out`; what it was to replace comes back."""
    aside = _aside(out)
    if aside.is_dir() and not os.path.lexists(out):
        aside.rename(out)
    elif aside.is_dir():
        names = _written(aside)
        for path in sorted(
            aside.iterdir(), key=lambda each: each.name == MANIFEST
        ):  # last: it knows the others
            if path.name in names:
                path.unlink()
        aside.rmdir()  # not if something of the user's is in it
    for path in out.parent.iterdir():
        if re.fullmatch(rf"\.tmp-{re.escape(out.name)}-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _coded(path: Path) -> Iterator[None]:
    """The operating system's errors, with our codes."""
    try:
        yield
    except OSError as error:
        raise refused(error, Path(error.filename or path)) from error

"""Files and folders -> documents: texts that begin and end by themselves."""

import codecs
import importlib
import io
import json
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from babyllama.checkpoint.folder import LARGEST_JSON, MANIFEST, SEAL
from babyllama.errors import InputError, MachineError, UsageError

LONG_FILE = 64 * 2**10  # bytes; a longer text file is cut into pieces, so that one file can be split
PIECE = 16 * 2**10  # characters of such a piece, at most; at least half of it, but for the last
CHUNK = 64 * 2**10  # bytes read at a time
LONGEST_LINE = 64 * 2**20  # characters of one line of jsonl

JSONL = {".jsonl", ".ndjson"}
READ_IN_FOLDERS = re.compile(
    r"\.(jsonl|ndjson|parquet|txt|text|md|markdown|rst|org|tex"
    r"|py|pyi|c|h|cc|cpp|hpp|cs|java|kt|go|rs|js|mjs|ts|jsx|tsx|rb|php|pl|lua|r|jl|swift|scala|hs|ml|ex|erl|clj|el"
    r"|lisp|sh|sql|zig|nim|html|css|toml|yaml|yml)"
)

BINARY = {
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PK\x03\x04": "a zip archive or an office document",
}
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
PREPARED = {"kind": "data"}  # what the manifest says of prepared data and of no other folder
OURS = {"a run": ("run.json", SEAL), "prepared data": (MANIFEST, json.dumps(PREPARED)[1:-1])}


class Document(NamedTuple):
    """One text that begins and ends by itself. `name` says where it came from, for messages."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How bytes become text.

    field        the name of the text in a line of jsonl or a column of parquet.
    encoding     of text files and jsonl; with utf-8 a byte order mark is removed.
    on_bad_text  "error": bytes that are not text are E302; "replace": they become U+FFFD.

    Raises UsageError E101 for an unknown encoding or choice.
    """

    field: str = "text"
    encoding: str = "utf-8"
    on_bad_text: str = "error"

    def __post_init__(self) -> None:
        if self.on_bad_text not in ("error", "replace"):
            raise UsageError("E101", "--on-bad-text", f"{self.on_bad_text!r}", "use error or replace")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UsageError(
                "E101", "--encoding", f"{self.encoding!r} is no text encoding", "use utf-8, utf-16 or latin-1"
            ) from None

    @property
    def codec(self) -> str:
        name = codecs.lookup(self.encoding).name
        return "utf-8-sig" if name == "utf-8" else name

    @property
    def wide(self) -> bool:
        """Whether NUL bytes are usual in this encoding."""
        return self.codec.startswith(("utf-16", "utf-32"))


def find_files(path: Path, reading: Reading) -> tuple[list[Path], Counter[str]]:
    """The files to read at path, in the order of their names, and what was left out, counted by reason.

    In a folder, hidden files, links to folders, other kinds of file and what is no regular file are left out, and
    with all that is in them runs and prepared data. A path that is itself such a file is an error. Nothing is opened
    that could block.

    Raises InputError E305 for a binary file or something that is no file; MachineError E403.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            if what := _binary(path, reading):
                raise InputError(
                    "E305", path, f"is {what}, expected text", "extract its text into a .txt file first"
                )
            return [path], Counter()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISDIR(mode):
        what = KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(
            "E305", path, f"is {what}, expected a file or a folder", "write its text to a file first"
        )

    files: list[Path] = []
    skipped: Counter[str] = Counter()
    for folder, folders, names in os.walk(path, onerror=lambda _: skipped.update(["unreadable"])):
        if ours := what_we_wrote(Path(folder)):
            skipped[ours] += 1
            folders.clear()
            continue
        skipped["hidden"] += sum(name.startswith(".") for name in folders + names)
        links = [name for name in folders if not name.startswith(".") and Path(folder, name).is_symlink()]
        skipped["link to a folder"] += len(links)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in links)
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(folder, name)
            if reason := _why_not(file, reading):
                skipped[reason] += 1
            else:
                files.append(file)
    return files, +skipped


def what_we_wrote(folder: Path) -> str | None:
    """Which of OURS a folder is, intact or not, by the mark in one file; None for a folder of the user's."""
    for ours, (name, mark) in OURS.items():
        with suppress(OSError):
            if (folder / name).is_file():
                with (folder / name).open("rb") as file:
                    if mark.encode() in file.read(LARGEST_JSON):
                        return ours
    return None


def _why_not(file: Path, reading: Reading) -> str | None:
    """Why a file of a folder is left out, or None."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        if not READ_IN_FOLDERS.fullmatch(file.suffix.lower()):
            return "other kind"
        if status.st_size == 0:
            return "empty"
        return "binary" if _binary(file, reading) else None
    except OSError:  # a broken or circular link, no permission, or just deleted
        return "unreadable"


def _binary(file: Path, reading: Reading) -> str | None:
    """What a file is, if its beginning shows that it is no text."""
    with file.open("rb") as opened:
        head = opened.read(8192)
    if file.suffix.lower() == ".parquet":
        return None
    for magic, what in BINARY.items():
        if head.startswith(magic):
            return what
    utf16 = head.startswith(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    )  # text in another encoding: E302 says so
    return "binary (it has NUL bytes)" if b"\0" in head and not reading.wide and not utf16 else None


def _unreadable(path: Path, error: OSError) -> MachineError:
    return MachineError(
        "E403",
        path,
        f"cannot be read: {error.strerror}",
        f"check that you may read it:  ls -l {shlex.quote(str(path))}",
    )


def read_file(file: Path, reading: Reading) -> Iterator[Document]:
    """The documents of one file: a line of jsonl, a row of parquet, a text file, or a piece of a long one.

    Line ends become \\n. Memory is bounded, whatever the size of the file.

    Raises InputError E302 (not text in this encoding), E305 (binary), E306 (broken or without the field);
    MachineError E403, E406.
    """
    try:
        if file.suffix.lower() in JSONL:
            yield from _jsonl(file, reading)
        elif file.suffix.lower() == ".parquet":
            yield from _parquet(file, reading)
        elif file.stat().st_size > LONG_FILE:
            for number, piece in enumerate(cut(_chunks(file, reading), PIECE), 1):
                yield Document(f"{file}, piece {number}", piece)
        else:
            yield Document(str(file), "".join(_chunks(file, reading)))
    except OSError as error:
        raise _unreadable(file, error) from error


def cut(chunks: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of at most `size` characters, cut behind the last empty line of each, else behind
    its last line, else its last word, else anywhere. No cut makes a piece shorter than half of size."""
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > size:
            borders = (
                held.rfind(mark, start + size // 2, start + size) + len(mark) for mark in ("\n\n", "\n", " ")
            )
            end = next((border for border in borders if border > start + size // 2), start + size)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _chunks(file: Path, reading: Reading) -> Iterator[str]:
    """The text of a file, about CHUNK bytes at a time."""
    decoder = codecs.getincrementaldecoder(reading.codec)(
        "strict" if reading.on_bad_text == "error" else "replace"
    )
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    read = line = 0
    with file.open("rb") as opened:
        data = b"-"
        while data:
            data = opened.read(CHUNK)
            if read == 0 and not reading.wide and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise _not_text(file, reading, 0, 1, "is UTF-16", "--encoding utf-16")
            read += len(data)
            try:
                text = newlines.decode(decoder.decode(data, final=not data), final=not data)
            except UnicodeDecodeError as error:
                at = read - len(error.object) + error.start
                line += error.object.count(b"\n", 0, error.start) + 1
                raise _not_text(
                    file, reading, at, line, f"{error.reason} (byte 0x{error.object[error.start]:02X})"
                ) from None
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0")) + 1
                raise InputError(
                    "E305",
                    f"{file}:{line}",
                    "has NUL characters, so it is binary",
                    "leave the file out, or convert it",
                )
            line += text.count("\n")
            yield text


def _not_text(file: Path, reading: Reading, at: int, line: int, found: str, fix: str = "") -> InputError:
    return InputError(
        "E302",
        f"{file}:{line}",
        f"not {reading.encoding} at byte offset {at}, line {line}: {found}",
        fix or "name the right encoding:  --encoding latin-1   or accept U+FFFD:  --on-bad-text replace",
    )


def _jsonl(file: Path, reading: Reading) -> Iterator[Document]:
    for number, line in enumerate(_lines(file, reading), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("E306", where, f"is not JSON: {error}", "correct or delete this line") from None
        if not isinstance(row, dict):
            raise InputError(
                "E306", where, "is not a JSON object", f'write {{"{reading.field}": "..."}} on each line'
            )
        yield Document(where, text_of(row.get(reading.field), row, where, reading))


def _lines(file: Path, reading: Reading) -> Iterator[str]:
    held = ""
    for chunk in _chunks(file, reading):
        # Not splitlines, which also cuts at U+2028, and that may stand in a JSON string.
        *lines, held = (held + chunk).split("\n")
        yield from lines
        if len(held) > LONGEST_LINE:
            raise InputError(
                "E306", file, f"has a line of over {LONGEST_LINE} characters", "write one text a line"
            )
    yield held


def _parquet(file: Path, reading: Reading) -> Iterator[Document]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MachineError(
            "E406", file, "parquet files need the library pyarrow", "pip install pyarrow"
        ) from None
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if reading.field not in names:
                text_of(None, names, str(file), reading)
            batches = opened.iter_batches(batch_size=256, columns=[reading.field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                where = f"{file} row {number}"
                yield Document(where, text_of(value, names, where, reading))
    except (importlib.import_module("pyarrow").ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError("E306", file, f"is not a readable parquet file: {error}", "write it again") from None


def text_of(value: object, fields: Iterable[str], where: str, reading: Reading) -> str:
    """value, a text, with \\n line ends and without the lone surrogates that JSON can spell and UTF-8 cannot.

    fields  the names of the row it comes from, or the row itself: the error proposes those that hold a text.

    Raises InputError E306 for another type, E302 for surrogates.
    """
    if not isinstance(value, str):
        found = f"has no text in the field {reading.field!r}; its fields are {', '.join(fields)}"
        texts = [name for name in fields if not isinstance(fields, Mapping) or isinstance(fields[name], str)]
        flags = [f"--field {shlex.quote(name)}" for name in texts if name != reading.field]
        fix = f"name the field that holds the text:  {'   or  '.join(flags)}"
        raise InputError("E306", where, found, fix if flags else "correct or delete this row")
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii() and (bad := re.search("[\ud800-\udfff]", text)):
        if reading.on_bad_text == "error":
            found = f"character {bad.start()} is U+{ord(bad[0]):04X}, half of a surrogate pair"
            raise InputError("E302", where, found, "correct it, or accept U+FFFD:  --on-bad-text replace")
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text

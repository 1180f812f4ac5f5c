"""The tensors of a file of torch.save, as a table: read without unpickling, so that nothing in the file can run.

Such a file is a zip archive, its entries not compressed: NAME/data.pkl says which tensors there are, NAME/data/0, 1, 2
and so on are their numbers. A pickle is a program for a stack machine. Of its instructions those that a dict of tensors
needs are followed here; the functions that they name are compared with a list, never looked up, and what they would
return is written into the table. Whatever else a pickle can say is refused.

Source: https://docs.python.org/3/library/pickletools.html (the instructions); torch/serialization.py and
torch/_utils.py, _rebuild_tensor_v2 (what torch.save says with them)
"""

import itertools
import math
import pickletools
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from babyllama.checkpoint.contents import Shape, Stored, plain
from babyllama.checkpoint.folder import opened, read_part
from babyllama.errors import InputError

LONGEST_PICKLE = 2**19  # bytes; that of a Llama of 80 layers has 0.1 MB
MOST_INSTRUCTIONS = 100_000  # that of 126 layers has 51,000
MOST_AXES = 4
MOST_NAMES = 2  # of one tensor: the table, which may be the head too
LONGEST_DIRECTORY = 2**20  # bytes of the archive's table of contents
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
}
REBUILD = ("torch._utils", "_rebuild_tensor_v2")
PARAMETER = ("torch._utils", "_rebuild_parameter")
ORDERED = ("collections", "OrderedDict")
KNOWN = {REBUILD, PARAMETER, ORDERED, *(("torch", name) for name in DTYPES)}


class Archive:
    """An open file: `tensors` by name. Numbers are read when they are asked for.

    Raises InputError E212 saying what is wrong; E201 where there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with opened(self.path, code="E201") as (file, size):
            self._entries = self._directory(file, size)
            names = [name for name in self._entries if name.split("/", 1)[1:] == ["data.pkl"]]
            if len(names) != 1:
                raise self.error(f"holds {len(names)} entries called data.pkl, expected 1")
            self._prefix = names[0].removesuffix("data.pkl")
            begin, length = self._entries[names[0]]
            if length > LONGEST_PICKLE:
                raise self.error(f"has a data.pkl of {length:,} bytes, at most {LONGEST_PICKLE:,} are read")
            order = self._entries.get(f"{self._prefix}byteorder", (0, 0))
            file.seek(order[0])
            if file.read(min(order[1], 16)) not in (b"", b"little"):
                raise self.error("was written on a big-endian machine")
            file.seek(begin)
            program = file.read(length)
        self.tensors = self._table(_follow(program, self))

    def tensor(self, name: str) -> Tensor:
        """The tensor, as it is stored. Raises InputError E212 where the file has become shorter since."""
        stored = self.tensors[name]
        data = read_part(self.path, stored.begin, stored.bytes, code="E201")
        if len(data) < stored.bytes:
            raise self.error(f"ends inside tensor {plain(name)}; it had been longer")
        return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)

    def error(self, found: str) -> InputError:
        fix = "copy or download it again; an old one can be saved anew with torch.save from a recent torch"
        return InputError("E212", self.path, found, fix)

    # ---- the archive -----------------------------------------------------------------------------

    def _directory(self, file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
        """Where the bytes of each entry begin, and how many they are; entries that are compressed are refused."""
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) < at + 22:
            raise self.error("is no zip archive, as torch.save has written it since torch 1.6")
        lengths = [int.from_bytes(tail[at + 12 : at + 16], "little")]
        if (large := tail.rfind(b"PK\6\6", 0, at)) >= 0:  # the same again, for archives of more than 4 GiB
            lengths.append(int.from_bytes(tail[large + 40 : large + 48], "little"))
        if max(lengths) > LONGEST_DIRECTORY:
            raise self.error(f"has a table of contents of {max(lengths):,} bytes, which no Llama needs")
        try:
            entries = zipfile.ZipFile(file).infolist()
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            OverflowError,
            NotImplementedError,
            struct.error,
        ) as error:
            raise self.error(f"is a damaged zip archive ({error})") from None
        found: dict[str, tuple[int, int]] = {}
        for entry in entries:
            name = entry.filename
            if name in found:
                raise self.error(f"holds {plain(name)} twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise self.error(f"holds {plain(name)} compressed or encrypted, which torch.save does not do")
            begin = self._begin(file, entry)
            if entry.file_size != entry.compress_size or begin + entry.file_size > size:
                raise self.error(
                    f"says that {plain(name)} has {entry.file_size:,} bytes, which are not there"
                )
            found[name] = begin, entry.file_size
        return found

    def _begin(self, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
        """The byte behind the entry's own header, which repeats its name."""
        header = b""
        if 0 <= entry.header_offset < 2**62:
            file.seek(entry.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise self.error(f"has no entry where {plain(entry.filename)} should be")
        name, extra = struct.unpack_from("<HH", header, 26)
        return entry.header_offset + 30 + name + extra

    # ---- the tensors -----------------------------------------------------------------------------

    def _table(self, value: Any) -> dict[str, Stored]:
        if not isinstance(value, dict) or not value:
            raise self.error("does not hold a dict of tensors")
        found = {}
        for name, each in value.items():
            if not isinstance(each, _Tensor):
                raise self.error(f"holds {plain(name)}, which is no tensor with a name")
            found[name] = self._placed(name, each)
        ordered = sorted(found.items(), key=lambda each: each[1].begin)
        for (_, one), (name, other) in pairwise(ordered):
            if one.begin + one.bytes > other.begin and one != other:
                raise self.error(f"has {plain(name)} where another tensor still is")
        most = max(Counter(found.values()).values())
        if most > MOST_NAMES:  # a small file could fill all memory
            raise self.error(f"gives one tensor {most} names, at most {MOST_NAMES} are read")
        return found

    def _placed(self, name: str, each: "_Tensor") -> Stored:
        counts = (each.offset, each.storage.numbers, *each.shape, *each.stride)
        if any(not 0 <= count < 2**48 for count in counts):
            raise self.error(f"has impossible sizes for {plain(name)}")
        steps = [math.prod(each.shape[i + 1 :]) for i in range(len(each.shape))]
        rows = zip(each.shape, each.stride, steps, strict=False)
        if len(each.shape) != len(each.stride) or any(n > 1 and own != step for n, own, step in rows):
            raise self.error(f"does not hold {plain(name)} number after number (shape {each.shape})")
        key = f"{self._prefix}data/{each.storage.key}"
        begin, length = self._entries.get(key, (0, -1))
        dtype = each.storage.dtype
        if length != each.storage.numbers * dtype.itemsize:
            raise self.error(
                f"has {length:,} bytes in {plain(key)}, where {each.storage.numbers:,} numbers should be"
            )
        if each.offset + math.prod(each.shape) > each.storage.numbers:
            raise self.error(f"has fewer numbers than {plain(name)} of shape {each.shape} needs")
        return Stored(each.shape, dtype, begin + each.offset * dtype.itemsize)


# ---- the pickle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """A function or class that the pickle names: only its name, it is not looked up."""

    name: tuple[str, str]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numbers: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}


def _follow(program: bytes, archive: Archive) -> Any:
    """What the pickle describes: a dict of _Tensor, if it is what torch.save writes for one."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    try:
        for name, value in _instructions(program, archive):
            if name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                return stack.pop()
            elif name == "MARK":
                stack.append(MARK)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in NUMBERS_AND_TEXTS:
                stack.append(value)
            elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
                stack.append({} if name == "EMPTY_DICT" else ())
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            elif name == "GLOBAL":
                module, _, function = value.partition(" ")
                if (module, function) not in KNOWN:
                    raise archive.error(f"would call {plain(value)}, which no tensor needs; nothing was run")
                stack.append(_Named((module, function)))
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                given, function = stack.pop(), stack.pop()
                stack.append(_result(function, given))
            elif name in ("SETITEM", "SETITEMS"):
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(
                    isinstance(key, str) for key in items[::2]
                ):  # hashing a nested tuple can take forever
                    raise TypeError
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name == "BUILD":
                stack.pop()  # attributes, as OrderedDict has _metadata: nothing here asks for them
            else:
                raise archive.error(f"holds the instruction {name}, which no dict of tensors needs")
    except InputError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise archive.error(f"has a data.pkl that makes no sense ({type(error).__name__})") from None
    raise archive.error("has a data.pkl without an end")


def _instructions(program: bytes, archive: Archive) -> Iterator[tuple[str, Any]]:
    with warnings.catch_warnings(
        action="ignore"
    ):  # of the texts of old instructions, which are refused anyway
        instructions = list(itertools.islice(pickletools.genops(BytesIO(program)), MOST_INSTRUCTIONS + 1))
    if len(instructions) > MOST_INSTRUCTIONS:
        raise archive.error(f"has a data.pkl of more than {MOST_INSTRUCTIONS:,} instructions")
    yield from ((code.name, value) for code, value, _ in instructions)


def _storage(given: Any) -> _Storage:
    """("storage", type, key, device, how many numbers), as torch names the numbers that stand elsewhere."""
    word, kind, key, _, numbers = given
    if word != "storage" or not isinstance(key, str) or "/" in key:
        raise ValueError
    return _Storage(key, DTYPES[kind.name[1]], numbers)


def _result(function: Any, given: tuple[Any, ...]) -> Any:
    """What a function would return."""
    if function == _Named(ORDERED):
        return {}
    if function == _Named(PARAMETER):
        return given[0]
    storage, offset, shape, stride = given[:4]
    if len(shape) > MOST_AXES or len(stride) != len(shape):
        raise ValueError
    counts = (storage.numbers, offset, *shape, *stride)
    if function != _Named(REBUILD) or not all(type(count) is int for count in counts):
        raise TypeError
    return _Tensor(storage, offset, tuple(shape), tuple(stride))

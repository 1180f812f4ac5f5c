"""Folders that appear whole or not at all, and that notice when a byte of them changes.

A folder is written beside its place under a hidden name, every file flushed to the disk, `manifest.json` (name, size
and sha256 of each file) last, and then renamed: at no moment does its final name stand for half of it. Standard
library only.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from babyllama.errors import BabyLlamaError, InputError, MachineError

MANIFEST = "manifest.json"
FORMAT = 1  # raised when an older reader could misread what is written
SEAL = "sha256 of the above"
FROM_ELSEWHERE = "use an older step, or copy the folder again"
LARGEST_JSON = 2 * 2**20  # bytes; what is read may take 25 times as many, as a list of empty objects does
DISK_FAILS = {getattr(errno, name) for name in ("EIO", "EUCLEAN", "EBADMSG") if hasattr(errno, name)}
DISK_FAILS_ON_WINDOWS = {23, 1117, 1392, 1393}  # ERROR_CRC, _IO_DEVICE, _FILE_CORRUPT, _DISK_CORRUPT
ROOM = 1.2  # times its size that a folder must find free before it is written


@contextlib.contextmanager
def new_folder(
    folder: Path, facts: Mapping[str, Any] | None = None, *, replace: bool = False
) -> Iterator[Path]:
    """A hidden folder to put files into; at the end of the block it is `folder`, whole and durable, with a manifest.

    The manifest holds `facts` too, which may be filled in within the block. If the block or the disk fails, nothing is
    left behind, and whatever stood there before is untouched. With `replace`, what has its name gives way at the end.

    Raises MachineError E401 when the disk is full, E403 when the folder cannot be written or is there already.
    """
    half_done, aside = folder.parent / f".tmp-{folder.name}-{os.getpid()}", None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half_done, ignore_errors=True)
        _remove_left_over(folder)
        half_done.mkdir()
        yield half_done
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in half_done.iterdir()
        }
        for name in files:
            sync(half_done / name)
        _write_durably(half_done / MANIFEST, [sealed({"format": FORMAT, **(facts or {}), "files": files})])
        sync(half_done)
        if replace and folder.exists():
            shutil.rmtree(_doomed(folder), ignore_errors=True)
            aside = folder.rename(_doomed(folder))
        half_done.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise refused(error, folder) from error
    finally:
        shutil.rmtree(half_done, ignore_errors=True)  # gone already when all went well
        if aside is not None:
            with contextlib.suppress(OSError):
                if not folder.exists():
                    aside.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)


def write_folder(
    folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any] | None = None, *, replace: bool = False
) -> None:
    """new_folder, for contents that are at hand; a disk that is too full is noticed before anything is written."""
    with contextlib.suppress(OSError):
        free, needed = shutil.disk_usage(folder.parent).free, int(ROOM * sum(map(len, files.values())))
        if free < needed:
            raise disk_full(folder, needed, free)
    with new_folder(folder, facts, replace=replace) as half_done:
        for name, content in files.items():
            (half_done / name).write_bytes(content)


def verify_folder(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file in it was read and found to be what the manifest says.

    Raises InputError E206 (no usable manifest), E208 (written by a newer version), E205 (a file is missing, cut short
    or too long, or its disk fails) or E204 (contents changed), each naming the file; MachineError E403 when one may not
    be read, or not now.
    """
    try:
        return _verified(folder)
    except OSError as error:
        raise unreadable(error, Path(error.filename or folder)) from error


def _verified(folder: Path) -> dict[str, Any]:
    manifest = read_sealed(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError("E206", str(folder / MANIFEST), "lists no files", FROM_ELSEWHERE)
    for name, said in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(said, dict):
            found = f"names {name!r}, which is not a file of this folder"
            raise InputError("E206", str(folder / MANIFEST), found, FROM_ELSEWHERE)
        if not path.is_file():
            raise InputError("E205", str(path), "is listed in manifest.json and missing", FROM_ELSEWHERE)
        size = path.stat().st_size
        if size != said.get("bytes"):
            found = f"has {size:,} bytes, manifest.json says {said.get('bytes')}"
            raise InputError("E205", str(path), found, FROM_ELSEWHERE)
        if file_sha256(path) != said.get("sha256"):
            raise InputError(
                "E204", str(path), "sha256 differs from manifest.json (file damaged)", FROM_ELSEWHERE
            )
    return manifest


def sealed(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON that vouches for itself: its last entry is the sha256 of the others."""
    seal = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return json.dumps({**value, SEAL: seal}, indent=1).encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` wrote to `path`, without the seal.

    Raises InputError E205 (missing), E206 (not what was written, down to the last bit), E208 (by a newer version).
    """
    value = read_json(path)
    version = value.get("format")
    if not isinstance(version, int):
        raise InputError("E206", str(path), "has no format number", FROM_ELSEWHERE)
    if version > FORMAT:
        found = f"was written in format {version}, this version of Baby Llama reads up to {FORMAT}"
        raise InputError("E208", str(path), found, "upgrade Baby Llama")
    value.pop(SEAL, None)
    if path.read_bytes() != sealed(value):
        raise InputError("E206", str(path), "was changed (file damaged)", FROM_ELSEWHERE)
    return value


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` this content at once: a reader, or a crash, sees the old file or the new one. Raises E401 or E403."""
    replace_file_by_parts(path, [content])


def replace_file_by_parts(path: Path, parts: Iterable[bytes]) -> None:
    """The same with a content that is made while it is written."""
    half_done = path.parent / f".tmp-{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_done.unlink(missing_ok=True)
        _remove_left_over(path)
        _write_durably(half_done, parts)
        half_done.replace(path)
        sync(path.parent)
    except OSError as error:
        raise refused(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            half_done.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    """Remove what killed programs left of `path`: hidden files and folders, an hour old, whose program is gone."""
    for left_over in path.parent.glob(f".tmp-{glob.escape(path.name)}-*"):
        process = left_over.name.removeprefix(f".tmp-{path.name}-")
        if not re.fullmatch("[0-9]{1,7}", process) or _runs(int(process)):  # no system counts further
            continue
        with contextlib.suppress(OSError):
            # what is newer may be another machine's, on a shared disk
            if left_over.stat().st_mtime < time.time() - 3600:
                _remove(left_over)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is such a process; True where that cannot be asked (on Windows, os.kill would end it)."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def remove_folder(folder: Path) -> None:
    """Remove `folder`; if that is interrupted, what is left no longer bears its name."""
    shutil.rmtree(_doomed(folder), ignore_errors=True)
    shutil.rmtree(folder.rename(_doomed(folder)), ignore_errors=True)


def _doomed(folder: Path) -> Path:
    """What `folder` is called while it is removed; `sweep` removes what still bears such a name."""
    return folder.parent / f".del-{folder.name}"


def sweep(parent: Path) -> None:
    """Remove what interrupted writes and removals left in `parent`. Only the holder of its lock may call this."""
    for left_over in [*parent.glob(".tmp-*"), *parent.glob(".del-*")]:
        _remove(left_over)


def read_json(path: Path, code: str = "E206") -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError E205 when there is none, or `code` when it is not a JSON object."""
    remedy = "copy it again from where it came" if code != "E206" else FROM_ELSEWHERE
    try:
        if not path.exists():
            raise InputError("E205", str(path), "is missing", remedy)
        with opened(path, code="E205") as (file, size):
            if size > LARGEST_JSON:
                found = f"has {size:,} bytes, at most {LARGEST_JSON:,} are read"
                raise InputError(code, str(path), found, remedy)
            value = json.loads(file.read(LARGEST_JSON).decode("utf-8"))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(code, str(path), f"is not JSON ({str(error)[:120]})", remedy) from None
    except OSError as error:
        raise unreadable(error, path) from error
    if not isinstance(value, dict):
        raise InputError(code, str(path), f"holds a JSON {type(value).__name__}, expected an object", remedy)
    return value


@contextlib.contextmanager
def opened(path: Path, code: str) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file to read, and its bytes; what could block or never end (a pipe, a device) is not opened.

    Raises InputError `code` when there is no such file, E205 when its disk fails, MachineError E403 when it may not be
    read, or not now.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(code, path, "is missing", "give the path of a model that is there") from None
    except OSError as error:
        raise unreadable(error, path) from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise InputError(code, path, "is not a file", "give the path of a file")
    with os.fdopen(handle, "rb") as file:
        yield file, status.st_size


def read_part(path: Path, begin: int, count: int, code: str) -> bytearray:
    """`count` bytes from byte `begin` on; fewer where the file has become shorter. Raises what `opened` does."""
    data = bytearray(count)
    with opened(path, code) as (file, size):
        file.seek(begin)
        del data[file.readinto(data) if begin < size else 0 :]
    return data


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(path: Path, needed: int, free: int) -> MachineError:
    wanted = f"{needed / 2**20:,.1f} MiB wanted, " if needed else ""
    found = f"No space left on the disk: {wanted}{free / 2**20:,.1f} MiB free"
    return MachineError(
        "E401", str(path), found, "free some space and repeat; nothing that was saved is lost"
    )


def refused(error: OSError, path: Path, needed: int = 0) -> MachineError:
    """The coded error for what the operating system said about `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            return disk_full(path, needed, shutil.disk_usage(path.parent).free)
        return disk_full(path, needed, 0)
    return MachineError(
        "E403",
        str(path),
        f"{error.strerror or error}",
        "check that the folder exists and is yours to write, or choose another",
    )


def unreadable(error: OSError, path: Path) -> BabyLlamaError:
    """The coded error for a file that was there and could not be read.

    E205 when it is gone or its disk fails. E403 for all else, which may pass: it may not be read, or too many files are
    open; what is there is not to be taken for damaged, and removed.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError("E205", str(path), "is missing", FROM_ELSEWHERE)
    found = f"cannot be read ({error.strerror or error})"
    if error.errno in DISK_FAILS or getattr(error, "winerror", None) in DISK_FAILS_ON_WINDOWS:
        return InputError("E205", str(path), found, "take another copy of it: its disk fails")
    if isinstance(error, PermissionError):
        return refused(error, path)
    fix = "repeat it; if that changes nothing take another copy, or of a run an older step with --step"
    return MachineError("E403", str(path), found, fix)


def _write_durably(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and makes renames durable by itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

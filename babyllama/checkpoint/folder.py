"""Folders that appear whole or not at all, and that notice when a byte of them changes.

A folder is written beside its place under a hidden name, every file flushed to the disk, `manifest.json` (name, size
and sha256 of each file) last, and then renamed: at no moment does its final name stand for half of it. Standard
library only.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babyllama.errors import InputError, MachineError

MANIFEST = "manifest.json"
FORMAT = 1  # raised when an older reader could misread what is written
SEAL = "sha256 of the above"
FROM_ELSEWHERE = "use an older step, or copy the folder again"
LARGEST_JSON = 4 * 2**20  # bytes


def write_folder(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any] | None = None) -> None:
    """Write `files` into a new `folder`, with a manifest that also holds `facts`. Durable when this returns.

    Raises MachineError E401 when the disk is (or would become) full, E403 when the folder cannot be written; in both
    cases nothing is left behind and whatever stood there before is untouched.
    """
    parent, half_done = folder.parent, folder.parent / f".tmp-{folder.name}"
    needed = sum(map(len, files.values()))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < 1.2 * needed:
            raise disk_full(folder, needed, free)
        if half_done.exists():
            shutil.rmtree(half_done)
        half_done.mkdir()
        listed = {}
        for name, content in files.items():
            _write_durably(half_done / name, content)
            listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _write_durably(half_done / MANIFEST, _sealed({"format": FORMAT, **(facts or {}), "files": listed}))
        sync(half_done)
        half_done.rename(folder)
        sync(parent)
    except OSError as error:
        shutil.rmtree(half_done, ignore_errors=True)
        raise refused(error, folder, needed) from error


def verify_folder(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file in it was read and found to be what the manifest says.

    Raises InputError E206 (no usable manifest), E208 (written by a newer version), E205 (a file is missing, cut short
    or too long) or E204 (contents changed), each naming the file.
    """
    manifest = read_json(folder / MANIFEST)
    version, files = manifest.get("format"), manifest.get("files")
    if not isinstance(version, int) or not isinstance(files, dict) or not files:
        raise InputError("E206", str(folder / MANIFEST), "lists no files", FROM_ELSEWHERE)
    if version > FORMAT:
        raise newer_version(folder / MANIFEST, version)
    if (folder / MANIFEST).read_bytes() != _sealed(
        {key: value for key, value in manifest.items() if key != SEAL}
    ):
        raise InputError("E206", str(folder / MANIFEST), "was changed (file damaged)", FROM_ELSEWHERE)
    for name, said in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(said, dict):
            raise InputError(
                "E206",
                str(folder / MANIFEST),
                f"names {name!r}, which is not a file of this folder",
                "copy the folder again",
            )
        if not path.is_file():
            raise InputError(
                "E205",
                str(path),
                "is listed in manifest.json and missing",
                FROM_ELSEWHERE,
            )
        size = path.stat().st_size
        if size != said.get("bytes"):
            raise InputError(
                "E205",
                str(path),
                f"has {size:,} bytes, manifest.json says {said.get('bytes')}",
                FROM_ELSEWHERE,
            )
        if file_sha256(path) != said.get("sha256"):
            raise InputError(
                "E204",
                str(path),
                "sha256 differs from manifest.json (file damaged)",
                FROM_ELSEWHERE,
            )
    return manifest


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` this content at once: a reader, or a crash, sees the old file or the new one. Raises E401 or E403."""
    half_done = path.parent / f".tmp-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_done.unlink(missing_ok=True)
        _write_durably(half_done, content)
        half_done.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            half_done.unlink()
        raise refused(error, path, len(content)) from error


def remove_folder(folder: Path) -> None:
    """Remove `folder`; if that is interrupted, what is left no longer bears its name."""
    doomed = folder.parent / f".del-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what interrupted writes and removals left in `parent`. Only the holder of its lock may call this."""
    for left_over in [*parent.glob(".tmp-*"), *parent.glob(".del-*")]:
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def read_json(path: Path, code: str = "E206") -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError E205 when there is none, or `code` when it is not a JSON object."""
    remedy = "copy it again from where it came" if code != "E206" else FROM_ELSEWHERE
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise InputError(
                code, str(path), f"has {size:,} bytes, at most {LARGEST_JSON:,} are read", remedy
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("E205", str(path), "is missing", remedy) from None
    except (ValueError, RecursionError) as error:
        raise InputError(code, str(path), f"is not JSON ({str(error)[:120]})", remedy) from None
    except OSError as error:
        raise refused(error, path) from error
    if not isinstance(value, dict):
        raise InputError(code, str(path), f"holds a JSON {type(value).__name__}, expected an object", remedy)
    return value


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newer_version(path: Path, version: int) -> InputError:
    found = f"was written in format {version}, this version of Baby Llama reads up to {FORMAT}"
    return InputError("E208", str(path), found, "upgrade:  pip install -U baby-llama")


def disk_full(path: Path, needed: int, free: int) -> MachineError:
    found = f"No space left on the disk: {needed / 2**20:,.1f} MiB to write, {free / 2**20:,.1f} MiB free"
    return MachineError(
        "E401",
        str(path),
        found,
        "free some space, or choose another disk with --out; nothing that was saved is lost",
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


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest, which vouch for themselves too."""
    seal = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, SEAL: seal}, indent=1).encode()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
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

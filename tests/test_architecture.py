"""Who may import whom, what an import costs, and which error codes are in use: read from the source, held for good."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from babyllama.errors import CODES

PACKAGE = Path(__file__).parents[1] / "babyllama"

# Part of the package -> the parts it may import, besides itself. "checkpoint.folder" is that one module.
# Nothing may import cli, and __init__ imports nothing when it is loaded.
MAY_IMPORT = {
    "errors": set(),
    "model": {"errors"},
    "text": {"errors"},
    "packages": {"errors", "checkpoint.folder"},
    "data": {"text", "errors", "checkpoint.folder", "packages"},
    "checkpoint": {"model", "text", "errors", "packages"},
    "train": {"model", "data", "checkpoint", "text", "errors", "machine", "costs"},
    "generate": {"model", "text", "errors"},
    "measure": {"model", "text", "data.questions", "generate.cache", "errors"},
    "costs": {"model", "errors"},
    "machine": {"model", "errors"},
}
MAY_IMPORT |= {"api": {*MAY_IMPORT}, "__init__": {*MAY_IMPORT, "api"}}
MAY_IMPORT |= {"terminal": {*MAY_IMPORT}}
MAY_IMPORT |= {"talk": {*MAY_IMPORT}}
MAY_IMPORT |= {"harness": {*MAY_IMPORT}}
MAY_IMPORT |= {"cli": {*MAY_IMPORT}, "__main__": {"cli"}}
EXCEPT = {
    ("train/__init__.py", "babyllama.api.train")
}  # the package that can be called: babyllama.train(...)

# Of what is not ours: the only things besides the standard library, and the things never.
ONLY = {"model": {"torch", "jaxtyping"}, "errors": set()}
NEVER = {"text": {"torch", "numpy"}, "data": {"torch"}, "costs": {"torch", "numpy"}}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports anywhere in it; relative imports keep their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def refused(part: str, name: str) -> bool:
    """Whether this part of the package may not import what has this dotted name."""
    top, _, rest = name.partition(".")
    if top == "babyllama":
        allowed = MAY_IMPORT[part] | {part, "__version__"}
        return bool(rest) and not any(f"{rest}.".startswith(f"{one}.") for one in allowed)
    if part in ONLY and top not in ONLY[part] | sys.stdlib_module_names:
        return True
    return top in NEVER.get(part, set()) or name.startswith(".")


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        part = place.parts[0].removesuffix(".py")
        if part in MAY_IMPORT:
            names = [
                name
                for name in imported(path)
                if refused(part, name) and (place.as_posix(), name) not in EXCEPT
            ]
            found += [f"{place} imports {name}" for name in sorted(names)]
        else:
            found.append(f"{place} belongs to no part in the table")
    return found


def test_imports_follow_the_table():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model.py", "from babyllama.train.loop import train"),
        ("model.py", "import numpy as np"),
        ("text/tokenizer.py", "import torch"),
        ("text/stream.py", "def f():\n    from numpy import array"),
        ("data/corpus.py", "from babyllama.checkpoint.run import Run"),
        ("data/corpus.py", "from babyllama import train"),
        ("generate/engine.py", "from babyllama.train import loop"),
        ("train/loop.py", "import babyllama.generate.engine"),
        ("train/loop.py", "from babyllama import cli"),
        ("api.py", "import babyllama.cli"),
        ("checkpoint/hf.py", "from . import folder"),
        ("helpers.py", ""),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


def test_what_the_table_allows_is_no_violation(tmp_path):
    (tmp_path / "data").mkdir()
    text = "import os.path\nfrom babyllama.checkpoint.folder import x\nfrom babyllama.data import y\nimport numpy"
    (tmp_path / "data" / "corpus.py").write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []


def test_no_module_is_named_for_having_no_subject():
    names = {
        part.removesuffix(".py") for path in PACKAGE.rglob("*.py") for part in path.relative_to(PACKAGE).parts
    }
    assert names.isdisjoint(FORBIDDEN_NAMES)


def test_everything_imported_from_outside_is_a_declared_dependency():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [each for name in ("parquet", "hub", "verify", "harness") for each in extras[name]]
    declared = {re.split(r"[^\w-]", each)[0] for each in project["dependencies"] + wanted} | {"llama_cpp"}
    outside = {name.partition(".")[0] for path in PACKAGE.rglob("*.py") for name in imported(path)}
    assert outside - sys.stdlib_module_names - {"babyllama"} <= declared


# ---- what an import costs


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "name", ["babyllama", "babyllama.errors", "babyllama.costs", "babyllama.machine", "babyllama.packages"]
)
def test_importing_the_package_and_its_plain_parts_is_cheap(name):
    assert loaded_by(f"import {name}").isdisjoint({"torch", "numpy", "tokenizers", "typer", "transformers"})


@pytest.mark.parametrize("name", ["babyllama.text.tokenizer", "babyllama.text.stream", "babyllama.text.chat"])
def test_text_needs_neither_torch_nor_numpy(name):
    assert loaded_by(f"import {name}").isdisjoint({"torch", "numpy", "transformers"})


def test_data_needs_no_torch():
    assert "torch" not in loaded_by("import babyllama.data.corpus, babyllama.data.batches")


@pytest.mark.parametrize(
    "before",
    ["import babyllama", "import babyllama.train.loop, babyllama", "import babyllama.api, babyllama"],
)
def test_babyllama_train_can_be_called_whatever_was_imported_before(before):
    check = "assert all(callable(babyllama.train) and callable(babyllama.load) for _ in range(2))"
    loaded_by(f"{before}\n{check}")


# ---- error codes

NOT_YET_RAISED: set[str] = set()  # may only shrink


def codes_used() -> set[str]:
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py") if p.name != "errors.py"]
    texts = {
        n.value
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant)
        if isinstance(n.value, str)
    }
    return {text for text in texts if re.fullmatch(r"E\d{3}", text)}


def test_every_code_that_is_raised_is_in_the_table():
    assert codes_used() <= CODES.keys()


def test_every_code_in_the_table_is_raised_somewhere():
    assert CODES.keys() - codes_used() == NOT_YET_RAISED

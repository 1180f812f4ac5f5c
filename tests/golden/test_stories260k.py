"""The golden story: stories260K, greedily, byte for byte as llama2.c's own test expects it.

`run -t 0.0 -n 200` makes 200 passes, the first over the BOS alone; each pass gives a token. The BOS is not
printed, nor is the space that begins the first word. Text: llama2.c, test_all.py.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama.checkpoint.export import export
from babyllama.checkpoint.hf import build
from babyllama.checkpoint.llama2c import read_llama2c
from babyllama.checkpoint.open import open_llama
from babyllama.checkpoint.verify import verify
from babyllama.generate.engine import complete, generate
from babyllama.generate.sample import Sampling
from babyllama.model import Llama
from babyllama.text.tokenizer import Tokenizer

BOS, PASSES = 1, 200
GREEDY = Sampling(temperature=0)
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a \
big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play \
with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""
SHA256 = "beeb5cb46785efee81a8545300b31e396b595e5ce6f3b77db201545501981d14"


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def llama(fixture_file: Callable[[str], Path], one_thread: None) -> Llama:
    config, weights = read_llama2c(fixture_file("stories260K.bin"))
    model = Llama(config, seed=None).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture
def tokenizer(fixture_file: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(fixture_file("tok512.bin"))


def test_the_story_here_is_the_one_that_is_known() -> None:
    assert len(STORY.encode()) == 464
    assert hashlib.sha256(STORY.encode()).hexdigest() == SHA256


def test_greedy_stories260k_tells_llama2cs_story(llama: Llama, tokenizer: Tokenizer) -> None:
    (completion,) = complete(llama, [[BOS]], max_tokens=PASSES, sampling=GREEDY)
    assert len(completion.ids) == PASSES
    assert tokenizer.decode([BOS, *completion.ids]) == STORY


def test_it_tells_the_same_story_without_a_cache(llama: Llama, tokenizer: Tokenizer) -> None:
    tokens = [BOS]
    with torch.inference_mode():
        for _ in range(PASSES):
            tokens.append(int(llama(torch.tensor([tokens]))[0, -1].argmax()))
    assert tokenizer.decode(tokens) == STORY


def test_it_goes_on_with_the_story_from_anywhere_in_a_batch(llama: Llama) -> None:
    (whole,) = complete(llama, [[BOS]], max_tokens=PASSES, sampling=GREEDY)
    story = [BOS, *whole.ids]
    prompts = [story[:length] for length in (1, 2, 50, 137, 200)]
    rows: list[list[int]] = [list(prompt) for prompt in prompts]
    for token in generate(
        llama, prompts, max_tokens=PASSES, max_len=PASSES + 1, sampling=GREEDY, prefill_chunk=7
    ):
        assert token.position == len(rows[token.row])
        rows[token.row].append(token.id)
    assert rows == [story] * 5


WAYS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "gguf": {"to": "gguf"},
    "llama2.c, version 0": {"to": "llama2c"},
    "llama2.c, version 1": {"to": "llama2c", "version": 1},
    "meta": {"to": "meta"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_story_survives_a_journey_through_every_format(
    tmp_path: Path, llama: Llama, tokenizer: Tokenizer, way: dict[str, Any]
) -> None:
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "out", **way)[0]
    found = open_llama(out)
    own = Tokenizer.load(tmp_path / "out-tokenizer.bin") if way["to"] == "llama2c" else found.tokenizer()
    model = build(found.config, found.weights)
    (completion,) = complete(model, [[BOS]], max_tokens=PASSES, sampling=GREEDY)
    assert own.decode([BOS, *completion.ids]) == STORY
    assert own.encode(STORY, bos=True) == tokenizer.encode(STORY, bos=True)
    verdict = verify(llama.config, llama.state_dict(), tokenizer, out, to=way["to"], text=STORY)
    assert verdict.relative <= 1e-5


def test_both_files_come_back_byte_for_byte(
    tmp_path: Path, fixture_file: Callable[[str], Path], llama: Llama, tokenizer: Tokenizer
) -> None:
    out, beside = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "out.bin", to="llama2c")
    assert out.read_bytes() == fixture_file("stories260K.bin").read_bytes()
    assert beside.read_bytes() == fixture_file("tok512.bin").read_bytes()

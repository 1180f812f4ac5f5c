"""A small text, prepared once, for the tests that train."""

import random
from pathlib import Path

import pytest

from babyllama.data.corpus import Corpus, prepare

WORDS = [
    "the",
    "a",
    "little",
    "old",
    "king",
    "queen",
    "swan",
    "duckling",
    "went",
    "saw",
    "sang",
    "slept",
    "by",
    "under",
]


def tale(number: int) -> str:
    chance = random.Random(number)
    lines = [" ".join(chance.choices(WORDS, k=8)).capitalize() + "." for _ in range(12)]
    return f"TALE {number}\n\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(30):
        (folder / f"{number}.txt").write_text(tale(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "ids"
    prepare(texts, folder, vocab_size=320)
    return folder


@pytest.fixture
def corpus(prepared) -> Corpus:
    return Corpus.open(prepared)

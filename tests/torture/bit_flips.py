"""Flip random bits of a saved run, cut its files short, mix them up, and see that each change is noticed.

    python tests/torture/bit_flips.py --count 100

The files are those of the newest step and run.json. A change to the step must make the run go on from the step before
it, with a code that says why, and end with the same bits (tried on every 20th change); a change to run.json must refuse
the whole run with a code.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from forks import Tally, attempt, fingerprint, main, prepared

from babyllama import api
from babyllama.checkpoint.run import RUN_JSON, Run
from babyllama.errors import InputError
from babyllama.train.loop import Started

STEPS = 8
CODES = {"E204", "E205", "E206", "E208"}


@contextlib.contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content, or without it; afterwards as it was."""
    before = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def noticed(out: Path, path: Path) -> str:
    """What is wrong with how a change to `path` was taken; empty when it was noticed and the older step is used."""
    try:
        newest, passed_over = Run(out).newest_intact()
    except InputError as error:
        return "" if path.name == RUN_JSON and error.code in CODES | {"E201"} else f"refused: {error}"
    if path.name == RUN_JSON:
        return "not noticed"
    codes = [problem.code for problem in passed_over]
    return "" if newest == STEPS - 2 and len(codes) == 1 and codes[0] in CODES else f"{newest}, {codes}"


def goes_on(out: Path, path: Path, expected: str, scratch: Path) -> str:
    """The same for a real resumption of a copy of the run."""
    shutil.copytree(out, scratch)
    events: list[object] = []
    try:
        api.resume(scratch, tell=events.append)
        started = next(event for event in events if isinstance(event, Started))
        right = started.step == STEPS - 2 and len(started.passed_over) == 1
        return "" if right and fingerprint(scratch) == expected else f"went on from {started.step}"
    except InputError as error:
        return "" if path.name == RUN_JSON else f"refused: {error}"
    finally:
        shutil.rmtree(scratch)


def torture(folder: Path, count: int, seed: int) -> Tally:
    chance, tally = random.Random(seed), Tally()
    tally.update({"flips": 0, "of them resumed": 0})
    data, out = prepared(folder), folder / "run"
    attempt(data, out, STEPS)
    expected, older = fingerprint(out), Run(out).folder(STEPS - 2)
    assert Run(out).steps()[-2:] == [STEPS - 2, STEPS]
    paths = [*sorted(Run(out).folder(STEPS).iterdir()), out / RUN_JSON]
    for number in range(count):
        path = chance.choice(paths)
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        with changed(path, bytes(content)):
            wrong = noticed(out, path)
            if not wrong and number % 20 == 0:
                wrong = goes_on(out, path, expected, folder / "scratch")
                tally["of them resumed"] += 1
        tally["flips"] += 1
        tally.expect(not wrong, f"bit in byte {place} of {path.name}: {wrong}")
    for path in paths:
        whole = path.read_bytes()
        for part in range(64):
            with changed(path, whole[: len(whole) * part // 64]):
                wrong = noticed(out, path)
            tally["cuts"] += 1
            tally.expect(not wrong, f"{path.name} cut at {part}/64: {wrong}")
        others = {"missing": None, "longer": whole + b"\0"}
        if (older / path.name).exists() and (older / path.name).read_bytes() != whole:
            others["of the step before"] = (older / path.name).read_bytes()
        for kind, content in others.items():
            with changed(path, content):
                wrong = noticed(out, path)
            tally["missing, longer or swapped"] += 1
            tally.expect(not wrong, f"{path.name} {kind}: {wrong}")
    tally.expect(Run(out).newest_intact() == (STEPS, []), "the run is no longer as it was")
    return tally


if __name__ == "__main__":
    main(torture, 1000, __doc__)

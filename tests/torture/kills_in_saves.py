"""Kill a training run inside each phase of its saves, and see that nothing is lost.

    python tests/torture/kills_in_saves.py --count 50

Half of the children are killed just before one of the calls that make, open, rename or remove something in the run
folder, these evenly over all such calls of a run; the other half in the middle of writing a file, by the limit on a
file's size that the kernel knows. Then the run goes on, and must end with the bits of one that nobody disturbed.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

from forks import Tally, attempt, ended, fingerprint, fork, main, prepared

from babyllama.checkpoint.folder import verify_folder
from babyllama.checkpoint.run import RUN_JSON, Run
from babyllama.errors import InputError
from babyllama.train.loop import Stepped

STEPS = 8
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # what Python tells an audit hook of


def watch(out: Path, last: int) -> list[int]:
    """Kill this process just before the call of number `last` in the run folder; the list holds their count so far."""
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CALLS and (event != "open" or str(arguments[0]).startswith(str(out))):
            seen[0] += 1
            if seen[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def limit(step: int, size: int):
    """From `step` on the kernel kills this process when a file it writes grows beyond `size` bytes."""

    def tell(event: object) -> None:
        if isinstance(event, Stepped) and event.step == step:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return tell


def torture(folder: Path, count: int, seed: int) -> Tally:
    chance, tally = random.Random(seed), Tally()
    data, out = prepared(folder), folder / "run"
    attempt(data, folder / "undisturbed", STEPS)
    expected = fingerprint(folder / "undisturbed")
    largest = max(path.stat().st_size for path in (folder / "undisturbed").glob("step-*/*"))

    def counted() -> None:
        seen = watch(out, 0)
        attempt(data, out, STEPS)
        calls = seen[0]
        (folder / "calls").write_text(str(calls), encoding="utf-8")

    assert ended(fork(counted)) == 0
    calls = int((folder / "calls").read_text(encoding="utf-8"))
    shutil.rmtree(out)

    def killed(number: int) -> None:
        if number % 2:
            step, size = chance.randrange(1, STEPS), chance.randrange(largest)
            attempt(data, out, STEPS, tell=limit(step, size))
        else:
            watch(out, 1 + number * calls // count)
            attempt(data, out, STEPS)

    for number in range(count):
        chance.seed(f"{seed}/{number}")
        status, kind = ended(fork(lambda at=number: killed(at))), "size" if number % 2 else "call"
        tally.expect(status in (-signal.SIGKILL, -signal.SIGXFSZ), f"{kind} {number}: exit status {status}")
        tally["kills in a file" if number % 2 else "kills before a call"] += 1
        tally["half-written steps"] += any(out.glob(".tmp-step-*"))
        for step in Run(out).steps() if (out / RUN_JSON).is_file() else []:
            with contextlib.suppress(InputError):
                tally["steps intact afterwards"] += bool(verify_folder(Run(out).folder(step)))
                continue
            tally.failures.append(f"{kind} {number}: step {step} has its name and is not intact")
        status = ended(fork(lambda: attempt(data, out, STEPS)))
        tally.expect(status == 0, f"{kind} {number}: does not go on, exit status {status}")
        if status == 0:
            tally.expect(fingerprint(out) == expected, f"{kind} {number}: other bits")
            tally.expect(not [*out.glob(".tmp-*"), *out.glob(".del-*")], f"{kind} {number}: left-overs")
        shutil.rmtree(out)
    tally["calls in a run"] = calls
    return tally


if __name__ == "__main__":
    main(torture, 400, __doc__)

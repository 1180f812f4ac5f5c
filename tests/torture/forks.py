"""What the tortures share: a small text, processes that start in milliseconds, and a tally.

A process that has imported everything and trained a run forks a child for each attempt. Runs train in one thread: a
child of a process with more would wait for threads that it does not have. Needs os.fork.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from babyllama import api, machine
from babyllama.checkpoint.run import RUN_JSON, Run
from babyllama.data.corpus import prepare

STEPS = 30
SETTINGS = {
    "size": "100k",
    "context": 32,
    "batch_size": 4,
    "threads": 1,
    "device": "cpu",
    "precision": "float32",
}
WORDS = (
    "the a little old king queen swan duckling went saw sang slept by under over lake tree house and then but"
)


class CannotError(Exception):
    """What a torture needs cannot be had here."""


class Tally(Counter[str]):
    """How often what happened; `failures` says what should not have."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []
        self.start = time.monotonic()

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)

    def line(self) -> str:
        counts = [f"{number:,} {name}" for name, number in self.items()]
        return ", ".join([*counts, f"{len(self.failures)} failures; {time.monotonic() - self.start:.0f} s"])


def prepared(folder: Path, seed: int = 0) -> Path:
    """A small text in `folder`, made ready to train on; and this process, to train on one thread."""
    torch.set_num_threads(1)
    machine.measure_precision = functools.cache(machine.measure_precision)  # once, not by each child
    chance = random.Random(seed)
    (folder / "text").mkdir(parents=True)
    for number in range(20):
        lines = " ".join(chance.choices(WORDS.split(), k=90))
        (folder / "text" / f"{number}.txt").write_text(lines, encoding="utf-8")
    prepare(folder / "text", folder / "data", vocab_size=300)
    return folder / "data"


def attempt(data: Path, out: Path, steps: int = STEPS, **more: object) -> None:
    """Start the run, or go on with it, to its end."""
    if (out / RUN_JSON).is_file():
        api.resume(out, **more)
    else:
        api.train(data, out=out, steps=steps, save_every=2, evaluations=3, **SETTINGS, **more)


def command(data: Path, out: Path, steps: int = STEPS) -> list[str]:
    """The same for the command line."""
    if (out / RUN_JSON).is_file():
        return ["train", "--resume", str(out)]
    settings = {"save_every": 2, "evaluations": 3, **SETTINGS}
    words = ["train", str(data), "--out", str(out), "--steps", str(steps)]
    words += ["--size", settings.pop("size"), "--device", settings.pop("device")]
    return words + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def fingerprint(out: Path) -> str:
    """Of the last weights and of all that the optimiser remembers."""
    run = Run(out)
    folder = run.folder(run.steps()[-1])
    return hashlib.sha256(
        b"".join((folder / f"{kind}.safetensors").read_bytes() for kind in ("model", "optim"))
    ).hexdigest()


def fork(work: Callable[[], object], said: Path | None = None) -> int:
    """The id of a child that does `work` and leaves with its exit status; what it prints goes to the file `said`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist, and are idle
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        if said is not None:
            sys.stdout = sys.stderr = said.open("w", encoding="utf-8")
        work()
        status = 0
    except KeyboardInterrupt:  # before or after the work
        status = 128 + signal.SIGINT
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        if said is not None:
            sys.stdout.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a child: its exit status, or -N when signal N killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Watch:
    """Seconds that a child takes to end, less those that it or we were only kept waiting for a core."""

    def __init__(self, child: int) -> None:
        self.processes = child, os.getpid()
        self.start = time.monotonic() - self.queued()

    def queued(self) -> float:
        """Seconds in the queue of the processor so far; 0 where the system does not tell."""
        waited = 0
        for process in self.processes:
            with contextlib.suppress(OSError, IndexError):
                waited += int(Path(f"/proc/{process}/schedstat").read_text(encoding="ascii").split()[1])
        return waited / 1e9

    def ended(self) -> tuple[int, float]:
        """What `ended` says, and the seconds."""
        os.waitid(os.P_PID, self.processes[0], os.WEXITED | os.WNOWAIT)  # its figures go with it
        seconds = time.monotonic() - self.queued() - self.start
        return ended(self.processes[0]), max(0.0, seconds)


def main(torture: Callable[[Path, int, int], Tally], count: int, description: str) -> None:
    """The command line of one torture: its tally on one line, and exit status 1 when anything failed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default=SETTINGS["precision"])
    given = parser.parse_args()
    SETTINGS["precision"] = given.precision
    memory = Path("/dev/shm")  # a file system in memory: nothing here waits for a disk
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as temporary:
        try:
            tally = torture(Path(temporary), given.count, given.seed)
        except CannotError as reason:
            print(f"skipped: {reason}")
            return
    print(tally.line())
    for failure in tally.failures[:20]:
        print(f"  {failure}", file=sys.stderr)
    sys.exit(bool(tally.failures))

"""Kill a training run at random moments, again and again, and see that nothing is lost.

    python tests/torture/kills.py --kills 50

A process that has imported everything and trained a few steps forks one child for each attempt, so an attempt costs
milliseconds; the child starts or resumes the run, and is killed with SIGKILL at a random moment. When a run gets
through, its last weights and its optimiser's state must be those of a run that nobody disturbed, bit for bit. Needs
os.fork.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from babyllama import api
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


@dataclass
class Tally:
    kills: int = 0
    runs: int = 0
    lost: int = 0  # attempts that failed although only kills had happened
    different: int = 0  # finished runs whose bits are not those of the undisturbed run
    while_saving: int = 0  # kills that left a half-written folder behind
    seconds: float = 0.0


def attempt(data: Path, out: Path) -> None:
    """Start the run, or go on with it, to its end."""
    if (out / RUN_JSON).is_file():
        api.resume(out)
    else:
        api.train(data, out=out, steps=STEPS, save_every=2, evaluations=3, **SETTINGS)


def fingerprint(out: Path) -> str:
    run = Run(out)
    folder = run.folder(run.steps()[-1])
    return hashlib.sha256(
        b"".join((folder / f"{kind}.safetensors").read_bytes() for kind in ("model", "optim"))
    ).hexdigest()


def spawn(data: Path, out: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist, and are idle
        child = os.fork()
    if child == 0:
        status = 1
        try:
            attempt(data, out)
            status = 0
        finally:
            os._exit(status)
    return child


def kill_loop(folder: Path, kills: int, seed: int = 0) -> Tally:
    """Runs in `folder` until `kills` of their processes were killed. One thread, so that forks are safe."""
    torch.set_num_threads(1)
    chance, tally, start = random.Random(seed), Tally(), time.monotonic()
    (folder / "text").mkdir(parents=True)
    for number in range(20):
        lines = " ".join(chance.choices(WORDS.split(), k=90))
        (folder / "text" / f"{number}.txt").write_text(lines, encoding="utf-8")
    prepare(folder / "text", folder / "data", vocab_size=300)
    attempt(folder / "data", folder / "undisturbed")  # warms this process up, too
    began = time.monotonic()
    _, status = os.waitpid(spawn(folder / "data", folder / "timed"), 0)
    duration = time.monotonic() - began
    expected = fingerprint(folder / "undisturbed")
    assert status == 0 and fingerprint(folder / "timed") == expected
    out = folder / "run"
    while tally.kills < kills:
        child = spawn(folder / "data", out)
        if chance.random() < 0.85:
            time.sleep(chance.uniform(0, duration * 0.7))
        else:
            time.sleep(duration * 3)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            tally.kills += 1
            tally.while_saving += any(out.glob(".tmp-step-*"))
        elif os.WEXITSTATUS(status) != 0:
            tally.lost += 1
        else:
            tally.runs += 1
            tally.different += fingerprint(out) != expected
            shutil.rmtree(out)
    attempt(folder / "data", out)  # whatever the last kill left behind
    tally.runs += 1
    tally.different += fingerprint(out) != expected
    tally.seconds = time.monotonic() - start
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = kill_loop(Path(temporary), given.kills, given.seed)
    print(result)
    sys.exit(bool(result.lost or result.different))

"""Kill a training run at random moments, again and again, and see that nothing is lost.

    python tests/torture/kills.py --count 50

Each child starts the run, or goes on with it, and is killed with SIGKILL at a random moment. When a run gets through,
its last weights and its optimiser's memory must be those of a run that nobody disturbed, bit for bit.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from forks import Tally, attempt, ended, fingerprint, fork, main, prepared


def torture(folder: Path, count: int, seed: int) -> Tally:
    """Runs in `folder` until `count` of their processes were killed."""
    chance, tally = random.Random(seed), Tally()
    data, out = prepared(folder), folder / "run"
    attempt(data, folder / "undisturbed")  # warms this process up, too
    began = time.monotonic()
    assert ended(fork(lambda: attempt(data, folder / "timed"))) == 0
    duration, expected = time.monotonic() - began, fingerprint(folder / "undisturbed")
    assert fingerprint(folder / "timed") == expected
    tally.update({"kills": 0, "of them while saving": 0, "runs finished": 0})
    while tally["kills"] < count:
        child = fork(lambda: attempt(data, out))
        if chance.random() < 0.9:
            time.sleep(chance.uniform(0, duration * 0.6))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == -signal.SIGKILL:
            tally["kills"] += 1
            tally["of them while saving"] += any(out.glob(".tmp-step-*"))
        elif status:
            tally.failures.append(f"exit status {status} after {tally['kills']} kills")
        else:
            tally["runs finished"] += 1
            tally.expect(fingerprint(out) == expected, f"other bits after {tally['kills']} kills")
            shutil.rmtree(out)
    attempt(data, out)  # whatever the last kill left behind
    tally["runs finished"] += 1
    tally.expect(fingerprint(out) == expected, "other bits at the end")
    return tally


if __name__ == "__main__":
    main(torture, 1000, __doc__)

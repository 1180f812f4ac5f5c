"""Let two processes train in one folder at the same moment, and see that one of them does and the other says why not.

    python tests/torture/races.py --count 10

The two wait at a pipe and are let go together. One must go on; the other must leave within 2 seconds with exit status 4
and E402. Then the winner is killed, and the next two find the folder free at once. Every third pair starts in a new
folder.
"""

import os
import shutil
import signal
import time
from pathlib import Path

from forks import Tally, Watch, attempt, command, ended, fork, main, prepared

from babyllama import cli

SOON, PATIENCE = 2.0, 60.0  # seconds; the first of a process that gets a core when it wants one
FOREVER = 10**7  # steps


def torture(folder: Path, count: int, seed: int) -> Tally:
    tally, data, out = Tally(), prepared(folder, seed), folder / "run"
    attempt(data, folder / "warm", 4)
    slowest = 0.0
    for number in range(count):
        if number % 3 == 0:
            shutil.rmtree(out, ignore_errors=True)
        gate, opens = os.pipe()

        def racer(gate: int = gate, opens: int = opens) -> None:
            os.close(opens)
            words = command(data, out, FOREVER)
            os.read(gate, 1)
            cli.main(words)

        said = {fork(racer, folder / f"said {name}"): folder / f"said {name}" for name in "ab"}
        time.sleep(0.02)  # both stand at the gate
        os.close(gate)
        os.close(opens)
        watches, deadline = {child: Watch(child) for child in said}, time.monotonic() + PATIENCE
        left = None
        while left is None and time.monotonic() < deadline:
            left = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            time.sleep(0.002)
        status, waited, text = None, 0.0, ""
        if left is not None:
            status, waited = watches[left.si_pid].ended()
            text = said.pop(left.si_pid).read_text(encoding="utf-8")
        slowest = max(slowest, waited)
        tally.expect(status == 4 and "E402" in text, f"pair {number}: exit status {status} {text}")
        tally.expect(waited <= SOON, f"pair {number}: {waited:.1f} s")
        for winner in said:  # two, where nobody gave way
            alive = os.waitpid(winner, os.WNOHANG)[0] == 0
            tally.expect(alive, f"pair {number}: nobody trains: {said[winner].read_text(encoding='utf-8')}")
            if alive:
                time.sleep(0.1 * (number % 4))  # sometimes long enough for a few saves
                os.kill(winner, signal.SIGKILL)
                ended(winner)
        tally["pairs"] += 1
        tally["told who holds it"] += "process " in text and "not known" not in text
    tally["ms at most"] = round(slowest * 1000)
    return tally


if __name__ == "__main__":
    main(torture, 100, __doc__)

"""Stop a training run with SIGTERM, Ctrl-C or a closed terminal at random moments, and see that it was saved.

    python tests/torture/terminations.py --count 10

Each child is the command line itself. One that is stopped while it trains must leave within 10 seconds with exit status
128 + signal, having saved the very step that it names; a second Ctrl-C must end it within a second. What goes on
afterwards must end with the bits of a run that nobody disturbed.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

from forks import Tally, Watch, attempt, command, ended, fingerprint, fork, main, prepared

from babyllama import cli
from babyllama.checkpoint.run import RUN_JSON, Run

SOON, AT_ONCE = 10.0, 1.0  # seconds
SIGNALS = [signal.SIGTERM] * 6 + [signal.SIGINT] * 2 + [signal.SIGHUP]


def torture(folder: Path, count: int, seed: int) -> Tally:
    chance, tally = random.Random(seed), Tally()
    data, out, said = prepared(folder), folder / "run", folder / "said"
    attempt(data, folder / "undisturbed")
    expected = fingerprint(folder / "undisturbed")

    def train() -> None:
        cli.main(command(data, out))

    began = time.monotonic()
    assert ended(fork(train, said)) == 0, said.read_text(encoding="utf-8")
    duration = time.monotonic() - began
    assert fingerprint(out) == expected
    shutil.rmtree(out)
    longest = 0.0
    tally.update(
        {"signals while training": 0, "before it": 0, "after it": 0, "second Ctrl-C": 0, "runs finished": 0}
    )
    while tally["signals while training"] < count:
        child, number = fork(train, said), chance.choice(SIGNALS)
        twice = number == signal.SIGINT and chance.random() < 0.5
        time.sleep(chance.uniform(0.05, 0.8) * duration)
        os.kill(child, number)
        if twice:
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, number)
        status, waited = Watch(child).ended()
        text = said.read_text(encoding="utf-8")
        where = f"{signal.Signals(number).name} {tally['signals while training']}: status {status}, {waited:.1f} s"
        tally.expect("Traceback" not in text, f"{where}: {text}")
        saved = re.search(r"saved at step ([\d,]+)", text)
        if status == 0:
            tally["runs finished"] += 1
            duration *= 0.9  # for a machine whose load changes
            tally.expect(fingerprint(out) == expected, f"{where}: other bits")
            shutil.rmtree(out)
            continue
        tally.expect(status in (128 + number, -number), where)
        tally.expect(waited <= (AT_ONCE if twice else SOON), where)
        longest = max(longest, waited)
        if twice:
            tally["second Ctrl-C"] += 1
        elif saved:
            tally["signals while training"] += 1
            tally.expect(status == 128 + number, where)
            tally.expect(Run(out).newest_intact() == (int(saved[1].replace(",", "")), []), f"{where}: {text}")
        elif re.search(r"^step +\d", text, re.MULTILINE):  # trained to the end, and was about to leave
            tally["after it"] += 1
            tally.expect(fingerprint(out) == expected, f"{where}: {text}")
        else:  # no step of this process was trained when the signal came, so none was lost
            tally["before it"] += 1
            duration *= 1.1
        if (out / RUN_JSON).is_file() and Run(out).steps():
            tally.expect(Run(out).newest_intact()[1] == [], f"{where}: a step is not intact")
    attempt(data, out)
    tally.expect(fingerprint(out) == expected, "other bits at the end")
    tally["ms at most"] = round(longest * 1000)
    return tally


if __name__ == "__main__":
    main(torture, 100, __doc__)

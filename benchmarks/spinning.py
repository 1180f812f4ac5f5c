"""Training speed by how long waiting threads spin (GOMP_SPINCOUNT), alternating, on an idle or on a busy machine.

python benchmarks/spinning.py [--busy] [--rounds 3]
"""

import argparse
import os
import statistics
import subprocess
import sys

ONE_RUN = """
import tempfile
from pathlib import Path
from babyllama import api
with tempfile.TemporaryDirectory() as folder:
    told = []
    tell = lambda event: told.append(getattr(event, "tokens_per_second", 0.0))
    plan = dict(context=256, batch_size=8, evaluations=0, save_seconds=1e9)
    api.train("fairy-tales", out=Path(folder) / "run", steps=60, size="1.9M", tell=tell, **plan)
    print(round(max(told[-10:])))
"""
SETTINGS = {"as torch has it": None, "3000": "3000"}


def tokens_per_second(spin: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spin is not None:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", ONE_RUN]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--busy", action="store_true", help="with another process that never waits")
parser.add_argument("--rounds", type=int, default=3)
given = parser.parse_args()
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if given.busy else None
try:
    rounds = [{name: tokens_per_second(spin) for name, spin in SETTINGS.items()} for _ in range(given.rounds)]
finally:
    if busy is not None:
        busy.kill()
for name in SETTINGS:
    speeds = [each[name] for each in rounds]
    print(f"GOMP_SPINCOUNT {name:>16}: {speeds} tokens/s, median {statistics.median(speeds):,.0f}")

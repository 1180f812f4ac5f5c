"""Every torture, short in the ordinary run and in full length by `make torture`; each is a program of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
COUNTS = {  # short, full
    "kills": (12, 1000),
    "kills_in_saves": (12, 400),
    "terminations": (10, 100),
    "races": (10, 100),
    "disk_full": (8, 64),
    "bit_flips": (100, 1000),
    "not_finite": (12, 100),
    "hostile_files": (150, 1_000_000),
}
NEEDS_FORK = set(COUNTS) - {"bit_flips", "not_finite", "hostile_files"}


def run(name: str, count: int) -> None:
    if name in NEEDS_FORK and not hasattr(os, "fork"):
        pytest.skip("this system has no os.fork")
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--count", str(count)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    print(done.stdout)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.removeprefix("skipped: ").strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", COUNTS)
def test_nothing_is_lost_in_the_short_form(name):
    run(name, COUNTS[name][0])


@pytest.mark.torture
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", COUNTS)
def test_nothing_is_lost_in_full_length(name):
    run(name, COUNTS[name][1])


def test_every_torture_is_in_the_table():
    programs = {path.stem for path in FOLDER.glob("*.py")} - {"forks", "test_torture"}
    assert programs == set(COUNTS)

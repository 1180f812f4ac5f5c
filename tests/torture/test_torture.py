"""Every torture, short in the ordinary run and in full length by `make torture`; each is a program of its own."""

import os
import signal
import subprocess
import sys
import time
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
NEEDS_FORK = set(COUNTS) - {"bit_flips", "not_finite"}


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
@pytest.mark.timeout(12 * 3600)
@pytest.mark.parametrize("name", COUNTS)
def test_nothing_is_lost_in_full_length(name):
    run(name, COUNTS[name][1])


def test_every_torture_is_in_the_table():
    programs = {path.stem for path in FOLDER.glob("*.py")} - {"forks", "lies", "test_torture"}
    assert programs == set(COUNTS)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the memory")
def test_a_file_that_does_harm_is_noticed_and_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import hostile_files

    def busy():
        end = time.process_time() + 1.2
        while time.process_time() < end:
            pass

    harms = {
        1: (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with -9"),
        2: (lambda: time.sleep(60), "ended with -14"),
        3: (busy, "took "),
        4: (lambda: bytearray(100 * 2**20), "took 100 MiB for a file of 1 bytes"),
        5: (lambda: bytearray(2**40), "MemoryError"),
        6: (lambda: {}["x"], "KeyError: 'x'"),
    }

    def read(path):
        if harm := harms.get(path.read_bytes()[0]):
            harm[0]()

    def case(target, good, seed, number):
        return bytes([number])

    monkeypatch.setattr(hostile_files, "case", case)
    monkeypatch.setattr(hostile_files, "HANGS", 5)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"good")
    target = hostile_files.Target("a", tmp_path / "files" / "a", read, lambda chance: b"")
    _, failures = hostile_files.tried(target, 8, 0, tmp_path, tmp_path / "kept")
    for number, (_, said) in harms.items():
        [failure] = [each for each in failures if each.startswith(f"a, case {number}: {said}")]
        assert failure.endswith(f"kept in {tmp_path / 'kept' / f'a, case {number}'}")
        assert (tmp_path / "kept" / f"a, case {number}" / "a").read_bytes() == bytes([number])
    assert len(failures) == len(harms)

"""Let the disk become full at every point of a save, and see that what was saved before stays.

    python tests/torture/disk_full.py --count 64

A run that has saved two steps lies on a small file system of its own, with from 0 to 1.5 times the size of a step left
on it. It must leave with exit status 4 and E401 and without left-overs, or get through; and with more room it must end
with the bits of a run that nobody disturbed. Every other time the check before a save is switched off, so that the
disk becomes full in the middle of a file. Needs root, to mount.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from forks import CannotError, Tally, attempt, command, ended, fingerprint, fork, main, prepared

from babyllama import cli
from babyllama.checkpoint import folder as folders
from babyllama.checkpoint.run import Run
from babyllama.train.loop import Stepped

STEPS = 8
PAGE = 4096  # bytes; a file system in memory counts in these


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own at `folder`, this small. Raises CannotError where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotError("mounting a small file system needs root") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def used(folder: Path) -> int:
    """Bytes that the files of a folder take on a file system in memory, where a folder itself takes none."""
    return sum(PAGE * -(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def torture(folder: Path, count: int, seed: int) -> Tally:
    tally, data, run = Tally(), prepared(folder, seed), folder / "saved twice"
    with small_disk(folder / "disk", 64):
        pass

    class PulledPlugError(Exception):
        pass

    def pull(event: object) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise PulledPlugError

    attempt(data, folder / "undisturbed", STEPS)
    expected = fingerprint(folder / "undisturbed")
    with contextlib.suppress(PulledPlugError):
        attempt(data, run, STEPS, tell=pull)
    assert Run(run).steps()[-2:] == [3, 4]
    step, said = used(Run(run).folder(4)), folder / "said"
    for number in range(count):
        room = 1.5 * step * number / max(1, count - 1)
        checked = number % 2 == 0

        def resume(checked: bool = checked) -> None:
            if not checked:
                folders.ROOM = 0.0
            cli.main(command(data, folder / "disk" / "run", STEPS))

        with small_disk(folder / "disk", int(used(run) + room) // 1024) as disk:
            shutil.copytree(run, disk / "run")
            status = ended(fork(resume, said))
            text = said.read_text(encoding="utf-8")
            where = f"{room / step:.2f} of a step free: exit status {status}"
            tally["full"] += status == 4
            tally["in the middle of a file"] += status == 4 and not checked
            tally["got through"] += status == 0
            tally.expect(status == 0 or (status == 4 and "error[E401]" in text), f"{where} {text}")
            tally.expect(status != 0 or room > 0.9 * step, f"{where}, which is too little")
            tally.expect(not list(disk.rglob(".tmp-*")), f"{where}, left-overs")
            newest, passed_over = Run(disk / "run").newest_intact()
            tally.expect(newest >= 4 and not passed_over, f"{where}, newest intact step {newest}")
            shutil.copytree(disk / "run", folder / "roomy")
        attempt(data, folder / "roomy")
        tally.expect(fingerprint(folder / "roomy") == expected, f"{where}, other bits with more room")
        shutil.rmtree(folder / "roomy")
    return tally


if __name__ == "__main__":
    main(torture, 64, __doc__)

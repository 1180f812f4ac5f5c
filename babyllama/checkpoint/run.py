"""A training run on disk: started once, saved step by step, resumed after anything.

    RUN/
      run.json          what was asked for; written once, never changed
      data/             the prepared text, when the run prepared it itself
      metrics.jsonl     one line for each report of the training loop
      skipped-00001187.safetensors   the rows of a step that was not finite
      step-00001200/    a saved step: a Hugging Face folder with our state beside it
        model.safetensors  config.json  generation_config.json  tokenizer.json  ...
        optim.safetensors  state.json  manifest.json
      .lock             held by the kernel while somebody trains here

There is no pointer to the latest step: it is the one with the highest number whose contents are intact.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from babyllama.checkpoint.folder import (
    FORMAT,
    read_json,
    read_sealed,
    refused,
    remove_folder,
    replace_file,
    sealed,
    sweep,
    verify_folder,
    write_folder,
)
from babyllama.errors import InputError, MachineError

RUN_JSON, METRICS, STATE = "run.json", "metrics.jsonl", "state.json"
STEP_NAME = re.compile(r"step-(\d{8})")
OURS = {".lock", ".owner.json", "data"}  # what may stand in a run folder before the run has started
KEEP_SKIPPED = 4  # of the steps that were not finite, the newest
KEEP_AT_LEAST = 2  # with one, a step that turns out to be damaged would be the only one


class Run:
    """One run folder. `Run.create` starts one, `Run(path)` opens one."""

    def __init__(self, path: Path) -> None:
        """Raises InputError E201 when there is no run at `path`, E206 or E208 when its run.json cannot be used."""
        self.path = Path(path)
        if not (self.path / RUN_JSON).is_file():
            found = "is not a run" if self.path.exists() else "does not exist"
            raise InputError("E201", str(path), found, "give the folder that `babyllama train --out` wrote")
        self.settings = read_sealed(self.path / RUN_JSON)

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, Any]) -> "Run":
        """Start a run at `path`, which must be free. Raises MachineError E403 when it holds something already."""
        path = Path(path)
        cls.refuse_taken(path)
        replace_file(path / RUN_JSON, sealed({"format": FORMAT, **settings}))
        return cls(path)

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raises MachineError E403 unless a run can start at `path`: it is free, or holds the beginnings of one."""
        if (path / RUN_JSON).exists():
            fix = f"go on with it:  babyllama train --resume {path}"
            raise MachineError("E403", str(path), "already holds a run", fix)
        if not path.exists():
            return
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file"}
        if (
            ".lock" in names
        ):  # an earlier start was killed here, and left what the holder of the lock will sweep
            names = {name for name in names if not name.startswith((".tmp-", ".del-"))}
        if names - OURS:
            raise MachineError(
                "E403", str(path), "exists and is not a run", "choose an empty or a new folder with --out"
            )

    # ---- steps -------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The numbers of the saved steps, ascending; not yet looked into."""
        names = (STEP_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def state(self, step: int) -> dict[str, Any]:
        return read_json(self.folder(step) / STATE)

    def save(self, step: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> Path:
        """Save a step, read it back, and only then remove the steps that it makes superfluous.

        Kept are the newest two and the best. Raises MachineError E401 or E403; whatever was saved before stays.
        """
        folder = self.folder(step)
        # It stands there already where it could not be read, and training has reached it again
        content = {**files, STATE: json.dumps(state, indent=1).encode()}
        write_folder(folder, content, {"step": step}, replace=True)
        verify_folder(folder)
        for later in [each for each in self.steps() if each > step]:
            remove_folder(self.folder(later))  # damaged, or of a course that was given up for this one
        with suppress(MachineError, OSError):  # an old step that cannot be read or removed now stays for once
            best = self.best()
            for old in self.steps()[:-KEEP_AT_LEAST]:
                if old != best:
                    remove_folder(self.folder(old))
        return folder

    def best(self) -> int:
        """The step with the fewest bits per byte on validation, the newest among equals. Raises InputError E207."""
        scores = []
        for step in self.steps():
            with suppress(InputError):
                bits = self.state(step).get("bits_per_byte")
                scores.append((bits if isinstance(bits, int | float) else float("inf"), -step))
        if not scores:
            raise self._nothing_saved([])
        return -min(scores)[1]

    def checked(self, step: int) -> Path:
        """The folder of `step`, verified. Raises InputError E207 when there is none, or what verify_folder finds."""
        if step not in self.steps():
            saved = ", ".join(map(str, self.steps())) or "none"
            raise InputError(
                "E207",
                str(self.path),
                f"has no saved step {step}; saved: {saved}",
                "choose one of these with --step",
            )
        try:
            verify_folder(self.folder(step))
        except InputError as error:
            raise InputError(error.code, error.where, error.found, self._instead_of(step)) from None
        return self.folder(step)

    def _instead_of(self, step: int) -> str:
        for other in reversed(self.steps()):
            with suppress(InputError, MachineError):
                if other != step and verify_folder(self.folder(other)):
                    return f"use step {other}, the newest intact one:  --step {other}"
        return "restore the run folder from a copy, or start a new run"

    def newest_intact(self) -> tuple[int, list[InputError]]:
        """The highest step whose every byte is what it was, and what was wrong with the ones passed over.

        Raises InputError E207, with a reason for each step, when none is left; MachineError E403 when one may not be
        read, or not now: it may be intact.
        """
        problems: list[InputError] = []
        for step in reversed(self.steps()):
            try:
                verify_folder(self.folder(step))
            except InputError as error:
                problems.append(error)
            else:
                return step, problems
        raise self._nothing_saved(problems)

    def _nothing_saved(self, problems: list[InputError]) -> InputError:
        if not problems:
            return InputError(
                "E207",
                str(self.path),
                "has no saved step yet",
                f"train it further:  babyllama train --resume {self.path}",
            )
        reasons = "; ".join(f"{error.where} {error.found}" for error in problems)
        return InputError(
            "E207",
            str(self.path),
            f"no saved step is intact: {reasons}",
            "restore the folder from a copy, or start a new run",
        )

    def keep_skipped(self, step: int, rows: bytes) -> None:
        """Keep the rows of a skipped step, and of the few before it. Raises MachineError E401 or E403."""
        replace_file(self.path / f"skipped-{step:08d}.safetensors", rows)
        for old in sorted(self.path.glob("skipped-*.safetensors"))[:-KEEP_SKIPPED]:
            old.unlink(missing_ok=True)

    # ---- metrics and lock --------------------------------------------------------------------

    def record(self, **values: Any) -> None:
        """Append one line to metrics.jsonl. Raises OSError when that fails: the caller decides if it matters."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a crash has cut is passed over."""
        lines = []
        with suppress(FileNotFoundError):
            for line in (self.path / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run folder `path` for oneself; the kernel lets go of it when the process ends, however it ends.

    Raises MachineError E402 naming the holder when another process trains there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise MachineError(
            "E402",
            str(path),
            f"another run trains here ({_holder(path)})",
            "wait for it, or choose another --out",
        ) from None
    except OSError as error:
        raise refused(error, path) from error
    try:
        sweep(path)
        with suppress(OSError, MachineError):
            owner = {
                "pid": os.getpid(),
                "host": os.uname().nodename if hasattr(os, "uname") else "",
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            replace_file(path / ".owner.json", json.dumps(owner).encode())
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    with suppress(InputError, MachineError):
        owner = read_json(path / ".owner.json")
        return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
    return "its process is not known"

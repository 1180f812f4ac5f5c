"""Put NaN and infinity into weights, gradients, losses and the optimiser's memory, and see that none is ever saved.

    python tests/torture/not_finite.py --count 12

A step whose loss or gradient is spoilt once must be skipped and the run must get through; what is spoilt for good, or
lies in the weights or the memory, must stop it at most 4 steps later with E501, and the last good step must stay.
"""

import contextlib
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from forks import Tally, attempt, main, prepared
from safetensors.torch import load, load_file

from babyllama.checkpoint.run import Run
from babyllama.errors import NumericalError
from babyllama.train import loop
from babyllama.train.loop import Skipped, Stepped

STEPS = 14
AT_MOST = 4  # steps after which a run that cannot go on has stopped
KINDS = ("weight", "memory", "squares", "gradient once", "loss once", "gradient", "loss")
LYING = ("weight", "memory", "squares")  # what stays where it was put; infinite squares show in no loss


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def spoil(kind: str, at: int, value: float, chance: random.Random):
    """In place of _Training.take_step: puts `value` where `kind` says, at the step of number `at` (from 0)."""
    take_step = loop._Training.take_step

    def spoilt(self: loop._Training, progress: float) -> tuple[float, float]:
        now = self.step == at if kind.endswith("once") or kind in LYING else self.step >= at
        if not now:
            return take_step(self, progress)
        weight = chance.choice(list(self.model.parameters()))
        if kind in LYING:
            memory = self.optimizer.tensors()
            squares = [tensor for name, tensor in memory.items() if name.endswith("exp_avg_sq")]
            places = {"weight": [weight.data], "memory": [*memory.values()], "squares": squares}
            tensor = chance.choice(places[kind])
            tensor.view(-1)[chance.randrange(tensor.numel())] = math.inf if kind == "squares" else value
            return take_step(self, progress)
        place, differentiate = chance.randrange(weight.numel()), self.differentiate

        def wrong(*given: object) -> float:
            loss = differentiate(*given)
            if kind.startswith("loss"):
                return loss + value
            weight.grad.view(-1)[place] = value
            return loss

        with replaced(self, "differentiate", wrong):
            return take_step(self, progress)

    return spoilt


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def torture(folder: Path, count: int, seed: int) -> Tally:
    chance, tally = random.Random(seed), Tally()
    data, out = prepared(folder), folder / "run"
    tally.update({"spoilt": 0, "stopped": 0, "got through": 0, "steps written": 0})
    save = Run.save

    def watched(self: Run, step: int, files: dict[str, bytes], state: dict[str, object]) -> Path:
        tally["steps written"] += 1
        tensors = [load(content) for name, content in files.items() if name.endswith(".safetensors")]
        tally.expect(all(map(all_finite, tensors)), f"step {step} is written and is not finite")
        return save(self, step, files, state)

    for number in range(count):
        kind, at = KINDS[number % len(KINDS)], chance.randrange(1, STEPS - AT_MOST)
        value = chance.choice([math.nan, math.inf, -math.inf])
        events: list[object] = []
        where, error = f"{value} in {kind} at step {at}", None
        with (
            replaced(loop._Training, "take_step", spoil(kind, at, value, chance)),
            replaced(Run, "save", watched),
        ):
            try:
                attempt(data, out, STEPS, tell=events.append)
            except NumericalError as raised:
                error = raised
        last = max(event.step for event in events if isinstance(event, Stepped | Skipped))
        skipped = [event.step for event in events if isinstance(event, Skipped)]
        tally["spoilt"] += 1
        tally["stopped" if error else "got through"] += 1
        if kind.endswith("once"):
            tally.expect(error is None and skipped == [at + 1], f"{where}: {error}, skipped {skipped}")
            if error is None:
                tally.expect(Run(out).state(STEPS)["skipped"] == 1, f"{where}: not counted")
        else:
            tally.expect(error is not None and error.code == "E501", f"{where}: {error}")
            tally.expect(last <= at + AT_MOST, f"{where}: went on to step {last}")
        for step in Run(out).steps():
            tensors = [load_file(path) for path in Run(out).folder(step).glob("*.safetensors")]
            tally.expect(all(map(all_finite, tensors)), f"{where}: step {step} is not finite")
        newest = Run(out).newest_intact() if Run(out).steps() else (0, [])
        tally.expect(newest[0] >= at - 2 and not newest[1], f"{where}: newest intact step {newest}")
        shutil.rmtree(out)
    return tally


if __name__ == "__main__":
    main(torture, 100, __doc__)

"""Training, babyllama beside its peers: same machine, same text, same hold-out, same evaluator.

    python benchmarks/training.py --throughput [--shape NAME ...] [--rounds 5] [--seconds 3]
    python benchmarks/training.py --quality FILE [--minutes 1 3 10] [--tune [MINUTES]] [--clock cold|warm]

--throughput: one shape, one batch, random ids. All contestants stand in one process and take turns of a few seconds,
round after round, so that whatever else the machine does meets all of them. Printed are the median of the rounds and
their spread, the ratio to the plain float32 loop (taken round by round), model GFLOP/s (6 N + 12 layers dim context a
token) and its share of what a bare product of two 2048 x 2048 matrices reaches here. Peak memory is that of a fresh
process which takes three steps, with Python, torch and the library in it.

--quality: every contestant learns the first 90 % of a file (or of a named text, its documents joined) with a schedule
that ends at the budget, and is scored on the last 10 %: bits per byte by babyllama.train.evaluate.score in float32,
sliding by half a context, so that every byte is scored once. Each run is a fresh process. Its clocks:

    cold   everything since the process was started: imports, tokenizer, encoding, building, training
    warm   training only

The budget is of --clock, cold unless told otherwise, for everyone. Scoring is outside both, for everyone. babyllama
runs as its users run it (`api.train` on data from `prepare`, which sets 1 % of its 90 % aside for itself); its own
evaluations and its saves are inside its clock, and every point of its curve is a saved step, loaded again.

A peer without a shape of its own gets the one that babyllama plans for these minutes, by a speed that is measured once
(OUT/speed.json); and, as "smaller", the next below it. Since a peer may learn a small text by heart before its time is
over, the best point of its curve is told beside the last.

--tune: first every contestant tries its five learning rates, each for the whole budget or for MINUTES, with the model
of the whole budget, on the first 90 % of the training part, scored on the rest of that part; the best one then goes to
the hold-out, beside the documented one (--tuned-only: instead of it). What is best after a minute is often too much for
fifteen. --rate R ... runs each of these for the whole budget instead, and scores every one on the hold-out: to take the
best of them is more than a peer could have known. (Ours are multiples of the plan's: name contestants by --only.)

Every run is appended to OUT/runs.jsonl at once, and none is made twice while what it rests on is the same code: an
interrupted comparison goes on where it stopped. Contestants take turns, seed after seed.

--only NAME ... chooses contestants; with --quality, --python NAME=PATH gives one an interpreter of its own (which can
import babyllama and its dependencies), for a peer that does not install beside the others.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "GOMP_SPINCOUNT", "3000"
)  # as the command line of babyllama sets it, before torch is loaded

sys.path.insert(0, str(Path(__file__).parent))

import ablate
import peers
import torch
from shapes import SHAPES, Shape, size_of, training_flops

from babyllama import machine
from babyllama.train import loop

PEAK_SIZE = 2048  # of the bare matrix product
POINTS = 8  # of a curve
WHOLE = -1.0  # of --tune: as long as the run itself
OWN_VALIDATION = 0.01  # of its training text that babyllama sets aside for itself


# ---- throughput ------------------------------------------------------------------------------------


def matrix_peak(kind: torch.dtype, size: int = PEAK_SIZE, seconds: float = 1.0) -> float:
    """FLOPs a second of the fastest product of two size x size matrices in `seconds`.

    A CPU without instructions for `kind` would take a minute for one: it is measured on smaller matrices.
    """
    small = size // 8
    if size > small >= 64 and 2 * size**3 / matrix_peak(kind, small, seconds / 10) > seconds:
        return matrix_peak(kind, small, seconds)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(kind) for _ in range(2))
    best, began, turns = float("inf"), time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(left, right)
        best, turns = min(best, time.perf_counter() - start), turns + 1
    return 2 * size**3 / best


def turn(step: Callable[[], Any], tokens_per_step: int, seconds: float) -> float:
    """Tokens a second of one turn, which takes whole steps and at least one."""
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return steps * tokens_per_step / (time.perf_counter() - start)


def compare(shape: Shape, names: list[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Tokens a second of every contestant in every round. The order turns by one from round to round."""
    entered = {name: peers.contestant(peers.THROUGHPUT[name], shape) for name in names}
    try:
        for each in entered.values():  # the first steps allocate
            each.step()
            each.step()
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                speeds[name].append(turn(entered[name].step, entered[name].tokens_per_step, seconds))
        return speeds
    finally:
        for each in entered.values():
            each.close()


def ratios(speeds: dict[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Of each contestant to the baseline, round by round, sorted."""
    return {
        name: sorted(own / other for own, other in zip(each, speeds[baseline], strict=True))
        for name, each in speeds.items()
    }


def throughput_table(
    shape: Shape,
    speeds: dict[str, list[float]],
    peaks: dict[str, float],
    memory: dict[str, int | None],
) -> str:
    """Markdown. `peaks`: FLOPs a second by "bf16" and "float32"; `memory`: bytes."""
    baseline = next(iter(speeds))
    flops, relative = training_flops(shape.config, shape.context), ratios(speeds, baseline)
    shown = [peaks[kind] for kind in DTYPES]  # bf16 below float32 is emulated, and no peak of anything
    lines = [
        f"| {shape.name} | tokens/s, median (spread) | x {baseline} (spread) | model GFLOP/s "
        "| of the bf16 product | of the float32 product | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in speeds.items():
        rate, ratio = statistics.median(each), relative[name]
        cells = [
            name,
            f"{rate:,.0f} ({min(each):,.0f} to {max(each):,.0f})",
            f"{statistics.median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f})",
            f"{rate * flops / 1e9:,.0f}",
            *(f"{100 * rate * flops / peak:.0f} %" if peak >= peaks["float32"] else "-" for peak in shown),
            f"{memory[name] / 2**20:,.0f}" if memory.get(name) else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_memory(shape: Shape, name: str, threads: int) -> int | None:
    """Bytes, the most that a process of this contestant alone has held after three steps."""
    request = {"memory": name, "shape": shape.name, "threads": threads}
    return child(sys.executable, request)["bytes"]


def throughput(given: argparse.Namespace) -> None:
    names = entered(given, peers.THROUGHPUT)
    for name in given.shape or list(SHAPES):
        shape = SHAPES[name]
        before = {kind: matrix_peak(dtype, seconds=given.seconds) for kind, dtype in DTYPES.items()}
        speeds = compare(shape, names, given.rounds, given.seconds)
        peaks = {
            kind: max(before[kind], matrix_peak(dtype, seconds=given.seconds))
            for kind, dtype in DTYPES.items()
        }
        memory = {each: measure_memory(shape, each, torch.get_num_threads()) for each in names}
        print(
            f"\n{shape.batch_size} rows of {shape.context} tokens, {torch.get_num_threads()} threads, "
            f"{given.rounds} rounds of {given.seconds:g} s; bare {PEAK_SIZE} product: "
            f"{peaks['bf16'] / 1e9:,.0f} GFLOP/s in bf16, {peaks['float32'] / 1e9:,.0f} in float32\n"
        )
        print(throughput_table(shape, speeds, peaks, memory), flush=True)


DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


# ---- quality: one run, in a process of its own -----------------------------------------------------


class Clock:
    """Seconds since the process was started, less those inside `stopped`."""

    def __init__(self, launched: float) -> None:
        self.real = time.perf_counter
        self.began, self.outside = self.real() - max(0.0, time.time() - launched), 0.0

    def now(self) -> float:
        return self.real() - self.outside

    def cold(self) -> float:
        return self.now() - self.began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = self.real()
        try:
            yield
        finally:
            self.outside += self.real() - start


def quality_run(request: dict[str, Any]) -> dict[str, Any]:
    """Train one contestant on request["train"] and score it on request["hold_out"]: paths of UTF-8 files."""
    torch.set_num_threads(request["threads"])
    clock, recipe = Clock(request["launched"]), peers.QUALITY[request["name"]]
    run = _run_ours if recipe.model == "babyllama" else _run_peer
    found = run(request, recipe, clock)
    last = found["curve"][-1]
    return {
        **{key: request[key] for key in ("name", "minutes", "rate", "seed", "clock")},
        "bits_per_byte": last["bits_per_byte"],
        **found,
    }


def _budget(request: dict[str, Any], clock: Clock) -> float:
    """Seconds that are left for training."""
    left = 60 * request["minutes"] - (clock.cold() if request["clock"] == "cold" else 0.0)
    if left <= 0:
        raise SystemExit(f"{request['name']}: nothing of {request['minutes']} minutes was left for training")
    return left


def _run_peer(request: dict[str, Any], recipe: peers.Recipe, clock: Clock) -> dict[str, Any]:
    from babyllama.train.evaluate import score

    train = Path(request["train"]).read_text(encoding="utf-8")
    with clock.stopped():  # the alphabet of the characters looks at it, nothing else does before scoring
        hold_out = Path(request["hold_out"]).read_text(encoding="utf-8")
    text = peers.encoder(recipe, train, hold_out)
    with clock.stopped():  # a shape that is lent by babyllama's plan is not thought about in this one's time
        recipe = recipe if recipe.shape else _shaped(request, recipe, text.vocab_size, len(train.encode()))
    config = peers.config_of(recipe, text.vocab_size)
    import numpy as np

    ids = np.array(text.encode(train), dtype=np.uint16)
    loop = peers.PlainLoop(recipe, config, ids, request["rate"], request["seed"])
    with clock.stopped():
        held = np.array(text.encode(hold_out))
    budget, start, curve, points = _budget(request, clock), clock.now(), [], request["points"]
    cold_start = clock.cold()

    def evaluate() -> None:
        with clock.stopped():
            found = score(loop.model, held, text.byte_lengths, recipe.context)
        warm = clock.now() - start
        curve.append(_point(warm, cold_start + warm, found.bits_per_byte, loop.steps, found.bytes))

    progress = 0.0
    while progress < 1:
        before = progress
        loop.step(before)
        progress = (clock.now() - start) / budget
        if progress < 1 and int(progress * points) != int(before * points):
            evaluate()
    evaluate()
    return {
        "curve": curve,
        "steps": loop.steps,
        "tokens": loop.steps * loop.tokens_per_step,
        "parameters": sum(weight.numel() for weight in loop.model.parameters()),
        "vocabulary": text.vocab_size,
        "context_bytes": recipe.context * len(train.encode()) / len(ids),
        "flops": loop.steps * loop.tokens_per_step * training_flops(config, recipe.context),
        "warm": curve[-1]["warm"],
        "cold": curve[-1]["cold"],
    }


def _shaped(request: dict[str, Any], peer: peers.Recipe, vocab_size: int, text_bytes: int) -> peers.Recipe:
    """The peer with the shape that babyllama plans, or one below it, and with rows as long as babyllama's for that."""
    from babyllama import machine
    from babyllama.train import recipe

    model = recipe.plan(
        vocab_size=vocab_size,
        text_bytes=text_bytes,
        train_tokens=text_bytes // 2,
        minutes=request["planned_minutes"],
        device="cpu",
        settings={"threads": request["threads"]},
        speed=machine.Precision(**request["speed"]),
    ).model
    at = recipe.SHAPES.index((model.dim, model.n_layers, model.n_heads))
    shape = recipe.SHAPES[max(0, at - peer.smaller)]
    return replace(peer, shape=shape, context=recipe.context_for(shape[0], text_bytes // 2))


def _point(warm: float, cold: float, bits: float, steps: int, bytes_: int) -> dict[str, Any]:
    return {"warm": warm, "cold": cold, "bits_per_byte": bits, "steps": steps, "scored_bytes": bytes_}


def _run_ours(request: dict[str, Any], recipe: peers.Recipe, clock: Clock) -> dict[str, Any]:
    """`prepare` and `api.train`; each saved step is loaded and scored with the clock stopped.

    The loop reads time.perf_counter, which here leaves out what is inside `stopped`. `agrees` is the loop's own count
    of its seconds, from its first step to its last, over this program's: near 1, or it read another clock.
    """
    import tempfile

    from babyllama import api
    from babyllama.data.corpus import prepare

    hold_out = Path(request["hold_out"]).read_text(encoding="utf-8")
    curve: list[dict[str, Any]] = []
    seen: dict[str, Any] = {}
    settings: dict[str, Any] = {"evaluations": request["points"]}

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        corpus = prepare(request["train"], Path(folder) / "data", val_fraction=OWN_VALIDATION)
        size: str | None = None
        with clock.stopped():
            if request["planned_minutes"] != request["minutes"]:  # tuned in less time than the run will have
                size = size_of(plan_of(corpus, request, request["planned_minutes"]).model)
            if request["rate"] != 1.0:  # times the rate of the plan, whose kind and size are kept
                plan = plan_of(corpus, request, request["minutes"], size)
                settings |= {
                    "learning_rate": plan.learning_rate * request["rate"],
                    "optimizer": plan.optimizer,
                }
                size = size_of(plan.model)
        budget, start, cold_start = _budget(request, clock), clock.now(), clock.cold()

        def hear(event: Any) -> None:
            if isinstance(event, api.Planned):
                seen["plan"] = event.plan
            elif isinstance(event, loop.Stepped):
                seen.update(step=event.step, seconds=event.seconds, warm=clock.now())
                seen.setdefault("first", (event.seconds, clock.now()))
            elif isinstance(event, loop.Saved):
                with clock.stopped():
                    llama = api.load(event.folder)
                    bits = llama.bits_per_byte(hold_out)
                    parameters = sum(weight.numel() for weight in llama.model.parameters())
                warm = clock.now() - start
                seen["parameters"] = parameters
                curve.append(_point(warm, cold_start + warm, bits, event.step, len(hold_out.encode())))

        time.perf_counter = clock.now  # type: ignore[assignment]
        try:
            api.train(
                Path(folder) / "data",
                out=out,
                minutes=budget / 60,
                size=size,
                seed=request["seed"],
                device="cpu",
                tell=hear,
                threads=request["threads"],
                **settings,
            )
        finally:
            time.perf_counter = clock.real
        whole = clock.now() - start
    plan = seen["plan"]
    return {
        "curve": curve,
        "steps": seen["step"],
        "tokens": seen["step"] * plan.tokens_per_step,
        "parameters": seen["parameters"],
        "vocabulary": corpus.vocab_size,
        "context_bytes": plan.context * corpus.train_bytes / len(corpus.train_ids),
        "flops": seen["step"] * plan.tokens_per_step * training_flops(plan.model, plan.context),
        "warm": whole,
        "cold": cold_start + whole,
        "agrees": (seen["seconds"] - seen["first"][0]) / max(1e-9, seen["warm"] - seen["first"][1]),
        "learning_rate": plan.learning_rate,
    }


def plan_of(corpus: Any, request: dict[str, Any], minutes: float, size: str | None = None) -> Any:
    from babyllama.train import recipe

    return recipe.plan(
        vocab_size=corpus.vocab_size,
        text_bytes=corpus.train_bytes,
        train_tokens=len(corpus.train_ids),
        minutes=minutes,
        size=size,
        seed=request["seed"],
        device="cpu",
        settings={"threads": request["threads"]},
    )


# ---- quality: all of them --------------------------------------------------------------------------


def split(data: bytes, share: float = 0.9) -> tuple[str, str]:
    """The first `share` of the bytes and the rest, cut at the next whole character."""
    at = int(len(data) * share)
    while at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character of UTF-8
        at += 1
    return data[:at].decode("utf-8"), data[at:].decode("utf-8")


def read_text(name: str) -> bytes:
    """A file, or a named text with its documents joined."""
    if Path(name).is_file():
        return Path(name).read_bytes()
    from babyllama.data.library import named

    return "\n".join(document.text for document in named(name)).encode()


def write_split(data: bytes, folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, part in zip(("train", "hold_out"), split(data), strict=True):
        path = folder / f"{name}.txt"
        path.write_bytes(part.encode())
        paths[name] = str(path)
    return paths


def quality(given: argparse.Namespace) -> None:
    names, out = entered(given, peers.QUALITY), Path(given.out)
    data = read_text(given.quality)
    whole = write_split(data, out / "text")
    inner = write_split(Path(whole["train"]).read_bytes(), out / "tuning") if given.tune else {}
    pythons = dict(each.split("=", 1) for each in given.python)
    results: list[dict[str, Any]] = []
    done, codes = ablate.read_lines(out / "runs.jsonl"), {ours: code(ours) for ours in (True, False)}
    if not (measured := out / "speed.json").exists():
        measured.write_text(json.dumps(asdict(machine.measure_precision("cpu"))), encoding="utf-8")
    speed = json.loads(measured.read_text(encoding="utf-8"))

    def run(
        name: str,
        minutes: float,
        rate: float,
        paths: dict[str, str],
        seed: int = 1,
        points: int = given.points,
        planned_minutes: float = 0.0,
    ) -> dict[str, Any]:
        """One run, or what an earlier call of this program found under the same conditions."""
        key = {"name": name, "minutes": minutes, "rate": rate, "seed": seed, "clock": given.clock}
        key |= {"threads": torch.get_num_threads(), "points": points}
        recipe = peers.QUALITY[name]  # which may have a shape of its own, whatever the minutes are
        key |= {"planned_minutes": minutes if recipe.shape else planned_minutes or minutes}
        key["python"] = pythons.get(name, "")
        key["text"] = hashlib.sha256(Path(paths["train"]).read_bytes()).hexdigest()[:8]
        key["code"] = codes[recipe.model == "babyllama"]
        for line in done:
            if all(line.get(name) == value for name, value in key.items()):
                return line
        request = {**key, **paths, "speed": speed}
        try:
            found = {**key, **child(pythons.get(name) or sys.executable, request)}
        except SystemExit as failed:  # told, and left out: the others go on
            print(f"  {failed}", file=sys.stderr)
            return {**key, "bits_per_byte": math.inf}
        ablate.append(out / "runs.jsonl", found)
        done.append(found)
        print(f"  {name}, {minutes:g} min, rate {rate:g}: {found['bits_per_byte']:.4f}", file=sys.stderr)
        if not 0.95 < found.get("agrees", 1.0) < 1.05:
            print(f"  {name} counted {found['agrees']:.2f} of this program's seconds", file=sys.stderr)
        return found

    for minutes in given.minutes:
        entries: list[tuple[str, str, float]] = []
        for name in names:
            if given.rate:
                entries += [(name, "given", rate) for rate in given.rate]
                continue
            rates = {"documented": peers.QUALITY[name].rates[0]}
            if given.tune:
                tries = minutes if given.tune == WHOLE else given.tune
                tried = {
                    rate: run(name, tries, rate, inner, points=1, planned_minutes=minutes)
                    for rate in peers.QUALITY[name].rates
                }
                rates[f"tuned at {tries:g}"] = best_rate(
                    {rate: one["bits_per_byte"] for rate, one in tried.items()}
                )
            if given.tune and given.tuned_only:
                del rates["documented"]
            elif len(set(rates.values())) == 1:
                rates = {" and ".join(rates): next(iter(rates.values()))}
            entries += [(name, how, rate) for how, rate in rates.items()]
        found = [
            {**ran, "how": how}
            for seed in range(1, given.seeds + 1)
            for name, how, rate in entries
            if "curve" in (ran := run(name, minutes, rate, whole, seed))
        ]
        results += sorted(found, key=lambda one: entries.index((one["name"], one["how"], one["rate"])))
    print(quality_table(results))
    write_curves(results, out / "curves.csv")
    if given.figure:
        from curve import draw

        for path in draw(out / "curves.csv", Path(given.figure), clock=given.clock):
            print(f"drawn: {path}")


def best_rate(bits: dict[float, float]) -> float:
    """The rate with the fewest bits per byte; one with which the run diverged is not it."""
    return min(bits, key=lambda rate: bits[rate] if math.isfinite(bits[rate]) else math.inf)


def code(ours: bool) -> str:
    """Names the code that one of our runs rests on, or a peer's."""
    here, package = Path(__file__).parent, ablate.PACKAGE
    paths = [here / f"{name}.py" for name in ("training", "peers", "shapes")]
    of_peers = "costs machine model data/batches data/corpus text/tokenizer train/evaluate train/recipe"
    paths += sorted(package.rglob("*.py")) if ours else [package / f"{name}.py" for name in of_peers.split()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def quality_table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line a run, and below the median of each contestant that ran with more than one seed."""
    lines = [
        "| contestant | minutes | rate | seed | bits per byte | best of its curve | steps | tokens/s, warm "
        "| model TFLOP | parameters | vocabulary | context, bytes | seconds, cold | warm |",
        f"|{'---|' * 14}",
    ]
    several: dict[str, list[float]] = {}
    for one in results:
        rate = f"{one['rate']:g}{' x plan' if one['name'] == 'babyllama' else ''} ({one['how']})"
        cells = [
            one["name"],
            f"{one['minutes']:g}",
            rate,
            str(one["seed"]),
            f"{one['bits_per_byte']:.4f}",
            f"{min(point['bits_per_byte'] for point in one['curve']):.4f}",
            f"{one['steps']:,}",
            f"{one['tokens'] / one['warm']:,.0f}",
            f"{one['flops'] / 1e12:,.1f}",
            f"{one['parameters']:,}",
            f"{one['vocabulary']:,}",
            f"{one['context_bytes']:.0f}",
            f"{one['cold']:.1f}",
            f"{one['warm']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        who = f"{one['name']}, {one['minutes']:g} minutes, rate {rate}"
        several.setdefault(who, []).append(one["bits_per_byte"])
    for who, bits in several.items():
        if len(bits) > 1:
            spread = f"{min(bits):.4f} to {max(bits):.4f}"
            lines.append(f"\n{who}: median {statistics.median(bits):.4f}, {spread}, {len(bits)} seeds")
    return "\n".join(lines)


def write_curves(results: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["contestant", "how", "minutes", "seed", "steps", "cold", "warm", "bits_per_byte"])
        for one in results:
            for point in one["curve"]:
                times = [f"{point[clock]:.3f}" for clock in ("cold", "warm")]
                told = [one["name"], one["how"], one["minutes"], one["seed"], point["steps"]]
                table.writerow([*told, *times, f"{point['bits_per_byte']:.5f}"])


# ---- the program -----------------------------------------------------------------------------------


def child(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """What this program, started anew by `python`, answers to a request: the last line that it prints."""
    command = [python, __file__, "--child", json.dumps({**request, "launched": time.time()})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{request.get('name') or request.get('memory')}: failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    if "memory" in request:
        one = peers.contestant(peers.THROUGHPUT[request["memory"]], SHAPES[request["shape"]])
        for _ in range(3):
            one.step()
        one.close()
        return {"bytes": loop.peak_memory()}
    return quality_run(request)


def entered(given: argparse.Namespace, all_: dict[str, peers.Recipe]) -> list[str]:
    """The contestants that take part; who does not is told, with the reason."""
    elsewhere = {each.split("=", 1)[0] for each in given.python if given.quality}
    names = []
    for name in given.only or list(all_):
        if name not in all_:
            raise SystemExit(f"{name!r} is no contestant here; there are: {', '.join(all_)}")
        why = None if name in elsewhere else peers.missing(all_[name])
        if why:
            print(f"without {name}: {why}")
        else:
            names.append(name)
    return names


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = found.add_mutually_exclusive_group(required=True)
    mode.add_argument("--throughput", action="store_true")
    mode.add_argument("--quality", metavar="TEXT", help="a file, or the name of a text")
    mode.add_argument("--sources", action="store_true", help="print where the settings of each peer stand")
    mode.add_argument("--child", help=argparse.SUPPRESS)
    found.add_argument("--only", nargs="+", metavar="NAME", help="contestants")
    found.add_argument("--shape", nargs="+", choices=list(SHAPES))
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--seconds", type=float, default=3.0, help="of one turn")
    found.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    found.add_argument("--seeds", type=int, default=1)
    found.add_argument("--tune", nargs="?", type=float, const=WHOLE, default=0.0, metavar="MINUTES")
    found.add_argument(
        "--rate",
        type=float,
        nargs="+",
        help="instead of the documented and of --tune",
    )
    found.add_argument("--tuned-only", action="store_true", help="not the documented rates as well")
    found.add_argument("--clock", choices=["cold", "warm"], default="cold")
    found.add_argument("--points", type=int, default=POINTS, help="of each curve")
    found.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    found.add_argument("--threads", type=int, default=0, help="default: one for each core")
    found.add_argument("--out", default="runs/benchmarks", help="folder of --quality")
    found.add_argument("--figure", metavar="STEM", help="draw the curves: STEM-light.svg and STEM-dark.svg")
    return found


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.child:
        print(json.dumps(answer(json.loads(given.child))))
        return
    if given.sources:
        for recipe in peers.QUALITY.values():
            print(f"{recipe.name}: {recipe.source}")
        return
    torch.set_num_threads(given.threads or peers.threads())
    if given.throughput:
        throughput(given)
    else:
        quality(given)


if __name__ == "__main__":
    main()

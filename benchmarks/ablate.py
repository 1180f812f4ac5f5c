"""Which settings are worth having: ablations by paired seeds, at equal time, with confidence intervals.

    python benchmarks/ablate.py vocabulary --text shakespeare fairy-tales --seconds 60 180
    python benchmarks/ablate.py mine --cell "small steps: batch_size=4" --cell "large: batch_size=16"
    python benchmarks/ablate.py vocabulary --table        only what was measured so far
    python benchmarks/ablate.py --list                    the groups and their cells

A cell is a set of settings; the first of a group is the baseline. Every cell is run with the seeds 1 to --seeds (first
weights and order of the batches are functions of the seed), and the difference to the baseline is taken seed by seed.
A run is a fresh process on one core with one thread, --jobs of them side by side, each on a core of its own; cells take
turns, A B C, B C A, seed after seed. Its result, bits per byte of the whole validation text, is appended to
OUT/GROUP.jsonl at once, so an interrupted ablation goes on where it stopped.

The budget is in processor seconds (time.process_time), which a busy machine changes less than those on the wall;
--clock wall takes the clock on the wall. A plan knows seconds only of time.perf_counter, so in the process of the run
that name is given the other clock while it trains; `training s` in the table is what the loop then counted. Preparing
the text, two steps that compile what is not compiled yet, and the score of the whole validation text are outside.

The shape is the one that babyllama plans for the baseline's vocabulary and budget, on one thread whose speed is
measured once, and the same for all cells but those that name another; so are precision, context, rows, dropout, weight
decay and the rate of the output matrix. What the recipe sets together with an optimiser or with the norm after the
embedding (rates, beta1, clip, cautious) comes and goes with it; and a cell of another size or vocabulary has the
recipe's numbers for its own, by the same speed. Every result holds the plan it was found with. Besides the fields of
Plan a cell may name

    vocab_size        ids of the tokenizer                 shape   (dim, layers, heads)
    tokens_per_step   rows = this over the context         size    parameters wished for, or 192x5x6
    tie_embeddings    the table is the output matrix too   init    "gpt2": normal 0.02 all, as in nanoGPT
    outputs_spread, inner_spread, embedding_spread, head_spread    of the first weights: of the two matrices of a layer
                      that write into the residual stream, of its five others, and of the vocabulary's two

A cell with a setting that this version does not know is reported as such, and the others are run. Every result names
the code that it was found with (a hash of the package); a table of more than one says so.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PACKAGE = HERE.parents[1] / "babyllama"
Settings = dict[str, Any]
Line = dict[str, Any]
Runs = dict[str, dict[int, float]]  # a number of each run, by cell and seed
SPREADS = tuple(f"{role}_spread" for role in ("outputs", "inner", "embedding", "head"))
OUTSIDE = (
    "vocab_size",
    "shape",
    "size",
    "tokens_per_step",
    "init",
    "tie_embeddings",
    *SPREADS,
)  # no fields of Plan


@dataclass(frozen=True)
class Cell:
    name: str
    settings: Settings = field(default_factory=dict)


MUON, ADAMW = {"optimizer": "muon"}, {"optimizer": "adamw"}
AS_IT_IS = Cell("as it is")

# In the order in which they decide. Most baselines are what the recipe does by itself.
GROUPS: dict[str, list[Cell]] = {
    "defaults": [  # one at a time is taken back
        AS_IT_IS,
        Cell("AdamW", {"optimizer": "adamw"}),
        Cell("not cautious", {"cautious": False}),
        Cell("tied", {"tie_embeddings": True, "embedding_norm": False}),
        Cell("without embedding norm", {"embedding_norm": False}),
        Cell("GPT-2 init", {"init": "gpt2"}),
        Cell("cosine to 0", {"schedule": "cosine"}),
        Cell("linear to 10 %", {"final": 0.1}),
        Cell("no warm-up", {"warmup": 0.0}),
        Cell("no average", {"average": 0.0}),
        Cell("clipped at 1", {"clip": 1.0}),
        Cell("weight decay 0", {"weight_decay": 0.0}),
        Cell("dropout 0.1", {"dropout": 0.1}),
        Cell("context 256", {"context": 256}),
    ],
    "start": [  # against the plainest of all
        AS_IT_IS,
        Cell(
            "AdamW, GPT-2 init, tied, cosine",
            {**ADAMW, "init": "gpt2", "tie_embeddings": True, "embedding_norm": False, "schedule": "cosine"},
        ),
    ],
    "tied": [  # which the norm after the embedding rules out
        Cell("without embedding norm", {"embedding_norm": False}),
        Cell("tied", {"tie_embeddings": True, "embedding_norm": False}),
    ],
    "precision": [Cell(kind, {"precision": kind}) for kind in ("float32", "bfloat16")],
    "vocabulary": [
        AS_IT_IS,
        Cell("bytes", {"vocab_size": 261}),  # the smallest: 256 bytes and 5 control tokens
        *(Cell(f"{size:,}", {"vocab_size": size}) for size in (320, 512, 1024, 2048, 4096, 8192)),
    ],
    "first weights": [
        AS_IT_IS,
        Cell("GPT-2 init", {"init": "gpt2"}),
        Cell("embedding 0.8", {"embedding_spread": 0.8}),
        Cell("head 0.001", {"head_spread": 0.001}),
        *(Cell(f"inner {spread:g}", {"inner_spread": spread}) for spread in (0.05, 0.1)),
        Cell("without embedding norm", {"embedding_norm": False}),
        *(Cell(f"embedding rate {rate:g}", {"embedding_rate": rate}) for rate in (0.004, 0.03, 0.2)),
        *(Cell(f"head rate {rate:g}", {"head_rate": rate}) for rate in (0.002, 0.004, 0.008)),
        *(Cell(f"gain rate {rate:g}", {"gain_rate": rate}) for rate in (0.004, 0.008)),
    ],
    "rates": [
        AS_IT_IS,
        *(Cell(f"AdamW {rate:g}", {**ADAMW, "learning_rate": rate}) for rate in (0.002, 0.004, 0.008)),
        *(Cell(f"Muon {rate:g}", {**MUON, "learning_rate": rate}) for rate in (0.01, 0.03, 0.04)),
    ],
    "batch": [
        AS_IT_IS,
        *(
            Cell(f"{name} {tokens:,}", {**optimizer, "tokens_per_step": tokens})
            for name, optimizer in (("AdamW", ADAMW), ("Muon", MUON))
            for tokens in (512, 1024, 2048, 4096, 8192)
        ),
    ],
    "schedule": [
        AS_IT_IS,
        Cell("linear to 10 %", {"final": 0.1}),
        Cell("cosine to 10 %", {"schedule": "cosine", "final": 0.1}),
        Cell("cosine to 0", {"schedule": "cosine", "final": 0.0}),
        Cell("wsd, last 20 %", {"schedule": "wsd", "decay": 0.2}),
        Cell("wsd, last 65 %", {"schedule": "wsd", "decay": 0.65}),
        *(Cell(f"warm-up {100 * share:g} %", {"warmup": share}) for share in (0.0, 0.02, 0.1)),
    ],
    "size": [  # with --seconds 30 60 180 330
        AS_IT_IS,
        *(
            Cell(f"{shape[0]} wide, {shape[1]} layers", {"shape": shape})
            for shape in ((64, 2, 2), (96, 3, 3), (128, 4, 4), (160, 4, 5), (192, 5, 6), (256, 6, 4))
        ),
    ],
    "context": [
        AS_IT_IS,
        *(Cell(f"{context} tokens", {"context": context}) for context in (64, 128, 256, 512)),
    ],
    "regularisation": [  # epochs are what --seconds makes of a text
        AS_IT_IS,
        *(
            Cell(f"dropout {dropout:g}, decay {decay:g}", {"dropout": dropout, "weight_decay": decay})
            for dropout in (0.0, 0.1, 0.2)
            for decay in (0.0, 0.1, 0.5)
        ),
    ],
    "small things": [  # effects below 1 %: --seeds 10
        AS_IT_IS,
        Cell("not cautious", {"cautious": False}),
        Cell("falling decay", {"weight_decay_falls": True}),
        *(Cell(f"{number} polynomials", {**MUON, "muon_polynomials": number}) for number in (4, 5)),
        Cell("heads together", {**MUON, "muon_by_head": False}),
        Cell("normuon", {**MUON, "normuon": True}),
        *(Cell(f"momentum {much:g}", {"momentum": much}) for much in (0.9, 0.98)),
        *(Cell(f"average {share:g}", {"average": share}) for share in (0.0, 0.01, 0.05)),
        Cell("clipped at 1", {"clip": 1.0}),
    ],
}


# ---- statistics ------------------------------------------------------------------------------------


def within(t: float, df: int) -> float:
    """The share of Student's t with df degrees of freedom that lies between -t and t.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd df) and 26.7.4 (even df).
    """
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        term, total = cosine, 0.0
        for k in range(3, df + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return sine * total


def t_quantile(df: int, share: float = 0.95) -> float:
    """The t with `share` of the distribution between -t and t; 12.706 for one degree of freedom and 95 %."""
    low, high = 0.0, 1.0
    while within(high, df) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, df) < share else (low, middle)
    return (low + high) / 2


def paired(ours: dict[int, float], baseline: dict[int, float]) -> tuple[float, float | None, int]:
    """Mean difference over the seeds that both have, half the width of its 95 % interval, and how many they are."""
    differences = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    n = len(differences)
    if n < 2:
        return (differences[0] if n else math.nan), None, n
    return statistics.fmean(differences), t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n), n


def difference(mean: float, half: float | None) -> str:
    """As a table has it; bold where the interval does not hold 0."""
    if math.isnan(mean):
        return "-"
    told = f"{'−' if mean < 0 else '+'}{abs(mean):.4f}" + ("" if half is None else f" ± {half:.4f}")
    return f"**{told}**" if half is not None and abs(mean) > half else told


def slope(bits: Runs, seen: Runs) -> tuple[float, float] | None:
    """Of bits per byte over the logarithm of the tokens seen, and half the width of its 95 % interval.

    A shared machine is now faster, now slower, by a tenth. By least squares, cells and seeds having means of their own;
    None where fewer than three runs more are known than that takes, or where all saw as many tokens.
    """
    import numpy as np  # here: a run is held to its core before numpy starts its threads

    runs = [(cell, seed) for cell, each in bits.items() for seed in each]
    cells, seeds = dict.fromkeys(cell for cell, _ in runs), dict.fromkeys(seed for _, seed in runs)
    if len(runs) < len(cells) + len(seeds) + 3:
        return None
    means = np.array(
        [[cell == each for each in cells] + [seed == each for each in seeds] for cell, seed in runs]
    )
    both = np.array([[seen[cell][seed], bits[cell][seed]] for cell, seed in runs])
    coefficients, _, rank, _ = np.linalg.lstsq(means.astype(float), both, rcond=None)
    x, y = (both - means @ coefficients).T
    if x @ x < 1e-9:
        return None
    found, free = x @ y / (x @ x), len(runs) - int(rank) - 1
    error = np.linalg.norm(y - found * x) / math.sqrt(free * (x @ x))
    return float(found), t_quantile(free) * float(error)


def at_equal_tokens(
    cell: str, baseline: str, bits: Runs, seen: Runs, by_tokens: tuple[float, float] | None
) -> tuple[float, float | None]:
    """As `paired`, but for what the one saw more than the other; that the slope is an estimate is in the interval."""
    if by_tokens is None:
        return math.nan, None
    found, uncertain = by_tokens
    more = paired(seen[cell], seen[baseline])[0]
    rest = [
        {seed: y - found * seen[name][seed] for seed, y in bits[name].items()} for name in (cell, baseline)
    ]
    mean, half, _ = paired(*rest)
    return mean, None if half is None else math.hypot(half, uncertain * more)


# ---- results on disk -------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Line]:
    """The results in a file; a last line that was cut short by an interruption is no result."""
    lines = []
    for raw in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(raw))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, line: Line) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def same(line: Line, where: Line, cell: Cell | None = None, seed: int | None = None) -> bool:
    """Whether a result was found under these conditions: text, seconds, clock; and by this cell with this seed."""
    asked = dict(where)
    if cell is not None:
        asked["settings"] = as_json(cell.settings)
    if seed is not None:
        asked["seed"] = seed
    return all(line.get(key) == value for key, value in asked.items())


def as_json(settings: Settings) -> Settings:
    """As it is read back: a tuple becomes a list."""
    return json.loads(json.dumps(settings))


@functools.cache  # what is edited while runs go on does not count
def code() -> str:
    """Names the package as it is now."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:8]


def table(lines: list[Line], cells: list[Cell], where: Line, refused: dict[str, str] | None = None) -> str:
    """Markdown, one line a cell: what was measured under these conditions. Negative differences are better.

    Bold: the 95 % interval of the difference does not hold 0. `refused`: why a cell could not be run. "At equal tokens"
    what `slope` says of the tokens that the one saw more is taken off.
    """
    found: dict[str, list[Line]] = {}
    for cell in cells:
        own = [line for line in lines if same(line, where, cell) and "bits_per_byte" in line]
        found[cell.name] = list({line["seed"]: line for line in own}.values())  # the last of each seed
    bits = {name: {line["seed"]: line["bits_per_byte"] for line in each} for name, each in found.items()}
    seen = {
        name: {line["seed"]: math.log(line["tokens_per_second"] * line["training_seconds"]) for line in each}
        for name, each in found.items()
    }
    by_tokens, first = slope(bits, seen), cells[0].name
    rows = [
        f"| {where['text']}, {where['seconds']:g} s ({where['clock']}) | bits per byte "
        "| difference, 95 % | at equal tokens | n | steps | tokens/s | training s | parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        each = found[cell.name]
        if not each:
            why = (refused or {}).get(cell.name, "-")
            rows.append(f"| {cell.name} | - | {why} | - | 0 | - | - | - | - |")
            continue
        differences, n = ["baseline", ""], len(each)
        if cell is not cells[0]:
            mean, half, n = paired(bits[cell.name], bits[first])
            equal = at_equal_tokens(cell.name, first, bits, seen, by_tokens)
            differences = [difference(mean, half), difference(*equal)]
        row = [
            cell.name,
            f"{statistics.fmean(bits[cell.name].values()):.4f}",
            *differences,
            str(n),
            f"{statistics.fmean(line['steps'] for line in each):,.0f}",
            f"{statistics.fmean(line['tokens_per_second'] for line in each):,.0f}",
            f"{statistics.fmean(line['training_seconds'] for line in each):.1f}",
            f"{each[-1]['parameters']:,}",
        ]
        rows.append(f"| {' | '.join(row)} |")
    codes = {line.get("code") for each in found.values() for line in each}
    if len(codes) > 1:
        rows.append(f"\nFound with {len(codes)} versions of the code: {', '.join(sorted(map(str, codes)))}.")
    return "\n".join(rows)


# ---- one run, in a process of its own --------------------------------------------------------------


def child(request: Line) -> Line:
    """The answer to a request, or {"missing": reason} when this version does not know one of its settings."""
    from babyllama.errors import UsageError

    try:
        return {"head": first_plan, "run": one_run}[request["do"]](request)
    except UsageError as error:
        return {"missing": f"{error.where} {error.found}"}


@functools.cache
def content(text: str) -> str:
    """Names what is in a file or a folder; a text that is known by its name does not change."""
    from babyllama.data.documents import Reading, find_files

    path = Path(text)
    if not path.exists():
        return "named"
    files, _ = find_files(path, Reading())
    found = hashlib.sha256()
    for file in files:
        found.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:8]


def prepared(request: Line, vocab_size: int | None) -> Any:
    """The text with this vocabulary, made once for all runs. The split does not depend on the vocabulary."""
    from filelock import FileLock

    from babyllama.data.corpus import Corpus, prepare

    name = f"{Path(request['text']).stem}-{content(request['text'])}-{code()}-{vocab_size or 'default'}"
    folder = Path(request["data"]) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if Corpus.stands_in(folder):
            return Corpus.open(folder)
        return prepare(request["text"], folder, vocab_size=vocab_size)


def by_name(shape: Sequence[int]) -> str:
    """(dim, layers, heads) as a size is written."""
    return "x".join(map(str, shape))


def first_plan(request: Line) -> Line:
    """What babyllama plans for this text and time on one thread of this speed; every cell takes from it what it does
    not name."""
    from babyllama import machine
    from babyllama.train import recipe

    base = request["base"]
    corpus, speed = prepared(request, base.get("vocab_size")), machine.measure_precision("cpu")
    options: dict[str, Any] = {
        "text_bytes": corpus.train_bytes,
        "train_tokens": len(corpus.train_ids),
        "minutes": request["seconds"] / 60,
        "device": "cpu",
        "settings": {"threads": 1},
        "speed": speed,
    }
    size = by_name(base["shape"]) if "shape" in base else base.get("size")
    plan = recipe.plan(vocab_size=corpus.vocab_size, size=size, **options)
    text = {"train_bytes": corpus.train_bytes, "val_bytes": corpus.val_bytes}
    return {"plan": recipe.plan_to_json(plan), "speed": asdict(speed), **text}


def cell_plan(request: Line, vocab_size: int, text_bytes: int, train_tokens: int) -> Any:
    """The plan of a cell: the recipe's for its shape and vocabulary, with the cell's settings."""
    from babyllama import machine
    from babyllama.train import recipe

    head, base, settings = request["head"], request["base"], dict(request["settings"])
    first = recipe.plan_from_json(head["plan"])
    outside = {name: settings.pop(name) for name in OUTSIDE if name in settings}
    changed = {name for name in ("size", "shape", "vocab_size") if outside.get(name) != base.get(name)}
    if "shape" in changed or ("shape" in outside and "size" not in changed):
        outside.pop("size", None)  # what a cell says comes before the base, and a shape before a size
    options: dict[str, Any] = {
        "text_bytes": text_bytes,
        "train_tokens": train_tokens,
        "minutes": request["seconds"] / 60,
        "seed": request["seed"],
        "device": "cpu",
        "speed": machine.Precision(**head["speed"]),
    }
    shape = outside.get("shape", (first.model.dim, first.model.n_layers, first.model.n_heads))
    context = int(settings.get("context", first.context))
    size = str(outside.get("size", by_name(shape)))
    if changed and "context" not in settings:
        context = recipe.plan(vocab_size=vocab_size, size=size, settings={"threads": 1}, **options).context
    tokens = outside.get("tokens_per_step", first.batch_size * first.context)
    own = {"threads": 1, "precision": first.precision, "context": context, "evaluations": 0}
    own |= {"save_seconds": 1e9, "batch_size": max(1, round(tokens / context))}
    if not changed:
        own |= {"dropout": first.dropout, "weight_decay": first.weight_decay}
    if "size" in changed & outside.keys() and "tokens_per_step" not in outside:
        del own["batch_size"]  # the recipe's for that size
    options["settings"] = own | settings
    plan = recipe.plan(vocab_size=vocab_size, size=size, **options)
    if not changed and "head_rate" not in settings and plan.optimizer == first.optimizer == "muon":
        plan = replace(plan, head_rate=first.head_rate)  # by the passes, too
    tied = bool(outside.get("tie_embeddings", False))
    return replace(plan, model=replace(plan.model, tie_embeddings=tied))


def one_run(request: Line) -> Line:
    import torch

    from babyllama import api
    from babyllama import model as mathematics
    from babyllama.checkpoint.run import Run
    from babyllama.train import loop

    torch.set_num_threads(1)
    settings = request["settings"]
    if settings.get("init", "gpt2") != "gpt2":
        return {"missing": f"init {settings['init']!r}"}
    corpus = prepared(request, settings.get("vocab_size", request["base"].get("vocab_size")))
    plan = cell_plan(request, corpus.vocab_size, corpus.train_bytes, len(corpus.train_ids))
    spreads = {role: settings[role] for role in SPREADS if role in settings}
    if "init" in settings:
        outputs = 0.02 / math.sqrt(2 * plan.model.n_layers)
        spreads = {**dict.fromkeys(SPREADS, 0.02), "outputs_spread": outputs, **spreads}
    if spreads:
        mathematics.init_std = functools.partial(spread, spreads, mathematics.init_std)
    told: Line = {"steps": 0, "training_seconds": 0.0}

    def hear(event: Any) -> None:
        if isinstance(event, loop.Stepped):
            told.update(steps=event.step, training_seconds=event.seconds)

    wall, processor = time.perf_counter, time.process_time
    with tempfile.TemporaryDirectory() as folder:
        short = replace(plan, seconds=0.0, steps=2, evaluation_tokens=plan.context)
        loop.train(Run.create(Path(folder) / "short", {}), short, corpus)
        run = Run.create(Path(folder) / "run", {})
        began = wall(), processor()
        if request["clock"] == "processor":
            time.perf_counter = processor
        try:
            outcome = loop.train(run, plan, corpus, tell=hear)
        finally:
            time.perf_counter = wall
        if outcome.score is None:
            raise SystemExit("stopped by a signal")
        spent = wall() - began[0], processor() - began[1]
        whole = scored(api.load(run.folder(outcome.step)), corpus)
    from babyllama import costs
    from babyllama.train.recipe import multiplied, plan_to_json

    return {
        "bits_per_byte": whole.bits_per_byte,
        "scored_bytes": whole.bytes,
        **told,
        "tokens_per_second": told["steps"] * plan.tokens_per_step / told["training_seconds"],
        "epochs": told["steps"] * plan.tokens_per_step / len(corpus.train_ids),
        "parameters": costs.parameters(plan.model).total,
        "multiplied": multiplied(plan.model),
        "plan": plan_to_json(plan),
        "wall_seconds": spent[0],
        "processor_seconds": spent[1],
        "torch": torch.__version__,
    }


def spread(spreads: Settings, usual: Any, name: str, shape: tuple[int, ...]) -> float:
    """Of a new matrix, where a cell names it; else `usual`."""
    role = {"tok_embeddings.weight": "embedding_spread", "lm_head.weight": "head_spread"}.get(
        name, "inner_spread"
    )
    if name.endswith(("wo.weight", "w_down.weight")):
        role = "outputs_spread"
    return spreads.get(role, usual(name, shape))


def scored(llama: Any, corpus: Any) -> Any:
    """The score of a model on the whole validation text."""
    import numpy as np

    from babyllama.train.evaluate import score

    bos = corpus.tokenizer.bos_id
    after_bos = bos, corpus.tokenizer.byte_lengths(bos)
    lengths = corpus.tokenizer.byte_lengths()
    return score(
        llama.model, np.asarray(corpus.val_ids), lengths, llama.config.max_seq_len, after_bos=after_bos
    )


def ask(request: Line, core: int | None) -> Line:
    """A fresh process, held on one core with one thread, and what it answered."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **one, "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("GOMP_SPINCOUNT", "3000")
    command = [sys.executable, str(HERE), "--child", json.dumps({**request, "core": core})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        return {"failed": f"exit {done.returncode}: {said}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---- all of them -----------------------------------------------------------------------------------


def cores(jobs: int) -> list[int | None]:
    """A core for each job, 0: for two if there are so many; None where the system holds no process on one."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * (jobs or 2)
    from babyllama import machine

    allowed = machine.separate_cpus()
    jobs = jobs or min(2, len(allowed))
    if jobs > len(allowed):
        raise SystemExit(f"--jobs {jobs}: only {len(allowed)} cores may be used here")
    return [*allowed[:jobs]]


def order(cells: list[Cell], seeds: int) -> list[tuple[Cell, int]]:
    """Seed by seed all cells, beginning with another one each time, so that none keeps its place or its core."""
    turns = []
    for seed in range(1, seeds + 1):
        first = (seed - 1) % len(cells)
        turns += [(cell, seed) for cell in cells[first:] + cells[:first]]
    return turns


def results(path: Path, given: argparse.Namespace) -> list[Line]:
    """The results in a file that count; with --anew, those of the package as it is now."""
    version = code()
    return [line for line in read_lines(path) if not given.anew or line.get("code") == version]


def measure(cells: list[Cell], where: Line, given: argparse.Namespace, path: Path) -> dict[str, str]:
    """Run what the file does not hold yet. Returns the cells that this version does not know, with the reason."""
    version, lines = code(), results(path, given)
    missing = [
        (cell, seed)
        for cell, seed in order(cells, given.seeds)
        if not any(same(line, where, cell, seed) for line in lines)
    ]
    if not missing:
        return {}
    base = given.base
    request = {**where, "base": base, "data": str(Path(given.out) / "data")}
    places = cores(given.jobs)
    head = next(
        (line["head"] for line in lines if "plan" in line.get("head", {}) and same(line, where)), None
    )
    if head is None:
        head = ask({**request, "do": "head"}, places[0])
        if "plan" not in head:
            raise SystemExit(f"no plan: {head}")
        append(path, {**where, "code": version, "head": head})
    told = ", ".join(f"{name} {value}" for name, value in head["plan"].items() if name != "model")
    print(f"{where['text']}, {where['seconds']:g} s: {head['plan'].get('model')}, {told}", file=sys.stderr)

    work: queue.SimpleQueue[tuple[Cell, int]] = queue.SimpleQueue()
    for each in missing:
        work.put(each)
    refused: dict[str, str] = {}
    writing = threading.Lock()

    def serve(core: int | None) -> None:
        while not stop.is_set():
            try:
                cell, seed = work.get_nowait()
            except queue.Empty:
                return
            if cell.name in refused:
                continue
            settings = {**base, **as_json(cell.settings)}
            found = ask({**request, "do": "run", "head": head, "settings": settings, "seed": seed}, core)
            with writing:
                if "bits_per_byte" in found:
                    append(path, {**where, **identity(cell, seed), "code": version, **found})
                    told = f"{found['bits_per_byte']:.4f}, {found['steps']} steps"
                elif "missing" in found:
                    first = cell.name not in refused
                    refused[cell.name] = f"not known to this version: {found['missing']}"
                    told = refused[cell.name] if first else ""
                else:
                    told = found["failed"]
                if told:
                    print(f"  {cell.name}, seed {seed}: {told}", file=sys.stderr)

    stop = threading.Event()
    workers = [threading.Thread(target=serve, args=(core,)) for core in places]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # the runs in progress heard it too, and end
        stop.set()
        for worker in workers:
            worker.join()
        raise SystemExit("stopped; the same command goes on from here") from None
    return refused


def identity(cell: Cell, seed: int) -> Line:
    return {"cell": cell.name, "settings": as_json(cell.settings), "seed": seed}


def parse_cell(text: str) -> Cell:
    """ "NAME: key=value, key=value"; a comma inside brackets is part of a value."""
    name, _, settings = text.partition(":")
    each = re.split(r",(?![^\[]*\])", settings)
    return Cell(name.strip(), dict(parse_setting(one) for one in each if one.strip()))


def parse_setting(text: str) -> tuple[str, Any]:
    """ "key=value", the value as JSON has it (0.1, true, [64, 2, 2]), else a word."""
    key, equals, value = text.strip().partition("=")
    if not equals:
        raise SystemExit(f"{text!r} is not KEY=VALUE")
    try:
        return key.strip(), json.loads(value.replace("True", "true").replace("False", "false"))
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("group", nargs="?", help="one of --list, or a name of your own with --cell")
    found.add_argument("--cell", action="append", default=[], metavar='"NAME: KEY=VALUE, ..."')
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every cell")
    found.add_argument("--text", nargs="+", default=["shakespeare"], help="files or named texts")
    found.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    found.add_argument("--clock", choices=["processor", "wall"], default="processor")
    found.add_argument("--seeds", type=int, default=5)
    found.add_argument("--jobs", type=int, default=0, help="side by side; default: two, on two cores")
    found.add_argument("--out", default="runs/ablations")
    found.add_argument(
        "--anew", action="store_true", help="what other versions of the code found does not count"
    )
    found.add_argument("--table", action="store_true", help="run nothing")
    found.add_argument("--list", action="store_true")
    found.add_argument("--child", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.child:
        request = json.loads(given.child)
        if request["core"] is not None:
            os.sched_setaffinity(0, {request["core"]})
        sys.path.insert(0, str(HERE.parent))
        print(json.dumps(child(request)))
        return
    if given.list:
        for name, cells in GROUPS.items():
            print(f"{name}: " + "; ".join(cell.name for cell in cells))
        return
    if not given.group or not (given.cell or given.group in GROUPS):
        raise SystemExit(f"no group {given.group!r}; there are: {', '.join(map(shlex.quote, GROUPS))}")
    cells = list(GROUPS.get(given.group, [AS_IT_IS]))
    for cell in map(parse_cell, given.cell):
        like = next((one for one in cells if as_json(one.settings) == as_json(cell.settings)), None)
        if like is None:
            cells.append(cell)
        else:  # results are found by the settings alone
            print(f"{cell.name} is the same as {like.name}")
    given.base = dict(map(parse_setting, given.set))
    path = Path(given.out) / f"{given.group.replace(' ', '-')}.jsonl"
    for text in given.text:
        for seconds in given.seconds:
            where = {"text": text, "content": content(text), "seconds": seconds}
            where |= {"clock": given.clock, "base": given.base}
            refused = {} if given.table else measure(cells, where, given, path)
            print(f"\n{table(results(path, given), cells, where, refused)}", flush=True)


if __name__ == "__main__":
    main()

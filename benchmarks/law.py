"""Fit the law of babyllama/train/law.py again, and write it to law.json beside it.

    python benchmarks/law.py                      run what is missing (some twenty minutes on two idle cores), then fit
    python benchmarks/law.py runs/tales runs/mine     these finished runs count too, and stay in law.json
    python benchmarks/law.py --fit                    fit what law.json holds, and show how well
    python benchmarks/law.py --fresh                  forget first what it holds, as when the recipe has changed
    python benchmarks/law.py --longer 3               on cores without bfloat16: three times the seconds of each run

Each run of its own is one thread for some processor seconds, by the recipe but for its size; see ablate.py, which makes
them and goes on where it was interrupted, with the same code. The sizes lie around what a budget can train, so that
the best is inside.
Three kinds of text: tales, plays, and Python, namely a part of SymPy, which PyTorch brings with it.
"""

import argparse
from pathlib import Path
from typing import Any

import ablate
import numpy as np
import sympy

from babyllama.checkpoint.run import Run
from babyllama.data.corpus import Corpus
from babyllama.train import law
from babyllama.train.recipe import TOKENS_PER_PARAMETER, multiplied, plan_from_json

CODE = Path(sympy.__file__).parent / "physics"
TEXTS = {"fairy-tales": "fairy-tales", "shakespeare": "shakespeare", "sympy-physics": str(CODE)}
SIZES = {20.0: ("64x2x2", "96x3x3"), 60.0: ("96x3x3", "128x4x4"), 180.0: ("128x4x4", "160x4x5", "192x5x6")}
OUT = "runs/ablations"


def make_runs(longer: float, jobs: int) -> None:
    """Make the runs of TEXTS and SIZES that this code has not made yet."""
    for text in TEXTS.values():
        for seconds, (first, *others) in SIZES.items():
            cells = [argument for size in others for argument in ("--cell", f"{size}: size={size}")]
            cells += ["--set", f"size={first}"]
            where = ["--text", text, "--seconds", str(seconds * longer), "--seeds", "1"]
            ablate.main(["law", *cells, *where, "--jobs", str(jobs), "--out", OUT, "--anew"])


def made_runs() -> list[law.Reached]:
    """What this code made so far, but for models too large for their time, which the recipe would not choose."""
    found, hard, names = [], {}, {text: name for name, text in TEXTS.items()}
    for line in ablate.read_lines(Path(OUT) / "law.jsonl"):
        if "bits_per_byte" not in line or line["text"] not in names:
            continue
        if line["code"] != ablate.code() or line["content"] != ablate.content(line["text"]):
            continue  # what other versions made, to the end, stands in law.json
        corpus = ablate.prepared({"text": line["text"], "data": f"{OUT}/data"}, None)
        tokens = line["epochs"] * len(corpus.train_ids)
        if tokens < TOKENS_PER_PARAMETER * line["parameters"]:
            continue
        if line["text"] not in hard:
            hard[line["text"]] = hardness(corpus)
        run = law.Reached(
            text=names[line["text"]],
            hardness=hard[line["text"]],
            parameters=line["multiplied"],
            text_bytes=corpus.train_bytes,
            epochs=line["epochs"],
            bits_per_byte=line["bits_per_byte"],
        )
        found.append(run)
    return found


def finished(path: Path) -> law.Reached:
    """A run that babyllama train made and finished."""
    run = Run(path)
    settings: dict[str, Any] = run.settings
    plan = plan_from_json(settings["plan"])
    corpus = Corpus.open(next(p for place in settings["data"] if Corpus.stands_in(p := path / place)))
    last = next((line for line in reversed(run.metrics()) if line["event"] == "finished"), None)
    if last is None:
        raise SystemExit(f"{path}: is not finished; finish it:  babyllama train --resume {path}")
    return law.Reached(
        text=Path(settings["text"]).stem,
        hardness=hardness(corpus),
        parameters=multiplied(plan.model),
        text_bytes=corpus.train_bytes,
        epochs=last["step"] * plan.tokens_per_step / len(corpus.train_ids),
        bits_per_byte=last["bits_per_byte"],
    )


def hardness(corpus: Corpus) -> float:
    return law.hardness(corpus.train_ids, corpus.val_ids, corpus.tokenizer.byte_lengths())


def table(fitted: law.Law, runs: list[law.Reached]) -> str:
    lines = [
        "| text | hardness | parameters | times seen | measured | told | off |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        told = law.told(run, fitted)
        lines.append(
            f"| {run.text} | {run.hardness:.3f} | {run.parameters / 1e6:.2f}M | {run.epochs:.2f} | "
            f"{run.bits_per_byte:.3f} | {told:.3f} | {told / run.bits_per_byte - 1:+.1%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--fit", action="store_true", help="run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the runs in law.json")
    parser.add_argument(
        "--longer", type=float, default=1.0, metavar="FACTOR", help="times the seconds of each run"
    )
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side, each on a core of its own")
    given = parser.parse_args(arguments)
    kept = law.read()[1] if law.LAW.exists() and not given.fresh else []
    new = [finished(path) for path in given.runs]
    if not given.fit:
        make_runs(given.longer, given.jobs)
        new += made_runs()
    runs = [run for run in kept if run not in new] + new
    fitted = law.fit(runs)
    law.write(fitted, runs)
    print(table(fitted, runs))
    off = np.array([law.told(run, fitted) / run.bits_per_byte - 1 for run in runs])
    print(f"\n{fitted}\nroot mean square {np.sqrt(np.square(off).mean()):.1%}, worst {np.abs(off).max():.1%}")


if __name__ == "__main__":
    main()

"""Draws bits per byte against time from the CSV that training.py writes, for a light and for a dark page.

python benchmarks/curve.py runs/benchmarks/curves.csv docs/figures/curve [--clock cold]
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "figures"))
from components import STYLE, THEMES

TITLE = "Bits per byte of the held-out text against seconds of training, for each contestant"


def read(path: Path, clock: str) -> dict[tuple[str, str], list[list[tuple[float, float]]]]:
    """(contestant, how its rate was chosen) -> its runs, each a list of (seconds, bits per byte)."""
    runs: dict[Any, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["contestant"], row["how"], row["minutes"], row["seed"]
            runs.setdefault(key, []).append((float(row[clock]), float(row["bits_per_byte"])))
    found: dict[tuple[str, str], list[list[tuple[float, float]]]] = {}
    for (name, how, *_), points in runs.items():
        found.setdefault((name, how), []).append(sorted(points))
    return found


def draw(table: Path, stem: Path, clock: str = "cold") -> list[Path]:
    """A line for each run: those of a contestant share a hue, and a dot marks where a schedule ended."""
    found, drawn = read(table, clock), []
    names = list(dict.fromkeys(name for name, _ in found))
    tuned = {name for name, how in found if "tuned" in how}
    stem.parent.mkdir(parents=True, exist_ok=True)
    for theme, colours in THEMES.items():
        muted = {
            key: colours["muted"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
        }
        with matplotlib.rc_context({**STYLE, **muted, "axes.edgecolor": colours["line"]}):
            figure = plt.figure(figsize=(6.4, 4.2))
            axes = figure.subplots()
            axes.grid(axis="y", color=colours["line"], linewidth=0.8)
            axes.set_axisbelow(True)
            for number, name in enumerate(names):
                hues = colours["hues"]
                style = {
                    "color": hues[number % len(hues)],
                    "linestyle": "-" if number < len(hues) else "--",
                    "linewidth": 2.6 if name == "babyllama" else 1.6,
                    "zorder": 3 if name == "babyllama" else 2,
                }
                label: str | None = name
                for (other, how), runs in found.items():
                    if other != name or (name in tuned and "tuned" not in how):
                        continue  # of two rates, the tuned one is drawn
                    for points in runs:
                        axes.plot(*zip(*points, strict=True), label=label, **style)
                        axes.plot(*points[-1], "o", color=style["color"], markersize=5, zorder=4)
                        label = None
            if max(at for runs in found.values() for points in runs for at, _ in points) > 120:
                axes.set_xscale("log")
            axes.set_xlabel(f"seconds ({clock})")
            axes.set_ylabel("bits per byte")
            legend = axes.legend(loc="upper right", fontsize=9)
            for text in legend.get_texts():
                text.set_color(colours["ink"])
            path = stem.with_name(f"{stem.name}-{theme}.svg")
            metadata = {"Date": None, "Creator": None, "Title": TITLE}
            options = {"transparent": True, "bbox_inches": "tight", "pad_inches": 0.06, "metadata": metadata}
            figure.savefig(path, format="svg", **options)
            plt.close(figure)
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("stem", type=Path)
    parser.add_argument("--clock", choices=["cold", "warm"], default="cold")
    given = parser.parse_args()
    for path in draw(given.table, given.stem, given.clock):
        print(path)

"""Draws the three components of a Llama by running them: docs/figures/{norm,rope,swiglu}-{light,dark}.svg.

Each plot has a function that computes its data with babyllama/model.py and one that draws them. The data are also
written into the SVG as its description, so that a test can compare a committed figure with a fresh computation
without depending on how this version of matplotlib writes a curve.

    python docs/figures/components.py
"""

import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from babyllama.model import Config, FeedForward, RMSNorm, no_tap, rope_tables, rotate

HERE = Path(__file__).parent
Data = dict[str, Any]

# Okabe-Ito hues, which colour-blind people can tell apart, lightened for the dark page.
THEMES = {
    "light": {
        "ink": "#1f2328", "muted": "#59636e", "line": "#d1d9e0", "cell": "#ebeff3",
        "dot": "#ffffff", "before": "#d1d9e0",
        "hues": ["#0072b2", "#c2540a", "#00835f", "#a3478a", "#7a6100"],
    },
    "dark": {
        "ink": "#f0f6fc", "muted": "#9198a1", "line": "#3d444d", "cell": "#262c36",
        "dot": "#0d1117", "before": "#596471",
        "hues": ["#56b4e9", "#f0883e", "#2fbf95", "#d78fc4", "#d9b036"],
    },
}  # fmt: skip
STYLE = {
    "svg.hashsalt": "baby-llama",  # the same ids in every drawing
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}

# ---- RMSNorm beside LayerNorm and BatchNorm ------------------------------------------------------

B, T, D = 2, 4, 8
MARKED = (0, 1, 2)  # the number whose statistic is asked for: row, token, feature


def norm_data() -> Data:
    """For each norm: which numbers of a (B, T, D) array share a statistic with the marked one, and what one token
    becomes.

    Sharing is found by running the norm: those inputs whose change would change the marked output. The token's numbers
    lie around 1.5, so that it shows whether a norm moves the mean.
    """
    x = 1.5 + 1.5 * torch.randn(B, T, D, generator=torch.Generator().manual_seed(4))
    batch_norm = nn.BatchNorm1d(D, affine=False)
    norms = {
        "RMSNorm": RMSNorm(D, eps=1e-5),
        "LayerNorm": nn.LayerNorm(D, elementwise_affine=False),
        "BatchNorm": lambda x: batch_norm(x.reshape(B * T, D)).reshape(B, T, D),
    }
    data: Data = {}
    for name, norm in norms.items():
        x.requires_grad_(True)
        y = norm(x)
        (influence,) = torch.autograd.grad(y[MARKED], x)
        shared = (influence.abs() > 1e-9).int().tolist()
        data[name] = {"shared": shared, "before": x[MARKED[:2]].tolist(), "after": y[MARKED[:2]].tolist()}
    return data


def draw_norm(figure: Figure, data: Data, colours: dict[str, Any]) -> None:
    top, bottom = figure.subplots(
        2, 3, gridspec_kw={"height_ratios": [1.9, 1], "hspace": 0.36, "wspace": 0.14}
    )
    says = {
        "RMSNorm": "÷ root mean square\nof the token",
        "LayerNorm": "− mean, ÷ deviation\nof the token",
        "BatchNorm": "− mean, ÷ deviation\nof the feature",
    }
    for i, (name, found) in enumerate(data.items()):
        hue, grid, bars = colours["hues"][i], top[i], bottom[i]
        for b in range(B):
            for t in range(T):
                for d in range(D):
                    y = b * (T + 1) + t  # one empty row between the sequences
                    fill = hue if found["shared"][b][t][d] else colours["cell"]
                    grid.add_patch(Rectangle((d + 0.06, y + 0.06), 0.88, 0.88, color=fill, linewidth=0))
        b, t, d = MARKED
        grid.plot(d + 0.5, b * (T + 1) + t + 0.5, "o", color=colours["dot"], markersize=5)
        grid.set(xlim=(0, D), ylim=(B * (T + 1) - 1, 0), aspect="equal", xticks=[], yticks=[])
        grid.spines[:].set_visible(False)
        grid.set_title(name, fontsize=13, fontweight="bold", color=colours["ink"], pad=8)
        if i == 0:
            for b in range(B):
                grid.text(-0.5, b * (T + 1) + T / 2, f"row {b + 1}", rotation=90, ha="center", va="center")

        bars.bar([j + 0.5 for j in range(D)], found["before"], 0.8, color=colours["before"])
        bars.bar([j + 0.5 for j in range(D)], found["after"], 0.4, color=hue)
        bars.axhline(0, color=colours["muted"], linewidth=0.8)
        bars.set(xlim=(0, D), ylim=(-2.0, 2.8), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)
        bars.set_xlabel(says[name], labelpad=5)
    below = {"textcoords": "offset points", "ha": "center", "annotation_clip": False}
    top[1].annotate(
        "one line for each token, one column for each feature", (D / 2, B * (T + 1) - 1), (0, -17), **below
    )
    bottom[1].annotate("the token of the dot, before (grey) and after", (D / 2, 3.2), (0, 0), **below)


# ---- RoPE: only the distance counts --------------------------------------------------------------

OFFSETS = (0, 1000, 20000)
DISTANCES = range(97)


def rope_data() -> Data:
    """The score of one fixed query, turned to position n + distance, with one fixed key, turned to position n."""
    config = Config(vocab_size=1, dim=64, n_layers=1, n_heads=1)
    ones = torch.ones(1, 1, 1, config.head_dim)

    def at(position: int) -> torch.Tensor:
        return rotate(ones, rope_tables(config, torch.tensor([[position]])))

    scores = {
        str(n): [(at(n + distance) * at(n)).sum().item() / config.head_dim for distance in DISTANCES]
        for n in OFFSETS
    }
    return {"distance": list(DISTANCES), "score": scores}


def draw_rope(figure: Figure, data: Data, colours: dict[str, Any]) -> None:
    axes: Axes = figure.subplots()
    axes.grid(axis="y", color=colours["line"], linewidth=0.6)
    x = data["distance"]
    for i, (n, y) in enumerate(data["score"].items()):
        label = f"key at position {int(n):,}"
        if i == 0:
            axes.plot(x, y, color=colours["hues"][0], label=label)
        else:  # every sixth distance, so that the curves that coincide can all be seen
            axes.plot(
                x[3 * i :: 6],
                y[3 * i :: 6],
                "os"[i - 1],
                color=colours["hues"][i],
                markersize=5.5,
                label=label,
            )
    axes.set(xlim=(-1, 97), ylim=(0, 1.05), yticks=[0, 0.5, 1], xticks=[0, 32, 64, 96])
    axes.set_xlabel("distance: position of the query − position of the key")
    axes.set_ylabel("score, relative to distance 0")
    axes.legend(loc="upper right", labelcolor=colours["ink"])


# ---- SwiGLU: a gate that is a smooth curve -------------------------------------------------------

UPS = (2.0, 1.0, 0.5, -0.5, -1.0)


def swiglu_data() -> Data:
    """silu(gate) · up over gate, for several up: a FeedForward whose matrices hand both straight through."""
    feed_forward = FeedForward(Config(vocab_size=1, dim=2, n_layers=1, n_heads=1, hidden_dim=2))
    with torch.no_grad():
        feed_forward.w_gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        feed_forward.w_up.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        feed_forward.w_down.weight.copy_(torch.eye(2))
        gate = torch.linspace(-6, 4, 101)
        products = {}
        for up in UPS:
            x = torch.stack((gate, torch.full_like(gate, up)), dim=-1)[None]  # (1, 101, 2): gate and up
            products[str(up)] = feed_forward(x, no_tap)[0, :, 0].tolist()
    return {"gate": gate.tolist(), "product": products}


def draw_swiglu(figure: Figure, data: Data, colours: dict[str, Any]) -> None:
    axes: Axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.76})
    axes.axhline(0, color=colours["line"], linewidth=1)
    axes.axvline(0, color=colours["line"], linewidth=1)
    x = data["gate"]
    for i, (up, y) in enumerate(data["product"].items()):
        hue, silu = colours["hues"][i], float(up) == 1
        axes.plot(x, y, color=hue, linewidth=3.2 if silu else 1.8, zorder=3 if silu else 2)
        label = f"up = {float(up):g}" + (" (silu)" if silu else "")
        axes.annotate(label.replace("-", "−"), (x[-1], y[-1]), (6, 0), textcoords="offset points", va="center",
                      color=hue, fontweight="bold" if silu else "normal", annotation_clip=False)  # fmt: skip
    axes.set(xlim=(-6, 4), ylim=(-4.5, 8.2), xticks=[-6, -3, 0, 3], yticks=[-4, 0, 4, 8])
    axes.set_xlabel("gate")
    axes.set_ylabel("silu(gate) · up")


# ---- all of them ---------------------------------------------------------------------------------

FIGURES = {
    # name: (data, drawing, size in inches, title for people who cannot see it)
    "norm": (
        norm_data,
        draw_norm,
        (6.4, 4.5),
        "Which numbers share a statistic in RMSNorm, LayerNorm and BatchNorm",
    ),
    "rope": (
        rope_data,
        draw_rope,
        (6.4, 3.4),
        "The attention score under RoPE against the distance of two tokens",
    ),
    "swiglu": (
        swiglu_data,
        draw_swiglu,
        (6.4, 3.4),
        "silu(gate) times up against gate, for several values of up",
    ),
}


def draw(name: str, theme: str, path: Path) -> None:
    data, drawing, size, title = FIGURES[name]
    colours, found = THEMES[theme], data()
    text = {key: colours["muted"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({**STYLE, **text, "axes.edgecolor": colours["line"]}):
        figure = plt.figure(figsize=size)
        drawing(figure, found, colours)
        description = json.dumps(rounded(found), separators=(",", ":"))
        metadata = {"Date": None, "Creator": None, "Title": title, "Description": description}
        figure.savefig(
            path, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.06, metadata=metadata
        )
        plt.close(figure)


def rounded(data: Any) -> Any:
    """The same with 4 digits behind the point: enough to tell curves apart, and the same on every CPU."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    return round(data, 4) + 0.0 if isinstance(data, float) else data


if __name__ == "__main__":
    matplotlib.use("svg")
    warnings.simplefilter("error")
    for name in FIGURES:
        for theme in THEMES:
            draw(name, theme, HERE / f"{name}-{theme}.svg")

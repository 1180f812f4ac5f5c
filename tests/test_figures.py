"""The committed figures show what the code computes today."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
REDRAW = "is not what the code draws now: run `make figures`"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"figures_{name}", FIGURES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def components() -> ModuleType:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    return load("components")


def every_number(data) -> list[float]:
    if isinstance(data, dict):
        return [number for value in data.values() for number in every_number(value)]
    if isinstance(data, list):
        return [number for value in data for number in every_number(value)]
    return [float(data)]


def drawn_data(path: Path) -> dict:
    """The numbers that were written into the SVG beside the curves."""
    for element in ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description"):
        return json.loads(element.text or "")
    raise AssertionError(f"{path.name} has no description")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_committed_block_diagram_is_what_its_code_draws(theme):
    path = FIGURES / f"block-{theme}.svg"
    assert path.read_bytes().decode() == load("block").draw(theme), f"{path.name} {REDRAW}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["norm", "rope", "swiglu"])
def test_the_committed_plots_show_what_the_model_computes(components, name, theme):
    path = FIGURES / f"{name}-{theme}.svg"
    fresh, committed = components.rounded(components.FIGURES[name][0]()), drawn_data(path)
    assert every_number(committed) == pytest.approx(every_number(fresh), abs=2e-3), f"{path.name} {REDRAW}"
    assert json.dumps(fresh)[:20] == json.dumps(committed)[:20]


def test_every_figure_is_there_in_both_themes_and_says_what_it_shows(components):
    names = {"block", *components.FIGURES}
    assert {path.name for path in FIGURES.glob("*.svg")} == {
        f"{n}-{t}.svg" for n in names for t in ("light", "dark")
    }
    for path in FIGURES.glob("*.svg"):
        title = ElementTree.parse(path).find("{http://www.w3.org/2000/svg}title")
        assert title is not None and len(title.text or "") > 20
        assert not re.search(r"\d{4}-\d\d-\d\dT", path.read_text(encoding="utf-8")), (
            "a date makes each drawing differ"
        )


def test_drawing_twice_gives_the_same_bytes(components, tmp_path):
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        components.draw("swiglu", "light", path)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


# ---- what the plots are said to show


def test_rms_and_layer_norm_share_within_a_token_and_batch_norm_within_a_feature(components):
    b0, t0, d0 = components.MARKED
    for name, found in components.norm_data().items():
        for b, sequence in enumerate(found["shared"]):
            for t, token in enumerate(sequence):
                for d, shared in enumerate(token):
                    expected = d == d0 if name == "BatchNorm" else (b, t) == (b0, t0)
                    assert shared == expected, (name, b, t, d)


def test_only_layer_norm_moves_the_mean_of_a_token_to_zero(components):
    data = components.norm_data()
    assert sum(data["LayerNorm"]["after"]) == pytest.approx(0, abs=1e-4)
    ratios = [a / b for a, b in zip(data["RMSNorm"]["after"], data["RMSNorm"]["before"], strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4), "RMSNorm only scales"


def test_the_rope_score_depends_on_the_distance_only(components):
    first, *others = components.rope_data()["score"].values()
    for scores in others:
        assert scores == pytest.approx(first, abs=2e-3)
    assert first[0] == pytest.approx(1) and max(first[64:]) < 0.6


def test_the_curve_of_up_1_is_silu_itself(components):
    import torch

    data = components.swiglu_data()
    silu = torch.nn.functional.silu(torch.tensor(data["gate"])).tolist()
    assert data["product"]["1.0"] == pytest.approx(silu, abs=1e-6)

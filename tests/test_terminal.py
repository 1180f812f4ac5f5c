"""What a person sees in a real terminal: the live line at several widths, and what happens without a screen."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from babyllama import terminal
from babyllama.checkpoint.run import Run
from babyllama.model import Config
from babyllama.terminal import TrainingScreen, command, duration, expected, plural, printable, size
from babyllama.train.loop import Compiling, NotCompiled, Skipped
from babyllama.train.recipe import Forecast, Plan

FAST = ["--size", "100k", "--device", "cpu", "--set", "context=32", "--set", "batch_size=4"]
FAST += ["--set", "threads=1", "--set", "evaluations=4"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(
        "".join(f"{i}. There was once a king who had {i} sons.\n\n" for i in range(600)), encoding="utf-8"
    )
    return path


def seen_in_a_terminal(columns: int, *arguments: str) -> str:
    """Everything a terminal of this width is sent, without the escape sequences."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "babyllama", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        pieces = []
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:  # Linux says so when the other side is closed
            pass
        os.close(ours)
        assert process.wait(60) == 0
    return ESCAPE.sub("", b"".join(pieces).decode(errors="replace"))


def told_before(bits_per_byte: float = 2.0, enough: float = 9.0, **ends) -> str:
    """What is said of a run that sees 1,000 tokens a second."""
    forecast = Forecast(1000.0, 12.5, bits_per_byte, 0.05, 2**30, enough)
    model = Config(vocab_size=9, dim=8, n_layers=1, n_heads=1)
    plan = Plan(model=model, context=10, batch_size=10, **ends)
    return "\n".join(text for _, text in expected(forecast, plan))


def test_the_forecast_says_what_how_long_and_whether_the_text_is_too_small_for_it():
    assert told_before(seconds=60.0).startswith("1.90 to 2.10 bits per byte, text seen 12.5 times")
    assert "about" not in told_before(seconds=60.0)
    assert "for about 50 seconds" in told_before(steps=500)
    assert "for about 8.3 minutes" in told_before(steps=5000)
    for ends in ({"seconds": 600.0}, {"steps": 6000}):
        assert "holds about 9 minutes of learning" in told_before(**ends)
        assert "of learning" not in told_before(enough=11.0, **ends)
    blind = told_before(bits_per_byte=11.0, steps=500)
    assert "no better than a blind guess" in blind and "bits per byte" not in blind
    assert "too short a text to tell" in str(expected(None, None))


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_live_line_shows_what_there_is_room_for(book, tmp_path, columns):
    shown = seen_in_a_terminal(
        columns, "train", str(book), "--out", str(tmp_path / "run"), "--steps", "300", *FAST
    )
    lines = [line for line in re.split(r"[\r\n]", shown) if "%" in line and " left" in line]
    assert lines and all(len(line.rstrip()) <= columns for line in lines)
    last = lines[-1]
    assert "loss" in last
    assert ("bits/byte" in last) is (columns > 60)
    assert ("tokens/s" in last) is (columns > 60)
    assert ("iB" in last and "step" in last) is (columns >= 140)
    assert "reading" not in last


def test_a_resumed_run_shows_no_bar_of_a_preparation_that_there_is_not(book, tmp_path):
    seen_in_a_terminal(80, "train", str(book), "--out", str(tmp_path / "run"), "--steps", "20", *FAST)
    shown = seen_in_a_terminal(80, "train", "--resume", str(tmp_path / "run"))
    assert "reading" not in shown and "encoding" not in shown


def test_a_run_says_when_it_compiles_its_step_and_when_it_does_not(capsys):
    screen = TrainingScreen()
    screen(Compiling())
    screen(NotCompiled("too little time is left"))
    said = capsys.readouterr()
    assert "Compiling the step" in said.out and "not compiled: too little time" in said.out + said.err


def test_training_goes_on_when_the_screen_goes_away(book, tmp_path):
    arguments = ["train", str(book), "--out", str(tmp_path / "run"), "--steps", "40", *FAST]
    with subprocess.Popen(
        [sys.executable, "-m", "babyllama", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        said = process.stderr.read().decode()
        assert process.wait(120) in (0, 141) and "Traceback" not in said and "Exception" not in said
    assert Run(tmp_path / "run").steps()[-1] == 40


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_training_goes_on_when_the_screen_is_full(book, tmp_path):
    arguments = ["train", str(book), "--out", str(tmp_path / "run"), "--steps", "40", *FAST]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        subprocess.run([sys.executable, "-m", "babyllama", *arguments], stdout=full, stderr=full, check=False)
    assert Run(tmp_path / "run").steps()[-1] == 40


def test_a_skipped_step_is_one_line_that_says_where_it_began(capsys):
    TrainingScreen()(Skipped(1234, 2.5, float("nan"), "layers.1.feed_forward.up", 2))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step  1,234   skipped" in said and "layers.1.feed_forward.up" in said


def test_figures_read_as_a_person_would_write_them():
    assert (duration(125), duration(3725), duration(float("inf"))) == ("2:05", "1:02:05", "?")
    assert (size(512), size(1536), size(3 * 2**30)) == ("512 bytes", "1.5 KiB", "3.0 GiB")
    assert [plural(n, "step") for n in (1, 2, 0.5, 200_000)] == [
        "1 step",
        "2 steps",
        "0.5 steps",
        "200,000 steps",
    ]
    assert command("babyllama", "generate", "a b", 3) == "babyllama generate 'a b' 3"
    assert printable("a\x1b[1m\x07\n\t€") == "a␛[1m␇\n\t€"


def test_what_a_model_says_keeps_its_tabs(capsys):
    terminal.say("a\tb\n\tc [bold]d")
    assert capsys.readouterr().out == "a\tb\n\tc [bold]d\n"


def test_a_stage_of_unknown_length_shows_a_bar_without_a_share(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=True, width=60))
    with terminal.preparing() as told:
        told("fetching smollm2", 0, 0)
    assert "fetching smollm2" in screen.getvalue() and "%" not in screen.getvalue()
    with terminal.preparing() as told:
        told("reading", 1, 2)
    assert "50 %" in screen.getvalue()

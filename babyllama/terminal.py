"""What a person sees in the terminal: a plan, a run as it goes, tables. Rich draws; nothing is computed here."""

import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text


class ReaderLeftError(Exception):
    """Nobody reads our output any more, as after `| head`. No OSError, which typer would end the program for."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise ReaderLeftError


console = _Console(highlight=False)
errors = _Console(stderr=True, highlight=False)


def printable(text: str) -> str:
    """`text` with signs like ␛ for the control characters, which could move the cursor or recolour the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else _sign(c) for c in text)


def _sign(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else "�" if character == "�" else f"\\u{code:04x}"


def say(text: str, end: str = "\n") -> None:
    """Text of a model: never read as markup, never a control sequence."""
    console.file.write(printable(text) + end)  # not console.out, which makes spaces of tabs
    console.file.flush()


def say_raw(text: str, end: str = "\n") -> None:
    """Text of a model exactly as it is, control characters too."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise ReaderLeftError from None


def note(text: str) -> None:
    """A line of ours with names of the person's own in it: as it is, on one line however long."""
    console.print(printable(text), markup=False, soft_wrap=True)


def command(*words: object) -> str:
    """A command as it can be typed, or copied, into a shell."""
    return shlex.join(map(str, words))


def facts(rows: list[tuple[str, str]], title: str = "") -> None:
    """Names on the left, what they are on the right."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(value))
    if title:
        console.print(f"[bold]{escape(title)}[/bold]")
    console.print(Padding(table, (0, 2)))


# ---- figures -------------------------------------------------------------------------------------


def count(number: int | float) -> str:
    """3,012,480 -> "3.0M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def size(number: int | float) -> str:
    """Bytes as a person reads them: "11.5 MiB"."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= bytes_:
            return f"{number / bytes_:.1f} {unit}"
    return f"{number:.0f} bytes"


def plural(number: int | float, noun: str) -> str:
    """1 and "step" -> "1 step"; 3,000 -> "3,000 steps"."""
    return f"{number:,g} {noun}" + ("" if number == 1 else "s") if number < 1e6 else f"{number:,.0f} {noun}s"


def duration(seconds: int | float) -> str:
    """125 -> "2:05"."""
    if not 0 <= seconds < 1e7:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- preparing a text ----------------------------------------------------------------------------


@contextlib.contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the stages of reading a text; gives the function that is told (stage, bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[share]}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None, share="")

    def told(stage: str, done: int, total: int) -> None:
        bar.start()
        share = (
            f"{100 * done / total:3.0f} %" if total else ""
        )  # of a stage whose length nobody knows: a bar alone
        bar.update(task, description=stage, completed=done, total=total or None, share=share)
        if stage == "encoding" and done >= total:
            bar.stop()

    try:
        yield told
    finally:
        bar.stop()


# ---- a run ---------------------------------------------------------------------------------------


class TrainingScreen:
    """Shows the events of a run: a live line in a terminal, plain lines in a file or a pipe."""

    def __init__(self) -> None:
        self.bits: float | None = None
        self.lowest, self.warned, self.held_out = math.inf, False, 0
        self.words = ""  # to try the model with
        self.outcome: Any = None
        columns = (
            BarColumn(bar_width=14),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.description}"),
        )
        self.live = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        self.task = self.live.add_task("", total=1.0)

    def __enter__(self) -> "TrainingScreen":
        return self

    def __exit__(self, *reason: object) -> None:
        if console.is_terminal:
            self.live.stop()

    def __call__(self, event: Any) -> None:
        show = getattr(self, f"_{type(event).__name__.lower()}", None)
        if show is not None:
            with contextlib.suppress(
                OSError, ReaderLeftError
            ):  # a screen that is gone or full is no reason to stop training
                show(event)

    def _planned(self, event: Any) -> None:
        plan, corpus = event.plan, event.corpus
        from babyllama import costs

        until = plural(plan.steps, "step") if plan.steps else plural(round(plan.seconds / 60, 2), "minute")
        where = plural(plan.threads, "core") if plan.device == "cpu" else plan.device
        m = plan.model
        facts(
            [
                ("to learn", documents(corpus.train_documents, corpus.train_bytes)),
                ("held out", f"{documents(corpus.val_documents, corpus.val_bytes)}, to measure on"),
                *left_out(corpus),
                (
                    "tokens",
                    f"{len(corpus.train_ids):,}, of a vocabulary of {corpus.vocab_size:,}; "
                    f"{corpus.train_bytes / max(1, len(corpus.train_ids)):.2f} bytes each",
                ),
                (
                    "model",
                    f"{count(costs.parameters(m).total)} parameters: {m.n_layers} layers, {m.dim} wide, "
                    f"{m.n_heads} heads, context {m.max_seq_len}",
                ),
                (
                    "step",
                    f"{plan.tokens_per_step:,} tokens, {OPTIMIZERS[plan.optimizer]}, matrices at up to "
                    f"{plan.learning_rate:.2g}" + (f", {plan.dropout:.0%} dropped" if plan.dropout else ""),
                ),
                ("training", f"{until} on {where}, products in {plan.precision}"),
                *expected(event.forecast, plan),
            ]
        )
        self.held_out, words = corpus.val_bytes, corpus.words_held_out()
        self.words = words if words.isprintable() and words[:1].isalnum() else "Once"
        console.print()

    def _started(self, event: Any) -> None:
        for problem in event.passed_over:
            note(f"passed over {problem.where}: {problem.found}")
        if event.step:
            console.print(f"Going on from step {event.step:,}.")
        if console.is_terminal:
            self.live.start()

    def _compiling(self, event: Any) -> None:
        console.print("Compiling the step: a minute or so.")

    def _notcompiled(self, event: Any) -> None:
        note(f"The step is not compiled: {event.why}")

    def _stepped(self, event: Any) -> None:
        if not console.is_terminal:
            return
        parts = {  # in the order in which they are shown; the later in `given_up`, the dearer
            "step": f"step {event.step:,}",
            "loss": f"loss {event.loss:.2f}",
            "bits": "" if self.bits is None else f"{self.bits:.2f} bits/byte",
            "speed": f"{event.tokens_per_second:,.0f} tokens/s",
            "memory": "" if event.memory is None else size(event.memory),
            "left": f"{duration(event.seconds_left)} left",
        }
        room = console.width - 24  # beside the bar and the percentage
        for given_up in ("memory", "step", "speed", "bits", "loss"):
            if len(" · ".join(filter(None, parts.values()))) > room:
                parts[given_up] = ""
        self.live.update(
            self.task, completed=event.progress, description=" · ".join(filter(None, parts.values()))
        )

    def _skipped(self, event: Any) -> None:
        note(f"step {event.step:>6,}   skipped: loss or gradient not finite, from {event.began}")

    def _evaluated(self, event: Any) -> None:
        self.bits = event.score.bits_per_byte
        best = "  [green]best so far[/green]" if event.best else ""
        console.print(f"step {event.step:>6,}   {bits_per_byte(event.score)}{best}")
        worse = event.score.bits_per_byte - self.lowest
        if worse > 0.01 and not self.warned:
            self.warned = True
            note(
                "The held-out text is predicted worse than before: the model learns its text by heart from here on."
            )
        self.lowest = min(self.lowest, event.score.bits_per_byte)
        if event.sample:
            words = " ".join(event.sample.split())
            console.print(
                Padding(Text(printable(words), style="dim", overflow="ellipsis", no_wrap=True), (0, 0, 0, 3))
            )

    def _outcome(self, event: Any) -> None:
        if console.is_terminal:
            self.live.stop()
        self.outcome = event
        if event.score is not None:
            console.print(f"\nDone after {event.step:,} steps: {bits_per_byte(event.score)}")
            part = event.score.bytes / max(1, self.held_out)
            what = "all" if part > 0.98 else f"{part:.0%}, evenly taken,"
            console.print(f"on {what} of the held-out text ({event.score.bytes:,} bytes).")


BLIND = 8  # bits per byte of a guess that knows nothing
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def expected(forecast: Any, plan: Any) -> list[tuple[str, str]]:
    """What a run is thought to reach, for `facts`; and how long there is something to learn, if that is less."""
    if forecast is None:
        return [("expected", "too short a text to tell; more text would help most")]
    low, high = (forecast.bits_per_byte * (1 + sign * forecast.spread) for sign in (-1, 1))
    minutes = plan.seconds / 60 or plan.steps * plan.tokens_per_step / forecast.tokens_per_second / 60
    time = (
        plural(round(minutes, 1), "minute") if minutes > 2 else plural(max(1, round(60 * minutes)), "second")
    )
    reached = f"{low:.2f} to {high:.2f} bits per byte" if high < BLIND else "no better than a blind guess"
    rows = [
        (
            "expected",
            f"{reached}, text seen {forecast.epochs:,.1f} times at {forecast.tokens_per_second:,.0f} tokens/s"
            + ("" if plan.seconds else f", for about {time}")
            + f"; {size(forecast.bytes)} of memory",
        )
    ]
    if minutes > forecast.enough_minutes:
        enough = plural(round(forecast.enough_minutes, 1), "minute")
        rows.append(
            ("", f"this text holds about {enough} of learning for this model here; more text would help more")
        )
    return rows


def bits_per_byte(score: Any) -> str:
    """A score, as markup."""
    spread = "" if score.error is None else f" ± {score.error:.3f}"
    return f"[bold]{score.bits_per_byte:.3f}[/bold] bits per byte{spread}"


def documents(count: int, bytes_: int) -> str:
    return f"{plural(count, 'document')}, {bytes_:,} bytes"


def left_out(corpus: Any) -> list[tuple[str, str]]:
    """What of a text was not used, and why; nothing when all of it was."""
    parts = [f"{count} exact duplicates"] if (count := corpus.duplicates) else []
    parts += [f"{number} × {reason}" for reason, number in corpus.skipped.items()]
    rows = [("left out", ", ".join(parts))] if parts else []
    if corpus.characters_replaced:
        rows.append(
            ("replaced", f"{corpus.characters_replaced:,} characters that are not valid in the encoding")
        )
    return rows


# ---- measuring -----------------------------------------------------------------------------------


@contextlib.contextmanager
def measuring() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; gives the function that is told (what it is on, done, in all)."""
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    task = bar.add_task("", total=None)
    with bar:
        yield lambda on, done, total: bar.update(
            task, description=escape(printable(on)[-40:]), completed=done, total=total
        )


def evaluation(found: Any) -> None:
    """What was measured, on how much of it, then each figure with its error beside what guessing gives."""
    result = found.result

    def counted(word: str) -> str:
        if found.items_in_all is None:
            return f"the first {plural(found.items, word)}"
        part = f"{found.items:,} of " if found.items < found.items_in_all else ""
        return f"{part}{plural(found.items_in_all, word)}"

    if hasattr(result, "bits_per_byte"):
        what = f"{counted('document')}, {result.bytes:,} bytes"
        rows = [("bits per byte", result.bits_per_byte, result.error, "guessing 8")]
    else:
        what = counted("question")
        guessing = f"guessing {result.guessing:.3f}" if result.guessing else ""
        figures = {"acc": result.acc, "acc_norm": result.acc_norm, "perplexity": result.perplexity}
        rows = [
            (name, figure.value, figure.error, "" if name == "perplexity" else guessing)
            for name, figure in figures.items()
            if figure is not None
        ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for name, value, error, beside in rows:
        table.add_row(name, _figure(value), "" if error is None else f"± {_figure(error)}", beside)
    note(f"{found.on}: {what}")
    console.print(Padding(table, (0, 2)))


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


# ---- costs ---------------------------------------------------------------------------------------


def costs_table(cost: Any) -> Table:
    """What each component of a model costs: parameters, and FLOPs a token."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("", style="dim")
    for name in ("parameters", "FLOPs a token", "of training"):
        table.add_column(name, justify="right")
    n, forward, training = cost.parameters, cost.forward_flops, cost.training_flops
    rows = {
        "embedding": (n.embedding, 0, 0),
        "attention, matrices": (n.attention, forward.attention_matrices, training.attention_matrices),
        f"attention, {cost.context:,} scores": (0, forward.attention_scores, training.attention_scores),
        "feed-forward": (n.feed_forward, forward.feed_forward, training.feed_forward),
        "norms": (n.norms, 0, 0),
        "head": (n.head, forward.head, training.head),
    }
    for name, numbers in rows.items():
        table.add_row(name, *(count(number) if number else "" for number in numbers))
    table.add_row("all", count(n.total), count(forward.total), count(training.total), style="bold")
    return table


def memory_facts(cost: Any) -> list[tuple[str, str]]:
    """The bytes of training and of the cache, for `facts`."""
    rows = f"{cost.batch_size} row{'s' if cost.batch_size > 1 else ''} of {cost.context:,} tokens"
    t = cost.training_bytes
    return [
        ("to train", f"{size(t.total)} with {rows}, of which:"),
        ("", f"weights {size(t.weights)}, gradients {size(t.gradients)}"),
        ("", f"optimiser {size(t.optimizer)}, activations {size(t.activations)}"),
        ("to generate", f"{size(t.weights)} of weights and {size(cost.cache_bytes)} of cache, {rows}"),
    ]


# ---- errors --------------------------------------------------------------------------------------


def show_error(error: Any) -> None:
    """A coded error, on stderr: the code in colour, the words as they are."""
    head, _, rest = str(error).partition(": ")
    errors.print(
        Text(head + ": ", style="bold red" if sys.stderr.isatty() else ""),
        Text(printable(rest)),
        sep="",
        soft_wrap=True,
    )

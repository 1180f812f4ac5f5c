"""The command line: one verb a stage. It parses, calls, prints; the work is done elsewhere."""

import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from babyllama.errors import BabyLlamaError, MachineError, UsageError

INTRO = """Train a small Llama on your own text, and look at what it has learned.

[bold]Begin here[/bold]

  babyllama story                              learn fairy tales, tell one
  babyllama train notes/ --minutes 10          learn a file or folder of yours
  babyllama generate runs/notes "Dear diary"   write like it

Named texts can stand wherever a file can: fairy-tales, shakespeare, hub:NAME (a Hugging Face data set).
"""

OUTRO = (
    "Exit status: 0 well, 2 usage, 3 bad input, 4 disk, memory or network, 5 numbers, 130 or 143 stopped and saved. \
Add --debug to any command to see where an error comes from."
)

app = typer.Typer(
    help=INTRO,
    epilog=OUTRO,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def verb(panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose help is its docstring, each paragraph filled to the width of the terminal."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        parts = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(part.split()) for part in parts)
        return app.command(rich_help_panel=panel, help=text)(function)

    return add


ParseError: Any = typer.BadParameter.__base__  # of everything that is wrong with a command line

Out = Annotated[
    Path | None, typer.Option("--out", help="Folder to write. Default: runs/ and the name of the text.")
]
Vocabulary = Annotated[
    int | None, typer.Option("--vocab-size", help="Tokens to tell apart. Default: by size of text.")
]
Encoding = Annotated[str, typer.Option(help="How files are encoded.")]
BadText = Annotated[str, typer.Option(help="What to do where a file is not valid: error or replace.")]
Field = Annotated[str, typer.Option(help="The field that holds the text, in jsonl and parquet files.")]
Seed = Annotated[int, typer.Option(help="Another seed, another result; the same seed, the same.")]


# ---- story ---------------------------------------------------------------------------------------

STORY_RUN = Path("runs/fairy-tales")
STORY_BEGINNING = "There was once"
SENTENCE_END = re.compile(r"""[.!?]["')]*(?=\s)""")


@verb("Start")
def story(
    minutes: Annotated[float, typer.Option(help="Minutes of training, the first time.")] = 3.0,
    out: Annotated[Path, typer.Option("--out", help="Where the run is kept.")] = STORY_RUN,
    seed: Seed = 1,
) -> None:
    """Train a Llama on Andersen's fairy tales for three minutes, and let it tell one.

    The second time it only tells: another story with another --seed.
    """
    from babyllama import api
    from babyllama.checkpoint.run import RUN_JSON
    from babyllama.terminal import console

    if not (out / RUN_JSON).is_file():
        console.print("[bold]A Llama learns to tell fairy tales.[/bold]\n")
        _train_and_show(
            lambda tell, progress: api.train(
                "fairy-tales", out=out, minutes=minutes, tell=tell, progress=progress
            ),
            out,
        )
    elif not _finished(out):
        _train_and_show(lambda tell, progress: api.resume(out, tell=tell), out)
    llama = api.load(out)
    console.print(f"\n[bold]A story, told by {out}[/bold] (seed {seed})\n")
    _tell(llama, STORY_BEGINNING, seed)
    console.print(
        f"\n[dim]Another one:  babyllama story --seed {seed + 1}\n"
        f'Your own:     babyllama generate {out} "The little prince"[/dim]',
        soft_wrap=True,
    )


def _tell(llama: Any, beginning: str, seed: int) -> None:
    """Fill the context with a story, and tell it up to its last whole sentence."""
    from babyllama.terminal import say

    story = beginning + llama.generate(
        beginning, max_tokens=llama.config.max_seq_len, temperature=0.6, top_p=0.9, seed=seed
    )
    ends = [found.end() for found in SENTENCE_END.finditer(story)]
    say(story[: ends[-1]] if ends else story)


def _finished(out: Path) -> bool:
    from babyllama.checkpoint.run import Run

    return any(line.get("event") == "finished" for line in Run(out).metrics())


# ---- train ---------------------------------------------------------------------------------------


@verb("Start")
def train(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="A file, a folder, prepared data, or the name of a text."),
    ] = None,
    out: Out = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of wall clock to train. Default: 10.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, instead of minutes.")] = None,
    size: Annotated[str | None, typer.Option(help="Parameters, as 3M. Default: by text and time.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run, from its newest intact step.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="With --resume: go on from this saved step.")] = None,
    vocab_size: Vocabulary = None,
    seed: Seed = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps. Default: the best there is.")] = None,
    encoding: Encoding = "utf-8",
    on_bad_text: BadText = "error",
    field: Field = "text",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any number of the plan, as learning_rate=0.001. Repeatable."),
    ] = None,
) -> None:
    """Train a Llama on a text.

    [bold]babyllama train notes/ --minutes 10[/bold] reads every text file in notes/, keeps a part aside to measure
    itself on, trains a tokenizer and a Llama that suit the text and the time, and leaves both in runs/notes. Ctrl-C
    stops and saves; [bold]babyllama train --resume runs/notes[/bold] goes on.
    """
    from babyllama import api

    if resume is not None:
        given = {
            "TEXT": text,
            "--out": out,
            "--minutes": minutes,
            "--steps": steps,
            "--size": size,
            "--set": settings,
        }
        if extra := [name for name, value in given.items() if value]:
            fix = f"leave {' and '.join(extra)} out, or start a new run without --resume"
            raise UsageError(
                "E104",
                "--resume",
                f"a run goes on as it was started; {', '.join(extra)} would change it",
                fix,
            )
        _train_and_show(lambda tell, progress: api.resume(resume, step=step, tell=tell), resume)
        return
    if text is None:
        raise UsageError(
            "E103", "TEXT", "nothing to train on", "name a text:  babyllama train fairy-tales --minutes 3"
        )
    out = out or Path("runs") / _name_of(text)
    options = {"seed": seed, **_settings(settings or [])}
    _train_and_show(
        lambda tell, progress: api.train(
            text,
            out=out,
            minutes=minutes,
            steps=steps,
            size=size,
            device=device,
            vocab_size=vocab_size,
            field=field,
            encoding=encoding,
            on_bad_text=on_bad_text,
            tell=tell,
            progress=progress,
            **options,
        ),
        out,
    )


def _train_and_show(start: Any, out: Path) -> None:
    """Run `start(tell, progress)` on the screen; a run that a signal stopped ends the program with its status."""
    from babyllama.terminal import TrainingScreen, console, preparing

    with preparing() as progress, TrainingScreen() as screen:
        start(screen, progress)
    if screen.outcome.stopped_by is not None:
        console.print(
            f"\nStopped and saved at step {screen.outcome.step:,}.  Go on:  babyllama train --resume {out}"
        )
        raise SystemExit(128 + screen.outcome.stopped_by)
    console.print(f'Saved in {out}.  Try it:  babyllama generate {out} "..."', soft_wrap=True)


def _name_of(text: str) -> str:
    name = text.rstrip("/\\").replace("hub:", "").replace("\\", "/").rsplit("/", 1)[-1]
    return Path(name).stem or "text"


def _settings(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise UsageError(
                "E101",
                f"--set {pair}",
                "is not of the form NAME=VALUE",
                "write it as --set learning_rate=0.001",
            )
        settings[name.strip()] = value.strip()
    return settings


# ---- data ----------------------------------------------------------------------------------------


@verb("The parts")
def data(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A file, a folder or the name of a text.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    vocab_size: Vocabulary = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer instead of training one.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace prepared data that is there.")
    ] = False,
    encoding: Encoding = "utf-8",
    on_bad_text: BadText = "error",
    field: Field = "text",
) -> None:
    """Turn a text into ids on disk, once, for many runs.

    Documents are read, exact duplicates removed, one in twenty set aside for validation, a tokenizer trained on the
    rest, and everything written as ids. [bold]babyllama train OUT[/bold] takes it from there.
    """
    from babyllama.data.corpus import prepare
    from babyllama.terminal import console, facts, preparing
    from babyllama.text.tokenizer import Tokenizer

    chosen = None if tokenizer is None else Tokenizer.load(tokenizer)
    with preparing() as progress:
        corpus = prepare(
            text,
            out,
            vocab_size=vocab_size,
            tokenizer=chosen,
            field=field,
            encoding=encoding,
            on_bad_text=on_bad_text,
            overwrite=overwrite,
            progress=progress,
        )
    facts(
        [
            (
                "training",
                f"{corpus.train_documents:,} documents, {corpus.train_bytes:,} bytes, {len(corpus.train_ids):,} tokens",
            ),
            (
                "validation",
                f"{corpus.val_documents:,} documents, {corpus.val_bytes:,} bytes, {len(corpus.val_ids):,} tokens",
            ),
            (
                "vocabulary",
                f"{corpus.vocab_size:,} tokens, {corpus.train_bytes / len(corpus.train_ids):.2f} bytes each",
            ),
        ],
        str(out),
    )
    console.print(f"\nTrain on it:  babyllama train {out} --minutes 10", soft_wrap=True)


# ---- generate ------------------------------------------------------------------------------------


@verb("Start")
def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A run, a saved step, a Hugging Face folder or a llama2.c file."
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The beginning that is to be continued.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; above 1: bolder.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens only; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that make up this share.")] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said already gets less likely.")
    ] = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Seven ways of choosing tokens, side by side.")
    ] = False,
    step: Annotated[int | None, typer.Option(help="Of a run: this saved step instead of the best.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer, for a format that does not carry it.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print control characters as they are.")] = False,
) -> None:
    """Continue a prompt, as it is being thought of.

    [bold]babyllama generate runs/notes "Dear diary"[/bold]
    """
    from babyllama import api
    from babyllama.terminal import say

    llama = api.load(model, step=step, tokenizer=tokenizer)
    if strategies:
        _strategies(llama, prompt, max_tokens, seed)
        return
    write = (lambda text, end="": print(text, end=end, flush=True)) if raw else say
    pieces = llama.stream(
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    write(prompt, end="")
    for piece in pieces:
        write(piece, end="")
    write("", end="\n")


def _strategies(llama: Any, prompt: str, max_tokens: int, seed: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from babyllama.generate.sample import STRATEGIES
    from babyllama.terminal import console, printable

    table = Table(show_lines=True, title=Text(printable(prompt) or "(no prompt)"), title_justify="left")
    table.add_column("how", style="bold", no_wrap=True)
    table.add_column("what comes of it", ratio=1)
    for name, sampling in STRATEGIES.items():
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        text = llama.generate(prompt, max_tokens=min(max_tokens, 60), seed=seed, **options)
        table.add_row(name, Text(printable(text)))
    console.print(table)


# ---- info and doctor -----------------------------------------------------------------------------


@verb("The parts")
def info(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A run, a saved step, a folder, a llama2.c file or a config.json."
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens in a row; 0: the model's own context.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows at once, for the memory of training.")] = 1,
) -> None:
    """What a model is made of and what it costs: parameters, FLOPs, memory, and a drawing of its block."""
    from babyllama import api, costs
    from babyllama.terminal import console, costs_table, facts, memory_facts

    config = api.load_config(model)
    cost = costs.costs(config, batch_size, context)
    scaling = config.rope_scaling
    facts(
        [
            ("layers", f"{config.n_layers}, {config.dim} wide, feed-forward {config.hidden_dim} wide"),
            ("heads", f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values"),
            (
                "vocabulary",
                f"{config.vocab_size:,}, {'one table' if config.tie_embeddings else 'a table each'} in and out",
            ),
            (
                "context",
                f"{config.max_seq_len:,} tokens, rope_theta {config.rope_theta:g}"
                + (f", {scaling.kind} × {scaling.factor:g}" if scaling else ""),
            ),
        ],
        str(model),
    )
    console.print()
    console.print(costs_table(cost))
    console.print()
    facts(memory_facts(cost), "Memory")
    console.print()
    console.print(costs.block_drawing(config), markup=False)


@verb("The parts")
def doctor() -> None:
    """What this machine has, whether it computes rightly, and what would be used."""
    from babyllama import machine
    from babyllama.errors import NumericalError
    from babyllama.terminal import console, facts, size

    found = machine.look()
    rows = [
        ("system", f"{found.system}, Python {found.python}, torch {found.torch}"),
        ("processor", f"{found.cpu}: {found.cores} cores, {found.threads} threads"),
        ("bfloat16", ", ".join(found.bf16) or "no instructions for it"),
        (
            "memory",
            f"{size(found.memory_available or 0)} free of {size(found.memory_total or 0)}"
            if found.memory_total
            else "not known",
        ),
    ]
    rows += [(each.device, f"{each.name}, {size(each.memory or 0)}") for each in found.accelerators]
    facts(rows, "This machine")
    speed = machine.measure_precision("cpu")
    console.print()
    facts(
        [
            ("float32", f"{speed.float32 / 1e9:,.0f} GFLOP/s"),
            ("bfloat16", f"{speed.bfloat16 / 1e9:,.0f} GFLOP/s"),
        ],
        "Matrix products on the CPU",
    )
    console.print()
    checks = [machine.self_check(device) for device in ["cpu", *(each.device for each in found.accelerators)]]
    facts(
        [("passed" if check.passed else "FAILED", f"{check} in {check.seconds:.1f} s") for check in checks],
        "Self-check",
    )
    device = machine.best_device()
    console.print(
        f"\nTraining would use [bold]{device}[/bold], products in [bold]{machine.best_precision(device)}[/bold]."
    )
    for check in checks:
        if not check.passed:
            raise NumericalError("E503", check.device, str(check), "train on the CPU:  --device cpu")


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit status; every error a person can meet is one with a code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [each for each in given if each != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    try:
        sys.exit(typer.main.get_command(app).main(given, prog_name="babyllama", standalone_mode=False) or 0)
    except BabyLlamaError as error:
        if debug:
            raise
        sys.exit(_fail(error))
    except ParseError as error:
        path = getattr(error.ctx, "command_path", "babyllama")
        sys.exit(_fail(UsageError("E101", path, error.format_message(), f"see:  {path} --help")))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + 13)
    except OSError as error:
        if debug:
            raise
        where = str(error.filename or "the system")
        sys.exit(
            _fail(
                MachineError(
                    "E403", where, error.strerror or str(error), "check the path and its permissions"
                )
            )
        )


def _fail(error: BabyLlamaError) -> int:
    from babyllama.terminal import show_error

    show_error(error)
    return error.exit_status

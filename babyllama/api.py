"""The surface in Python: train a Llama on a text, load any model, ask it for text or for numbers.

import babyllama

run = babyllama.train("fairy-tales", minutes=3, out="runs/tales")
llama = babyllama.load("runs/tales")
print(llama.generate("Once upon a time", max_tokens=200, temperature=0.8, top_p=0.95, seed=1))
"""

import contextlib
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babyllama import machine
from babyllama.checkpoint.contents import check_ids, plain
from babyllama.checkpoint.export import FORMATS, bare
from babyllama.checkpoint.export import export as write_export
from babyllama.checkpoint.hf import build, read_config
from babyllama.checkpoint.open import FIX, open_llama
from babyllama.checkpoint.pull import MODELS, place_of
from babyllama.checkpoint.pull import pull as pull
from babyllama.checkpoint.run import RUN_JSON, Run, locked
from babyllama.checkpoint.verify import Verdict
from babyllama.checkpoint.verify import verify as verify_export
from babyllama.data import library
from babyllama.data.corpus import Corpus, prepare, whole_text
from babyllama.data.documents import Reading
from babyllama.data.questions import SETS, questions
from babyllama.errors import InputError, MachineError, NumericalError, UsageError
from babyllama.generate.engine import Generation, Token, complete, generate
from babyllama.generate.sample import Sampling
from babyllama.measure.choices import Marks, ask
from babyllama.model import Config, Llama
from babyllama.text.chat import ChatTemplate, Messages
from babyllama.text.stream import TextStream
from babyllama.text.tokenizer import Tokenizer
from babyllama.train import law, loop
from babyllama.train.evaluate import Score, score
from babyllama.train.recipe import (
    Forecast,
    Plan,
    Text,
    check,
    forecast,
    plan,
    plan_from_json,
    plan_to_json,
)

DATA = "data"  # the folder of a run in which its prepared text stands
LIBRARIES = 190 * 2**20  # bytes of numba, its kernels and torch.optim, which the first step loads; measured
SAMPLE_TOKENS = 48  # that a model goes on with at each evaluation, from some words of the held-out text
STORY_TOKENS = 256  # of a story, its beginning included


@dataclass(frozen=True)
class Planned:
    """Told once, before the first step."""

    plan: Plan
    corpus: Corpus
    forecast: (
        Forecast | None
    )  # None: the text is too short to be judged; on a CPU, bytes of the whole process


# ---- training ------------------------------------------------------------------------------------


def train(
    text: str | Path,
    *,
    out: str | Path,
    minutes: int | float | None = None,
    steps: int | None = None,
    tokens: int | str | None = None,
    size: int | str | None = None,
    device: str | None = None,
    seed: int = 1,
    vocab_size: int | None = None,
    field: str = "text",
    encoding: str = "utf-8",
    on_bad_text: str = "error",
    tell: Callable[[Any], None] = lambda event: None,
    progress: Callable[[str, int, int], None] | None = None,
    began: float | None = None,
    **settings: Any,
) -> Run:
    """Train a Llama on `text` and return its run folder.

    text      a file, a folder, a named text ("fairy-tales", "shakespeare", "hub:NAME") or a folder of prepared data.
    minutes   of wall clock; or `steps`; or steps until so many `tokens` were seen, as "20M"; none of them: 10 minutes.
    size      parameters wished for, as "3M", or a shape, as "288x6x6"; None: chosen for this text and this time.
    field, encoding, on_bad_text  how files are read, see data/documents.py; with vocab_size, not for prepared data.
    tell      hears of everything that happens: Planned, then the events of train/loop.py, an Outcome last.
    began     time.perf_counter() of when the minutes began; None: now.
    settings  most fields of recipe.Plan, for example dropout=0.1: docs/training.md.

    Raises the coded errors of babyllama.errors. Whatever they are, what was saved before stays.
    """
    began = time.perf_counter() if began is None else began
    out = Path(out)
    check(settings, minutes=minutes, steps=steps, tokens=tokens, size=size, device=device)
    if not (out / RUN_JSON).exists():
        Run.refuse_taken(out)  # before a lock is left in a folder that is none of ours
    with locked(out):
        Run.refuse_taken(out)
        if Corpus.stands_in(Path(text)):
            if vocab_size is not None:
                found = "was prepared with a vocabulary of its own"
                raise UsageError("E103", "--vocab-size", found, "leave it out, or train on the text itself")
            corpus, places = Corpus.open(text), [os.path.relpath(text, out), str(Path(text).resolve())]
        else:
            corpus = prepare(
                text,
                out / DATA,
                vocab_size=vocab_size,
                field=field,
                encoding=encoding,
                on_bad_text=on_bad_text,
                overwrite=True,
                progress=progress,
            )
            places = [DATA]
        speed = machine.measure_precision(device or machine.best_device())
        chosen = plan(
            vocab_size=corpus.vocab_size,
            text_bytes=corpus.train_bytes,
            train_tokens=len(corpus.train_ids),
            minutes=minutes,
            steps=steps,
            tokens=tokens,
            size=size,
            device=device,
            seed=seed,
            settings=settings,
            speed=speed,
            used=time.perf_counter() - began,
        )
        check_device(chosen.device)
        facts = {
            "text": str(text),
            "data": places,
            "fingerprint": corpus.fingerprint,
            "plan": plan_to_json(chosen),
            "torch": torch.__version__,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        told = Planned(chosen, corpus, _forecast(chosen, corpus, speed, time.perf_counter() - began))
        run = Run.create(out, facts)
        _train(run, told, None, tell, time.perf_counter() - began)
    return run


def resume(
    path: str | Path, *, step: int | None = None, tell: Callable[[Any], None] = lambda event: None
) -> Run:
    """Go on with the run at `path` from its newest intact saved step, or from `step`.

    A run of so many steps on a CPU ends with the same bits as one that was never stopped.

    Raises InputError E201 (not a run), E207 (no intact step), E307 (its data was changed), and those of train.
    """
    Run(Path(path))  # before a lock file is left in a folder that is none of ours
    with locked(Path(path)):
        run = Run(Path(path))
        chosen = plan_from_json(run.settings["plan"])
        corpus = _corpus_of(run)
        if chosen.device != "cpu" and not machine.has_device(chosen.device):
            there = machine.best_device()
            compiles = chosen.compile and there.startswith("cuda")
            chosen = replace(chosen, device=there, precision="float32", compile=compiles)
        check_device(chosen.device)
        speed = machine.measure_precision(chosen.device)
        _train(run, Planned(chosen, corpus, _forecast(chosen, corpus, speed)), step, tell)
    return run


def _corpus_of(run: Run) -> Corpus:
    places = [run.path / place for place in run.settings["data"]]  # an absolute path stays what it is
    data = next((place for place in places if Corpus.stands_in(place)), places[0])
    corpus = Corpus.open(data)
    if corpus.fingerprint != run.settings["fingerprint"]:
        fix = "restore the data, or start a new run"
        raise InputError("E307", str(data), "is not the data that this run was started with", fix)
    return corpus


def _train(
    run: Run, planned: Planned, step: int | None, tell: Callable[[Any], None], used: float = 0.0
) -> None:
    tell(planned)
    chosen, corpus = planned.plan, planned.corpus
    words = corpus.words_held_out()
    room = chosen.context - 1 - len(corpus.tokenizer.encode(words))
    prompt, room = (words, room) if room > 0 else ("", chosen.context - 1)

    def sample(model: Llama) -> str:
        writer = LoadedLlama(chosen.model, corpus.tokenizer, model)
        more = writer.generate(prompt, max_tokens=min(SAMPLE_TOKENS, room), temperature=0.8, top_p=0.95)
        return prompt + more

    tell(loop.train(run, chosen, corpus, step=step, tell=tell, sample=sample, used=used))


def _forecast(chosen: Plan, corpus: Corpus, speed: machine.Precision, used: float = 0.0) -> Forecast | None:
    if min(len(corpus.train_ids), len(corpus.val_ids)) < 64:
        return None
    text = Text(corpus.train_bytes, len(corpus.train_ids))
    hard = law.hardness(corpus.train_ids, corpus.val_ids, corpus.tokenizer.byte_lengths())
    told = forecast(chosen, text, hard, speed, used)
    if chosen.device != "cpu":
        return told
    libraries = 0 if "babyllama.train.cpu" in sys.modules else LIBRARIES
    return replace(told, bytes=told.bytes + libraries + (loop.held_memory() or 0))


def check_device(device: str) -> None:
    """Raises NumericalError E503 when a GPU computes wrong numbers. The CPU is what it is compared with."""
    if device == "cpu":
        return
    check = machine.self_check(device)
    if not check.passed:
        raise NumericalError("E503", device, str(check), "compute on the CPU:  --device cpu")


# ---- models --------------------------------------------------------------------------------------


def load(path: str | Path, *, step: int | None = None, tokenizer: str | Path | None = None) -> "LoadedLlama":
    """Open a model: a run (its best step, or `step`), a saved step, or a folder or file of any format that is read:
    Hugging Face, Meta, GGUF, llama2.c.

    tokenizer  a tokenizer file, where the format does not carry one (llama2.c), or in place of its own.

    Raises InputError E201 when nothing at `path` is a model; E202, E203, E205, E209 to E212 when one is broken.
    """
    found = find(path, step)
    try:
        return _open(found, tokenizer)
    except InputError:
        if found.exists():
            raise
    return _open(find(path, step), tokenizer)  # a run that is being trained has just replaced its best step


def _open(path: Path, tokenizer: str | Path | None) -> "LoadedLlama":
    model = open_llama(path)
    chosen = model.tokenizer() if tokenizer is None else Tokenizer.load(tokenizer)
    return LoadedLlama(model.config, chosen, weights=model.weights)


def load_config(path: str | Path) -> Config:
    """The sizes of the model at `path`, which may also be a config.json. Raises what `load` does."""
    if Path(path).suffix == ".json" and Path(path).is_file():
        return read_config(Path(path))
    return open_llama(find(path)).config


def find(path: str | Path, step: int | None = None) -> Path:
    """Where the model at `path` lies: of a run, its best step, or `step`; of a name, where `pull` put it.

    Raises InputError E201 when nothing is there.
    """
    name, path = str(path), Path(path)
    try:
        if (path / RUN_JSON).is_file():
            run = Run(path)
            return run.checked(run.best() if step is None else step)
        if path.exists():
            return path
    except OSError as error:  # longer than a name can be, in a folder that nobody may look into
        raise InputError("E201", plain(name), f"cannot be looked at ({error.strerror})", FIX) from None
    if (name in MODELS or name.startswith("hub:")) and (kept := place_of(name)).is_dir():
        return kept
    if name in MODELS or name.startswith("hub:"):
        raise InputError("E201", name, "is not here yet", f"fetch it first:  babyllama pull {name}")
    raise InputError("E201", name, "does not exist", FIX)


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what came of reading it again; None: that was not wanted."""

    paths: list[Path]
    config: Config
    verdict: Verdict | None


def export(
    path: str | Path,
    *,
    to: str,
    out: str | Path | None = None,
    kind: str | None = None,
    shards: int = 1,
    version: int = 0,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    with_tokenizer: bool = True,
    verify: bool = True,
) -> Exported:
    """Write the model at `path` as another runtime reads it, and read it again to see that it computes the same.

    to              gguf (llama.cpp, Ollama and what is built on them), llama2c, meta, or hf (a Hugging Face folder).
    out             file or folder to write; None: here, named after the model.
    kind            of the numbers of a GGUF: f32, f16, bf16, q8_0, q4_0; None: f16.
    shards          of Meta's folder: files to cut the matrices into.
    version         of llama2.c's format: 0, 1, or 2, which keeps a byte for each number.
    with_tokenizer  False: llama2c without the file of the tokenizer, whose format holds few.

    Raises what `load` does; UsageError E101 to E105; MachineError E401, E403; NumericalError E504: read again, it does
    not compute the same.
    """
    if kind is not None and to != "gguf" and to in FORMATS:
        raise UsageError("E103", "--type", f"is of a GGUF, and {to} has one kind of numbers", "leave it out")
    for option, given, of in (("--shards", shards != 1, "meta"), ("--version", version != 0, "llama2c")):
        if given and to != of and to in FORMATS:
            raise UsageError("E103", option, f"is of {of}, and has no meaning for {to}", "leave it out")
    kind = kind or ("f16" if to == "gguf" else "f32")
    found = find(path, step)
    model = open_llama(found)
    wanted = with_tokenizer or to != "llama2c"
    chosen = (model.tokenizer() if tokenizer is None else Tokenizer.load(tokenizer)) if wanted else None
    if out is None:
        name = bare(Path(path).resolve().name) + {"gguf": f"-{kind}", "meta": "-meta", "hf": "-hf"}.get(
            to, ""
        )
        out = Path(name + FORMATS.get(to, ""))
    paths = write_export(
        model.config, model.weights, chosen, Path(out), to=to, kind=kind, shards=shards, version=version
    )
    verdict = None
    if verify:
        told = "q8_0" if to == "llama2c" and version == 2 else kind
        verdict = verify_export(model.config, model.weights, chosen, paths[0], to=to, kind=told)
    return Exported(paths, model.config, verdict)


class Answer(Iterator[str]):
    """A text piece by piece, as it is being thought of: whole characters only, and nothing of a stop string.

    prompt_tokens  it was given; `tokens`: it has said so far, without the one that ended it.
    left_out       older messages that the context had no room for.
    ended          whether the model itself came to an end: not before the last piece, and not when room or leave did.
    """

    def __init__(
        self, tokens: Iterator[Token], text: TextStream, prompt_tokens: int, left_out: int = 0
    ) -> None:
        self.prompt_tokens, self.left_out = prompt_tokens, left_out
        self.tokens, self.ended = 0, False
        self._pieces = self._read(tokens, text)

    def __next__(self) -> str:
        return next(self._pieces)

    def _read(self, tokens: Iterator[Token], text: TextStream) -> Iterator[str]:
        for token in tokens:
            self.tokens += 1
            if piece := text.push(token.id):
                yield piece
            if text.stopped:
                break
        self.ended = text.stopped or (isinstance(tokens, Generation) and tokens.reasons == ["stop"])
        if piece := text.flush():
            yield piece


class LoadedLlama:
    """A model with its tokenizer. `config`, `tokenizer` and `model` are what they are called."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        model: Llama | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._model, self._weights = model, weights
        check_ids(tokenizer.vocab_size, config)

    @cached_property
    def model(self) -> Llama:
        """The torch module, built when first asked for."""
        return self._model if self._model is not None else build(self.config, self._weights or {})

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: the text, after one BOS where the tokenizer says so, as those trained here do."""
        return self.tokenizer.prompt(text)

    def generate(self, prompt: str, **options: Any) -> str:
        """The text that follows `prompt`; see `stream` for the options."""
        return "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """The same piece by piece: whole characters only, and nothing of a stop string.

        Ends after max_tokens, at an end token, at a string of `stop`, or at the end of the context.

        Raises UsageError E102 (a value out of range), InputError E311 (prompt too long), NumericalError E502.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return self._answer(self.encode(prompt), max_tokens, sampling, self.tokenizer.eos_ids, stop)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How this model is talked to; `plain` where it has no template. Raises InputError E312."""
        return ChatTemplate(self.tokenizer)

    def chat(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """The answer to a conversation: a list of {"role": "system", "user" or "assistant", "content": text}.

        max_tokens  of the answer; None: a quarter of the context. The oldest messages are left out (`Answer.left_out`
                    says how many) where there would not be room for so many, or for a quarter.

        Ends at every end token that generation_config.json names, and at what the template puts behind an answer. A
        model without a template goes on with the text of the last message. The rest is as for `stream`.

        Raises what `stream` does, and the errors of ChatTemplate.prompt.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        context = self.config.max_seq_len
        quarter = max(1, context // 4)
        most = quarter if max_tokens is None else max_tokens
        ids, left_out = self.chat_template.fit(messages, context - min(most, quarter))
        if len(ids) >= context:
            found = f"prompt {len(ids)} tokens, context {context}, which leaves no room for an answer"
            raise InputError("E311", "the last message", found, "shorten it, or the system message")
        return self._answer(ids, most, sampling, self.chat_template.stop_ids, stop, left_out)

    def _answer(
        self,
        ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        stop: str | Sequence[str],
        left_out: int = 0,
    ) -> Answer:
        """What the model adds to ids. What is out of range is refused now, not when the first piece is asked for."""
        text = TextStream(self.tokenizer, stop)
        tokens = generate(
            self.model,
            [ids],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )
        return Answer(tokens, text, len(ids), left_out)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (T, V): after each of the T ids, the logits of the next one. Raises InputError E309, E311."""
        if not 0 < len(ids) <= self.config.max_seq_len:
            found = f"has {len(ids)} tokens, the context holds 1 to {self.config.max_seq_len}"
            raise InputError("E311", "the sequence", found, "give a shorter one")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise InputError(
                "E309",
                "the sequence",
                f"holds an id outside 0 .. {self.config.vocab_size - 1}",
                "use this model's tokenizer",
            )
        return self.model(torch.tensor([list(ids)]))[0].float().numpy()

    def bits_per_byte(self, text: str) -> float:
        """How many bits this model needs for each byte of `text`; lower is better, 8 is what a blind guess needs."""
        ids, lengths = np.asarray(self.tokenizer.encode(text, bos=True)), self.tokenizer.byte_lengths
        after_bos = self.tokenizer.bos_id, lengths(self.tokenizer.bos_id)
        return score(self.model, ids, lengths(), self.config.max_seq_len, after_bos=after_bos).bits_per_byte


def write_story(llama: LoadedLlama, beginning: str, seed: int = 0) -> str:
    """`beginning` and what follows it, STORY_TOKENS in all if the story does not end before. Where the context is full,
    its latter half is what the model goes on from, with random numbers of its own: these are counted from the start of
    a prompt."""
    tokenizer, context = llama.tokenizer, llama.config.max_seq_len
    ids = llama.encode(beginning)
    given = len(ids)
    while len(ids) < STORY_TOKENS:
        (more,) = complete(
            llama.model,
            [ids if len(ids) < context else ids[-max(1, context // 2) :]],
            max_tokens=STORY_TOKENS - len(ids),
            sampling=Sampling(temperature=0.6, top_p=0.9, seed=seed),
            stop_ids=tokenizer.eos_ids,
            vocab_size=tokenizer.vocab_size,
            streams=[len(ids) - given],
        )
        ids = ids + more.ids
        if more.reason == "stop" or not more.ids:
            break
    return beginning + tokenizer.decode(ids[given:])


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a model made of the first `items` of `items_in_all`: documents of a text, or questions of a set.

    `items_in_all` is None of a text that was read no further.
    """

    on: str
    items: int
    items_in_all: int | None
    result: Score | Marks


def evaluate(
    model: "str | Path | LoadedLlama",
    on: Sequence[str | Path] = (),
    *,
    limit: int | None = None,
    device: str | None = None,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    field: str = "text",
    encoding: str = "utf-8",
    on_bad_text: str = "error",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Evaluation]:
    """Measure a model: bits per byte of texts, marks of sets of questions, each with its error bar.

    model     what `load` opens, with `step` and `tokenizer`; or what it returned.
    on        texts (a file, a folder, a named text, or prepared data, of which what is held out) and names of
              data.questions.SETS. None: all of the text that a run holds out.
    limit     only the first so many documents or questions of each.
    device    "cpu", "cuda" or "mps", on which the model lies while it is measured. None: the best there is; for what
              `load` returned, where it lies.
    progress  is told (what it is on, done, in all).

    Raises UsageError E101 (no such device), E102, E103; what `load` and data.corpus.prepare raise; InputError E308
    (neither a text nor a set), E309 (data prepared with another tokenizer); MachineError E404 (memory of the device),
    E405, E407 (the package of questions); NumericalError E502, E503 (a device that computes wrong numbers).
    """
    if limit is not None and limit < 1:
        raise UsageError("E102", "--limit", f"{limit}, expected 1 or more", "leave it out to measure on all")
    if device is not None:
        machine.require_device(device)
    reading = Reading(field=field, encoding=encoding, on_bad_text=on_bad_text)
    for each in on:
        _check_known(each)
    held_out = None
    if not on:
        if isinstance(model, LoadedLlama) or not (Path(model) / RUN_JSON).is_file():
            found = "nothing to measure on, and no run, which has a text held out"
            raise UsageError("E103", "--on", found, "name a text or a set:  --on hellaswag")
        held_out = _corpus_of(Run(Path(model)))
    llama = model if isinstance(model, LoadedLlama) else load(model, step=step, tokenizer=tokenizer)
    if not isinstance(model, LoadedLlama):
        device = device or machine.best_device()
    with _lying_on(device, llama.model):
        if held_out is not None:
            return [_evaluate_corpus(llama, held_out, f"text held out of {model}", limit, progress)]
        return [_evaluate_on(llama, each, limit, reading, progress) for each in on]


@contextlib.contextmanager
def _lying_on(device: str | None, model: Llama) -> Iterator[None]:
    """The model on that device, and afterwards where it was; None: it stays there."""
    before = model.tok_embeddings.weight.device
    if device is not None:
        check_device(device)
    try:
        model.to(device or before)
        yield
    except torch.OutOfMemoryError as error:
        fix = "measure on the CPU:  --device cpu"
        raise MachineError("E404", str(device or before), str(error)[:200], fix) from error
    finally:
        model.to(before)


def _evaluate_on(
    llama: LoadedLlama,
    on: str | Path,
    limit: int | None,
    reading: Reading,
    progress: Callable[[str, int, int], None] | None,
) -> Evaluation:
    if isinstance(on, str) and on in SETS:
        asked = questions(on, limit)
        marks = ask(llama.model, llama.tokenizer, asked, _named(progress, on))
        return Evaluation(on, len(asked), SETS[on].questions, marks)
    if Corpus.stands_in(Path(on)):
        return _evaluate_corpus(llama, Corpus.open(on), f"text held out of {on}", limit, progress)
    ids, documents = whole_text(on, llama.tokenizer, reading, limit)
    scored = _bits_per_byte(llama, ids, _named(progress, str(on)))
    return Evaluation(str(on), documents, None if documents == limit else documents, scored)


def _check_known(on: str | Path) -> None:
    """Raises InputError E308 for what is neither a text nor a set, UsageError E103 for the name of a set and a file."""
    if isinstance(on, str) and on in SETS and Path(on).exists():
        fix = f"give the one that lies here by its path:  ./{on}"
        raise UsageError("E103", on, "is the name of a set of questions, and of a file or folder here", fix)
    names = [*library.NAMES, *SETS]
    if str(on) not in names and not str(on).startswith("hub:") and not os.path.lexists(on):
        nearest = difflib.get_close_matches(str(on), names, n=1, cutoff=0.0)[0]
        found = f"no such file, folder, text or set; there are {', '.join(names)} and hub:NAME"
        raise InputError("E308", str(on), found, f"give a path, or the nearest name:  {nearest}")


def _evaluate_corpus(
    llama: LoadedLlama,
    corpus: Corpus,
    on: str,
    limit: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Evaluation:
    """On what a corpus holds out: whole documents from its beginning."""
    if corpus.tokenizer.sha256 != llama.tokenizer.sha256:
        found = "was prepared with another tokenizer than the model's"
        raise InputError("E309", str(corpus.folder), found, "give the text itself")
    ids, documents = np.asarray(corpus.val_ids), corpus.val_documents
    if limit is not None and limit < documents:
        marks = 2 if corpus.tokenizer.bos_id == corpus.tokenizer.eos_id else 1  # of a document
        ids = ids[: np.flatnonzero(ids == corpus.tokenizer.eos_id)[limit * marks - 1] + 1]
        documents = limit
    return Evaluation(on, documents, corpus.val_documents, _bits_per_byte(llama, ids, _named(progress, on)))


def _bits_per_byte(llama: LoadedLlama, ids: np.ndarray, progress: Callable[[int, int], None]) -> Score:
    context, lengths, bos = llama.config.max_seq_len, llama.tokenizer.byte_lengths, llama.tokenizer.bos_id
    device = str(llama.model.tok_embeddings.weight.device)
    done, total = 0, math.ceil((len(ids) - 1) / max(1, context // 2))

    def logits(tokens: Tensor) -> Tensor:
        nonlocal done
        progress(done, total)
        done += len(tokens)
        return llama.model(tokens)

    found = score(logits, ids, lengths(), context, device=device, after_bos=(bos, lengths(bos)))
    progress(total, total)
    if not math.isfinite(found.bits_per_byte):
        what = f"bits per byte are {found.bits_per_byte}"
        raise NumericalError("E502", "the model", what, "check the weights that it was loaded from")
    return found


def _named(progress: Callable[[str, int, int], None] | None, on: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(on, done, total) if progress is not None else None

"""The one training loop.

Everything random or ordered is a function of (seed, step): the first weights, which rows a step sees, what dropout
leaves out. So the state of a run is its weights as they are trained, the optimiser's memory, the average of the
weights, the number of the step, the seconds used and the count of skipped steps; a run that was stopped and resumed
ends with the same bits as one that was not (same machine, CPU, a run of so many steps).
"""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from babyllama.checkpoint.folder import replace_file
from babyllama.checkpoint.hf import model_files, read_model
from babyllama.checkpoint.run import METRICS, Run
from babyllama.data.batches import IGNORE, Batches, refuse_shorter
from babyllama.data.corpus import Corpus
from babyllama.errors import BabyLlamaError, InputError, MachineError, NumericalError
from babyllama.model import Llama, tap_names
from babyllama.train.evaluate import Score, score
from babyllama.train.optim import Average, Optimizer
from babyllama.train.recipe import COMPILE_SECONDS, EVALUATION_TOKENS, Plan
from babyllama.train.step import PlainStep, Step, folded, loss_sum, products

OPTIMIZER = "optim.safetensors"
PROCESS_STATUS = Path("/proc/self/status")
RECORDS = 200  # steps that metrics.jsonl tells of, evenly over a run
TRAINED = "tok_embeddings.weight.trained"  # as the optimiser has it, where the model's file has it folded
LAST_SHARE = 0.02  # of a time budget, at most, for the score of the last weights
LAST_TOKENS = 0.05  # of what a run of steps learned from, for that; never fewer than a large evaluation has
MOST_RESERVED = 0.25  # of a time budget, for all that comes after the last step
SKIPS = 3  # steps in a row that are not finite; that many end the run

# ---- what the loop tells ------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    step: int  # 0, or the saved step from which the run goes on
    passed_over: tuple[BabyLlamaError, ...] = ()  # what was wrong with newer steps


@dataclass(frozen=True)
class Compiling:
    """torch.compile begins, which takes a minute or so."""


@dataclass(frozen=True)
class NotCompiled:
    """torch.compile was asked for, and the step runs without it."""

    why: str


@dataclass(frozen=True)
class Stepped:
    step: int
    progress: float  # 0 to 1
    loss: float  # nats per token, of this step's batch
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens_per_second: float  # over the last seconds
    seconds: float  # of wall clock used so far
    seconds_left: float
    memory: int | None  # bytes, the most this process has held


@dataclass(frozen=True)
class Skipped:
    """A step whose loss or gradient was not finite. It changed no weight; the rows of the next step are others."""

    step: int
    loss: float  # this and the next may be finite, but not both
    gradient_norm: float
    began: str  # where the first value that is not finite stood, as "layers.1.feed_forward.up"
    in_a_row: int  # skipped steps up to this one


@dataclass(frozen=True)
class Evaluated:
    step: int
    score: Score
    sample: str | None
    best: bool  # no earlier evaluation was as good


@dataclass(frozen=True)
class Saved:
    step: int
    folder: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or stopped by a signal with everything saved."""

    step: int
    score: Score | None  # in float32, over all of the validation text or a part; None when stopped
    stopped_by: int | None  # signal number


Event = Started | Compiling | NotCompiled | Stepped | Skipped | Evaluated | Saved
Tell = Callable[[Event], None]


# ---- the loop -----------------------------------------------------------------------------------


def train(
    run: Run,
    plan: Plan,
    corpus: Corpus,
    *,
    step: int | None = None,
    tell: Tell = lambda event: None,
    sample: Callable[[Llama], str] | None = None,
    used: float = 0.0,
) -> Outcome:
    """Train until the plan's steps or seconds are used, from the newest intact saved step, or from `step`, or from new.

    `tell` hears of every step; `sample` writes a text with the model at each evaluation; `used` seconds of a new run's
    budget are gone already. The caller holds the lock.

    Raises InputError E207 (no saved step is intact; or E2xx for the `step` asked for), E204 or E205 (a step that was
    saved is read back otherwise), E307 (the prepared text has become shorter), NumericalError E501 (SKIPS steps in a
    row, or the weights themselves, are not finite; what was saved stays), MachineError E401, E403 (cannot save, or not
    read what was saved), E404 (memory).
    """
    threads, training = torch.get_num_threads(), None
    torch.set_num_threads(plan.threads)
    try:
        training = _Training(run, plan, corpus, tell, sample, used)
        with _signals() as caught:
            training.run_from(step, caught)
        if caught:
            return Outcome(training.step, None, caught[0])
        try:
            return training.finish()
        except KeyboardInterrupt:  # everything is saved; resumed, it is scored again
            return Outcome(training.step, None, signal.SIGINT)
    except (RuntimeError, MemoryError) as error:
        if "allocate" in str(error) or isinstance(error, MemoryError | torch.OutOfMemoryError):
            where, found = f"step with {plan.batch_size} rows of {plan.context} tokens", str(error)[:200]
            if training is not None and training.complete:
                where = "the last score"
                fix = f"the run is complete and saved; measure it elsewhere:  babyllama eval {run.path}"
            elif plan.batch_size > 1:
                split = f"--set batch_size={plan.batch_size // 2} --set accumulation={plan.accumulation * 2}"
                fix = f"start a new run, in another --out, with fewer rows at once:  {split}"
            else:
                shorter = f"--set context={max(1, plan.context // 2)}"
                fix = f"start a new run, in another --out, with shorter rows:  {shorter}"
            raise MachineError("E404", where, found or "more memory than there is", fix) from error
        raise
    finally:
        torch.set_num_threads(threads)


class _Training:
    def __init__(
        self,
        run: Run,
        plan: Plan,
        corpus: Corpus,
        tell: Tell,
        sample: Callable[[Llama], str] | None,
        used: float = 0.0,
    ) -> None:
        self.run, self.plan, self.corpus, self.tell, self.sample = run, plan, corpus, tell, sample
        self.batches = Batches(corpus.train_ids, plan.context, plan.batch_size * plan.accumulation, plan.seed)
        self.byte_lengths = corpus.tokenizer.byte_lengths()
        self.after_bos = corpus.tokenizer.bos_id, corpus.tokenizer.byte_lengths(corpus.tokenizer.bos_id)
        self.clock = time.perf_counter()  # when `seconds` was last brought up to date
        self.step, self.seconds, self.best_bits = 0, used, math.inf
        self.used = used  # of the seconds, before the first step: at the start, and at each resume
        self.done = False  # trained to the end, and the better of the last weights and their average kept
        self.complete = False  # that, and saved
        self.last_tokens: int | None = None  # scored of the last weights; None: all there are
        self.last_seconds = 0.0  # that this takes
        self.scoring_seconds = 0.0  # that the newest evaluation took to score the weights
        self.reserved = 0.0  # seconds of the budget for what comes after the last step
        self.skipped, self.skipped_in_a_row = 0, 0
        self.evaluated: Score | None = None  # at this very step

    # ---- state ---------------------------------------------------------------------------------

    def restore(self, wanted: int | None) -> None:
        passed_over: list[InputError] = []
        if wanted is None and self.run.steps():
            wanted, passed_over = self.run.newest_intact()
        elif wanted is not None:
            self.run.checked(wanted)
        if wanted is None:
            self._take(Llama(self.plan.model, seed=self.plan.seed))
        else:
            self._load(wanted)
        self._keep_metrics(lambda line: line.get("step", 0) <= self.step)  # later steps will be told again
        self.tell(Started(self.step, tuple(passed_over)))
        for problem in passed_over:
            self._record(
                event="passed over",
                step=self.step,
                code=problem.code,
                where=problem.where,
                found=problem.found,
            )

    def _load(self, step: int) -> None:
        folder, state = self.run.folder(step), self.run.state(step)
        config, weights = read_model(folder)
        if config != self.plan.model:
            raise InputError(
                "E203",
                str(folder),
                "holds a model of another shape than run.json",
                "restore the run folder from a copy",
            )
        model = Llama(config, seed=None)
        model.load_state_dict(weights, strict=True)
        self._take(model)
        try:
            self._set_tensors(load_safetensors((folder / OPTIMIZER).read_bytes()))
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.reserved, self.done = float(state.get("reserved", 0.0)), bool(state["done"])
            self.used = float(state.get("used", 0.0))  # not in states of earlier versions
            self.skipped = int(state.get("skipped", 0))  # not in states of earlier versions
            self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
            self.best_bits = float(
                state["best_bits_per_byte"] if state["best_bits_per_byte"] is not None else math.inf
            )
        except (KeyError, TypeError, ValueError) as error:
            fix = f"resume from an older step:  babyllama train --resume {self.run.path} --step N"
            raise InputError(
                "E206", str(folder), f"lacks a part of the training state ({error})", fix
            ) from None

    def _take(self, model: Llama) -> None:
        """Train this model from now on."""
        self.model = model.to(self.plan.device)
        self.differentiate = _step(self.model, self.plan)
        self.optimizer = Optimizer(self.model, self.plan)
        self.average = Average(self.model, self.plan) if self.plan.average else None

    def _tensors(self) -> dict[str, Tensor]:
        """What a step needs besides the model as it is saved."""
        tensors = self.optimizer.tensors()
        if self.plan.embedding_norm:
            tensors[TRAINED] = self.model.tok_embeddings.weight.detach()
        return tensors | (self.average.tensors() if self.average is not None else {})

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError when one is missing."""
        self.optimizer.load(tensors)
        if self.plan.embedding_norm:
            self.model.tok_embeddings.weight.data.copy_(tensors[TRAINED])
        if self.average is not None:
            self.average.load(tensors)

    def save(self) -> None:
        """Save this step. Raises NumericalError E501, and writes nothing, when a tensor of it is not finite."""
        self._refuse_not_finite()
        self._tick()
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "used": self.used,
            "reserved": self.reserved,
            "done": self.done,
            "bits_per_byte": self.evaluated.bits_per_byte if self.evaluated else None,
            "best_bits_per_byte": self.best_bits if math.isfinite(self.best_bits) else None,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        with folded(self.model, self.plan) as plain:
            files = model_files(self.plan.model, plain.state_dict(), self.corpus.tokenizer)
        files[OPTIMIZER] = save_safetensors(
            {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        )
        self.tell(Saved(self.step, str(self.run.save(self.step, files, state))))

    # ---- time ----------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps, or of its seconds but for those before the first step, here and
        at each resume, and after the last."""
        if self.plan.steps:
            return self.step / self.plan.steps
        whole = self.plan.seconds - self.reserved - self.used
        return (self.seconds - self.used) / whole if whole > 0 else 1.0

    def seconds_left(self, rate: float) -> float:
        if self.plan.steps:
            return (self.plan.steps - self.step) * self.plan.tokens_per_step / rate if rate else math.inf
        return max(0.0, self.plan.seconds - self.seconds)

    def _tick(self) -> float:
        """Bring `seconds` up to date. Returns the time."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return now

    def _reserve(self) -> None:
        """Decide how many tokens the last weights are scored on, and how many seconds are kept for that and for the
        evaluation before it."""
        if self.plan.steps:
            trained = self.plan.steps * self.plan.tokens_per_step
            affordable = max(self.plan.evaluation_tokens, EVALUATION_TOKENS[1], int(LAST_TOKENS * trained))
            self.last_tokens = affordable if affordable < len(self.corpus.val_ids) else None
            return
        some = min(max(2 * self.plan.context, 4096), len(self.corpus.val_ids))
        self._score(self._in_float32, some)  # warms up
        began = time.perf_counter()
        scored = self._score(self._in_float32, some)
        rate = scored.tokens / max(1e-9, time.perf_counter() - began)
        affordable = int(LAST_SHARE * self.plan.seconds * rate)
        affordable = max(2 * self.plan.context, affordable)
        self.last_tokens = affordable if affordable < len(self.corpus.val_ids) else None
        self.last_seconds = min(self.last_tokens or math.inf, len(self.corpus.val_ids)) / rate
        guessed = min(self.plan.evaluation_tokens, len(self.corpus.val_ids)) / rate
        self._keep(guessed * (1 if self.average is None else 2))  # a guess, and the least that is kept

    def _keep(self, seconds: float) -> None:
        """Reserve what the last score takes, and `seconds` for the evaluation and the save before it."""
        if self.plan.seconds:
            needed = max(self.reserved, self.last_seconds + seconds)  # never less: progress does not go back
            self.reserved = min(needed, MOST_RESERVED * self.plan.seconds)

    # ---- running -------------------------------------------------------------------------------

    def run_from(self, wanted: int | None, caught: list[int]) -> None:
        """Train to the end, or until a signal is caught; either way everything is saved then."""
        self.restore(wanted)
        began, reached = self.seconds, self.progress
        if not self.done and not caught:
            self._warm_up()
        self._reserve()
        self._tick()
        self.used += self.seconds - began  # no progress
        recent = [(time.perf_counter(), self.step)]
        last_save, saved = time.perf_counter(), self.step
        save_due, evaluation_due = False, self._due(reached, self.plan.evaluations)
        while not self.done and not caught:
            # Where the time ended in a save one more step is taken, so that there is one to be judged as the last.
            before = min(self.progress, 0.5 if self.step == 0 else 1.0)
            loss, norm = self.take_step(before)
            self.step += 1
            self.evaluated = None
            now = self._tick()
            recent = [*recent[-50:], (now, self.step)]
            speed = (
                (recent[-1][1] - recent[0][1])
                * self.plan.tokens_per_step
                / max(1e-9, recent[-1][0] - recent[0][0])
            )
            left = self.seconds_left(speed)
            if not self.skipped_in_a_row:
                if self.average is not None:
                    self.average.update(self.model, min(1.0, self.progress))
                done, memory, rate = min(1.0, self.progress), peak_memory(), self.optimizer.rate(before)
                stepped = Stepped(self.step, done, loss, norm, rate, speed, self.seconds, left, memory)
                self.tell(stepped)
                if self._due(before, RECORDS):
                    self._record(event="step", **asdict(stepped))
            evaluation_due |= self._due(before, self.plan.evaluations)
            if self.plan.save_every:
                save_due |= self.step % self.plan.save_every == 0
            else:
                save_due |= now - last_save > self.plan.save_seconds
            if self.skipped_in_a_row and self.progress < 1:
                continue  # what is due waits for a good step, so that bad ones push no good save out
            if evaluation_due:
                self.evaluate()
            if save_due or evaluation_due:
                self.save()
                last_save, saved = time.perf_counter(), self.step
                if evaluation_due:  # the last one scores the average too
                    self._keep(last_save - now + (self.scoring_seconds if self.average is not None else 0.0))
                save_due = evaluation_due = False
        # What a signal stopped is saved; not step 0, which a new start would make.
        if not self.done and self.step not in (0, saved):
            self.save()
        self.complete = self.done

    def _due(self, before: float, times: int) -> bool:
        """Whether one of `times` even marks lies between the progress `before` this step and now; the end is one."""
        return self.progress >= 1 or math.floor(before * times) != math.floor(self.progress * times)

    def take_step(self, progress: float) -> tuple[float, float]:
        """One update. Returns the loss in nats per target token and the norm of the gradient before clipping.

        If one of these is not finite, nothing is updated: the step is skipped.

        The gradient is that of the mean over all target tokens of the step, however they are spread over batches: each
        batch's sum is divided by the number of all of them, since a mean of means would weigh short batches more.
        """
        tokens, targets = self._batch()
        counted = int((targets != IGNORE).sum())
        parts = zip(tokens.chunk(self.plan.accumulation), targets.chunk(self.plan.accumulation), strict=True)
        loss = sum(
            self.differentiate(some, wanted, counted, self.step, part)
            for part, (some, wanted) in enumerate(parts)
        )
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(loss) and bool(norm.isfinite()):
            if self.plan.clip and norm > self.plan.clip:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.plan.clip, norm)
            self.optimizer.step(progress)
            self.skipped_in_a_row = 0
        else:
            self._skip(loss, float(norm), tokens, targets)
        return loss, float(norm)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets of the next step, on the device."""
        tokens, targets = map(torch.from_numpy, self.batches.batch(self.step))
        return tokens.to(self.plan.device), targets.to(self.plan.device)

    def _warm_up(self) -> None:
        """Differentiate a batch and forget it, so that what is compiled at first use takes none of the run's progress.

        Where torch.compile fails, for which there are as many reasons as machines, the step runs without it; also where
        a resumed run has no time for it.
        """
        compiles, left = self.plan.compile, self.plan.seconds - self.seconds
        if compiles and self.plan.seconds and self.step and left < COMPILE_SECONDS:
            self._without_compiling("too little time is left")
            compiles = False
        if not compiles and left <= 0:  # a run of so many steps, or of no time at all
            return
        tokens, targets = (each.chunk(self.plan.accumulation)[0] for each in self._batch())
        if compiles:
            self.tell(Compiling())
        try:
            self.differentiate(tokens, targets, targets.numel(), self.step)
        except Exception as error:
            if not compiles or isinstance(error, torch.OutOfMemoryError):
                raise
            self._without_compiling(_reason(error), str(error)[:4000])
            self.differentiate(tokens, targets, targets.numel(), self.step)

    def _without_compiling(self, why: str, problem: str = "") -> None:
        self._record(event="not compiled", step=self.step, problem=problem or why)
        self.tell(NotCompiled(why))
        self.differentiate = _step(self.model, replace(self.plan, compile=False))

    def evaluate(self) -> None:
        self._refuse_not_finite()
        began = self.clock
        scored = self._score(self.differentiate.logits, self.plan.evaluation_tokens)
        self.scoring_seconds = self._tick() - began
        last = self.progress >= 1
        if self.average is not None and last:
            scored = self._better_of_average(scored)
        self.done = last
        best, self.best_bits = (
            scored.bits_per_byte < self.best_bits,
            min(self.best_bits, scored.bits_per_byte),
        )
        self.evaluated = scored
        with folded(self.model, self.plan) as plain:
            text = self.sample(plain) if self.sample is not None else None
        self._record(event="evaluation", step=self.step, seconds=self.seconds, sample=text, **asdict(scored))
        self.tell(Evaluated(self.step, scored, text, best))

    def finish(self) -> Outcome:
        """Score the last weights in float32: on all of the validation text, or a part that takes little of the run."""
        whole = self._score(self._in_float32, self.last_tokens)
        self._tick()
        told = {"event": "finished", "step": self.step, "seconds": self.seconds, **asdict(whole)}
        self._keep_metrics(lambda line: line.get("event") != "finished", told)  # not also of an earlier time
        return Outcome(self.step, whole, None)

    @torch.no_grad()
    def _better_of_average(self, last: Score) -> Score:
        """Keep the average of the weights if it predicts better than the last of them, and the better score."""
        assert self.average is not None
        weights = dict(self.model.named_parameters())
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, mean in self.average.weights().items():
            weights[name].copy_(mean)
        averaged = self._score(self.differentiate.logits, self.plan.evaluation_tokens)
        if averaged.bits_per_byte < last.bits_per_byte:
            return averaged
        for name, weight in before.items():
            weights[name].copy_(weight)
        return last

    def _in_float32(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) in float32, by the faster of two ways where that is one of them."""
        return self.differentiate.logits(tokens) if self.plan.precision == "float32" else self.model(tokens)

    def _score(self, logits: Callable[[Tensor], Tensor], max_tokens: int | None) -> Score:
        """Raises InputError E307 when the file of the validation text has become shorter."""
        refuse_shorter(self.corpus.val_ids)
        ids = np.asarray(self.corpus.val_ids)
        with folded(self.model, self.plan):
            scored = score(
                logits,
                ids,
                self.byte_lengths,
                self.plan.context,
                max_tokens,
                self.plan.device,
                self.after_bos,
                self.differentiate.rows_at_once,
            )
        if not math.isfinite(scored.bits_per_byte):
            raise self._not_finite(f"bits per byte on validation are {scored.bits_per_byte}")
        return scored

    # ---- numbers that are none -----------------------------------------------------------------

    def _skip(self, loss: float, norm: float, tokens: Tensor, targets: Tensor) -> None:
        """Count the step under way as skipped, and keep its rows. Raises NumericalError E501 after SKIPS in a row."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        began = self._began(tokens, targets)
        skipped = Skipped(self.step + 1, loss, norm, began, self.skipped_in_a_row)
        self._record(event="skipped", **asdict(skipped) | {"loss": str(loss), "gradient_norm": str(norm)})
        about = {**asdict(skipped), "batch": self.step, "seed": self.plan.seed}
        rows = save_safetensors(
            {"tokens": tokens.cpu(), "targets": targets.cpu()},
            {key: str(value) for key, value in about.items()},
        )
        with suppress(MachineError, OSError):  # a report that cannot be written is no reason to stop training
            self.run.keep_skipped(skipped.step, rows)
        self.tell(skipped)
        if self.skipped_in_a_row >= SKIPS:
            found = (
                f"the last {SKIPS} steps are not finite (loss {loss}, gradient {norm}), beginning at {began}"
            )
            raise self._not_finite(found, skipped.step)

    @torch.no_grad()
    def _began(self, tokens: Tensor, targets: Tensor) -> str:
        """Where the first value that is not finite stands: forward through the model, then back through gradients."""
        names, firsts = tap_names(self.plan.model), []

        def look(name: str, value: Tensor) -> Tensor:
            if not name.endswith("masked_scores") and not value.isfinite().all():  # those are -inf on purpose
                found.append(name)
            return value

        losses_are_finite = True
        with folded(self.model, self.plan) as plain:
            for row, wanted in zip(tokens.split(1), targets.split(1), strict=True):
                found: list[str] = []
                losses_are_finite &= bool(loss_sum(products(plain, row, self.plan, look), wanted).isfinite())
                firsts += found[:1]
        if firsts:
            return min(firsts, key=names.index)
        if not losses_are_finite:
            return "the loss"
        for name, weight in reversed(list(self.model.named_parameters())):
            if weight.grad is not None and not weight.grad.isfinite().all():
                return f"the gradient of {name}"
        return "nothing that happens again"

    def _refuse_not_finite(self) -> None:
        """Raises NumericalError E501 when a weight, or what the optimiser remembers of it, is not finite."""
        for name, tensor in [*self.model.state_dict().items(), *self._tensors().items()]:
            if not tensor.isfinite().all():
                raise self._not_finite(f"{name} is not finite, so this step is not saved")

    def _not_finite(self, found: str, step: int | None = None) -> NumericalError:
        names = ("learning_rate", "embedding_rate", "head_rate", "gain_rate")
        lower = (f"--set {name}={value / 4:.2g}" for name in names if (value := getattr(self.plan, name)))
        fix = f"start a new run with lower learning rates:  {' '.join(lower)}"
        return NumericalError("E501", f"step {self.step if step is None else step}", found, fix)

    # ---- small things --------------------------------------------------------------------------

    def _record(self, **values: Any) -> None:
        """A line for metrics.jsonl. A report that cannot be written is no reason to stop training."""
        with suppress(OSError):
            self.run.record(**values)

    def _keep_metrics(self, wanted: Callable[[dict[str, Any]], bool], *new: dict[str, Any]) -> None:
        """Remove the other lines of metrics.jsonl, and those that were damaged, and add the new ones, all at once."""
        path = self.run.path / METRICS
        with suppress(OSError, MachineError):  # as _record
            told = self.run.metrics()
            kept = [line for line in told if isinstance(line.get("step", 0), int) and wanted(line)]
            if new or (path.exists() and len(kept) < len(path.read_bytes().splitlines())):
                replace_file(path, "".join(json.dumps(line) + "\n" for line in [*kept, *new]).encode())


def _step(model: Llama, plan: Plan) -> Step:
    """What differentiates this model on this device."""
    if plan.device != "cpu" or plan.compile:
        return PlainStep(model, plan)
    from babyllama.train.cpu import CPUStep  # which loads numba

    return CPUStep(model, plan)


def _reason(error: BaseException) -> str:
    """In a line, why torch.compile failed: its errors stand one inside the other, and begin with headings."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)


def held_memory() -> int | None:
    """Bytes that this process holds now; where the system does not say that in Linux's way, peak_memory."""
    return _process_status("VmRSS") or peak_memory()


def peak_memory() -> int | None:
    """Bytes, the most this process has held; None on Windows, which does not tell in this way."""
    if bytes_ := _process_status("VmHWM"):  # on Linux; its ru_maxrss counts what started this program, too
        return bytes_
    try:
        import resource
    except ImportError:
        return None
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _process_status(entry: str) -> int | None:
    """Bytes, from what Linux tells of this process."""
    try:
        return 1024 * int(PROCESS_STATUS.read_text(encoding="utf-8").split(f"{entry}:")[1].split()[0])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list into which the first SIGINT, SIGTERM or SIGHUP puts itself; a second acts as it would without us."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.getsignal(number) for number in numbers}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

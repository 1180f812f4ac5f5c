"""This text, this machine, these minutes -> every other number of a training run.

The rules are few and each stands beside its number; nearly all can be overridden, and the plan is stored with the run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from babyllama import costs, machine
from babyllama.errors import InputError, MachineError, UsageError
from babyllama.model import Config, RopeScaling
from babyllama.train import law

# (dim, n_layers, n_heads): heads of 32 numbers while small, 64 later; 32 to 64 of width for each layer
SHAPES = (
    (64, 2, 2),
    (96, 3, 3),
    (128, 4, 4),
    (160, 4, 5),
    (192, 5, 6),
    (256, 6, 4),
    (320, 6, 5),
    (384, 8, 6),
    (512, 8, 8),
    (768, 12, 12),
    (1024, 16, 16),
)
# The longest that the width allows, and of which the text fills sixteen rows
CONTEXTS = (256, 128, 64, 32, 16)
LONG_ROWS = 192  # width of a model, below which rows of 128 tokens teach it more in the same time
PARAMETERS_PER_BYTE = 16  # of training text, at most; more only learns it by heart
TOKENS_PER_PARAMETER = 0.36  # that a run is expected to see at least: a larger model is no better by then
STEPS = 1200  # that a run takes, as long as they do not become too small or too large
FEWEST_STEPS = 600  # as few as this are right if each is then large enough for Muon
MUON_STEP = 6  # tokens of a step for each of the width, aimed at for Muon's sake; four fifths of it will do
AVERAGE = 0.02  # of a run: what is so much older counts half in the average of the weights
LARGEST_STEP = 8  # tokens of a step for each of the width: more steps learn more than larger ones
HEAD_RATES = 0.0017, 0.007  # least and most of the output matrix beside Muon: the most divided by the passes
BY_HEART = 10  # passes over the text times parameters for each of its bytes, from which on dropout helps
COMPILE_SECONDS = 540  # of a run on a CUDA GPU, from which on torch.compile is worth the minute that it takes
ENOUGH = 0.005  # of the bits per byte: a gain that is not worth twice the time
EVALUATING = 0.02  # of a run's work, all evaluations together, which decides how many tokens each scores
EVALUATION_TOKENS = 2048, 16384  # as few and as many as are right for one
EVALUATION_ROWS = 8  # of the context's length, that an evaluation has at least
OVERHEAD = 0.05  # of a run's seconds: evaluations, samples, saves
MEMORY_SHARE = 0.8  # of the free memory that training may plan to use


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a run, apart from its text. Exactly one of `steps` and `seconds` is above 0."""

    model: Config
    context: int  # tokens a row
    batch_size: int  # rows at once
    accumulation: int = 1  # batches whose gradients are added up for one step
    steps: int = 0
    seconds: float = 0.0  # of wall clock, evaluations and saves included
    optimizer: Literal["adamw", "muon"] = "adamw"  # of the matrices; everything else has AdamW
    learning_rate: float = 0.004  # of the matrices, at its peak
    embedding_rate: float = 0.0  # of the token table, at its peak; 0: as learning_rate, with AdamW alone
    head_rate: float = 0.0  # of the output matrix, if it is one of its own; 0: as above
    gain_rate: float = 0.0  # of the norms; 0: as above
    schedule: Literal["linear", "wsd", "cosine"] = "linear"  # of all rates, after the warm-up: optim.schedule
    warmup: float = 0.05  # share of the run
    decay: float = 0.6  # share of the run, its last, over which wsd goes down
    final: float = 0.0  # share of their peak at which all rates end
    beta1: float = 0.9
    beta2: float = 0.98
    momentum: float = 0.95  # of Muon, by Nesterov
    # These two are what runs had before there was a choice, for their run.json does not name them
    muon_polynomials: int = 5  # of its orthogonalisation, 3 to 5: fewer are faster, and less exact
    muon_by_head: bool = False  # Muon works on each attention head's part of a matrix by itself
    normuon: bool = False  # Muon, with rows made equally long over time
    weight_decay: float = 0.1  # of matrices, times their rate; never of gains or of the vocabulary's
    weight_decay_falls: bool = False  # along the schedule, besides the rate that it is multiplied with
    cautious: bool = False  # only entries decay that their update, too, brings nearer to 0
    average: float = 0.0  # half-life of the mean of the weights, as share of the run; 0: none is kept
    dropout: float = 0.0  # share of the numbers that are left out
    embedding_norm: bool = False  # normalise the token vectors; of untied models only
    clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    seed: int = 1
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; everything else is float32
    threads: int = 1
    compile: bool = False  # PyTorch's own step, by torch.compile; on a CPU instead of the one written out
    evaluations: int = 8  # during the run, evenly, each with a sample of text and a save
    evaluation_tokens: int = 16384  # scored at each of them; at the end all, or as loop.py decides
    save_every: int = 0  # steps between saves besides; 0: every `save_seconds`
    save_seconds: float = 300.0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.seconds > 0):
            raise UsageError("E103", "steps, seconds", "exactly one of them ends a run", "give one of them")
        for name in (
            "context",
            "batch_size",
            "accumulation",
            "learning_rate",
            "threads",
            "evaluation_tokens",
        ):
            self._require(name, 0 < getattr(self, name) < math.inf, "must be above 0")
        for name in (
            "steps",
            "seconds",
            "embedding_rate",
            "head_rate",
            "gain_rate",
            "weight_decay",
            "average",
            "clip",
            "evaluations",
            "save_every",
            "save_seconds",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "must be 0 or above")
        self._require("batch_size", self.batch_size < 2**31, "must be below 2^31")
        self._require("seed", 0 <= self.seed < 2**63, "must be from 0 to 2^63 - 1")
        self._require("average", self.average <= 1, "must be at most 1")
        for name in ("warmup", "beta1", "beta2", "momentum", "dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")
        self._require("muon_polynomials", 3 <= self.muon_polynomials <= 5, "must be 3, 4 or 5")
        self._require("decay", 0 < self.decay <= 1, "must be above 0 and at most 1")
        self._require("final", 0 <= self.final <= 1, "must be from 0 to 1")
        if self.embedding_norm and self.model.tie_embeddings:
            found = "the head of this model is its token table, and only tokens are normalised"
            raise UsageError("E103", "embedding_norm", found, "leave it out, or train an untied model")
        if self.normuon and self.optimizer != "muon":
            raise UsageError("E103", "normuon", "is a part of Muon", "set optimizer=muon too")
        own = ["embedding_rate", "gain_rate", *([] if self.model.tie_embeddings else ["head_rate"])]
        if self.optimizer == "muon" and (missing := [name for name in own if not getattr(self, name)]):
            found = "not given, and Muon's learning_rate fits nothing but matrices"
            raise UsageError("E103", ", ".join(missing), found, "give each a rate, as head_rate=0.005")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError("E102", name, f"{name} ({getattr(self, name)}) {rule}", f"choose another {name}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.context


ASKED_FOR_OTHERWISE = {"model", "steps", "seconds", "seed", "device"}
SETTINGS = {one.name: one.type for one in fields(Plan) if one.name not in ASKED_FOR_OTHERWISE}


def plan(
    *,
    vocab_size: int,
    text_bytes: int,
    train_tokens: int,
    minutes: int | float | None = None,
    steps: int | None = None,
    tokens: int | str | None = None,
    size: int | str | None = None,
    device: str | None = None,
    seed: int = 1,
    settings: dict[str, Any] | None = None,
    speed: machine.Precision | None = None,
    used: float = 0.0,
) -> Plan:
    """The plan for a text of `text_bytes` and `train_tokens` on this machine.

    minutes   of wall clock, or so many `steps`, or steps until so many `tokens` were seen, as "20M". None: 10 minutes.
    size      parameters wished for, as "3M" or "15m", and the nearest of SHAPES is taken; or width, layers and heads,
              as "288x6x6". None: chosen by text and time.
    settings  fields of Plan that override what is chosen here.
    speed     of the device, where it was measured already.
    used      seconds of the minutes that are gone.

    Raises UsageError E101 (unknown setting), E102, E103; InputError E303 (less text than one row); MachineError E404
    (more than fits in memory).
    """
    settings = check(settings or {}, minutes=minutes, steps=steps, tokens=tokens, size=size, device=device)
    if steps is not None:
        until = Until(steps=steps)
    elif tokens is not None:
        until = Until(tokens=parse_count("--tokens", tokens))
    else:
        until = Until(seconds=60.0 * (10 if minutes is None else minutes))
    device = device or machine.best_device()
    speed = speed or machine.measure_precision(device)
    precision = settings.pop("precision", speed.best)
    threads = int(settings.get("threads", machine.physical_cores()))
    peak = _peak(device, precision, threads, speed)
    common = {"seed": seed, "device": device, "precision": precision, "threads": threads}
    text = Text(text_bytes, train_tokens)
    wished = None if size is None else parse_size(size)

    def plan_for(dim: int, n_layers: int, n_heads: int) -> Plan:
        context = settings.get("context", context_for(dim, train_tokens))
        if train_tokens < context + 1:
            found = f"has {train_tokens} tokens to learn from, a row needs {context + 1}"
            fix = f"give more text, or shorter rows:  --set context={max(1, train_tokens // 4)}"
            raise InputError("E303", "the text", found, fix)
        model = Config(
            vocab_size=vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=context
        )
        return _for_model(model, text, until, peak, used, {"context": context, **common, **settings})

    plans = [plan_for(*shape) for shape in ((wished,) if isinstance(wished, tuple) else SHAPES)]
    if isinstance(wished, tuple):
        chosen = plans[0]
    elif wished is not None:
        chosen = min(plans, key=lambda one: abs(math.log(costs.parameters(one.model).total / wished)))
    else:
        fitting = [
            one
            for one in plans
            if costs.parameters(one.model).total <= PARAMETERS_PER_BYTE * text_bytes
            and _tokens(one, peak, used) >= TOKENS_PER_PARAMETER * costs.parameters(one.model).total
            and not any(_too_much(one))
        ]
        chosen = fitting[-1] if fitting else plans[0]
    _check_memory(chosen)
    return chosen


def context_for(dim: int, train_tokens: int) -> int:
    """Tokens of a row."""
    longest = CONTEXTS[0] if dim >= LONG_ROWS else CONTEXTS[1]
    fitting = (one for one in CONTEXTS if one <= longest and train_tokens >= 16 * one)
    return next(fitting, CONTEXTS[-1])


@dataclass(frozen=True)
class Until:
    """What ends a run; one of them is above 0."""

    seconds: float = 0.0
    steps: int = 0
    tokens: float = 0.0


@dataclass(frozen=True)
class Text:
    """What of a text decides a plan."""

    bytes: int  # to learn from
    tokens: int


def _for_model(
    model: Config,
    text: Text,
    until: Until,
    peak: float,
    used: float,
    settings: dict[str, Any],
) -> Plan:
    """The plan for a model of this size.

    What the numbers rest on stands in docs/log.md, 2026-11-30, if no other day is named. "Each default taken back by
    itself" (two tables): Muon and the norm after the embedding win, dropout loses, linear beats cosine; cautious decay
    and weight decay win in one of them or on one text; warm-up, average and clip make no difference. "Dropout hurts
    long before it helps". "Shorter rows for narrow models". 2026-11-24, "weight decay was twice too strong": its
    largest. 2026-12-01, "Muon was a third of a step": heads by themselves, three polynomials, Muon's rate, the tokens
    for each parameter, one seed each; "the output matrix learned too fast": its rate, and that of the token table. The
    rate of the norms, the size of a step and the growth of weight decay with the passes were chosen in runs that are
    not in the log.
    """
    context, width = settings["context"], model.dim
    steps, seconds, device = until.steps, until.seconds, settings["device"]
    tokens_per_step = 2048.0
    if not steps:
        seen = until.tokens
        if not seen:  # without Muon, which takes time of its own
            bare = Plan(model=model, context=context, batch_size=1, threads=1, seconds=seconds, device=device)
            seen = _tokens(bare, peak, used)
        largest = LARGEST_STEP * width if device == "cpu" else 2**16
        least = max(512, min(MUON_STEP * width, seen / FEWEST_STEPS))
        tokens_per_step = min(max(seen / STEPS, least), largest)
    # Threads share the rows evenly, where time ends the run; so many steps, or tokens, are the same on every machine
    each = settings["threads"] if device == "cpu" and seconds else 1
    rows = min(max(1, round(tokens_per_step / context / each)) * each, max(1, text.tokens // context))
    chosen: dict[str, Any] = {"batch_size": rows, "embedding_norm": True, "average": AVERAGE}
    asked = {"accumulation": 1, **chosen, **settings}
    step = asked["batch_size"] * asked["accumulation"] * context  # tokens, of rows that were rounded
    enough = step >= MUON_STEP * width * 4 / 5  # a division comes last: exact where it can be
    if until.tokens:
        steps = math.ceil(until.tokens / step)
    # Half of the law fitted for the OLMo models, 0.0047 · (N / 108M)^(-1/3), and at most 0.004: for all below 22M
    rate = min(0.0047 * (costs.parameters(model).total / 108e6) ** (-1 / 3) / 2, 0.004)
    if settings.get("optimizer", "muon" if enough or settings.get("normuon") else "adamw") == "muon":
        chosen |= {
            "optimizer": "muon",
            "muon_polynomials": 3,
            "muon_by_head": True,
            "learning_rate": 0.02,
            "embedding_rate": round(0.1 * (128 / width) ** 0.5, 4) if asked["embedding_norm"] else rate,
            "head_rate": HEAD_RATES[1],  # until the passes are known, below
            "gain_rate": 0.006,
            "beta1": 0.8,
            "cautious": True,
            "clip": 0.0,
        }
    else:
        chosen |= {"learning_rate": rate, "embedding_rate": 0.02 if asked["embedding_norm"] else rate}
    plan = Plan(model=model, seconds=seconds, steps=steps, **{**chosen, **settings})
    epochs = _epochs(plan, text, peak, used)
    # A token is scored in windows that overlap by half, forward only: two thirds of the work of one that is learned
    scored = 1.5 * EVALUATING * _tokens(plan, peak, used) / max(1, plan.evaluations)
    fewest, most = EVALUATION_TOKENS
    again = math.log2(max(1.0, epochs))  # how often the passes were doubled
    by_heart = math.log2(max(1.0, epochs * multiplied(model) / text.bytes / BY_HEART))
    lowest, highest = HEAD_RATES
    care: dict[str, Any] = {
        "dropout": round(min(0.3, 0.17 * by_heart), 2),
        "weight_decay": round(min(0.5, 0.1 + 0.45 * again), 2),
        "compile": plan.device.startswith("cuda") and _seconds(plan, peak, used) >= COMPILE_SECONDS,
        "evaluation_tokens": int(max(min(max(scored, fewest), most), EVALUATION_ROWS * context)),
    }
    if plan.optimizer == "muon":
        care["head_rate"] = round(max(lowest, highest / max(1.0, epochs)), 4)
    return replace(plan, **{name: value for name, value in care.items() if name not in settings})


def tokens_per_second(plan: Plan, peak: float) -> float:
    """Expected of a training step where a bare matrix product reaches `peak` FLOP/s.

    The wider the model, the nearer a step comes to a bare product; the formula goes through three measured widths.
    """
    share = 0.3
    if plan.device == "cpu":
        share = 0.9 * plan.model.dim / (plan.model.dim + 102)
        rounds = math.ceil(plan.batch_size / plan.threads)  # in the last, some threads may have no row
        share *= plan.batch_size / (rounds * plan.threads)
    tokens = plan.tokens_per_step
    seconds = tokens * costs.training_flops(plan.model, plan.context).total / (share * peak)
    if plan.optimizer == "muon":
        seconds += _muon_flops(plan) / (0.4 * peak)
    return tokens / seconds


def _muon_flops(plan: Plan) -> float:
    """Of one step: polynomials, each two products of a matrix with its Gram matrix and one of that with itself."""
    model = plan.model
    heads = model.n_heads, model.n_heads, model.n_kv_heads, model.n_kv_heads
    if plan.muon_by_head:
        shapes = [(model.head_dim, model.dim)] * sum(heads)
    else:
        shapes = [(number * model.head_dim, model.dim) for number in heads]
    shapes += [(model.hidden_dim, model.dim)] * 3
    each = (4 * min(a, b) ** 2 * max(a, b) + 2 * min(a, b) ** 3 for a, b in shapes)
    return float(plan.muon_polynomials * model.n_layers * sum(each))


@dataclass(frozen=True)
class Forecast:
    """What a plan is expected to reach, before it starts."""

    tokens_per_second: float
    epochs: float
    bits_per_byte: float
    spread: float  # two of three runs end within this share of it
    bytes: int  # of memory
    enough_minutes: float  # after which twice the time would bring less than ENOUGH


def forecast(
    plan: Plan, text: Text, hardness: float, speed: machine.Precision | None = None, used: float = 0.0
) -> Forecast:
    """What the plan will reach on a text of this `hardness` (law.hardness)."""
    numbers = law.read()[0]
    speed = speed or machine.measure_precision(plan.device)
    peak = _peak(plan.device, plan.precision, plan.threads, speed)
    return Forecast(
        tokens_per_second=tokens_per_second(plan, peak),
        epochs=_epochs(plan, text, peak, used),
        bits_per_byte=hardness * _bits(plan, text, peak, used, numbers),
        spread=numbers.spread,
        bytes=memory(plan)[plan.device],
        enough_minutes=_enough(plan, text, peak, numbers),
    )


def _enough(plan: Plan, text: Text, peak: float, numbers: law.Law) -> float:
    """Minutes of this model on this text after which as many again would bring less than ENOUGH."""
    minute = 60 * tokens_per_second(plan, peak) / text.tokens  # in epochs
    parameters, minutes = multiplied(plan.model), 0.25
    while minutes < 2**20:
        now, then = (numbers.bits(1.0, parameters, text.bytes, n * minutes * minute) for n in (1, 2))
        if then > now * (1 - ENOUGH):
            break
        minutes *= 2
    return minutes


def multiplied(model: Config) -> int:
    """Parameters that are multiplied with: all but the table that tokens are looked up in."""
    return costs.parameters(model).total - (0 if model.tie_embeddings else model.vocab_size * model.dim)


def _peak(device: str, precision: str, threads: int, speed: machine.Precision) -> float:
    """FLOP/s of bare products with these threads."""
    peak = (speed.bfloat16 or speed.float32) if precision == "bfloat16" else speed.float32
    return peak * min(1.0, threads / machine.physical_cores()) if device == "cpu" else peak


def _seconds(plan: Plan, peak: float, used: float) -> float:
    """That the run will take from now on."""
    if plan.seconds:
        return plan.seconds - used
    return plan.steps * plan.tokens_per_step / tokens_per_second(plan, peak)


def _tokens(plan: Plan, peak: float, used: float) -> float:
    """That the run will have seen at its end."""
    if plan.steps:
        return float(plan.steps * plan.tokens_per_step)
    left = max(0.0, plan.seconds * (1 - OVERHEAD) - used)
    # One step is taken in any case
    return max(float(plan.tokens_per_step), left * tokens_per_second(plan, peak))


def _epochs(plan: Plan, text: Text, peak: float, used: float) -> float:
    return _tokens(plan, peak, used) / text.tokens


def _bits(plan: Plan, text: Text, peak: float, used: float, numbers: law.Law) -> float:
    """As a share of the text's hardness."""
    return numbers.bits(1.0, multiplied(plan.model), text.bytes, _epochs(plan, text, peak, used))


def check(
    settings: dict[str, Any],
    *,
    minutes: int | float | None = None,
    steps: int | None = None,
    tokens: int | str | None = None,
    size: int | str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """The settings as numbers; whatever is wrong with a request is said here, before any text is read.

    Raises UsageError E101 (unknown setting or device), E102 (out of range), E103 (two ends).
    """
    ends = {"--minutes": minutes, "--steps": steps, "--tokens": tokens}
    if len(given := [name for name, value in ends.items() if value is not None]) > 1:
        raise UsageError("E103", ", ".join(given), "each of them ends the run", "give one of them")
    for name, value in (("--minutes", minutes), ("--steps", steps)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError("E102", name, f"is {value}, expected a number above 0", f"choose another {name}")
    if tokens is not None:
        parse_count("--tokens", tokens)
    if size is not None:
        parse_size(size)
    if device is not None:
        machine.require_device(device)
    return _typed(settings)


def parse_count(name: str, count: int | str) -> float:
    """The number in 260000, "260k", "3M", "1.5M" or "1B". Raises UsageError E102."""
    text = str(count)
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        number = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        of = "parameters" if name == "--size" else "tokens"
        fix = "write it as 500k, 3M or 1.5M" + (", or a shape as 288x6x6" if name == "--size" else "")
        raise UsageError("E102", name, f"{text!r} is not a number of {of}", fix)
    return number


def parse_size(text: int | str) -> float | tuple[int, int, int]:
    """ "3M" -> parameters; "288x6x6" -> width, layers, heads. Raises UsageError E102."""
    if not re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", str(text)):
        return parse_count("--size", text)
    dim, n_layers, n_heads = map(int, str(text).split("x"))
    try:
        Config(vocab_size=1, dim=dim, n_layers=n_layers, n_heads=n_heads)
    except UsageError as error:
        raise UsageError("E102", f"--size {text}", error.found, "write it as WIDTHxLAYERSxHEADS") from None
    return dim, n_layers, n_heads


def _typed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, as values of the types that Plan declares."""
    kept = {}
    for name, value in settings.items():
        if name not in SETTINGS:
            raise UsageError("E101", f"--set {name}", "is not a setting", _instead_of(name))
        kind = SETTINGS[name]
        if kind in (int, float):
            try:
                kept[name] = kind(value)
                if isinstance(value, bool) or (isinstance(value, float) and value != kept[name]):
                    raise ValueError  # int() would make 1 of True and of 1.9
            except (TypeError, ValueError, OverflowError):
                expected = "a whole number" if kind is int else "a number"
                raise UsageError(
                    "E102", f"--set {name}", f"is {value!r}, expected {expected}", "give a number"
                ) from None
            continue
        words = {"true": True, "false": False} if kind is bool else {word: word for word in get_args(kind)}
        if str(value).lower() not in words:
            raise UsageError("E101", f"--set {name}", f"is {value!r}", f"choose {' or '.join(words)}")
        kept[name] = words[str(value).lower()]
    if kept.get("threads", 1) > machine.logical_cores():
        found = f"is {kept['threads']}, this machine runs {machine.logical_cores()} at once"
        raise UsageError("E102", "--set threads", found, "choose fewer")
    smallest = Config(vocab_size=1, dim=2, n_layers=1, n_heads=1)
    least: dict[str, Any] = {"context": 1, "batch_size": 1, **kept}
    if kept.get("normuon"):
        least = {"optimizer": "muon", **least}
    if least.get("optimizer") == "muon":  # the rates that are not given will be the recipe's
        least = {"embedding_rate": 1.0, "head_rate": 1.0, "gain_rate": 1.0, **least}
    Plan(model=smallest, steps=1, **least)  # refuses what is out of range
    return kept


def _instead_of(name: str) -> str:
    """What to do about a setting that there is not."""
    if name in ("minutes", "steps", "tokens", "size", "vocab_size", "seed", "device"):
        return f"it is an option of its own:  --{name.replace('_', '-')}"
    if name in ("dim", "n_layers", "n_heads"):
        return "the shape of the model is --size WIDTHxLAYERSxHEADS"
    near = ["context"] if name == "max_seq_len" else get_close_matches(name, SETTINGS, 1, cutoff=0.75)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(SETTINGS)}"


def memory(plan: Plan) -> dict[str, int]:
    """Bytes that training by this plan holds at the most, by the device that holds them.

    On a CPU that is in a save: all of its files are made before one is written, and the optimiser's twice while it is
    put together. On a GPU it is in a step; a save takes memory of the CPU, a copy of the optimiser included.
    """
    held = costs.training_bytes(
        plan.model,
        plan.batch_size,
        plan.context,
        device=plan.device.partition(":")[0],
        workers=plan.threads,
        bytes_per_number=2 if plan.precision == "bfloat16" else 4,
        optimizer=plan.optimizer,
        average=plan.average > 0,
        embedding_norm=plan.embedding_norm,
    )
    table = (
        4 * plan.model.vocab_size * plan.model.dim if plan.embedding_norm else 0
    )  # saved as it is trained, too
    beside = held.optimizer + table
    if plan.device.startswith("cuda"):
        return {plan.device: held.total, "cpu": held.weights + 3 * beside}
    return {plan.device: held.total + held.weights + 2 * beside}


def _too_much(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """The devices whose memory is too small for a plan, with the bytes that it needs there and those that are free."""
    for device, needed in memory(plan).items():
        available = machine.free_memory(device)
        if available is not None and needed > MEMORY_SHARE * available:
            yield device, needed, available


def _check_memory(plan: Plan) -> None:
    for device, needed, available in _too_much(plan):
        kind = "GPU" if device.startswith("cuda") else "main"
        found = f"training would need {needed / 2**30:,.1f} GiB of {kind} memory, {available / 2**30:,.1f} GiB are free"
        fix = "take a smaller --size"
        if plan.batch_size > 1 and device == plan.device:
            fix += f", or fewer rows at once:  --set batch_size={max(1, plan.batch_size // 4)}"
        raise MachineError("E404", "the plan", found, fix)


# ---- to and from run.json ------------------------------------------------------------------------


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The plan that plan_to_json wrote. Raises UsageError E101 for a field that this version does not know."""
    known = {one.name for one in fields(Plan)}
    if unknown := set(value) - known:
        raise UsageError(
            "E101",
            "run.json",
            f"holds unknown settings: {', '.join(sorted(unknown))}",
            "use the version that started this run",
        )
    model = dict(value["model"])
    if model.get("rope_scaling"):
        model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
    return Plan(**{**value, "model": Config(**model)})

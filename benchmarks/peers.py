"""The contestants of training.py: what others document, as settings of one plain PyTorch loop, and babyllama itself.

A contestant's numbers are those of the commands its authors publish, and `source` names the file each stands in. The
loop is the one that all of them share: forward, cross-entropy in float32, backward, clip, AdamW (fused, which is the
fastest that PyTorch has on a CPU, for everyone), learning rate by progress. What differs is in `Recipe`.

nanoGPT and llama2.c are run as recipes, not as their code: our model with PyTorch's fused attention in float32, which
is what both take on a CPU (their autocast is a null context there), nanoGPT's initialisation (normal 0.02, less by
1/√(2 layers) into the residual stream; llama2.c lessens another matrix of the feed-forward) and a tied head. So nanoGPT
gets a Llama's blocks, which are not worse.
"""

import importlib.util
import math
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from shapes import Shape, plan_for
from torch import Tensor, nn

from babyllama import machine
from babyllama.checkpoint.run import Run
from babyllama.data.batches import IGNORE, Batches
from babyllama.data.corpus import Corpus
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer
from babyllama.train import loop

SECONDS_OF_NO_SAVE = 1e9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one contestant trains. `rates`: what --tune tries, the same number for everyone, the documented one first."""

    name: str
    source: str
    model: Literal["llama", "transformers", "litgpt", "babyllama"]
    vocabulary: int | Literal["characters", "default"] = "default"  # default: as many as babyllama takes
    shape: tuple[int, int, int] | None = None  # dim, layers, heads; None: the shape that babyllama plans
    smaller: int = (
        0  # so many of babyllama's shapes below that: a slower trainer sees fewer tokens in the same time
    )
    tied: bool = False
    gpt2_init: bool = False
    context: int = 256  # replaced where babyllama lends the shape
    rows: int = 8
    accumulation: int = 1
    windows: Literal["random", "epochs"] = "epochs"
    precision: Literal["float32", "bfloat16"] = "float32"
    rates: tuple[float, ...] = (1e-3,)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of tensors with two axes, as all of these do
    clip: float = 1.0
    warmup: float = 0.0  # share of the run
    schedule: Literal["linear", "cosine"] = "linear"
    final: float = 0.0  # share of the peak at the end

    def learning_rate(self, peak: float, progress: float) -> float:
        """At `progress` in [0, 1]. It rises from a tenth: a short run may have one step in its warm-up, at 0."""
        if progress < self.warmup:
            return peak * max(0.1, progress / self.warmup)
        done = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        falls = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return peak * (self.final + (1 - self.final) * falls)


TRIED = (1e-3, 2e-3, 4e-3, 8e-3)  # beside the documented rate

# train.py: weight_decay, beta1, grad_clip; config/train_shakespeare_char.py: learning_rate, min_lr, beta2,
# warmup_iters 100 (of max_iters 2000); README.md, "I only have a macbook": block_size, batch_size, n_layer, n_head,
# n_embd, max_iters = lr_decay_iters = 2000, dropout 0. Here the iterations are what fits into the time.
NANOGPT = Recipe(
    name="nanoGPT",
    source="karpathy/nanoGPT: README.md (CPU command), config/train_shakespeare_char.py, train.py",
    model="llama",
    vocabulary="characters",  # data/shakespeare_char/prepare.py
    shape=(128, 4, 4),
    tied=True,
    gpt2_init=True,
    context=64,
    rows=12,
    windows="random",
    rates=(1e-3, 3e-4, 2e-3, 4e-3, 8e-3),
    beta2=0.99,
    weight_decay=0.1,
    warmup=100 / 2000,
    schedule="cosine",
    final=0.1,
)
# train.py: dim, n_layers, n_heads, max_seq_len, gradient_accumulation_steps 4, learning_rate, weight_decay, betas,
# grad_clip, warmup_iters 1000 of max_iters 100000, min_lr 0, dropout 0; its first lines: --batch_size=8 for a small
# machine (128 otherwise: a minute of two cores would be three steps); README.md: --vocab_size=4096.
LLAMA2C = Recipe(
    name="llama2.c",
    source="karpathy/llama2.c: train.py, README.md (custom tokenizers)",
    model="llama",
    vocabulary=4096,
    shape=(288, 6, 6),
    tied=True,
    gpt2_init=True,
    context=256,
    rows=8,
    accumulation=4,
    rates=(5e-4, *TRIED),
    beta2=0.95,
    weight_decay=0.1,
    warmup=1000 / 100_000,
    schedule="cosine",
)
# transformers, src/transformers/training_args.py: per_device_train_batch_size 8, learning_rate 5e-5, linear to 0
# without warm-up, betas 0.9 and 0.999, eps 1e-8, weight_decay 0, max_grad_norm 1. Shape and vocabulary are
# babyllama's, since the library proposes none.
TRANSFORMERS = Recipe(
    name="transformers float32",
    source="huggingface/transformers: src/transformers/training_args.py (defaults), LlamaForCausalLM",
    model="transformers",
    rates=(5e-5, *TRIED),
)
# config_hub/pretrain/tinystories.yaml: shape, tied, lr, betas, weight_decay, max_norm, min_lr 0, precision bf16-mixed;
# cosine in litgpt/pretrain.py; lr_warmup_steps 1000 of the 74,000 steps that its 9.7 billion tokens make. Its
# global_batch_size 512 and micro_batch_size 128 are for GPUs: here those of llama2.c for a small machine.
LITGPT = Recipe(
    name="litgpt",
    source="Lightning-AI/litgpt: config_hub/pretrain/tinystories.yaml, litgpt/pretrain.py (initialisation, cosine)",
    model="litgpt",
    vocabulary=4096,
    shape=(288, 6, 6),
    tied=True,
    accumulation=4,
    precision="bfloat16",
    rates=(5e-4, *TRIED),
    beta2=0.95,
    weight_decay=0.1,
    warmup=1000 / 74_000,
    schedule="cosine",
)
OURS = Recipe(
    name="babyllama",
    source="this checkout; rates are multiples of the plan's own",
    model="babyllama",
    rates=(1.0, 0.25, 0.5, 2.0, 4.0),
)
QUALITY = {
    recipe.name: recipe
    for recipe in (
        OURS,
        TRANSFORMERS,
        replace(TRANSFORMERS, name="transformers bf16", precision="bfloat16"),
        replace(TRANSFORMERS, name="transformers float32, smaller", smaller=1),
        replace(TRANSFORMERS, name="transformers bf16, smaller", precision="bfloat16", smaller=1),
        NANOGPT,
        LLAMA2C,
        replace(LLAMA2C, name="llama2.c, short steps", accumulation=1),
        LITGPT,
    )
}
# What --throughput compares: one shape, one batch, one optimiser (AdamW fused), so only the step differs.
PLAIN = Recipe(name="plain float32", source="babyllama/model.py in a plain loop", model="llama")
THROUGHPUT = {
    recipe.name: recipe
    for recipe in (
        PLAIN,
        replace(PLAIN, name="plain bf16", precision="bfloat16"),
        replace(OURS, source="babyllama.train.loop.train itself"),
        replace(OURS, name="babyllama, Muon", source="the same with the optimiser that the recipe prefers"),
        TRANSFORMERS,
        replace(TRANSFORMERS, name="transformers bf16", precision="bfloat16"),
        replace(LITGPT, name="litgpt bf16"),
    )
}


def missing(recipe: Recipe) -> str | None:
    """Why this contestant cannot run here; None if it can."""
    needs = {"transformers": "transformers", "litgpt": "litgpt"}.get(recipe.model)
    if needs is None or importlib.util.find_spec(needs) is not None:
        return None
    why = "not installed"
    if needs == "litgpt":
        why += (
            " (litgpt 0.5.13 wants huggingface-hub < 1.4 and transformers 5 wants >= 1.31: "
            "give it an environment of its own with --python litgpt=PATH, or run this program there)"
        )
    return why


# ---- models ----------------------------------------------------------------------------------------


def build(recipe: Recipe, config: Config, seed: int) -> nn.Module:
    """A new model; called with tokens (B, T) it gives logits (B, T, V)."""
    torch.manual_seed(seed)
    if recipe.model == "transformers":
        return _Transformers(config)
    if recipe.model == "litgpt":
        return _litgpt(config)
    model = Llama(config, seed=seed)
    if recipe.gpt2_init:
        gpt2_init(model, seed)
    return model


@torch.no_grad()
def gpt2_init(model: Llama, seed: int) -> None:
    """Normal(0, 0.02), less by 1/√(2 layers) for what writes into the residual stream: nanoGPT's."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            residual = name.endswith(("wo.weight", "w_down.weight"))
            deviation = 0.02 / math.sqrt(2 * model.config.n_layers) if residual else 0.02
            weight.normal_(0.0, deviation, generator=generator)


class _Transformers(nn.Module):
    """LlamaForCausalLM, which answers with more than logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.dim,
                intermediate_size=config.hidden_dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                max_position_embeddings=config.max_seq_len,
                tie_word_embeddings=config.tie_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens).logits


def _litgpt(config: Config) -> nn.Module:
    """litgpt's GPT with the switches that make it a Llama, and the initialisation of its `pretrain`."""
    from litgpt import GPT
    from litgpt import Config as Theirs

    model = GPT(
        Theirs(
            name="llama",
            block_size=config.max_seq_len,
            padded_vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_query_groups=config.n_kv_heads,
            n_embd=config.dim,
            head_size=config.head_dim,
            intermediate_size=config.hidden_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            inward = name.endswith((".attn.proj.weight", ".mlp.proj.weight"))
            spread = 1 / math.sqrt(config.dim) / config.n_layers if inward else math.sqrt(0.4 / config.dim)
            nn.init.normal_(weight, std=spread)
    if config.tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    return model


# ---- the plain loop --------------------------------------------------------------------------------


class PlainLoop:
    """One contestant in training: `step` is one update."""

    def __init__(self, recipe: Recipe, config: Config, ids: NDArray[Any], rate: float, seed: int = 1) -> None:
        self.recipe, self.rate = recipe, rate
        self.model = build(recipe, config, seed)
        weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [each for each in weights if each.ndim >= 2], "weight_decay": recipe.weight_decay},
                {"params": [each for each in weights if each.ndim < 2], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            fused=True,
        )
        self.ids, self.steps = ids, 0
        self.batches = Batches(ids, recipe.context, recipe.rows * recipe.accumulation, seed)
        self.random = np.random.default_rng(seed)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.rows * self.recipe.accumulation * self.recipe.context

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.recipe.windows == "epochs":
            tokens, targets = self.batches.batch(self.steps)
        else:
            context = self.recipe.context
            begins = self.random.integers(
                len(self.ids) - context, size=self.recipe.rows * self.recipe.accumulation
            )
            windows = np.stack([self.ids[at : at + context + 1] for at in begins]).astype(np.int64)
            tokens, targets = windows[:, :-1], windows[:, 1:]
        return torch.from_numpy(tokens), torch.from_numpy(np.ascontiguousarray(targets))

    def step(self, progress: float = 0.5) -> float:
        """The loss of this batch, in nats per token."""
        tokens, targets = self.batch()
        counted, loss = int((targets != IGNORE).sum()), 0.0
        parts = self.recipe.accumulation
        for some, wanted in zip(tokens.chunk(parts), targets.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                logits = self.model(some)
            sum_ = F.cross_entropy(
                logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            part = sum_ / counted
            part.backward()
            loss += part.item()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.rate, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss

    def close(self) -> None:
        pass


# ---- babyllama, step by step -----------------------------------------------------------------------


class _StopTraining(BaseException):
    """No Exception: nothing in the loop has a remedy for it."""


class OurLoop:
    """`babyllama.train.loop.train` itself, held after each step until `step` is called again.

    It runs in a thread of its own and is held inside `tell`, so whatever the loop does for a step is what is timed, its
    reports included. Evaluations and saves are switched off, and no step is the one in many that is recorded.
    """

    def __init__(self, shape: Shape, ids: NDArray[Any], seed: int = 1, **settings: Any) -> None:
        options = {"context": shape.context, "batch_size": shape.batch_size, "evaluations": 0}
        settings = {**options, "save_seconds": SECONDS_OF_NO_SAVE, **settings}
        self.plan = plan_for(
            shape.config,
            text_bytes=4 * len(ids),
            train_tokens=len(ids),
            steps=10**9,
            seed=seed,
            device="cpu",
            settings=settings,
        )
        self.folder = tempfile.TemporaryDirectory()
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.over, self.error = False, None
        corpus = random_corpus(ids, shape.vocab_size, Path(self.folder.name))
        run = Run.create(Path(self.folder.name) / "run", {})
        self.thread = threading.Thread(target=self._train, args=(run, corpus), daemon=True)
        self.thread.start()
        self._wait()

    @property
    def tokens_per_step(self) -> int:
        return self.plan.tokens_per_step

    def _train(self, run: Run, corpus: Corpus) -> None:
        try:
            loop.train(run, self.plan, corpus, tell=self._hold)
        except _StopTraining:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def _hold(self, event: Any) -> None:
        if isinstance(event, loop.Started | loop.Stepped):
            self.done.release()
            self.go.acquire()
            if self.over:
                raise _StopTraining

    def _wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def step(self, progress: float = 0.5) -> None:
        self.go.release()
        self._wait()

    def close(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join()
        self.folder.cleanup()


def random_corpus(ids: NDArray[Any], vocab_size: int, folder: Path) -> Corpus:
    """Prepared data of random ids; the tokenizer is never asked."""
    tokenizer = Tokenizer.train(
        ["nothing is said here, nothing is meant here"], min(vocab_size, 512), exact=False
    )
    return Corpus(
        folder=folder,
        tokenizer=tokenizer,
        train_ids=ids,
        val_ids=ids[:64],
        train_documents=1,
        val_documents=1,
        train_bytes=4 * len(ids),
        val_bytes=256,
        duplicates=0,
        skipped={},
        characters_replaced=0,
        source="random ids",
        fingerprint="random",
    )


def contestant(recipe: Recipe, shape: Shape, seed: int = 1) -> PlainLoop | OurLoop:
    """A contestant of --throughput: this shape, random ids. Everything that is not the step is the same."""
    ids = np.random.default_rng(seed).integers(shape.vocab_size, size=2**18).astype(np.uint16)
    if recipe.model == "babyllama":
        same = {"threads": torch.get_num_threads(), "dropout": 0.0}
        return OurLoop(shape, ids, seed, optimizer="muon" if "Muon" in recipe.name else "adamw", **same)
    same = {
        "tied": False,
        "gpt2_init": False,
        "accumulation": 1,
        "context": shape.context,
        "rows": shape.batch_size,
    }
    return PlainLoop(replace(recipe, **same), shape.config, ids, rate=1e-3, seed=seed)


# ---- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A text for one contestant: its ids, and how to score a held-out text."""

    vocab_size: int
    encode: Callable[[str], list[int]]  # with one id in front that is given, not predicted
    byte_lengths: list[int]


def encoder(recipe: Recipe, train: str, hold_out: str) -> Encoded:
    """Trained on the training text; only the characters' alphabet also sees the rest, as nanoGPT's prepare.py does."""
    if recipe.vocabulary == "characters":
        letters = sorted(set(train) | set(hold_out) | {"\n"})
        index = {letter: id for id, letter in enumerate(letters)}
        lengths = [len(letter.encode()) for letter in letters]
        return Encoded(len(letters), lambda text: [index["\n"], *(index[c] for c in text)], lengths)
    from babyllama.data.corpus import default_vocab_size

    size = (
        default_vocab_size(len(train.encode())) if recipe.vocabulary == "default" else int(recipe.vocabulary)
    )
    tokenizer = Tokenizer.train([train], size, exact=False)
    return Encoded(
        tokenizer.vocab_size, lambda text: tokenizer.encode(text, bos=True), tokenizer.byte_lengths()
    )


def config_of(recipe: Recipe, vocab_size: int) -> Config:
    """Raises ValueError for a recipe that leaves its shape to babyllama."""
    if recipe.shape is None:
        raise ValueError(f"{recipe.name} has no shape of its own")
    dim, n_layers, n_heads = recipe.shape
    return Config(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        max_seq_len=recipe.context,
        tie_embeddings=recipe.tied,
    )


def threads() -> int:
    return machine.physical_cores()

"""Two implementations of one model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from weights import randomised

from babyllama.checkpoint.hf import model_files
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer


class Twins(NamedTuple):
    """A model with its tokenizer, and the same opened by transformers."""

    model: Llama
    tokenizer: Tokenizer
    theirs: Any
    their_tokenizer: Any

    def plainly(self, context: str, continuation: str) -> tuple[float, bool]:
        """(nats, greedy) by transformers alone: one text in one pass, nothing shared, nothing filled up."""
        before = self.their_tokenizer(context.rstrip())["input_ids"]
        after = self.their_tokenizer(context + continuation)["input_ids"][len(before) :]
        ids = torch.tensor([(before + after)[-(self.model.config.max_seq_len + 1) :]])
        with torch.no_grad():
            logits = self.theirs(ids[:, :-1]).logits[0, -len(after) :].double().log_softmax(-1)
        targets = ids[0, -len(after) :]
        return float(logits[range(len(after)), targets].sum()), bool((logits.argmax(-1) == targets).all())


@pytest.fixture(scope="session")
def twins_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Llama, Tokenizer], Twins]:
    """twins_of(model, tokenizer): transformers opens what this project writes."""

    def make(model: Llama, tokenizer: Tokenizer) -> Twins:
        folder = tmp_path_factory.mktemp("model")
        for name, data in model_files(model.config, model.state_dict(), tokenizer).items():
            (folder / name).write_bytes(data)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return Twins(model.eval(), tokenizer, theirs, AutoTokenizer.from_pretrained(folder))

    return make


@pytest.fixture(scope="session")
def random_llama() -> Callable[..., Llama]:
    """random_llama(max_seq_len=8, ...): weights so large that a wrong mask, slot or position shows in the logits."""

    def make(**sizes: Any) -> Llama:
        usual: dict[str, Any] = dict(
            vocab_size=97, dim=48, n_layers=3, n_heads=6, n_kv_heads=2, max_seq_len=64
        )
        return randomised(Llama(Config(**{**usual, **sizes}), seed=None).eval(), seed=7, gain=1.0)

    return make

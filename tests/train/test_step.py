"""The step that PyTorch differentiates, compiled: the same numbers, and compiled once."""

import subprocess
import sys

import pytest

# In a process of its own, since the checks of types that tests run with cannot be compiled.
COMPILED = """
import sys
from dataclasses import replace
from functools import partial

import torch

from babyllama.data.batches import IGNORE
from babyllama.model import Config, Llama
from babyllama.train.recipe import Plan
from babyllama.train.step import PlainStep

torch.compile = partial(torch.compile, backend="aot_eager")  # all but the last part, which wants a C++ compiler
from torch._dynamo.utils import counters

config = Config(vocab_size=31, dim=16, n_layers=2, n_heads=2, n_kv_heads=1)
plan = Plan(
    model=config, context=8, batch_size=3, steps=9, dropout=0.3, embedding_norm=True, precision=sys.argv[1]
)
tokens, targets = torch.randint(0, 31, (2, 3, 8), generator=torch.Generator().manual_seed(0))
targets[0, 4:] = IGNORE
models = Llama(config, seed=0), Llama(config, seed=0)
plain, compiled = PlainStep(models[0], plan), PlainStep(models[1], replace(plan, compile=True))
nats = []
for step, part in ((0, 0), (1, 0), (1, 1), (2, 0)):
    found = [one(tokens, targets, 20 + step, step, part) for one in (plain, compiled)]
    assert found[0] == found[1], found
    nats.append(found[0] * (20 + step))
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(theirs.grad, ours.grad)
    with torch.inference_mode():
        assert torch.equal(plain.logits(tokens), compiled.logits(tokens))
assert len({round(sum_, 3) for sum_ in nats}) == 4, "every part drops other numbers"
assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_compiled_step_is_the_plain_one_and_is_compiled_once(precision):
    command = [sys.executable, "-c", COMPILED, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

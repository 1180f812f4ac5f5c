"""What is trained here runs in stock llama.cpp: same ids for a text, same logits, same continuation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama.checkpoint.export import export
from babyllama.checkpoint.verify import TEXT, verify
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import Tokenizer

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_heads": 6},
    "grouped": {"n_heads": 9, "n_kv_heads": 3, "dim": 144},
    "tied, more rows than ids": {"n_heads": 6, "tie_embeddings": True, "more": 7},
    "wide heads": {"n_heads": 4, "head_dim": 32},
    "theta 5e5": {"n_heads": 6, "rope_theta": 5e5},
    "llama3 by 8": {"n_heads": 6, "rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
    "llama3 by 32": {
        "n_heads": 6,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling(kind="llama3", factor=32.0),
    },
    "linear": {"n_heads": 6, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 380)


def model(tokenizer: Tokenizer, more: int = 0, **shape: Any) -> Llama:
    sizes = {"vocab_size": tokenizer.vocab_size + more, "dim": 96, "n_layers": 2, "max_seq_len": 512}
    llama = Llama(Config(**{**sizes, **shape}), seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in llama.parameters():
        weight.data.normal_(0, 0.15, generator=generator)
    return llama


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_has_the_same_ids_and_logits_there(
    tmp_path: Path, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    llama = model(tokenizer, **shape)
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf")[0]
    verdict = verify(llama.config, llama.state_dict(), tokenizer, out, to="gguf")
    assert verdict.reader == "llama.cpp"
    assert verdict.relative <= 1e-5


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_continuation_is_the_same_there_token_by_token(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    """Of a model that has learned a text, so that the likeliest token is clearly ahead."""
    from llama_cpp import Llama as Theirs

    from babyllama.generate.engine import generate
    from babyllama.generate.sample import Sampling

    llama, ids = model(tokenizer, n_heads=6, n_kv_heads=2).train(), tokenizer.encode(TEXT, bos=True)
    optimizer, tokens = torch.optim.AdamW(llama.parameters(), 3e-3), torch.tensor([ids])
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(llama(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    llama.eval()
    beginning = tokenizer.encode("Once upon a time there", bos=True)
    sampling = Sampling(temperature=0.0)
    ours = [
        token.id for token in generate(llama, [beginning], max_tokens=64, sampling=sampling, stop_ids=set())
    ]
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf", kind=kind)[0]
    theirs = Theirs(str(out), n_ctx=512, verbose=False)
    assert theirs.tokenize(b"Once upon a time there", add_bos=True, special=False) == beginning
    found = theirs.generate(beginning, temp=0.0, repeat_penalty=1.0)
    assert [next(found) for _ in range(64)] == ours
    assert len(set(ours)) > 20
    theirs.close()

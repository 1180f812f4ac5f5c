"""What is trained here runs in stock llama.cpp: same ids for a text, same logits, same continuation.

llama.cpp comes in the packages llama-cpp-python, which pip compiles, and xllamacpp, which is there in wheels.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import randomised

from babyllama.checkpoint.export import export
from babyllama.checkpoint.verify import TEXT, verify
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import Tokenizer


def needs(package: str, name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


COMPILED = needs("llama_cpp", "llama-cpp-python")
SERVED = needs("xllamacpp", "xllamacpp")
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
    return randomised(Llama(Config(**{**sizes, **shape}), seed=3).eval())


@COMPILED
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_has_the_same_ids_and_logits_there(
    tmp_path: Path, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    llama = model(tokenizer, **shape)
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf")[0]
    verdict = verify(llama.config, llama.state_dict(), tokenizer, out, to="gguf")
    assert verdict.reader == "llama.cpp"
    assert verdict.relative <= 1e-5


@contextlib.contextmanager
def serving(path: Path) -> Iterator[Any]:
    """llama.cpp's server as xllamacpp starts it, keys and values in float32."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.cpuparams.n_threads = str(path), 512, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.verbosity, settings.warmup = -1, False
    yield xllamacpp.Server(settings)


def asked(server: Any, prompt: str, tokens: int, shown: int = 1, **options: Any) -> list[dict[str, Any]]:
    """The likeliest next tokens, each with the log-probabilities of `shown`. It tells none of half a character."""
    options |= {"n_predict": tokens, "temperature": 0.0, "n_probs": shown, "ignore_eos": True}
    return server.handle_completions({"prompt": prompt, **options})["choices"][0]["logprobs"]["content"]


@SERVED
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_gives_every_token_the_same_probability_there(
    tmp_path: Path, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    llama, ids = model(tokenizer, **shape), tokenizer.encode(TEXT, bos=True)
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf")[0]
    with torch.inference_mode():
        ours = llama(torch.tensor([ids]))[0, -1].log_softmax(-1)
    letter = tokenizer.encode("a")[0]
    with serving(out) as server:  # which encodes the text itself, and tells probabilities of before the bias
        found = asked(server, TEXT, 1, llama.config.vocab_size, logit_bias=[[letter, 1000.0]])
    theirs = {each["id"]: each["logprob"] for each in found[0]["top_logprobs"]}
    assert theirs.keys() == set(range(llama.config.vocab_size))
    largest = max(abs(theirs[id] - float(ours[id])) for id in theirs)
    print(f"log-probabilities differ by {largest:.2g} at most")
    assert largest <= 1e-4


@pytest.mark.parametrize(
    "package", [pytest.param("llama_cpp", marks=COMPILED), pytest.param("xllamacpp", marks=SERVED)]
)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_continuation_is_the_same_there_token_by_token(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, package: str
) -> None:
    """Of a model that has learned a text, so that the likeliest token is clearly ahead."""
    from babyllama.generate.engine import generate
    from babyllama.generate.sample import Sampling

    llama = model(tokenizer, n_heads=6, n_kv_heads=2).train()
    ids = tokenizer.encode(TEXT.encode("ascii", "ignore").decode(), bos=True)
    optimizer, tokens = torch.optim.AdamW(llama.parameters(), 3e-3), torch.tensor([ids])
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(llama(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    llama.eval()
    prompt = "Once upon a time there"
    beginning, sampling = tokenizer.encode(prompt, bos=True), Sampling(temperature=0.0)
    ours = [
        token.id for token in generate(llama, [beginning], max_tokens=64, sampling=sampling, stop_ids=set())
    ]
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf", kind=kind)[0]
    if package == "llama_cpp":
        from llama_cpp import Llama as Theirs

        theirs = Theirs(str(out), n_ctx=512, verbose=False)
        assert theirs.tokenize(prompt.encode(), add_bos=True, special=False) == beginning
        stream = theirs.generate(beginning, temp=0.0, repeat_penalty=1.0)
        found = [next(stream) for _ in range(64)]
        theirs.close()
    else:
        with serving(out) as server:
            found = [token["id"] for token in asked(server, prompt, 64)]
    assert found == ours
    assert len(set(ours)) > 20

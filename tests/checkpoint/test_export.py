"""Out and in again: every shape of Llama in every format, read by others, with the same logits."""

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import randomised

from babyllama.checkpoint.export import FORMATS, export
from babyllama.checkpoint.gguf import TYPES
from babyllama.checkpoint.open import open_llama
from babyllama.checkpoint.verify import OURS, TEXT, verify
from babyllama.errors import BabyLlamaError, InputError, MachineError, NumericalError, UsageError
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 380)


def model(tokenizer: Tokenizer, **shape: Any) -> Llama:
    config = Config(**{**dict(vocab_size=tokenizer.vocab_size, dim=96, n_layers=2, max_seq_len=512), **shape})
    return randomised(Llama(config, seed=3).eval())


LLAMA3 = {"n_heads": 6, "n_kv_heads": 2, "rope_theta": 5e5}
SHAPES: dict[str, dict[str, Any]] = {
    "each head its own keys": {"n_heads": 6},
    "6 heads, 2 keys": {"n_heads": 6, "n_kv_heads": 2},
    "9 heads, 3 keys": {"n_heads": 9, "n_kv_heads": 3, "dim": 144},
    "tied": {"n_heads": 6, "tie_embeddings": True},
    "wide heads": {"n_heads": 4, "head_dim": 32},
    "theta 1e5": {"n_heads": 6, "rope_theta": 1e5},
    "theta 5e5": LLAMA3,
    "llama3 by 8": {**LLAMA3, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
    "llama3 by 32": {**LLAMA3, "rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
    "linear": {"n_heads": 6, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
}
CANNOT = {  # what a format has no place for
    "meta": {"wide heads", "llama3 by 32", "linear"},
    "llama2c": {"wide heads", "theta 1e5", "theta 5e5", "llama3 by 8", "llama3 by 32", "linear"},
}
WAYS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "meta, whole": {"to": "meta"},
    "meta, in two": {"to": "meta", "shards": 2},
    "llama2.c, version 0": {"to": "llama2c"},
    "llama2.c, version 1": {"to": "llama2c", "version": 1},
    "gguf": {"to": "gguf"},
}


def carried(tokenizer: Tokenizer, to: str) -> Tokenizer | None:
    return None if to == "llama2c" else tokenizer  # whose files hold no byte-level vocabulary


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_comes_back_from_every_format(
    tmp_path: Path, tokenizer: Tokenizer, name: str, way: dict[str, Any]
) -> None:
    llama, to = model(tokenizer, **SHAPES[name]), way["to"]
    own, out = carried(tokenizer, to), tmp_path / f"model{FORMATS[to]}"
    if name in CANNOT.get(to, set()):
        with pytest.raises(UsageError) as caught:
            export(llama.config, llama.state_dict(), own, out, **way)
        assert caught.value.code == "E105"
        assert not list(tmp_path.iterdir())
        return
    written = export(llama.config, llama.state_dict(), own, out, **way)
    assert written[0] == out
    verdict = verify(llama.config, llama.state_dict(), own, out, to=to)
    print(f"{name}, {to}, {verdict}")
    assert verdict.relative <= 1e-5
    assert verdict.largest <= 1e-4
    if own is not None:
        assert verdict.bits is not None and abs(verdict.bits[1] - verdict.bits[0]) < 1e-4
    again = open_llama(out)
    context = again.config.max_seq_len if to == "meta" else llama.config.max_seq_len
    assert again.config == dataclasses.replace(llama.config, max_seq_len=context)
    assert all(torch.equal(again.weights[key], weight) for key, weight in llama.state_dict().items())
    if own is not None:
        assert again.tokenizer().encode(TEXT, bos=True) == own.encode(TEXT, bos=True)


COSTS = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2, "q8_0": 3e-2, "q4_0": 0.4}


def test_how_a_model_is_sampled_comes_along_and_one_that_says_nothing_is_given_a_way(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    llama, said = model(tokenizer, n_heads=6), {"temperature": 0.6, "repetition_penalty": 1.1}
    for name, generation in (("told", said), ("not told", {})):
        ids = {"eos_token_id": [tokenizer.eos_id, 4]}
        held = {"generation_config.json": json.dumps({**generation, **ids}).encode()}
        own = Tokenizer({**tokenizer.files(), **held})
        out = export(llama.config, llama.state_dict(), own, tmp_path / name, to="hf")[0]
        written = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
        assert {key: written[key] for key in generation} == generation
        assert written["eos_token_id"] == ids["eos_token_id"]
        assert written["temperature"] == generation.get("temperature", 0.8)
        assert written.get("do_sample") == (None if generation else True)


def test_a_name_that_no_system_has_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama, name = model(tokenizer, n_heads=6), "a" * 300
    with pytest.raises(MachineError) as caught:
        export(llama.config, llama.state_dict(), tokenizer, tmp_path / name, to="hf")
    assert caught.value.code == "E403"
    with pytest.raises(InputError) as refused:
        Tokenizer.load(tmp_path / name)
    assert refused.value.code == "E310"


@pytest.mark.parametrize(("kind", "bound"), COSTS.items())
def test_smaller_numbers_cost_what_they_may(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, bound: float
) -> None:
    llama = model(tokenizer, **SHAPES["6 heads, 2 keys"])
    out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a.gguf", to="gguf", kind=kind)[0]
    verdict = verify(llama.config, llama.state_dict(), tokenizer, out, to="gguf", kind=kind)
    print(f"{kind}, {verdict}")
    assert verdict.relative <= bound
    assert (verdict.relative > 1e-6) == (kind != "f32")
    assert verdict.bits is not None and abs(verdict.bits[1] - verdict.bits[0]) < 0.02


def test_sizes_are_those_of_the_kinds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6, dim=192)
    sizes = {}
    for kind in TYPES:
        out = export(llama.config, llama.state_dict(), tokenizer, tmp_path / kind, to="gguf", kind=kind)[0]
        sizes[kind] = out.stat().st_size / sum(weight.numel() for weight in llama.parameters())
    assert sizes["f32"] > 1.9 * sizes["f16"] > 1.8 * 1.8 * sizes["q8_0"]
    assert sizes["f16"] == pytest.approx(sizes["bf16"])
    assert sizes["q4_0"] < 0.75 * sizes["q8_0"]


# ---- verification can fail


def flipped(path: Path, change: Any) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_what_computes_something_else_is_refused_loudly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, **SHAPES["6 heads, 2 keys"])
    weights = llama.state_dict()
    wrong = {
        "another order of the rows of q": {
            "layers.0.attention.wq.weight": weights["layers.0.attention.wq.weight"].flip(0)
        },
        "gate and up swapped": {
            "layers.1.feed_forward.w_gate.weight": weights["layers.1.feed_forward.w_up.weight"],
            "layers.1.feed_forward.w_up.weight": weights["layers.1.feed_forward.w_gate.weight"],
        },
        "a row of the table lost": {"tok_embeddings.weight": weights["tok_embeddings.weight"].roll(1, 0)},
    }
    for number, (what, changes) in enumerate(wrong.items()):
        for to in ("hf", "gguf", "meta"):
            out = tmp_path / f"{number}{to}"
            export(llama.config, {**weights, **changes}, tokenizer, out, to=to)
            with pytest.raises(NumericalError) as caught:
                verify(llama.config, weights, tokenizer, out, to=to)
            assert caught.value.code == "E504", what


def test_other_ids_for_the_same_text_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, **SHAPES["6 heads, 2 keys"])
    other = Tokenizer.train([TEXT[::-1] * 3], 380)
    if other.vocab_size > llama.config.vocab_size:
        pytest.fail("the other tokenizer is too large for this test")
    for to in ("hf", "gguf", "meta"):
        export(llama.config, llama.state_dict(), other, tmp_path / to, to=to)
        with pytest.raises(NumericalError) as caught:
            verify(llama.config, llama.state_dict(), tokenizer, tmp_path / to, to=to)
        assert "other ids" in caught.value.found


def test_a_tokenizer_of_a_larger_model_is_refused_and_nothing_is_written(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    llama = model(tokenizer, n_heads=6, vocab_size=tokenizer.vocab_size - 1)
    for to in ("hf", "gguf", "meta"):
        with pytest.raises(InputError) as caught:
            export(llama.config, llama.state_dict(), tokenizer, tmp_path / to, to=to)
        assert caught.value.code == "E309"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "gguf", "meta"])
def test_every_token_that_ends_a_text_comes_along(tmp_path: Path, tokenizer: Tokenizer, to: str) -> None:
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": [tokenizer.eos_id, 4]}
    several = Tokenizer({**tokenizer.files(), "generation_config.json": json.dumps(ends).encode()})
    assert several.eos_ids == {tokenizer.eos_id, 4}
    llama = model(tokenizer, n_heads=6)
    out = export(llama.config, llama.state_dict(), several, tmp_path / "a", to=to)[0]
    assert open_llama(out).tokenizer().eos_ids == several.eos_ids


def test_a_reader_of_ours_is_used_where_there_is_no_other(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama = model(tokenizer, n_heads=6)
    for to in FORMATS:
        own = carried(tokenizer, to)
        export(llama.config, llama.state_dict(), own, tmp_path / to, to=to)
        verdict = verify(llama.config, llama.state_dict(), own, tmp_path / to, to=to)
        assert (verdict.reader, verdict.largest) == (OURS, 0.0)


# ---- the disk, and nonsense


def test_nothing_is_written_over_what_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6)
    for to in FORMATS:
        (tmp_path / to).write_text("mine", encoding="utf-8")
        with pytest.raises(MachineError) as caught:
            export(llama.config, llama.state_dict(), carried(tokenizer, to), tmp_path / to, to=to)
        assert caught.value.code == "E403"
        assert (tmp_path / to).read_text(encoding="utf-8") == "mine"
    own = carried(tokenizer, "gguf")
    (tmp_path / "a.Modelfile").write_text("mine", encoding="utf-8")
    with pytest.raises(MachineError) as caught:
        export(llama.config, llama.state_dict(), own, tmp_path / "a.gguf", to="gguf")
    assert caught.value.code == "E403"
    assert (tmp_path / "a.Modelfile").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "a.gguf").exists()


def test_what_fails_half_way_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6)

    class Broken(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name == "layers.1.ffn_norm.weight":
                raise InputError("E211", "model", "not finite", "none")
            return super().__getitem__(name)

        def items(self) -> Any:
            return [(name, self[name]) for name in self]

    for to in FORMATS:
        with pytest.raises(InputError):
            export(llama.config, Broken(llama.state_dict()), carried(tokenizer, to), tmp_path / to, to=to)
        assert not list(tmp_path.iterdir())


def test_unknown_words_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6)
    wrong: list[dict[str, Any]] = [{"to": "onnx"}, {"to": "gguf", "kind": "q2_k"}]
    wrong += [{"to": "meta", "shards": 7}, {"to": "llama2c", "version": 9}]
    for options in wrong:
        own = carried(tokenizer, options["to"])
        with pytest.raises(BabyLlamaError) as caught:
            export(llama.config, llama.state_dict(), own, tmp_path / "a", **options)
        assert caught.value.code in ("E101", "E102")
        assert not list(tmp_path.iterdir())


def test_what_a_reader_says_of_a_file_is_a_failed_verification(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6)
    folder = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a", to="hf")[0]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "vision": "no", "dtype": "float31"}), encoding="utf-8"
    )
    with pytest.raises(NumericalError, match="transformers does not read it") as caught:
        verify(llama.config, llama.state_dict(), tokenizer, folder, to="hf")
    assert caught.value.code == "E504"


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_tokenizer_that_puts_no_bos_is_compared_without_one(
    tmp_path: Path, tokenizer: Tokenizer, to: str
) -> None:
    layout = json.loads(tokenizer.files()["tokenizer.json"])
    layout["post_processor"] = None  # as SmolLM2's
    without = Tokenizer({**tokenizer.files(), "tokenizer.json": json.dumps(layout).encode()})
    assert without.prompt(TEXT) == tokenizer.prompt(TEXT)[1:]
    assert without.prompt("") == tokenizer.prompt("") == [tokenizer.bos_id]
    llama = model(tokenizer, n_heads=6)
    out = export(llama.config, llama.state_dict(), without, tmp_path / "a", to=to)[0]
    assert verify(llama.config, llama.state_dict(), without, out, to=to).reader != OURS


def test_a_reader_that_does_not_start_is_no_fault_of_the_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = model(tokenizer, n_heads=6)
    folder = export(llama.config, llama.state_dict(), tokenizer, tmp_path / "a", to="hf")[0]
    empty = types.ModuleType("transformers")  # in which nothing is to be found
    empty.__spec__ = importlib.util.find_spec("transformers")
    monkeypatch.setitem(sys.modules, "transformers", empty)
    with pytest.raises(MachineError, match="AutoModelForCausalLM") as caught:
        verify(llama.config, llama.state_dict(), tokenizer, folder, to="hf")
    assert caught.value.code == "E406"


def test_points_in_a_name_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = model(tokenizer, n_heads=6)
    given = llama.config, llama.state_dict(), tokenizer
    names = {path.name for path in export(*given, tmp_path / "a" / "Llama-3.2-1B", to="gguf")}
    assert names == {"Llama-3.2-1B", "Llama-3.2-1B.Modelfile"}
    names = {path.name for path in export(*given, tmp_path / "b" / "Llama-3.2-1B.gguf", to="gguf")}
    assert names == {"Llama-3.2-1B.gguf", "Llama-3.2-1B.Modelfile"}

"""GGUF: read and written as the published reader and transformers do; and the files that have brought others down."""

import os
import struct
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from weights import randomised

from babyllama.checkpoint.gguf import GGUF, LLAMA3, ROPE, TYPES, gguf_parts, read_gguf
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, Llama, RopeScaling, rope_frequencies

gguf = pytest.importorskip("gguf")

VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(90)],
    "tokenizer.ggml.token_type": [1] * 90,
    "tokenizer.ggml.merges": ["t1 t2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_heads": 6},
    "grouped": {"n_heads": 6, "n_kv_heads": 2},
    "nine heads": {"n_heads": 9, "n_kv_heads": 3, "dim": 144},
    "tied": {"n_heads": 4, "tie_embeddings": True},
    "wide heads": {"n_heads": 4, "head_dim": 32, "norm_eps": 1e-6, "rope_theta": 5e5},
    "odd rows": {"n_heads": 6, "hidden_dim": 100},
}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"n_heads": 6, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3": {"n_heads": 6, "rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
    "llama3, by 32, of 64": {
        "n_heads": 6,
        "rope_scaling": RopeScaling(
            kind="llama3", factor=32.0, original_max_seq_len=64, high_freq_factor=3.0
        ),
    },
}


def model(**shape: Any) -> Llama:
    config = Config(**{**dict(vocab_size=90, dim=96, n_layers=2, max_seq_len=128), **shape})
    return randomised(Llama(config, seed=3).eval())


def put(path: Path, llama: Llama, kind: str = "f32", **more: Any) -> Path:
    path.write_bytes(b"".join(gguf_parts(llama.config, llama.state_dict(), {**VOCABULARY, **more}, kind)))
    return path


@pytest.mark.parametrize("shape", [*SHAPES.values(), *SCALED.values()], ids=[*SHAPES, *SCALED])
def test_what_is_written_is_read_again_to_the_bit(tmp_path: Path, shape: dict[str, Any]) -> None:
    llama = model(**shape)
    config, weights, metadata = read_gguf(put(tmp_path / "a.gguf", llama))
    assert config == llama.config
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())
    assert {name: metadata[name] for name in VOCABULARY if name != "tokenizer.ggml.token_type"} == {
        name: value for name, value in VOCABULARY.items() if name != "tokenizer.ggml.token_type"
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_reads_it_with_the_same_logits(tmp_path: Path, shape: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    llama = model(**shape)
    put(tmp_path / "a.gguf", llama)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ids = torch.randint(0, 90, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(ids).logits, llama(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", TYPES)
def test_the_published_reader_finds_every_key_and_number(tmp_path: Path, kind: str) -> None:
    llama = model(**SHAPES["odd rows"])
    path = put(tmp_path / "a.gguf", llama, kind)
    theirs, ours = gguf.GGUFReader(path), GGUF(path)
    assert {tensor.name for tensor in theirs.tensors} == ours.tensors.keys()
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.numbers(tensor.name), expected.reshape(ours.tensors[tensor.name].shape))
    for key, value in ours.metadata.items():
        found = theirs.fields[key].contents()
        if isinstance(value, float):
            assert found == pytest.approx(value)
        else:
            assert found == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert theirs.fields["general.file_type"].contents() == TYPES[kind][1]


def test_kinds_of_tensors_are_those_that_were_asked_for(tmp_path: Path) -> None:
    def kinds(kind: str) -> dict[str, str]:
        found = GGUF(put(tmp_path / "a.gguf", model(**SHAPES["odd rows"]), kind)).tensors
        return {name: each.kind.name for name, each in found.items()}

    found = kinds("q4_0")
    assert found["token_embd.weight"] == found["output.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == found["blk.1.ffn_up.weight"] == "Q4_0"
    assert found["blk.0.ffn_down.weight"] == "F16"  # rows of 100
    assert found["blk.0.attn_norm.weight"] == found["output_norm.weight"] == "F32"
    assert set(kinds("bf16").values()) == {"BF16", "F32"}
    with pytest.raises(UsageError) as caught:
        kinds("q3_k")
    assert caught.value.code == "E101"


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4_0", 0.25)])
def test_logits_of_small_numbers_stay_near(tmp_path: Path, kind: str, bound: float) -> None:
    llama = model(**SHAPES["grouped"])
    _, weights, _ = read_gguf(put(tmp_path / "a.gguf", llama, kind))
    ids = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llama(ids)
        llama.load_state_dict(weights)
        error = (llama(ids) - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 0 < error < bound


# ---- RoPE


def test_scaled_frequencies_stand_in_a_tensor_and_others_in_none(tmp_path: Path) -> None:
    for name, shape in {**SHAPES, **SCALED}.items():
        tensors = GGUF(put(tmp_path / "a.gguf", model(**shape))).tensors
        assert (ROPE in tensors) == name.startswith("llama3")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_of_a_file_of_llama_cpp_are_recognised(tmp_path: Path, factor: float) -> None:
    """Which has the divisors alone, computed here as convert_hf_to_gguf.py does."""
    llama = model(n_heads=2, rope_theta=5e5, rope_scaling=RopeScaling(kind="llama3", factor=factor))
    hd, divisors = llama.config.head_dim, []
    for i in range(0, hd, 2):
        wavelength = 2 * np.pi * 5e5 ** (i / hd)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    path = put(tmp_path / "a.gguf", llama)
    stored = GGUF(path).tensors[ROPE]
    data = bytearray(path.read_bytes())
    data[stored.begin : stored.begin + stored.bytes] = np.array(divisors, "<f4").tobytes()
    for key in LLAMA3.values():
        data = data.replace(key.encode(), key.replace("babyllama", "somebodys").encode())
    path.write_bytes(data)
    found = read_gguf(path)[0]
    assert found == llama.config
    assert torch.equal(rope_frequencies(found), rope_frequencies(llama.config))
    wrong = np.array(divisors, "<f4") * np.linspace(1, 1.1, hd // 2, dtype="<f4")
    data[stored.begin : stored.begin + stored.bytes] = wrong.tobytes()
    path.write_bytes(data)
    assert ROPE in refusal(path)


# ---- files that are none, or lie. The kinds are those of llama.cpp's tests/test-gguf.cpp and more.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    count = len(shape) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(shape)}qIQ", count, *shape, kind, offset)


def file(
    keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", version: int = 3,
    magic: bytes = b"GGUF", n_tensors: int | None = None, n_keys: int | None = None,
) -> bytes:  # fmt: skip
    """A file of these parts, with numbers that need not be right."""
    counts = [len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys]
    head = magic + struct.pack("<Iqq", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


U32, F32, STRING, ARRAY = 4, 6, 8, 9
ONE = tensor("a", [32])
HOSTILE = {
    "nothing": b"",
    "four bytes": b"GGUF",
    "another magic": file(magic=b"GGML"),
    "version 0": file(version=0),
    "version 1": file(version=1),
    "a later version": file(version=4),
    "the other byte order": file(version=3 << 24),
    "-1 tensors": file(n_tensors=-1),
    "-1 keys": file(n_keys=-1),
    "2^40 keys": file(n_keys=2**40),
    "more tensors than there are": file(tensors=[ONE], n_tensors=2),
    "a key of 2^60 bytes": file([struct.pack("<Q", 2**60) + b"a"]),
    "a key without a name": file([key("", U32, b"\0" * 4)]),
    "a key that is not UTF-8": file([text(b"\xff\xfe") + struct.pack("<I", U32) + b"\0" * 4]),
    "a type that is none": file([key("a", 13, b"\0" * 8)]),
    "a type of -1": file([key("a", 2**32 - 1, b"\0" * 8)]),
    "a key twice": file([key("a", U32, b"\0" * 4)] * 2),
    "a text of 2^60 bytes": file([key("a", STRING, struct.pack("<Q", 2**60))]),
    "an array of 2^60": file([key("a", ARRAY, struct.pack("<IQ", U32, 2**60))]),
    "an array of 2^60 texts": file([key("a", ARRAY, struct.pack("<IQ", STRING, 2**60))]),
    "an array of 2^61 bytes": file([key("a", ARRAY, struct.pack("<IQ", 0, 2**61))]),
    "an array of arrays": file([key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U32, 0))]),
    "an array of a type that is none": file([key("a", ARRAY, struct.pack("<IQ", 99, 1) + b"\0" * 8)]),
    "alignment 0": file([key("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment 3": file([key("general.alignment", U32, struct.pack("<I", 3))]),
    "alignment 2^31": file([key("general.alignment", U32, struct.pack("<I", 2**31))]),
    "an alignment that is a text": file([key("general.alignment", STRING, text("32"))]),
    "a tensor of 2^60 bytes of name": file(tensors=[struct.pack("<Q", 2**60) + b"a"]),
    "a tensor without a name": file(tensors=[tensor("", [32])], data=b"\0" * 128),
    "a tensor of too long a name": file(tensors=[tensor("a" * 300, [32])], data=b"\0" * 128),
    "five axes": file(tensors=[tensor("a", [1, 1, 1, 1, 32])], data=b"\0" * 128),
    "no axes": file(tensors=[tensor("a", [])], data=b"\0" * 128),
    "2^32 - 1 axes": file(tensors=[tensor("a", [32], axes=2**32 - 1)], data=b"\0" * 128),
    "an axis of -1": file(tensors=[tensor("a", [-1])], data=b"\0" * 128),
    "an axis of 0": file(tensors=[tensor("a", [0])], data=b"\0" * 128),
    "axes of 2^62": file(tensors=[tensor("a", [2**62, 4])], data=b"\0" * 128),
    "axes whose product overflows to 0": file(tensors=[tensor("a", [2**32, 2**32])], data=b"\0" * 128),
    "more numbers than bytes": file(tensors=[tensor("a", [33])], data=b"\0" * 128),
    "a kind that is none": file(tensors=[tensor("a", [32], 99)], data=b"\0" * 128),
    "a kind that was removed": file(tensors=[tensor("a", [32], 4)], data=b"\0" * 128),
    "rows that no blocks fill": file(tensors=[tensor("a", [33], 8)], data=b"\0" * 128),
    "an offset between": file(tensors=[tensor("a", [32], offset=4)], data=b"\0" * 256),
    "an offset behind the end": file(tensors=[tensor("a", [32], offset=2**40)], data=b"\0" * 128),
    "an offset of 2^64 - 32": file(tensors=[tensor("a", [32], offset=2**64 - 32)], data=b"\0" * 128),
    "a tensor twice": file(tensors=[ONE, ONE], data=b"\0" * 256),
    "tensors in one place": file(tensors=[ONE, tensor("b", [32])], data=b"\0" * 128),
    "tensors that overlap": file(tensors=[tensor("a", [64]), tensor("b", [32], offset=128)], data=b"\0" * 256),
    "numbers cut short": file(tensors=[ONE], data=b"\0" * 127),
}  # fmt: skip


def refusal(path: Path, code: str = "E210") -> str:
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert caught.value.code == code, caught.value
    return caught.value.found


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_at_once_and_in_little_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    refusal(path)
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 2**20
    tracemalloc.stop()


def test_the_texts_of_all_keys_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, six = tmp_path / "a.gguf", struct.pack("<IQ", STRING, 6) + text("ab") * 6
    path.write_bytes(file([key("a", ARRAY, six), key("b", ARRAY, six)]))
    assert len(GGUF(path).metadata) == 2
    for name, most, said in (
        ("MOST_TEXTS", 11, "has 12 texts up to b"),
        ("MOST_LETTERS", 25, "25 bytes of texts"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"babyllama.checkpoint.gguf.{name}", most)
            assert said in refusal(path)


def test_the_parts_that_hostile_files_are_made_of_make_good_ones_too(tmp_path: Path) -> None:
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("a", ARRAY, struct.pack("<IQ", F32, 2) + b"\0" * 8),
    ]
    (tmp_path / "a.gguf").write_bytes(file(keys, [ONE, tensor("b", [2, 3], offset=128)], b"\0" * 160))
    found = GGUF(tmp_path / "a.gguf")
    assert found.tensors["b"].shape == (3, 2)
    assert found.numbers("a").tolist() == [0.0] * 32
    assert len(gguf.GGUFReader(tmp_path / "a.gguf").tensors) == 2


@pytest.mark.parametrize(
    "what", ["architecture", "missing", "experts", "layers", "bias", "shape", "scaling", "text"]
)
def test_a_good_file_of_something_else_is_refused(tmp_path: Path, what: str) -> None:
    def metadata(**changes: Any) -> dict[str, Any]:
        return {name.replace("__", "."): value for name, value in changes.items()}

    changes: dict[str, Any] = {
        "architecture": metadata(general__architecture="qwen2"),
        "experts": metadata(llama__expert_count=8),
        "layers": {"llama.attention.head_count_kv": [6, 2]},
        "scaling": {"llama.rope.scaling.type": "yarn"},
        "text": {"llama.embedding_length": "96"},
        "shape": {"llama.feed_forward_length": 128},
    }
    path = put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **changes.get(what, {}))
    if what == "missing":
        path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_cound"))
    if what == "bias":
        path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.biases"))
    refusal(path, "E203" if what in ("bias", "shape") else "E210")


def test_cuts_and_flips_are_refused_or_read(tmp_path: Path) -> None:
    good = put(tmp_path / "good.gguf", model(n_heads=2, dim=32, vocab_size=90, n_layers=1)).read_bytes()
    head = min(each.begin for each in GGUF(tmp_path / "good.gguf").tensors.values())
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}

    def contents() -> Iterator[bytes]:
        yield from (good[:cut] for cut in rng.integers(0, len(good), 150))
        for place, bit in rng.integers(0, (head, 8), (500, 2)):
            yield good[:place] + bytes([good[place] ^ 1 << int(bit)]) + good[place + 1 :]

    for content in contents():
        (tmp_path / "a.gguf").write_bytes(content)
        try:
            _, weights, _ = read_gguf(tmp_path / "a.gguf")
            dict(weights)
            outcomes["read"] += 1
        except InputError as error:
            assert error.code in ("E203", "E210", "E211")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path: Path) -> None:
    llama = model(**SHAPES["plain"])
    llama.layers[1].attention.wv.weight.data[3, 5] = torch.nan
    _, weights, _ = read_gguf(put(tmp_path / "a.gguf", llama))
    with pytest.raises(InputError) as caught:
        dict(weights)
    assert caught.value.code == "E211"
    assert "layers.1.attention.wv.weight holds 1 numbers" in caught.value.found


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = put(tmp_path / "a.gguf", model(**SHAPES["plain"]))
    _, weights, _ = read_gguf(path)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(InputError) as caught:
        dict(weights)
    assert caught.value.code == "E210"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        refusal(path, "E201")


SINGLE = (
    "general.architecture",
    "llama.expert_count",
    "llama.attention.key_length",
    "llama.rope.scaling.type",
)


@pytest.mark.parametrize("key", [*SINGLE, "llama.embedding_length", "general.alignment"])
@pytest.mark.parametrize("value", [[1, 2], ["llama", "llama"], []])
def test_an_array_where_one_value_belongs_is_refused(tmp_path: Path, key: str, value: list[Any]) -> None:
    refusal(put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **{key: value}))


def test_linear_scaling_is_found_as_llama_cpp_finds_it(tmp_path: Path) -> None:
    """Which takes a missing type for linear, and an old key for the factor."""
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        found = read_gguf(put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **{key: 4.0}))[0].rope_scaling
        assert found == RopeScaling(kind="linear", factor=4.0)
        assert (
            read_gguf(put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **{key: 1.0}))[0].rope_scaling
            is None
        )
    whole = {"llama.rope.scaling.factor": 4}  # stored as a whole number
    found = read_gguf(put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **whole))[0].rope_scaling
    assert found == RopeScaling(kind="linear", factor=4.0)


def test_a_part_of_a_model_is_refused_with_the_command_that_joins_them(tmp_path: Path) -> None:
    path = put(tmp_path / "a.gguf", model(**SHAPES["plain"]), **{"split.count": 3})
    assert "one of 3 parts" in refusal(path)
    put(path, model(**SHAPES["plain"]), **{"split.count": 1})
    read_gguf(path)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_numbers_that_a_kind_cannot_hold_are_refused_with_one_that_can(tmp_path: Path, kind: str) -> None:
    llama = model(**SHAPES["plain"])
    llama.layers[0].attention.wq.weight.data[3, 5] = -1e5
    with pytest.raises(UsageError, match=r"wq\.weight") as caught:
        put(tmp_path / "a.gguf", llama, kind)
    assert caught.value.code == "E105"
    for held in ("f32", "bf16"):
        read_gguf(put(tmp_path / held, llama, held))[1]["layers.0.attention.wq.weight"]


def test_numbers_that_only_float32_can_hold_are_sent_there(tmp_path: Path) -> None:
    llama = model(**SHAPES["plain"])
    llama.layers[0].attention.wq.weight.data[3, 5] = 3.4e38
    for kind in ("bf16", "f16", "q8_0"):
        with pytest.raises(UsageError, match=r"wq\.weight") as caught:
            put(tmp_path / "a.gguf", llama, kind)
        assert caught.value.fix == "take f32"

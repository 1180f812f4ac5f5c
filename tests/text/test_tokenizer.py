"""Tokenizer: any text survives, control tokens cannot be typed, other programs agree, no file is trusted."""

import base64
import json
import os
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers

from babyllama.errors import InputError
from babyllama.text.tokenizer import SMALLEST_VOCAB, SPECIALS, Tokenizer

TEXTS = [
    "Once upon a time there was a little girl who lived in a little house by the sea.\n",
    "The little girl went to the sea, and the sea was blue; she didn't see the 1234567 fishes.\n",
    "def hello(name):\n    return f'hello {name}'\n\n\n    # naïve, 日本語, 🎉🎉\n",
] * 3
TRICKY = [
    "",
    " ",
    "  a",
    "\n\n\t ",
    "é",
    "e\u0301",
    "日本",
    "👩‍👩‍👧",
    "\0\x7f",
    "\u2028",
    "▁x ▁",
    "\ufeffx",
    "\ufffd",
    "<0x0A>",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def llama2c_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.bin: every letter of a sentence, and some pieces with scores."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(pieces)
    for rank, piece in enumerate(
        ["th", " th", "the", " the", "er", " t", "he", "re", "here", "ttt", "tt", "é"]
    ):
        pieces.append(piece)
        scores.append(-float(rank * 7 % 12))  # not in the order of the ids
    for letter in " abcdefghijklmnopqrstuvwxyz,.":
        pieces.append(letter)
        scores.append(-1000.0 - ord(letter))
    path = tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    path.write_bytes(_llama2c(pieces, scores))
    return path


def _llama2c(pieces: list[str], scores: list[float]) -> bytes:
    raw = [piece.encode() for piece in pieces]
    entries = (
        struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(raw, scores, strict=True)
    )
    return struct.pack("<i", max(map(len, raw))) + b"".join(entries)


def _read_llama2c(path: Path) -> tuple[list[str], list[float]]:
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode())
        scores.append(score)
        at += 8 + length
    return pieces, scores


def _run_c(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """What run.c does, slowly: join the neighbours whose union scores best, the leftmost first."""
    id_of = {piece: id for id, piece in enumerate(pieces)}
    ids: list[int] = []
    for character in (" " if text else "") + text:
        known = id_of.get(character)
        ids += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        unions = [(id_of.get(pieces[a] + pieces[b]), at) for at, (a, b) in enumerate(pairwise(ids))]
        scored = [(-scores[id], at, id) for id, at in unions if id is not None]
        if not scored:
            return ids
        _, at, id = min(scored)
        ids[at : at + 2] = [id]


def _sentencepiece_json(tmp_path: Path) -> Path:
    """A tokenizer.json in the manner of Llama 2."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ["▁", "a", "b", "ab", "▁ab", "▁a"]:
        vocab[piece] = len(vocab)
    core = Core(
        models.BPE(vocab, [("a", "b"), ("▁", "ab"), ("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path / "tokenizer.json"
    core.save(str(path))
    return path


def _write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# Any text survives.


@given(st.text())
@example("".join(TRICKY))
def test_decode_gives_back_every_string(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_decode_gives_back_tricky_strings(ours: Tokenizer, llama2c_file: Path, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text
    llama2c = Tokenizer.load(llama2c_file)
    assert llama2c.decode(llama2c.encode(text, bos=True)) == text


@given(st.text())
def test_decode_of_llama2c_gives_back_every_string(llama2c_file: Path, text: str) -> None:
    tokenizer = Tokenizer.load(llama2c_file)
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@given(st.lists(st.integers(0, 319)))
def test_decode_reads_any_ids_as_their_bytes(ours: Tokenizer, ids: list[int]) -> None:
    assert ours.decode(ids) == b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace")


@given(st.text())
def test_byte_lengths_add_up_to_the_bytes_of_the_text(ours: Tokenizer, text: str) -> None:
    lengths = ours.byte_lengths()
    assert sum(lengths[id] for id in ours.encode(text, bos=True, eos=True)) == len(text.encode())


@given(st.text())
def test_behind_bos_the_space_that_sentencepiece_puts_is_no_byte_of_the_text(
    ours: Tokenizer, llama2c_file: Path, text: str
) -> None:
    for tokenizer in (ours, Tokenizer.load(llama2c_file)):
        first, rest = tokenizer.byte_lengths(tokenizer.bos_id), tokenizer.byte_lengths()
        ids = tokenizer.encode(text, bos=True, eos=True)
        lengths = [(first if before == tokenizer.bos_id else rest)[id] for before, id in pairwise(ids)]
        assert sum(lengths) == len(text.encode())
    assert ours.byte_lengths(ours.bos_id) == ours.byte_lengths()


def test_behind_bos_a_piece_that_begins_with_the_space_has_a_byte_less(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_sentencepiece_json(tmp_path))
    _, id = tokenizer.encode("ab", bos=True)
    assert tokenizer.byte_lengths()[id] == 3
    assert tokenizer.byte_lengths(tokenizer.bos_id)[id] == 2


@given(st.lists(st.text(), max_size=5))
def test_encode_batch_is_encode_of_each(ours: Tokenizer, texts: list[str]) -> None:
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_half_a_surrogate_pair_is_e302(ours: Tokenizer) -> None:
    for call in (lambda: ours.encode("ab\ud83d"), lambda: ours.encode_batch(["a", "ab\ud83d"])):
        with pytest.raises(InputError, match="character 2 is U\\+D83D") as error:
            call()
        assert error.value.code == "E302"


def test_a_megabyte_without_a_space_takes_linear_time(ours: Tokenizer) -> None:
    def seconds(length: int) -> float:
        start = time.perf_counter()
        assert len(ours.encode("x" * length)) == length
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(10**6) < max(
        10 * seconds(250_000), 2
    )  # a quadratic encoder takes 16 times as long, and minutes


# Control tokens.


def test_control_tokens_come_first(ours: Tokenizer) -> None:
    vocab = json.loads(ours.files()["tokenizer.json"])["model"]["vocab"]
    assert [vocab[name] for name in SPECIALS] == list(range(len(SPECIALS)))
    assert (ours.bos_id, ours.eos_id, ours.eos_ids, ours.special_ids) == (
        0,
        1,
        frozenset({1}),
        frozenset(range(5)),
    )
    assert ours.vocab_size == 320


@given(st.lists(st.sampled_from([*SPECIALS, "[INST]", " ", "a", "\n"])))
def test_control_tokens_typed_by_a_user_stay_text(ours: Tokenizer, parts: list[str]) -> None:
    ids = ours.encode("".join(parts))
    assert not ours.special_ids & set(ids)
    assert ours.decode(ids) == "".join(parts)


def test_control_tokens_typed_into_llama2c_stay_text(llama2c_file: Path) -> None:
    tokenizer = Tokenizer.load(llama2c_file)
    assert not tokenizer.special_ids & set(tokenizer.encode("<s></s> <unk> a</s>"))


def test_control_tokens_in_the_training_text_are_ordinary_text() -> None:
    tokenizer = Tokenizer.train(["<|eot_id|> said the girl <|begin_of_text|>"] * 20, 280)
    assert not tokenizer.special_ids & set(tokenizer.encode("<|eot_id|> said"))


def test_bos_and_eos_are_added_once_when_asked(ours: Tokenizer) -> None:
    ids = ours.encode("a girl")
    assert ours.encode("a girl", bos=True, eos=True) == [ours.bos_id, *ids, ours.eos_id]
    assert ours.encode("") == []


@pytest.mark.parametrize("kind", ["ours", "llama2c"])
def test_autotokenizer_gives_the_same_ids_with_one_bos(
    kind: str, ours: Tokenizer, llama2c_file: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = ours if kind == "ours" else Tokenizer.load(llama2c_file)
    theirs = transformers.AutoTokenizer.from_pretrained(_write(tokenizer.files(), tmp_path / "made"))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in [*TEXTS[:3], *TRICKY, "don't  stop 12345\r\n\r\n  x"]:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text, bos=True), text
        assert theirs.decode(ids, skip_special_tokens=True) == text


# Training.


def test_words_are_split_as_llama_3_splits_them() -> None:
    tokenizer = Tokenizer.train(["12345678 don't stop!\n\n\n  now"] * 50, 1000, exact=False)
    pieces = [
        tokenizer.token_bytes(id).decode() for id in tokenizer.encode("12345678 don't stop!\n\n\n  now")
    ]
    assert pieces == ["123", "456", "78", " don", "'t", " stop", "!\n\n\n", " ", " now"]
    assert json.loads(tokenizer.files()["tokenizer.json"])["model"]["ignore_merges"] is True


def test_a_text_that_repeats_itself_for_long_gives_no_token_that_nobody_reads() -> None:
    """Chinese has no spaces: what is between two marks is one word."""
    line = "".join(chr(0x4E00 + n) for n in range(300))
    tokenizer = Tokenizer.train([line] * 9, 1500, exact=False)
    assert 128 < max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)) <= 256
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_too_small_a_vocabulary_is_e304() -> None:
    with pytest.raises(InputError, match=f"--vocab-size {SMALLEST_VOCAB}") as error:
        Tokenizer.train(TEXTS, SMALLEST_VOCAB - 1)
    assert error.value.code == "E304"
    assert Tokenizer.train(TEXTS, SMALLEST_VOCAB).vocab_size == SMALLEST_VOCAB


def test_too_large_a_vocabulary_is_e304_and_names_the_largest() -> None:
    with pytest.raises(InputError) as error:
        Tokenizer.train(TEXTS, 5000)
    assert error.value.code == "E304"
    largest = int(error.value.fix.split()[-1])
    assert Tokenizer.train(TEXTS, largest).vocab_size == largest
    with pytest.raises(InputError):
        Tokenizer.train(TEXTS, largest + 1)
    assert Tokenizer.train(TEXTS, 5000, exact=False).vocab_size == largest


def test_a_pair_must_occur_twice_to_become_a_token() -> None:
    assert Tokenizer.train(["abcdefgh"], 5000, exact=False).vocab_size == SMALLEST_VOCAB
    assert Tokenizer.train(["ab cd", "ab ce"], 5000, exact=False).vocab_size > SMALLEST_VOCAB


def test_no_text_at_all_gives_the_bytes_alone() -> None:
    tokenizer = Tokenizer.train([], 5000, exact=False)
    assert tokenizer.vocab_size == SMALLEST_VOCAB
    assert tokenizer.decode(tokenizer.encode("日本")) == "日本"


def test_training_does_not_depend_on_threads_or_order() -> None:
    program = (
        "import sys; from babyllama.text.tokenizer import Tokenizer\n"
        "letters = 'abcdefghij'\n"
        "words = [' '.join(letters[int(d)] * 2 for d in str(n * n)) + ''.join(letters[int(d)] for d in str(n))\n"
        "         for n in range(5000)]\n"
        "print(Tokenizer.train(words[:: int(sys.argv[1])], 1100).sha256)"
    )
    said = set()
    for threads, order in (("1", "1"), ("4", "1"), ("3", "-1")):
        settings = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(
            [sys.executable, "-c", program, order], env=settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1


# Loading.


def test_files_loaded_again_are_the_same_tokenizer(ours: Tokenizer, tmp_path: Path) -> None:
    folder = _write(ours.files(), tmp_path / "made")
    for path in (folder, folder / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.files() == ours.files()
        assert (again.sha256, again.vocab_size, again.bos_id, again.eos_ids) == (
            (ours.sha256, ours.vocab_size, ours.bos_id, ours.eos_ids)
        )
        assert again.encode(TEXTS[2]) == ours.encode(TEXTS[2])


def test_eos_is_every_id_of_generation_config(ours: Tokenizer, tmp_path: Path) -> None:
    folder = _write(ours.files(), tmp_path / "made")
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [1, 4]}', encoding="utf-8"
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (1, frozenset({1, 4}))


def test_eos_named_by_an_object_is_understood(ours: Tokenizer, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": {"content": "<|eot_id|>"}}
    files = {**ours.files(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.load(_write(files, tmp_path / "made"))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, frozenset({4}))


def test_bos_and_eos_without_any_config_are_the_usual_names(ours: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(ours.files()["tokenizer.json"])
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, frozenset({1}))


def test_sentencepiece_tokenizer_json_is_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_sentencepiece_json(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids) == (1, 2, frozenset({0, 1, 2}))
    ids = tokenizer.encode("ab a\nb é", bos=True)
    assert [tokenizer.token_bytes(id) for id in ids] == [
        *(b"", b" ab", b" a", b"\n", b"b", b" ", b"\xc3", b"\xa9"),
    ]
    assert tokenizer.decode(ids) == "ab a\nb é"
    assert tokenizer.decode(tokenizer.encode(" ab")[1:]) == " ab"  # without BOS, ids go on from something


def test_llama2c_joins_as_run_c_does(llama2c_file: Path) -> None:
    pieces, scores = _read_llama2c(llama2c_file)
    tokenizer = Tokenizer.load(llama2c_file)
    for text in ["the other there", "tttttt here", "THE été\n", " the", "", "x  the, there.", "thethethe"]:
        assert tokenizer.encode(text) == _run_c(text, pieces, scores), text


def test_tok512_tokenizes_stories_as_run_c_does(fixture_file) -> None:
    path = fixture_file("tok512.bin")
    pieces, scores = _read_llama2c(path)
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (512, 1, frozenset({2}))
    for text in [
        "Once upon a time, there was a little girl",
        'Lily said, "I can\'t."\n\nTom  ran 10 miles!',
        *TRICKY,
    ]:
        ids = tokenizer.encode(text, bos=True)
        assert ids[1:] == _run_c(text, pieces, scores), text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("Once upon a time, there was a little girl")) == 12


def test_an_id_outside_the_vocabulary_is_e309(ours: Tokenizer) -> None:
    for id in (-1, 320):
        for call in (ours.token_bytes, lambda id: ours.decode([5, id])):
            with pytest.raises(InputError, match=f"id {id} ") as error:
                call(id)
            assert error.value.code == "E309"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}",
        b"[1]",
        b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        b'{"a": ' + b"[" * 100_000,
        b"\x0a\x0d\x0a\x05<unk>",  # the beginning of a SentencePiece model
        struct.pack("<ifi", 10, 0.0, 2**31 - 1) + b"a",
        struct.pack("<ifi", 10, 0.0, -5) + b"a",
        struct.pack("<ifi", 10, float("nan"), 1) + b"a",
        struct.pack("<ifi", 10, 0.0, 2) + b"\xff\xff",
        struct.pack("<ifi", 10, 0.0, 1) + b"a",
    ],
)
def test_a_malformed_file_is_e310(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        Tokenizer.load(path)
    assert error.value.code == "E310"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:82e9d3\nsize 2183982\n", "Git LFS"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "a web page"),
        (b"\n<html lang=en>", "a web page"),
        (b"GGUF\x03\0\0\0" + bytes(16), "is a GGUF"),
        (b"PK\x03\x04" + b"x" * 50, "neither JSON nor SentencePiece"),
        (b'\xff\xfe{\0"\0', "neither JSON nor SentencePiece"),
    ],
)
def test_a_file_that_is_something_else_is_e310_and_named(data: bytes, found: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.bin"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=found) as error:
            Tokenizer.load(tmp_path / name)
        assert error.value.code == "E310"


def test_a_folder_may_hold_any_kind_of_file_and_json_comes_first(
    ours: Tokenizer, llama2c_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_file.read_bytes())
    llama2c = Tokenizer.load(llama2c_file)
    assert Tokenizer.load(tmp_path).sha256 == llama2c.sha256
    lines = (
        b"%b %d\n" % (base64.b64encode(token), rank)
        for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"th"])
    )
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    ranks = Tokenizer.load(tmp_path)
    assert ranks.vocab_size == 257 + 256
    (tmp_path / "tokenizer.json").write_bytes(ours.files()["tokenizer.json"])
    assert Tokenizer.load(tmp_path).sha256 == ours.sha256
    (tmp_path / "any.name").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert Tokenizer.load(tmp_path / "any.name").sha256 == ranks.sha256


def _split(pattern: object) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replaced(literal: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": literal}, "content": content}


AROUND = {  # of tokens that are put around a text, the text left out
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
    },
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"pre_tokenizer": _split("(a+)+$")}, "pattern '\\(a\\+\\)\\+\\$'"),
        ({"pre_tokenizer": _split("a*a*a*a*b")}, "which is not known"),
        ({"normalizer": {**_replaced("a", ""), "pattern": {"Regex": "(a|a)*b"}}}, "which is not known"),
        ({"normalizer": _replaced("a", "aa")}, "makes texts longer"),
        ({"normalizer": _replaced("", "a")}, "makes texts longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "makes texts longer"),
        ({"normalizer": {"type": "ByteLevel"}}, "step ByteLevel"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}}, "too many steps"),
        ({"normalizer": {"type": "Sequence", "normalizers": 5}}, "is not a tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "step Whitespace"),
        ({"pre_tokenizer": 5}, "step None"),
        ({"pre_tokenizer": {"type": ["Split"]}}, "step \\['Split'\\]"),
        ({"normalizer": {"type": {"Strip": 1}}}, "step {'Strip': 1}"),
        ({"normalizer": {"type": "\x1b[2J"}}, r"step \\x1b\[2J that"),
        ({"pre_tokenizer": _split(["a"])}, "which is not known"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}}, "twice"),
        ({"added_tokens": {}}, "is not a list"),
        ({"added_tokens": [{"id": 0}]}, "lacks an id"),
        ({"added_tokens": [{"id": -1, "content": "x", "special": True}]}, "lacks an id"),
        ({"added_tokens": [{"id": 7, "content": "x" * 1000, "special": True}]}, "long"),
        ({"added_tokens": [{"id": 7, "content": "", "special": True}]}, "is empty"),
        ({"added_tokens": [{"id": 7, "content": "<|eot_id|>", "special": True}]}, "has two ids"),
        ({"added_tokens": [{"id": 9, "content": "<x>", "special": True}]}, "given twice"),
        ({"added_tokens": [{"id": 321, "content": "<x>", "special": True}]}, "some are missing"),
        ({"decoder": {"type": "Unknown"}}, "is not a tokenizer"),
        ({"model": {"type": "Unigram"}}, "expected BPE"),
        ({"model": {"dropout": 0.5}}, "dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"merges": [["", "a"]]}}, "merge 1"),
        ({"model": {"merges": [["a", ""]]}}, "merge 1"),
        ({"model": {"merges": ["ab"]}}, "merge 1"),
        ({"model": {"merges": [["a", "\u00e9\u00e9"]]}}, "merge 1"),
        ({"model": {"merges": [["a"]]}}, "no merges"),
        ({"model": {"merges": {}}}, "no merges"),
        ({"model": {"vocab": {"a" * 100_000: 0}}}, "no vocab"),
        ({"model": {"vocab": {"a": -1}}}, "no vocab"),
        ({"model": {"vocab": {"a": 0.5}}}, "no vocab"),
        ({"model": {"vocab": []}}, "no vocab"),
        ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "missing or given twice"),
        ({"model": {"vocab": {"a": 0, "b": 2}, "merges": []}}, "missing or given twice"),
        ({"model": {"vocab": {"\ud800": 0}, "merges": []}}, "no text"),
        ({"post_processor": {"x": "y" * 2**20}}, "bytes besides"),
        ({"vocab": {}}, "in its model"),
        ({"post_processor": AROUND}, "0 times"),
        ({"post_processor": {**AROUND, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2}}, "2 times"),
    ],
)
def test_a_tokenizer_json_that_no_llama_has_is_e310(
    ours: Tokenizer, change: dict[str, object], found: str, tmp_path: Path
) -> None:
    layout = json.loads(ours.files()["tokenizer.json"])
    for key, value in change.items():
        if key == "model":
            layout["model"].update(value)
        else:
            layout[key] = value
    if "vocab" in change:
        layout = {"vocab": {}, **layout}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(InputError, match=found) as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "E310"


def test_a_token_that_is_given_twice_is_e310(ours: Tokenizer, tmp_path: Path) -> None:
    data = ours.files()["tokenizer.json"].replace(b'"vocab":{', b'"vocab":{"!":5,')
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match="occurs twice") as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "E310"


def test_a_control_token_that_a_text_can_hold_is_e310(ours: Tokenizer, tmp_path: Path) -> None:
    """A word that is in the vocabulary is taken whole, also if it is the name of a control token."""
    layout = json.loads(ours.files()["tokenizer.json"])
    for token in layout["added_tokens"]:
        if token["content"] == "<|eot_id|>":
            token["content"] = "stop"
    layout["model"]["vocab"]["stop"] = layout["model"]["vocab"].pop("<|eot_id|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(InputError, match="'stop' would be encoded as a control token") as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "E310"


def test_a_tokenizer_json_may_be_written_in_any_way(ours: Tokenizer, tmp_path: Path) -> None:
    layout = json.loads(ours.files()["tokenizer.json"])
    old = {**layout, "model": {**layout["model"], "merges": [" ".join(m) for m in layout["model"]["merges"]]}}
    turned = {**layout, "model": dict(reversed(layout["model"].items()))}
    for written in (
        json.dumps(layout, indent=2),
        json.dumps(layout, ensure_ascii=False, indent="\t"),
        json.dumps(old),
        json.dumps(turned, separators=(",", ":")),
        "\r\n" + json.dumps(layout),
    ):
        (tmp_path / "tokenizer.json").write_bytes(written.encode())
        again = Tokenizer.load(tmp_path)
        assert (again.vocab_size, again.special_ids) == (ours.vocab_size, ours.special_ids)
        assert again.encode(TEXTS[2]) == ours.encode(TEXTS[2])


def test_nothing_at_the_path_is_e310(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json", Path(os.devnull)):
        with pytest.raises(InputError) as error:
            Tokenizer.load(path)
        assert error.value.code == "E310"


def test_a_file_at_which_the_library_panics_only_when_it_encodes_is_e310(
    ours: Tokenizer, tmp_path: Path
) -> None:
    """A template without a type is not checked by it, and may name a token that it does not define."""
    layout = json.loads(ours.files()["tokenizer.json"])
    layout["post_processor"]["type"] = 255
    layout["post_processor"]["special_tokens"]["other"] = layout["post_processor"]["special_tokens"].pop(
        SPECIALS[0]
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "E310"


def test_an_id_of_a_billion_is_e310_and_allocates_nothing(ours: Tokenizer, tmp_path: Path) -> None:
    layout = json.loads(ours.files()["tokenizer.json"])
    layout["model"]["vocab"]["zzz"] = 1_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(InputError, match="1000000001 ids") as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "E310"


def test_a_broken_config_beside_the_tokenizer_is_e310(ours: Tokenizer, tmp_path: Path) -> None:
    folder = _write({**ours.files(), "generation_config.json": b'{"eos_token_id": '}, tmp_path / "made")
    with pytest.raises(InputError, match="generation_config") as error:
        Tokenizer.load(folder)
    assert error.value.code == "E310"
    many = b'{"a": [%b{}]}' % (b"{}," * 2**20)  # which would take 25 times its bytes in memory
    folder = _write({**ours.files(), "tokenizer_config.json": many}, tmp_path / "long")
    with pytest.raises(InputError, match="bytes of JSON") as error:
        Tokenizer.load(folder)
    assert (error.value.code, error.value.where) == ("E310", "tokenizer_config.json")
    fewer = b'{"a": [%b{}]}' % (b"{}," * 2**19)
    folder = _write({**ours.files(), "tokenizer_config.json": fewer}, tmp_path / "shorter")
    with pytest.raises(InputError, match="more than 262144 commas and brackets"):
        Tokenizer.load(folder)


@given(st.data())
def test_a_damaged_file_loads_or_is_e310(ours: Tokenizer, llama2c_file: Path, data: st.DataObject) -> None:
    original = data.draw(st.sampled_from([ours.files()["tokenizer.json"], llama2c_file.read_bytes()]))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = llama2c_file.with_name("damaged")
    path.write_bytes(
        damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    )
    try:
        tokenizer = Tokenizer.load(path)
    except InputError as error:
        assert error.code == "E310"
    else:
        tokenizer.decode(tokenizer.encode("the girl", bos=True))


def test_the_tokenizer_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"  # importing them now fails
        "from babyllama.text.stream import TextStream; from babyllama.text.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(['aaaa aaaa'], 262).decode([0, 261]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "aa\n", done.stderr


@pytest.mark.parametrize(
    "beside", [{"chat_template": "a\ud800"}, {"eos_token": "\udfff", "x_token": "\ud800"}]
)
def test_half_a_character_beside_a_tokenizer_is_e310(ours: Tokenizer, beside: dict[str, str]) -> None:
    config = {**json.loads(ours.files()["tokenizer_config.json"]), **beside}
    with pytest.raises(InputError, match="half of a character") as error:
        Tokenizer({**ours.files(), "tokenizer_config.json": json.dumps(config).encode()})
    assert error.value.code == "E310"

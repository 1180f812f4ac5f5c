"""Characters <-> token ids: byte-pair encoding, trained here or read from the files of the Llama family.

Three kinds of vocabulary, one class:

    byte-level BPE    Llama 3, SmolLM2, and what we train: a token is bytes, any text survives
    SentencePiece     Llama 1 and 2: a token is characters, unknown ones fall back to <0x..> bytes
    llama2.c          tokenizer.bin: the second kind with scores in place of merges

Whatever the kind, a token adds fixed bytes to the text (`token_bytes`), and text is those bytes joined and
read as UTF-8. Decoding, streaming and counting bits per byte all rest on that one definition.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

from babyllama.errors import InputError

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
SPECIALS = (
    BOS,
    EOS,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)  # the first ids, in this order
SMALLEST_VOCAB = 256 + len(SPECIALS)

# The split of Llama 3: merges never cross these borders. llama.cpp knows such a vocabulary as `llama-bpe`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BOS_NAMES = (BOS, "<s>", "<|startoftext|>", "<|im_start|>")
EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")

LARGEST_FILE = 64 * 2**20  # bytes; the tokenizer.json of Llama 3 has 9 MB
LARGEST_LLAMA2C = 8 * 2**20  # bytes; Llama 2's has 0.4 MB
LONGEST_PIECE = 256  # bytes of one token of a llama2.c file
LARGEST_VOCAB = 2**20

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CONFIGS = (*FILES[1:], "generation_config.json")


class Tokenizer:
    """Text <-> ids of one vocabulary.

    bos_id, eos_id  begin and end a document; `eos_ids` holds every id at which generation stops.
    adds_bos        whether other programs, which do as tokenizer.json says, put BOS before a text.
    special_ids     control tokens: they add nothing to the text, and no text encodes to them.
    vocab_size      highest id + 1.
    sha256          of tokenizer.json.

    `decode(encode(text, bos=True)) == text` for every string, of tokenizers trained here and of llama2.c's;
    with a vocabulary from elsewhere, as far as its own normalisation allows.
    """

    def __init__(self, files: Mapping[str, bytes], where: object = "tokenizer.json") -> None:
        """From the contents of tokenizer.json and, if there, of the files named in `CONFIGS`. Raises E310."""
        data = files["tokenizer.json"]
        layout = _parse(data, where)
        core = _core(data, where)
        self._core = core
        self._files = {name: files[name] for name in FILES if name in files}
        self.sha256 = hashlib.sha256(data).hexdigest()

        vocab = core.get_vocab(with_added_tokens=True)
        added = core.get_added_tokens_decoder()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST_VOCAB:
            _broken(where, f"has {self.vocab_size} ids, expected 1 to {LARGEST_VOCAB}")
        self.special_ids = frozenset(id for id, token in added.items() if token.special)

        self._pieces = [b""] * self.vocab_size
        to_bytes = _token_reader(core, layout, where)
        for token, id in vocab.items():
            self._pieces[id] = token.encode() if id in added else to_bytes(token)
        for id in self.special_ids:
            self._pieces[id] = b""

        self.bos_id, self.eos_id, self.eos_ids = _ends(files, vocab, self.vocab_size, where)
        # SentencePiece puts a space before every text, so that a word has one form wherever it stands.
        first = core.encode("a", add_special_tokens=False).ids[:1]
        self._prefixes_space = any(self._pieces[id].startswith(b" ") for id in first)
        self.adds_bos = core.encode("a").ids[:1] == [self.bos_id]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, exact: bool = True) -> "Tokenizer":
        """Byte-level BPE with `vocab_size` ids: 5 control tokens, 256 bytes, then the most frequent pairs.

        The same texts give the same bytes, whatever the number of threads. A pair must occur twice to become
        a token; with exact=False texts with too few such pairs give a smaller vocabulary instead of E304.

        Raises InputError E304 for a vocab_size that is too small, or larger than the texts can give.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise InputError(
                "E304",
                "vocab_size",
                f"{vocab_size} is too small: 256 bytes and {len(SPECIALS)} control tokens come first",
                f"use a vocabulary of at least {SMALLEST_VOCAB}:  --vocab-size {SMALLEST_VOCAB}",
            )
        core = Core(models.BPE(ignore_merges=True))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator((_valid(text) for text in texts), trainer)
        largest = core.get_vocab_size()
        if exact and largest < vocab_size:
            raise InputError(
                "E304",
                "vocab_size",
                f"{vocab_size} is more than this text can give: only {largest} tokens occur often enough",
                f"use a vocabulary of at most {largest}, or more text:  --vocab-size {largest}",
            )
        core.post_processor = _one_bos(BOS, 0)
        return cls({"tokenizer.json": core.to_str().encode()})

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A tokenizer.json, a folder that holds one, or the tokenizer.bin of llama2.c; told apart by content.

        bos and eos come from tokenizer_config.json and generation_config.json beside it, else from the names
        that are usual. Raises InputError E310.
        """
        path = Path(path)
        if path.is_dir():
            names = [name for name in ("tokenizer.json", "tokenizer.bin") if (path / name).is_file()]
            if not names:
                _broken(path, "holds no tokenizer.json")
            path /= names[0]
        data = _read(path)
        if data.lstrip()[:1] != b"{":
            return cls({"tokenizer.json": _from_llama2c(data, path)}, path)
        beside = {name: _read(path.with_name(name)) for name in CONFIGS if path.with_name(name).is_file()}
        return cls({**beside, "tokenizer.json": data}, path)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text; the names of control tokens inside it are ordinary characters. Raises E302."""
        ids = self._core.encode(_valid(text), add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [_valid(text) for text in texts]
        return [encoding.ids for encoding in self._core.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises E309 for an unknown id."""
        pieces, previous = [], None
        for id in ids:
            pieces.append(self.bytes_after(previous, id))
            previous = id
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that this token adds to a text; none for a control token. Raises E309."""
        if not 0 <= id < self.vocab_size:
            raise InputError(
                "E309",
                "token ids",
                f"id {id} is outside the vocabulary, expected 0 to {self.vocab_size - 1}",
                "use the tokenizer that the ids were made with:  --tokenizer FILE",
            )
        return self._pieces[id]

    def bytes_after(self, previous: int | None, id: int) -> bytes:
        """`token_bytes(id)` without the space that SentencePiece put between BOS and the text."""
        piece = self.token_bytes(id)
        return piece[1:] if self._prefixes_space and previous == self.bos_id and piece[:1] == b" " else piece

    def byte_lengths(self, previous: int | None = None) -> list[int]:
        """For each id, how many bytes of text it stands for behind `previous`: the denominators of bits per byte.

        Only BOS makes a difference there, and only to SentencePiece (see `bytes_after`).
        """
        return [len(self.bytes_after(previous, id)) for id in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        """What `transformers.AutoTokenizer` needs in a folder. Files that were loaded come back unchanged."""
        bos, eos = (self._core.id_to_token(id) for id in (self.bos_id, self.eos_id))
        config = {
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        made = {
            "tokenizer_config.json": _dump(config),
            "special_tokens_map.json": _dump({"bos_token": bos, "eos_token": eos}),
        }
        return {**made, **self._files}


def _valid(text: str) -> str:
    """text itself. Raises E302 for a lone surrogate, half of a character that UTF-8 cannot write."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "E302",
                "text",
                f"character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair",
                'remove it, or replace it:  text.encode("utf-8", "replace").decode()',
            ) from None
    return text


def _one_bos(bos: str, id: int) -> processors.TemplateProcessing:
    """For other programs: their `encode` puts exactly one BOS before a text. Ours asks for none."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, id)]
    )


def _dump(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# Reading files, which may hold anything.


def _broken(where: object, found: str) -> NoReturn:
    raise InputError(
        "E310",
        where,
        found,
        "give the tokenizer.json of a byte-level or SentencePiece BPE, or the tokenizer.bin of llama2.c; "
        "transformers writes the first from most forms:  AutoTokenizer.from_pretrained(A).save_pretrained(B)",
    )


def _read(path: Path) -> bytes:
    """The whole file, if it is a regular one of at most LARGEST_FILE bytes."""
    try:
        if not path.is_file():
            _broken(path, "is not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        _broken(path, f"cannot be read: {error.strerror}")
    if len(data) > LARGEST_FILE:
        _broken(path, f"is larger than {LARGEST_FILE} bytes")
    return data


def _parse(data: bytes, where: object) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        _broken(where, f"is not JSON ({error})")
    if not isinstance(value, dict):
        _broken(where, "is not a JSON object")
    return value


def _core(data: bytes, where: object) -> Core:
    try:
        core = Core.from_str(data.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust side is no Exception
        _broken(where, f"is not a tokenizer ({str(error)[:200]})")
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # what a user types is text, even if it looks like <|eot_id|>
    return core


def _token_reader(core: Core, layout: dict[str, Any], where: object) -> Callable[[str], bytes]:
    """The function from a token, as the file spells it, to its bytes."""
    if not isinstance(core.model, models.BPE):
        _broken(where, f"is a {type(core.model).__name__} vocabulary, expected BPE")
    decoder = json.dumps(layout.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder or '"ByteLevel"' in json.dumps(layout.get("pre_tokenizer")):
        byte_of = _bytes_of_letters()
        return lambda token: (
            bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()
        )
    if not core.model.byte_fallback:
        _broken(where, "is neither byte-level nor has byte fallback, so that not every text can be encoded")
    space = "▁" if "▁" in decoder or "Metaspace" in decoder else " "

    def to_bytes(token: str) -> bytes:
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(space, " ").encode()

    return to_bytes


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable letter: itself, or the next free one from U+0100 on.

    Source: [GPT-2] encoder.py, bytes_to_unicode.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _ends(
    files: Mapping[str, bytes], vocab: dict[str, int], size: int, where: object
) -> tuple[int, int, frozenset[int]]:
    """BOS, EOS and all ids that end a text. generation_config.json holds ids (one or a list), the other names."""
    begins: list[int] = []
    stops: list[int] = []

    def ids_in(value: object) -> Iterator[int]:
        values = value if isinstance(value, list) else [value]
        yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < size)

    def id_named(value: object) -> Iterator[int]:
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str) and name in vocab:
            yield vocab[name]

    for name in ("generation_config.json", "tokenizer_config.json"):
        if name in files:
            config = _parse(files[name], name)
            begins += [*ids_in(config.get("bos_token_id")), *id_named(config.get("bos_token"))]
            stops += [*ids_in(config.get("eos_token_id")), *id_named(config.get("eos_token"))]
    # transformers writes the ids 1 and 2 for a model whose maker named none: the tokenizer's own BOS goes first
    if "tokenizer_config.json" in files:
        named = _parse(files["tokenizer_config.json"], "tokenizer_config.json").get("bos_token")
        begins = [*id_named(named), *begins]
    stops = stops or [vocab[name] for name in EOS_NAMES if name in vocab][:1]
    begins = begins or [vocab[name] for name in BOS_NAMES if name in vocab][:1] or stops[:1]
    if not stops:
        _broken(where, "names no token that ends a text (eos_token in a tokenizer_config.json beside it)")
    return begins[0], stops[0], frozenset(stops)


def _from_llama2c(data: bytes, where: object) -> bytes:
    """The tokenizer.json that does what run.c does with this tokenizer.bin.

    The file: int32 length of the longest piece, then float32 score, int32 length and bytes of each piece, in
    the order of the ids: <unk>, BOS, EOS, 256 bytes, then the rest. run.c joins, again and again, the two
    neighbours whose union has the best score; so every way to make a piece of two is a merge, best first.

    Source: [llama2.c] tokenizer.py, run.c.
    """
    pieces: list[str] = []
    scores: list[float] = []
    if len(data) > LARGEST_LLAMA2C or len(data) < 4:
        _broken(where, f"has {len(data)} bytes: neither JSON nor a tokenizer.bin of llama2.c")
    (longest,) = struct.unpack_from("<i", data)
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            _broken(where, f"is cut short at byte {at}, after {len(pieces)} tokens")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not (0 < length <= min(longest, LONGEST_PIECE, len(data) - at) and math.isfinite(score)):
            _broken(
                where,
                f"token {len(pieces)} at byte {at} has length {length}: not a llama2.c tokenizer, or cut",
            )
        try:
            pieces.append(data[at : at + length].decode())
        except UnicodeDecodeError:
            _broken(where, f"token {len(pieces)} at byte {at} is not UTF-8")
        scores.append(score)
        at += length
    if pieces[3:259] != [f"<0x{byte:02X}>" for byte in range(256)]:
        _broken(where, "tokens 3 to 258 are not the 256 bytes of a llama2.c tokenizer")
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the file writes the last two with line ends around them
    vocab = {piece: id for id, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        _broken(where, f"{len(pieces) - len(vocab)} tokens occur twice")

    joinable = set(pieces[259:])
    merges = [
        (piece[:cut], piece[cut:])
        for id, piece in sorted(enumerate(pieces[259:], 259), key=lambda pair: (-scores[pair[0]], pair[0]))
        for cut in range(1, len(piece))
        if piece[:cut] in joinable and piece[cut:] in joinable
    ]
    core = Core(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.add_special_tokens(pieces[:3])
    core.normalizer = normalizers.Prepend(" ")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = _one_bos("<s>", 1)
    return core.to_str().encode()

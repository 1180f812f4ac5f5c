"""The vocabularies of other programs -> the files that `Tokenizer` takes: tokenizer.json and what names BOS and EOS.

    from_sentencepiece    tokenizer.model of Llama 1 and 2: pieces with scores, in a protobuf
    from_llama2c          tokenizer.bin of llama2.c: pieces with scores, and nothing else
    from_tiktoken         tokenizer.model of Llama 3: tokens with ranks, a line each
    from_gguf             what a GGUF says under tokenizer.*: pieces with scores, or tokens and merges

A file may hold anything. What is not known is refused (E310), and sooner than in a second.
"""

import base64
import json
import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from babyllama.errors import InputError

# How text is cut into words, which merges never leave.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What SentencePiece may do to white space.
FIRST_SPACES, MORE_SPACES, LAST_SPACES = r"\A +", " {2,}", r"▁+\z"

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"

# The names of the first of Llama 3's 256 control tokens, behind its ranks; the others are reserved.
LLAMA_3 = (BOS, EOS, *(f"<|reserved_special_token_{n}|>" for n in range(4)))
LLAMA_3 += ("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>")
LLAMA_3_1 = (*LLAMA_3[:4], "<|finetune_right_pad_id|>", "<|step_id|>", *LLAMA_3[6:8])
LLAMA_3_1 += ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>")
CONTROL_TOKENS = 256

# Other files of ranks, whose words are cut by other patterns.
NOT_LLAMA_3 = {
    50_256: "GPT-2's",
    50_280: "p50k",
    100_256: "GPT-4's",
    151_643: "Qwen's",
    199_998: "GPT-4o's",
    200_000: "Llama 4's",
}

# Where generation ends, besides at EOS. Source: [llama.cpp] llama-vocab.cpp, special_eog_ids.
END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", EOS, "<|endoftext|>", "</s>")

# The types of a piece. SentencePiece and GGUF use the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

LARGEST_FILE = 5 * 2**20  # bytes; Llama 3's has 2.2 MB
LARGEST_VOCAB = 2**18  # Llama 3's has 128,256
MOST_PIECES = 2**17  # of SentencePiece; Llama 1's and 2's have 32,000
MOST_MERGES = 2**19  # the GGUF of Llama 3 has 280,147
MOST_FIELDS = 2**19  # of a protobuf; Llama 2's has 128,000
LONGEST_PIECE = 256  # bytes; Llama 3's has 128
LONGEST_RUN = 32  # of one character, among tokens with equal scores; Mistral's has 16
MOST_WORK = 3 * 10**7  # the sum of squared lengths of all pieces; Llama 3's 7.4 million take a second

FIX = (
    "give the tokenizer.json of a byte-level or SentencePiece BPE, the tokenizer.model of Llama 1, 2 or 3, or the "
    "tokenizer.bin of llama2.c; transformers writes the first from most forms:  "
    "AutoTokenizer.from_pretrained(A).save_pretrained(B)"
)


def broken(where: object, found: str, fix: str = FIX) -> NoReturn:
    raise InputError("E310", where, found, fix)


# ---- scores or ranks -> merges

Piece = TypeVar("Piece", str, bytes)


def merges_of(rank: Mapping[Piece, float], where: object) -> list[tuple[Piece, Piece]]:
    """The merges that do what ranks do: one for each piece that is ever made, in the order of their ranks.

    With ranks, two neighbours are joined whenever their union is a piece, the lowest rank first, the leftmost of
    equals. What happens inside a stretch of text does not depend on what stands around it, until a join crosses one
    of its ends. So a piece is only ever made by the join that makes it when it is encoded alone; one that alone
    stays in parts is never made.

    Equal ranks go by place, which merges cannot say. They pass where the longest first comes to the same, join by join:
    among runs of one character (the white space of Mistral), where the left end of a run grows before any other place.
    """
    if sum(len(piece) ** 2 for piece in rank) > MOST_WORK:
        broken(where, "has too many long tokens")
    made = {
        piece: pair
        for piece in rank
        if len(piece) > 1 and (pair := last_join(piece, lambda a, b: rank.get(a + b, math.inf)))
    }
    equal = Counter(rank[piece] for piece in made)
    alike = [piece for piece in made if equal[rank[piece]] > 1]
    for of in {rank[piece] for piece in alike}:
        runs = [piece for piece in alike if rank[piece] == of]
        one = runs[0][:1]
        if any(piece != one * len(piece) for piece in runs) or not _grow_from_the_left(rank, one, of):
            broken(
                where,
                f"tokens {runs[0]!r} and {runs[1]!r} have the same score, which leaves their order open",
            )
    return [made[piece] for piece in sorted(made, key=lambda piece: (rank[piece], -len(piece)))]


def _grow_from_the_left(rank: Mapping[Piece, float], one: Piece, of: float) -> bool:
    """Whether, in runs of one character, leftmost first and longest first make the same joins in the same order."""
    ranks = {length: rank[one * length] for length in range(2, LONGEST_RUN + 1) if one * length in rank}
    if ranks.get(2) != of or one * (LONGEST_RUN + 1) in rank:
        return False

    def joins(length: int, longest_first: bool) -> Iterator[int]:
        parts = [1] * length
        while True:
            unions = ((a + b, at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks)
            best = min(((ranks[k], -k * longest_first, at, k) for k, at in unions), default=None)
            if best is None:
                return
            parts[best[2] : best[2] + 2] = [best[3]]
            yield best[2]

    lengths = range(2, 2 * max(ranks) + 2)
    return all(list(joins(length, False)) == list(joins(length, True)) for length in lengths)


def last_join(piece: Piece, rank: Callable[[Piece, Piece], float]) -> tuple[Piece, Piece] | None:
    """The two parts that a piece, encoded alone, is in before it is whole; None if it never is.

    rank  of joining two parts, the lowest first; infinite if they are not joined.
    """
    parts = [piece[at : at + 1] for at in range(len(piece))]
    ranks = [rank(left, right) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = min(ranks)
        if best == math.inf:
            return None
        at = ranks.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        for beside in range(max(at - 1, 0), min(at + 1, len(ranks))):
            ranks[beside] = rank(parts[beside], parts[beside + 1])
    return (parts[0], parts[1]) if ranks[0] < math.inf else None


# ---- pieces with scores: SentencePiece, llama2.c


def from_sentencepiece(data: bytes, where: object, add_bos: bool = True) -> dict[str, bytes]:
    """A model of SentencePiece, as its own library encodes with it: BPE with byte fallback.

    add_bos  whether other programs put BOS before a text, which is not said in the file.

    Raises E310, also for what no Llama has: other algorithms, characters that are changed before they are encoded,
    user-defined pieces.
    Source: [SentencePiece] sentencepiece_model.proto, bpe_model.cc, normalizer.cc.
    """
    _no_larger(data, where)
    read = _Protobuf(where)
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}, 5: {}}  # trainer, normaliser, denormaliser
    for number, value in read.fields(data):
        if number == 1:
            fields = dict(read.fields(value))
            if len(pieces) == MOST_PIECES:
                broken(where, f"has more than {MOST_PIECES} tokens")
            pieces.append(read.text(fields.get(1, b"")))
            scores.append(read.float32(fields.get(2, bytes(4))))
            types.append(read.int(fields.get(3, NORMAL)))
            if not pieces[-1]:
                broken(where, f"token {len(pieces) - 1} is empty")
        elif number in settings:
            settings[number] |= dict(read.fields(value))

    trainer, normalizer, denormalizer = settings.values()
    if (kind := read.int(trainer.get(3, 1))) != 2:
        name = {1: "unigram", 3: "word", 4: "character"}.get(kind, kind)
        broken(where, f"is a SentencePiece vocabulary of the kind {name}, expected BPE")
    if not trainer.get(35, 0):
        broken(where, "has no byte fallback, so that not every text can be encoded")
    if normalizer.get(2) or denormalizer.get(2):
        name = read.text(normalizer.get(1, b"?"))
        broken(where, f"replaces characters before it encodes (normalisation {name!r}, expected 'identity')")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        broken(where, "does not write a space as '▁' before a word, as all Llamas do")
    for id, type in enumerate(types):
        if type in (USER_DEFINED, UNUSED):
            broken(where, f"token {id}, {pieces[id]!r}, is user-defined or unused: no Llama has such tokens")

    control = {piece: id for id, piece in enumerate(pieces) if types[id] == CONTROL}
    bos = control.get(read.text(trainer.get(46, b"<s>")))
    eos = control.get(read.text(trainer.get(47, b"</s>")))
    if eos is None:
        broken(where, "names no token that ends a text (trainer_spec.eos_piece)")
    return _of_pieces(
        pieces,
        scores,
        types,
        where,
        bos=bos,
        ends=[eos],
        prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        add_bos=add_bos,
    )


FIXED_LENGTHS = {1: 8, 5: 4}  # bytes, by kind of field


class _Protobuf:
    """The fields of a protobuf message: numbers as int, everything else as its bytes.

    Source: protobuf.dev, "Encoding".
    """

    def __init__(self, where: object) -> None:
        self.where = where
        self.left = MOST_FIELDS

    def fields(self, data: object) -> Iterator[tuple[int, Any]]:
        if not isinstance(data, bytes):
            self.broken("a number where a message belongs")
        at, end = 0, len(data)
        while at < end:
            self.left -= 1
            if self.left < 0:
                self.broken(f"more than {MOST_FIELDS} fields")
            tag = data[at]
            if tag < 0x80:  # nearly all are
                at += 1
            else:
                tag, at = self.varint(data, at)
            kind = tag & 7
            if kind == 0:
                value, at = self.varint(data, at)
                yield tag >> 3, value
                continue
            length = FIXED_LENGTHS.get(kind)
            if kind == 2:
                length, at = self.varint(data, at)
            if length is None or length > end - at:
                self.broken(f"a field of kind {kind} with length {length}: not SentencePiece, or cut")
            yield tag >> 3, data[at : at + length]
            at += length

    def varint(self, data: bytes, at: int) -> tuple[int, int]:
        if at < len(data) and data[at] < 0x80:
            return data[at], at + 1
        value = 0
        for n in range(10):
            if at + n >= len(data):
                break
            value |= (data[at + n] & 0x7F) << 7 * n
            if data[at + n] < 0x80:
                return value, at + n + 1
        self.broken("a number that does not end: not SentencePiece, or cut")

    def text(self, value: object) -> str:
        if not isinstance(value, bytes):
            self.broken("a number where a text belongs")
        return _utf8(value, "a text", self.where)

    def int(self, value: object) -> int:
        if not isinstance(value, int):
            self.broken("a text where a number belongs")
        return value

    def float32(self, value: object) -> float:
        if not isinstance(value, bytes) or len(value) != 4:
            self.broken("no float where a score belongs")
        return float(struct.unpack("<f", value)[0])

    def broken(self, found: str) -> NoReturn:
        broken(self.where, f"holds {found}")


def from_llama2c(data: bytes, where: object) -> dict[str, bytes]:
    """A tokenizer.bin, as run.c encodes with it.

    The file: int32 length of the longest piece, then float32 score, int32 length and bytes of each piece, in the
    order of the ids: <unk>, BOS, EOS, 256 bytes, then the rest. Its spaces are spaces.

    Raises E310.
    Source: [llama2.c] tokenizer.py, run.c.
    """
    _no_larger(data, where)
    pieces: list[str] = []
    scores: list[float] = []
    if len(data) < 4:
        broken(where, f"has {len(data)} bytes, too few for a tokenizer")
    (longest,) = struct.unpack_from("<i", data)
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            broken(where, f"is cut short at byte {at}, after {len(pieces)} tokens")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 < length <= min(longest, LONGEST_PIECE, len(data) - at) or len(pieces) == LARGEST_VOCAB:
            broken(
                where,
                f"token {len(pieces)} at byte {at} has length {length}: not a llama2.c tokenizer, or cut",
            )
        pieces.append(_utf8(data[at : at + length], f"token {len(pieces)} at byte {at}", where))
        scores.append(score)
        at += length
    if pieces[3:259] != BYTES:
        broken(where, "tokens 3 to 258 are not the 256 bytes of a llama2.c tokenizer")
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the file writes the last two with line ends around them
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)]
    return _of_pieces(pieces, scores, types, where, bos=1, ends=[2], space=" ", by_ids=True)


def _of_pieces(
    pieces: list[str],
    scores: list[float],
    types: list[int],
    where: object,
    *,
    bos: int | None,
    ends: list[int],
    space: str = "▁",
    prefix: bool = True,
    squeeze: bool = False,
    by_ids: bool = False,
    add_bos: bool = True,
    template: str | None = None,
) -> dict[str, bytes]:
    """The files of a vocabulary that joins characters by the scores of what they make.

    space    how pieces write a space.
    prefix   puts a space before every text, so that a word has one form wherever it stands.
    squeeze  leaves out spaces at both ends of a text, and all but one of several.
    by_ids   joins only what are pieces themselves (run.c), not any characters whose union is one.
    """
    _check(pieces, where)
    if not all(map(math.isfinite, scores)):
        broken(where, "a score is not a number")
    if sorted(piece for piece, type in zip(pieces, types, strict=True) if type == BYTE) != BYTES:
        broken(where, "lacks some of the 256 bytes <0x00> to <0xFF>, so that not every text can be encoded")
    for id, piece in enumerate(pieces):
        if "\0" in piece:
            broken(where, f"token {id} holds the character NUL")
        if len(piece) == 1 and types[id] != NORMAL:
            broken(
                where, f"token {id}, {piece!r}, is a control token of one character, which any text may hold"
            )

    rank = {piece: -score for piece, score, type in zip(pieces, scores, types, strict=True) if type == NORMAL}
    characters = {piece for piece in rank if len(piece) == 1}
    if by_ids:
        rank = {piece: of for piece, of in rank.items() if characters.issuperset(piece)}
    merges = merges_of(rank, where)
    for left, right in merges:
        if not characters.issuperset(left + right):
            broken(where, f"token {left + right!r} holds a character that is no token")

    steps: list[dict[str, Any]] = []
    if squeeze:
        steps += [_replace({"Regex": FIRST_SPACES}, ""), _replace({"Regex": MORE_SPACES}, " ")]
    if prefix:
        steps.append({"type": "Prepend", "prepend": space})
    if space != " ":
        steps.append(_replace({"String": " "}, space))
    if squeeze:
        steps.append(_replace({"Regex": LAST_SPACES}, ""))
    back: list[dict[str, Any]] = [_replace({"String": space}, " ")] if space != " " else []
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
    }
    # With all bytes there, nothing is ever encoded as unknown.
    unknown = pieces[types.index(UNKNOWN)] if UNKNOWN in types else None
    model = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return _files(pieces, types, merges, model, parts, bos, ends, add_bos, template)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# ---- tokens that are bytes: tiktoken, GGUF


def letters_of_bytes() -> list[str]:
    """Byte-level BPE writes each byte as a printable letter: itself, or the next free one from U+0100 on.

    Source: [GPT-2] encoder.py, bytes_to_unicode.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LINE = re.compile(rb"([A-Za-z0-9+/]{2,344}={0,2}) (\d{1,7})(?:\r?\n|\Z)")


def from_tiktoken(data: bytes, where: object, names: Sequence[str] = LLAMA_3_1) -> dict[str, bytes]:
    """The ranks of Llama 3, as Meta's code encodes with them: a token in base64 and its rank, a line each.

    The file names neither the pattern that cuts text into words nor the control tokens; both are Llama 3's here, as
    they are in Meta's code. Known files of other models have other patterns and are refused.

    names  of the first of the 256 control tokens; the file is the same for Llama 3 and its later versions.

    Raises E310.
    Source: [llama-models] tokenizer_utils.py, llama3/tokenizer.py; [tiktoken] _educational.py.
    """
    _no_larger(data, where)
    rank: dict[bytes, float] = {}
    at = lines = 0
    while at < len(data):
        line = _LINE.match(data, at)
        if not line or lines == LARGEST_VOCAB:
            broken(where, f"line {lines + 1} is not a token of at most {LONGEST_PIECE} bytes and its rank")
        try:
            rank[base64.b64decode(line[1], validate=True)] = float(line[2])
        except ValueError:
            broken(where, f"line {lines + 1} is not base64")
        at = line.end()
        lines += 1
        if len(rank) != lines:
            broken(where, f"line {lines} repeats a token")
    tokens = sorted(rank, key=rank.__getitem__)
    if [rank[token] for token in tokens] != list(range(len(tokens))):
        broken(where, f"the ranks of {len(tokens)} tokens are not the numbers from 0 on")
    if len(tokens) in NOT_LLAMA_3:
        name = NOT_LLAMA_3[len(tokens)]
        broken(
            where, f"{len(tokens)} ranks are {name}, which cuts text into words in another way than Llama 3"
        )
    if not rank.keys() >= {bytes([byte]) for byte in range(256)}:
        broken(where, "lacks some of the 256 bytes, so that not every text can be encoded")

    reserved = sum("reserved" in name for name in names)
    more = range(reserved, reserved + CONTROL_TOKENS - len(names))
    control = [*names, *(f"<|reserved_special_token_{n}|>" for n in more)]
    letter = letters_of_bytes()

    def spelled(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges = [(spelled(left), spelled(right)) for left, right in merges_of(rank, where)]
    spellings = [*map(spelled, tokens), *control]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(control)
    ends = [len(tokens) + control.index(name) for name in (EOS, *END_NAMES[:2]) if name in control]
    words, whole = GGUF_WORDS["llama-bpe"]
    return _files(
        spellings, types, merges, {"ignore_merges": whole}, _byte_level(words), len(tokens), ends, True, None
    )


def _cut(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


# What `tokenizer.ggml.pre` stands for: how words are cut, and whether a word that is a token is taken whole, whatever
# the merges would make of it. Of names that mean the same, the first is written. Source: [llama.cpp] llama-vocab.cpp.
_LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT_2 = [{**_LETTERS, "use_regex": True}]
_SMOLLM = [{"type": "Digits", "individual_digits": True}, *_GPT_2]
_LLAMA_3 = [*_cut(LLAMA_3_WORDS), _LETTERS]
GGUF_WORDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "llama-bpe": (_LLAMA_3, True),
    "llama3": (_LLAMA_3, True),
    "llama-v3": (_LLAMA_3, True),
    "falcon3": (_LLAMA_3, True),
    "smaug-bpe": (_LLAMA_3, False),
    "dbrx": (_LLAMA_3, False),
    "smollm": (_SMOLLM, False),
    "starcoder": (_SMOLLM, False),
    "refact": (_SMOLLM, False),
    "gpt-2": (_GPT_2, False),
    "qwen2": ([*_cut(QWEN_2_WORDS), _LETTERS], False),
}


def _byte_level(words: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


# ---- GGUF


def from_gguf(metadata: Mapping[str, Any], where: object) -> dict[str, bytes]:
    """What a GGUF says under tokenizer.*, as llama.cpp encodes with it.

    Control tokens cannot be typed, also where llama.cpp would join them from their letters. Unused tokens behind the
    last one that is used are left out: they only fill up the rows of a matrix.

    Raises E310, also for a `tokenizer.ggml.pre` that is not in `GGUF_WORDS`.
    Source: [llama.cpp] llama-vocab.cpp.
    """
    key = "tokenizer.ggml."
    model = metadata.get(key + "model")
    if not isinstance(model, str) or model not in ("llama", "gpt2"):
        broken(where, f"{key}model is {model!r}, expected 'llama' (SentencePiece) or 'gpt2' (byte-level BPE)")
    tokens = _list(metadata, key + "tokens", _str, None, LARGEST_VOCAB, where)
    types = _list(metadata, key + "token_type", operator.index, len(tokens), LARGEST_VOCAB, where)
    for id, type in enumerate(types):
        if not NORMAL <= type <= BYTE:
            broken(where, f"{key}token_type of token {id} is {type}, expected {NORMAL} to {BYTE}")

    def id_at(name: str) -> int | None:
        value = metadata.get(f"{key}{name}_token_id")
        if value is None:
            return None
        try:
            id = operator.index(value)
        except TypeError:
            id = -1
        if not 0 <= id < len(tokens):
            broken(where, f"{key}{name}_token_id is {value!r}, expected 0 to {len(tokens) - 1}")
        return id

    bos, eos = id_at("bos"), id_at("eos")
    if eos is None:
        broken(where, f"has no {key}eos_token_id, so that no text ends")
    named = [id for id, token in enumerate(tokens) if types[id] == CONTROL and token in END_NAMES]
    ends = list(dict.fromkeys(id for id in (eos, id_at("eot"), id_at("eom"), *named) if id is not None))
    for id in (*ends, *([bos] if bos is not None else [])):
        types[id] = CONTROL
    while types and types[-1] == UNUSED:
        types.pop()
    del tokens[len(types) :]

    add_bos = _flag(metadata, key + "add_bos_token", None, where)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        broken(where, "tokenizer.chat_template is not a text")
    if model == "llama":
        for id, type in enumerate(types):
            if type == UNUSED:
                broken(where, f"token {id}, {tokens[id]!r}, is unused, with used ones behind it")
        scores = _list(metadata, key + "scores", float, None, LARGEST_VOCAB, where)
        if len(scores) < len(tokens):
            broken(where, f"has {len(scores)} scores for {len(tokens)} tokens")
        prefix = _flag(metadata, key + "add_space_prefix", True, where)
        return _of_pieces(
            tokens,
            scores[: len(tokens)],
            types,
            where,
            bos=bos,
            ends=ends,
            prefix=bool(prefix),
            add_bos=add_bos is not False,
            template=template,
        )

    pre = metadata.get(key + "pre")
    if not isinstance(pre, str) or pre not in GGUF_WORDS:
        known = ", ".join(GGUF_WORDS)
        broken(where, f"{key}pre is {pre!r}: how it cuts text into words is not known, only that of {known}")
    words, whole = GGUF_WORDS[pre]
    _check(tokens, where)
    normal = {token for token, type in zip(tokens, types, strict=True) if type == NORMAL}
    letters = set(letters_of_bytes())
    for token in normal:
        if not letters.issuperset(token):
            broken(where, f"token {token!r} is not written in the letters of byte-level BPE")
    merges: dict[tuple[str, str], None] = {}
    for merge in _list(metadata, key + "merges", _str, None, MOST_MERGES, where):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= normal:
            broken(where, f"merge {merge!r} is not two tokens whose union is a token")
        merges[left, right] = None
    if add_bos is None:
        add_bos = GGUF_WORDS[pre] == (_LLAMA_3, True)
    model_parts = {"ignore_merges": whole}
    return _files(tokens, types, list(merges), model_parts, _byte_level(words), bos, ends, add_bos, template)


def _list(
    metadata: Mapping[str, Any],
    key: str,
    convert: Callable[[Any], Any],
    length: int | None,
    longest: int,
    where: object,
) -> list[Any]:
    """The array at key, each element converted. It may be a list or an array of numpy."""
    values: Any = metadata.get(key)
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        broken(where, f"has no list {key}")
    if len(values) > longest or length not in (None, len(values)):
        expected = f"at most {longest}" if length is None else str(length)
        broken(where, f"{key} has {len(values)} entries, expected {expected}")
    try:
        return [convert(value) for value in values]
    except (TypeError, ValueError):
        broken(where, f"{key} holds values of another kind than it should")


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # UnicodeEncodeError, which is a ValueError, for half of a surrogate pair
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool | None, where: object) -> bool | None:
    value = metadata.get(key, default)
    if value is not None and (not isinstance(value, int) or value not in (0, 1)):
        broken(where, f"{key} is {value!r}, expected true or false")
    return None if value is None else bool(value)


# ---- what all of them need


def _no_larger(data: bytes, where: object) -> None:
    if len(data) > LARGEST_FILE:
        broken(where, f"has {len(data)} bytes, more than {LARGEST_FILE}")


def _utf8(data: bytes, what: str, where: object) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        broken(where, f"{what} is not UTF-8")


def _check(tokens: list[str], where: object) -> None:
    seen: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if not 0 < len(token) <= 2 * LONGEST_PIECE:  # a letter that stands for a byte may have two bytes
            broken(where, f"token {id} has {len(token)} characters, expected 1 to {2 * LONGEST_PIECE}")
        if seen.setdefault(token, id) != id:
            broken(where, f"tokens {seen[token]} and {id} are both {token!r}")


def _files(
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, str]],
    model: dict[str, Any],
    parts: dict[str, Any],
    bos: int | None,
    ends: list[int],
    add_bos: bool,
    template: str | None,
) -> dict[str, bytes]:
    """tokenizer.json, and the configurations that name BOS, EOS and the chat template."""
    added = [
        {
            "id": id,
            "content": tokens[id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type != USER_DEFINED,
        }
        for id, type in enumerate(types)
        if type not in (NORMAL, BYTE)
    ]
    # What is behind the last ordinary token only stands in added_tokens, as in the files of Llama 3.
    last = max((id for id, type in enumerate(types) if type in (NORMAL, BYTE)), default=-1)
    layout = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": None if bos is None or not add_bos else _one_bos(tokens[bos], bos),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": {token: id for id, token in enumerate(tokens[: last + 1])},
            "merges": merges,
        },
    }
    config: dict[str, Any] = {
        "add_bos_token": bos is not None and add_bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[ends[0]],
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation: dict[str, Any] = {"eos_token_id": ends}
    if bos is not None:
        config["bos_token"] = tokens[bos]
        generation["bos_token_id"] = bos
    if template is not None:
        config["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode(),
        "tokenizer_config.json": dump(config),
        "generation_config.json": dump(generation),
    }


def _one_bos(bos: str, id: int) -> dict[str, Any]:
    """For other programs: their `encode` puts exactly one BOS before a text. Ours asks for none."""

    def token(type: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": type}}

    def text(name: str, type: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type}}

    return {
        "type": "TemplateProcessing",
        "single": [token(0), text("A", 0)],
        "pair": [token(0), text("A", 0), token(1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def dump(value: object) -> bytes:
    """JSON as the files beside a tokenizer.json have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

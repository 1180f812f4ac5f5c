"""What stands in a tokenizer.json, checked before a tokenizer is built from it.

A file of this format says what is done to text in many steps, each with settings of its own, and the library that
carries them out believes all of it. What a Llama's tokenizer does not need is refused here, in particular what would
take for ever with some text, or make it a million times as long.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from babyllama.text.vocabularies import (
    FIRST_SPACES,
    GPT_2_WORDS,
    LARGEST_VOCAB,
    LAST_SPACES,
    LLAMA_3_WORDS,
    LONGEST_PIECE,
    MORE_SPACES,
    MOST_MERGES,
    QWEN_2_WORDS,
    broken,
)

# A regular expression may take for ever with some text, and no probe finds all of those: only these are let through.
KNOWN_PATTERNS = {LLAMA_3_WORDS, QWEN_2_WORDS, GPT_2_WORDS, FIRST_SPACES, MORE_SPACES, LAST_SPACES}
NORMALIZERS = {"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Strip"}
PRE_TOKENIZERS = {"Sequence", "Split", "ByteLevel", "Digits", "Metaspace"}
MOST_STEPS = 16
MOST_QUOTES = 2 * LARGEST_VOCAB + 4 * MOST_MERGES + 2**19  # of tokens, of merges, of all else
LARGEST_BESIDE = 2 * 2**20  # bytes of another JSON file, with a chat template in it
MOST_VALUES = 2**18  # in it: Python may keep 70 bytes of each
LARGEST_REST = 2**20  # bytes of all but vocabulary and merges; Llama 3's has 60,000


@dataclass(frozen=True)
class Layout:
    """vocab    token -> id: of the model, and of the added tokens; the ids are the numbers from 0 on.
    added    id -> whether it is a control token; the others of them are matched in every text.
    parts    all of the file, with an empty vocabulary and no merges.
    """

    vocab: dict[str, int]
    added: dict[int, bool]
    parts: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        return self.parts["model"]


# Both are long and simple: these patterns find them in the file, and take them apart in pieces that fit in memory.
_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"(?:[^"\\]|\\.){0,1536}+"'  # LONGEST_PIECE letters, each written as \u0123
_ENTRY = rb"%b%b:%b\d{1,10}" % (_STRING, _SPACE, _SPACE)
_PAIR = rb"\[%b%b%b,%b%b%b\]" % (_SPACE, _STRING, _SPACE, _SPACE, _STRING, _SPACE)
_MERGE = rb"(?:%b|%b)" % (_STRING, _PAIR)


def _many(one: bytes, times: bytes) -> bytes:
    return rb"(?:%b%b(?:,%b)?+)%b+" % (one, _SPACE, _SPACE, times)


_VOCAB = re.compile(
    rb'(?<!\\)"vocab"%b:%b(\{%b%b\})' % (_SPACE, _SPACE, _SPACE, _many(_ENTRY, b"*")), re.DOTALL
)
_MERGES = re.compile(
    rb'(?<!\\)"merges"%b:%b(\[%b%b\])' % (_SPACE, _SPACE, _SPACE, _many(_MERGE, b"*")), re.DOTALL
)
_ENTRIES = re.compile(_many(_ENTRY, b"{1,4096}"), re.DOTALL)
_PAIRS = re.compile(_many(_MERGE, b"{1,4096}"), re.DOTALL)


def read_layout(data: bytes, where: object) -> Layout:
    """Raises E310 for what is no tokenizer.json of a Llama, with little more memory than its tokens take."""
    if data.count(b'"') > MOST_QUOTES:
        broken(where, f"holds more texts than {LARGEST_VOCAB} tokens and {MOST_MERGES} merges have")
    spans = []
    for name, pattern in (("vocab", _VOCAB), ("merges", _MERGES)):
        found = pattern.search(data)
        if not found:
            if data.lstrip()[:1] == b"{":  # say what else it may be
                parse(data[:LARGEST_REST] if len(data) <= LARGEST_REST else b"{}", where)
            broken(where, f"holds no {name} of a BPE, or a token of more than {LONGEST_PIECE} letters")
        spans.append(found.span(1))
    (a, b), (c, d) = sorted(spans)
    first, second = (b"{}", b"[]") if spans[0] < spans[1] else (b"[]", b"{}")
    rest = data[:a] + first + data[b:c] + second + data[d:]
    if b > c or len(rest) > LARGEST_REST:
        broken(where, f"has {len(rest)} bytes besides vocabulary and merges, more than {LARGEST_REST}")
    parts = parse(rest, where)
    model = parts.get("model")
    if not isinstance(model, dict) or model.get("vocab") != {} or model.get("merges") != []:
        broken(where, "does not hold its vocabulary and merges in its model, and once")
    _check_model(model, where)
    for part, kinds in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        _check_steps(part, parts.get(part), kinds, where)
    _check_template(parts.get("post_processor"), where)

    vocab: dict[str, int] = {}
    for count, (token, id) in enumerate(_each(_ENTRIES, b"{%b}", data, spans[0], where), 1):
        vocab[token] = id
        if len(vocab) != count:
            broken(where, f"token {token!r} occurs twice")
        if count > LARGEST_VOCAB:
            broken(where, f"has more than {LARGEST_VOCAB} tokens")
    for count, merge in enumerate(_each(_PAIRS, b"[%b]", data, spans[1], where), 1):
        left, right = merge if isinstance(merge, list) else merge.partition(" ")[::2]
        if count > MOST_MERGES:
            broken(where, f"has more than {MOST_MERGES} merges")
        if left not in vocab or right not in vocab or left + right not in vocab or not left or not right:
            broken(
                where, f"merge {count}, of {left!r} and {right!r}, is not of two tokens whose union is one"
            )
    added = dict(_added(parts.get("added_tokens", []), vocab, where))
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= LARGEST_VOCAB:
        broken(where, f"has {size} ids, expected 1 to {LARGEST_VOCAB}")
    if len(set(vocab.values())) != size or len(vocab) != size:
        broken(where, f"has {len(vocab)} tokens for {size} ids: some are missing or given twice")
    return Layout(vocab, added, parts)


def parse(data: bytes, where: object) -> dict[str, Any]:
    if len(data) > LARGEST_BESIDE:
        broken(where, f"has {len(data)} bytes of JSON, more than {LARGEST_BESIDE}")
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        broken(where, f"holds more than {MOST_VALUES} commas and brackets, each of which may begin a value")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        broken(where, f"is not JSON ({error})")
    if not isinstance(value, dict):
        broken(where, "is not a JSON object")
    return value


def _each(
    many: re.Pattern[bytes], around: bytes, data: bytes, span: tuple[int, int], where: object
) -> Iterator[Any]:
    """The entries of an object, as pairs, or of a list."""
    at = re.compile(_SPACE).match(data, span[0] + 1).end()  # type: ignore[union-attr]  # white space may be empty
    while found := many.match(data, at, span[1] - 1):
        at = found.end()
        chunk = around % found[0].rstrip(b", \t\r\n")
        try:
            entries = json.loads(chunk, object_pairs_hook=list)
            if b"\\" in chunk:  # only an escape can write half of a surrogate pair
                json.dumps(entries, ensure_ascii=False).encode()
        except ValueError:
            broken(where, f"what stands before byte {at} is not JSON, or no text")
        yield from entries


def _check_model(model: dict[str, Any], where: object) -> None:
    if (kind := model.get("type", "BPE")) != "BPE":
        broken(where, f"is a {str(kind)[:80]} vocabulary, expected BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            broken(where, f"has a {name}, which no Llama has")


def _added(tokens: object, vocab: dict[str, int], where: object) -> Iterator[tuple[int, bool]]:
    """Id, and whether it is a control token, of each added token; it is put into vocab if it is not there."""
    if not isinstance(tokens, list):
        broken(where, "added_tokens is not a list")
    for token in tokens:
        match token:
            case {"id": int(id), "content": str(text), "special": bool(special)} if id >= 0:
                if not 0 < len(text) <= LONGEST_PIECE or vocab.setdefault(text, id) != id:
                    broken(where, f"added token {text[:80]!r} is empty, long, or has two ids")
                yield id, special
            case _:
                broken(where, f"added token {str(token)[:80]} lacks an id, a text, or whether it is special")


def _check_template(step: object, where: object) -> None:
    """What is put around a text must be tokens that the same step lists, or the library gives up all of Python."""
    inside = step.get("processors", []) if isinstance(step, dict) else []
    for each in [step, *inside] if isinstance(inside, list) else [step]:
        if not isinstance(each, dict) or each.get("type") != "TemplateProcessing":
            continue
        match each:
            case {"single": list(single), "pair": list(pair), "special_tokens": dict(listed)}:
                pieces = [piece.get("SpecialToken") for piece in single + pair if isinstance(piece, dict)]
                names = [
                    piece.get("id") if isinstance(piece, dict) else ""
                    for piece in pieces
                    if piece is not None
                ]
                texts = [
                    piece["Sequence"] for piece in single if isinstance(piece, dict) and "Sequence" in piece
                ]
                if len(texts) != 1:
                    broken(where, f"its post_processor puts a text {len(texts)} times where it stood once")
                if all(isinstance(name, str) and name in listed for name in names):
                    continue
        broken(where, "its post_processor puts a token around texts that it does not list")


def _check_steps(part: str, step: object, kinds: set[str], where: object) -> None:
    """Only known steps and patterns, few of them, and none that makes text longer but by what is put before it."""
    todo, done, byte_levels = [step] if step is not None else [], 0, 0
    while todo:
        step = todo.pop()
        done += 1
        kind = step.get("type") if isinstance(step, dict) else None
        if not isinstance(step, dict) or not isinstance(kind, str) or kind not in kinds or done > MOST_STEPS:
            broken(where, f"its {part} has a step {str(kind)[:80]} that is not known, or too many steps")
        byte_levels += kind == "ByteLevel"
        if byte_levels > 1:
            broken(where, f"its {part} writes bytes as letters twice")
        inside = step.get("normalizers", step.get("pretokenizers", []))
        if isinstance(inside, list):
            todo += inside
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if regex is not None and (not isinstance(regex, str) or regex not in KNOWN_PATTERNS):
            broken(
                where,
                f"its {part} holds the pattern {str(regex)[:200]!r}, which is not known: with some texts a "
                "pattern takes for ever",
            )
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        longest = len(literal) if isinstance(literal, str) else 1
        for name, most in (("content", longest), ("prepend", 1), ("replacement", 1)):
            if len(str(step.get(name, ""))) > most:
                broken(
                    where, f"its {part} writes {str(step[name])[:80]!r} for less, which makes texts longer"
                )

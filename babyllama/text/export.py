"""A tokenizer -> what other programs keep it in: the metadata of a GGUF, the tokenizer.bin of llama2.c.

Neither holds every tokenizer. What would be encoded otherwise there is refused (E310), with the reason.
"""

import json
import math
import struct
from typing import Any, NoReturn

from babyllama.errors import InputError
from babyllama.text.tokenizer import Tokenizer
from babyllama.text.vocabularies import (
    BYTE,
    BYTES,
    CONTROL,
    END_NAMES,
    GGUF_WORDS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    last_join,
)

PADDING, PADDING_SCORE = "[PAD{}]", -10000.0


def to_gguf(tokenizer: Tokenizer, rows: int | None = None) -> dict[str, Any]:
    """The metadata tokenizer.* of a GGUF that stock llama.cpp encodes with as this tokenizer does.

    rows  of the model's embedding, if it has more than the tokenizer has ids: unused tokens fill them up.

    Lists are of str, int (int32 in the file) or float (float32); other values are str, bool or int (uint32).
    Raises InputError E310 for a tokenizer that llama.cpp has no name for.
    Source: [llama.cpp] llama-vocab.cpp; [gguf] docs/gguf.md.
    """
    made = _Made(tokenizer, "GGUF")
    words = made.words()
    tokens, types = list(made.tokens), list(made.types)
    if words:
        held: dict[str, Any] = {"model": "gpt2", "pre": words}
    else:
        scores = made.scores()
        tokens = made.spelled("▁")
        held = {"model": "llama", "pre": "default", "add_space_prefix": made.prefix}
    for id in range(len(tokens), rows or 0):
        tokens.append(PADDING.format(id))
        types.append(UNUSED)
    if len(set(tokens)) < len(tokens):
        made.refuse("two tokens would have one name there")
    held |= {"tokens": tokens, "token_type": types}
    if words:
        held["merges"] = [f"{left} {right}" for left, right in made.merges]
    else:
        held["scores"] = scores + [PADDING_SCORE] * (len(tokens) - len(scores))
        if UNKNOWN in types:
            held["unknown_token_id"] = types.index(UNKNOWN)
    held |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    held |= made.ends()
    held["add_bos_token"] = tokenizer.puts_bos
    held["add_eos_token"] = False
    metadata = {f"tokenizer.ggml.{key}": value for key, value in held.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def to_llama2c(tokenizer: Tokenizer, rows: int | None = None) -> bytes:
    """The tokenizer.bin that run.c encodes with as this tokenizer does.

    rows  of the model's embedding: run.c reads as many entries.

    It is for vocabularies like Llama 2's: <unk>, BOS, EOS, 256 bytes, then pieces, and a space before every text.
    Raises InputError E310 for any other.
    Source: [llama2.c] tokenizer.py, run.c.
    """
    made = _Made(tokenizer, "llama2.c")
    if made.words():
        made.refuse("it is byte-level, and run.c joins characters")
    if (tokenizer.bos_id, tokenizer.eos_id) != (1, 2) or made.types[:3] != [UNKNOWN, CONTROL, CONTROL]:
        made.refuse("its first tokens are not <unk>, BOS and EOS, as run.c takes for granted")
    if made.tokens[3:259] != BYTES or made.types[259:] != [NORMAL] * (len(made.types) - 259):
        made.refuse("its first tokens are not followed by 256 bytes, and then by ordinary tokens only")
    if not made.prefix:
        made.refuse("it puts no space before a text, as run.c always does")
    if not tokenizer.puts_bos:
        made.refuse("it puts no BOS before a text, as run.c always does")
    padding = [PADDING.format(id) for id in range(tokenizer.vocab_size, rows or 0)]
    scores = made.scores() + [PADDING_SCORE] * len(padding)
    named = ["<unk>", "\n<s>\n", "\n</s>\n", *made.spelled(" ")[3:], *padding]
    pieces = [piece.encode() for piece in named]
    if len(set(pieces)) < len(pieces):
        made.refuse("two tokens would be the same there")
    entries = (
        struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True)
    )
    return struct.pack("<i", max(map(len, pieces))) + b"".join(entries)


class _Made:
    """What a tokenizer is made of, as its tokenizer.json says.

    types   of the tokens, as SentencePiece and GGUF number them.
    prefix  whether a space is put before every text (SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer, target: str) -> None:
        self.target, self.eos_id, self.eos_ids = target, tokenizer.eos_id, tokenizer.eos_ids
        self.layout: dict[str, Any] = json.loads(tokenizer.files()["tokenizer.json"])
        self.model: dict[str, Any] = self.layout["model"]
        added = {token["id"]: token for token in self.layout.get("added_tokens", [])}
        names = {id: token for token, id in self.model["vocab"].items()}
        names |= {id: token["content"] for id, token in added.items()}
        self.tokens = [names[id] for id in range(tokenizer.vocab_size)]
        self.types = [NORMAL] * len(self.tokens)
        for id, token in added.items():
            self.types[id] = CONTROL if id in tokenizer.special_ids else USER_DEFINED
            if not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"]):
                self.refuse(f"it takes white space beside {token['content']!r} away")
        self.merges: list[tuple[str, str]] = [
            tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in self.model["merges"]
        ]
        self.prefix = False
        self.space = " "

    def refuse(self, why: str) -> NoReturn:
        fix = "export to a Hugging Face folder, which holds every tokenizer:  --to hf"
        if self.target == "llama2.c":
            fix = f"write the weights alone with --no-tokenizer-file, or {fix}"
        raise InputError("E310", f"tokenizer for {self.target}", f"cannot be written: {why}", fix)

    def words(self) -> str | None:
        """llama.cpp's name for how words are cut; None for SentencePiece. Sets prefix and space for the latter."""
        steps = _steps(self.layout.get("pre_tokenizer"))
        before = _steps(self.layout.get("normalizer"))
        if any(step["type"] == "ByteLevel" for step in steps):
            if before:
                self.refuse(f"it changes text before it encodes ({before[0]['type']})")
            for name, (known, whole) in GGUF_WORDS.items():
                same = [_essence(step) for step in steps] == [_essence(step) for step in known]
                if same and whole == bool(self.model.get("ignore_merges")):
                    return name
            self.refuse("llama.cpp has no name for how it cuts text into words")
        self._spaces([*before, *steps])
        if not self.model.get("byte_fallback"):
            self.refuse("it is neither byte-level nor has byte fallback")
        for id, token in enumerate(self.tokens):
            if self.types[id] == NORMAL and token in BYTES:
                self.types[id] = BYTE
            if self.types[id] == CONTROL and token == self.model.get("unk_token"):
                self.types[id] = UNKNOWN
        return None

    def _spaces(self, steps: list[dict[str, Any]]) -> None:
        """How spaces are written, and whether one is put before a text: in steps of their own, or in Metaspace."""
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        match steps:
            case []:
                pass
            case [{"type": "Prepend", "prepend": " "}]:
                self.prefix = True
            case [step] if step == replace:
                self.space = "▁"
            case [{"type": "Prepend", "prepend": "▁"}, step] if step == replace:
                self.space, self.prefix = "▁", True
            case [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
                self.space, self.prefix = "▁", scheme != "never"
            case _:
                self.refuse("it treats white space in a way that only tokenizer.json can say")

    def ends(self) -> dict[str, int]:
        """Where a text ends besides at EOS. What has one of the END_NAMES is known by it, and needs no key."""
        others = sorted(self.eos_ids - {self.eos_id})
        known = [id for id in others if self.tokens[id] in END_NAMES]
        others = [id for id in others if id not in known]
        keys = ["eot_token_id", "eom_token_id"]
        if len(others) > len(keys):
            self.refuse(
                f"besides at EOS it ends at {len(others)} tokens, and a GGUF has keys for {len(keys)}"
            )
        held = dict(zip(reversed(keys) if known else keys, others, strict=False))
        for id in known:
            held.setdefault("eom_token_id" if self.tokens[id] == "<|eom_id|>" else "eot_token_id", id)
        return held

    def spelled(self, space: str) -> list[str]:
        """The tokens, with spaces written as the target writes them."""
        normal = [token for token, type in zip(self.tokens, self.types, strict=True) if type == NORMAL]
        if space != self.space and any(space in token for token in normal):
            self.refuse(f"it has tokens with {space!r} that are not spaces")
        return [
            token.replace(self.space, space) if type == NORMAL else token
            for token, type in zip(self.tokens, self.types, strict=True)
        ]

    def scores(self) -> list[float]:
        """Scores that come to the same as the merges: 0, -1, -2 ... in their order, then for what is never made.

        They do if every token, encoded alone, is made by the same last join with both (see `merges_of`).
        """
        normal = [token for token, type in zip(self.tokens, self.types, strict=True) if type == NORMAL]
        of_pair = {pair: float(rank) for rank, pair in enumerate(self.merges)}
        made = {
            token: last_join(token, lambda left, right: of_pair.get((left, right), math.inf))
            for token in normal
            if len(token) > 1
        }
        first = {token: of_pair[pair] if (pair := made.get(token)) else math.inf for token in normal}
        order = {token: float(rank) for rank, token in enumerate(sorted(normal, key=first.__getitem__))}
        for token, pair in made.items():
            if last_join(token, lambda left, right: order.get(left + right, math.inf)) != pair:
                self.refuse(f"scores do not come to the same as its merges for the token {token!r}")
        return [-order[token] if token in order else 0.0 for token in self.tokens]


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a sequence within sequences."""
    if step is None:
        return []
    inside = step.get("normalizers") or step.get("pretokenizers")
    if step["type"] != "Sequence":
        return [step]
    return [each for one in inside or [] for each in _steps(one)]


def _essence(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what makes no difference to ids."""
    return {"use_regex": True, **{name: value for name, value in step.items() if name != "trim_offsets"}}

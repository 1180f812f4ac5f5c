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
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

from babyllama.errors import InputError
from babyllama.text.layout import Layout, parse, read_layout
from babyllama.text.vocabularies import (
    BOS,
    EOS,
    LLAMA_3,
    LLAMA_3_1,
    LLAMA_3_WORDS,
    LONGEST_PIECE,
    broken,
    dump,
    from_llama2c,
    from_sentencepiece,
    from_tiktoken,
    letters_of_bytes,
)

SPECIALS = (
    BOS,
    EOS,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)  # the first ids, in this order
SMALLEST_VOCAB = 256 + len(SPECIALS)

BOS_NAMES = (BOS, "<s>", "<|startoftext|>", "<|im_start|>")
EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")

LARGEST_FILE = 32 * 2**20  # bytes; the tokenizer.json of Llama 3 has 9 or 17 MB

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GENERATION, CONFIG, ADDED = "generation_config.json", "tokenizer_config.json", "added_tokens.json"
CONFIGS = (*FILES[1:], GENERATION)
IN_A_FOLDER = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")


class Tokenizer:
    """Text <-> ids of one vocabulary.

    bos_id, eos_id  begin and end a document; `eos_ids` holds every id at which generation stops.
    special_ids     control tokens: they add nothing to the text, and no text encodes to them; `special_names` as
                    the files spell them.
    vocab_size      highest id + 1.
    sha256          of tokenizer.json.
    puts_bos        whether other programs put BOS before a text, because tokenizer.json says so.
    chat_template   the jinja template that came with it, as it is (text/chat.py renders it); None: there is none.
    named_tokens    what the files call "bos_token", "eos_token" and so on; templates use these names.
    generation      what a generation_config.json says that came with it.

    `decode(encode(text, bos=True)) == text` for every string, of tokenizers trained here and of llama2.c's;
    with a vocabulary from elsewhere, as far as its own normalisation and its bytes allow (SmolLM2 lacks some).
    """

    def __init__(self, files: Mapping[str, bytes], where: object = "tokenizer.json") -> None:
        """From the contents of tokenizer.json and, if there, of the files named in `CONFIGS`. Raises E310."""
        data = files["tokenizer.json"]
        layout = read_layout(data, where)
        to_bytes = _token_reader(layout, where)
        vocab, added = layout.vocab, layout.added
        self.vocab_size = len(vocab)
        self.chat_template, self.named_tokens = _for_chats(files)
        names = {id: token for token, id in vocab.items() if id in added}
        self.bos_id, self.eos_id, self.eos_ids = _ends(files, vocab, self.vocab_size, where)
        self.generation = parse(files.get(GENERATION, b"{}"), GENERATION)
        ends = {self.bos_id, *self.eos_ids}
        hidden = {
            name
            for id, name in names.items()
            if not added[id] and _is_control(name, names.values(), id in ends, self.chat_template or "")
        }
        self.special_names = {id: name for id, name in names.items() if added[id] or name in hidden}
        self.special_ids = frozenset(self.special_names)
        self._pieces = [b""] * self.vocab_size
        for token, id in vocab.items():
            if id not in self.special_ids:
                self._pieces[id] = token.encode() if id in added else to_bytes(token)

        self._files = {name: files[name] for name in FILES if name in files}
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._core = core = _core(data, layout, where)
        self._added = core.get_added_tokens_decoder()
        core.add_special_tokens([AddedToken(name, special=True) for name in hidden])
        self._marks, self._marked = dict[int, str](), dict[int, int]()
        # SentencePiece puts a space before every text, so that a word has one form wherever it stands.
        with _panics_told(where):
            bare, whole = (core.encode("a", add_special_tokens=asked).ids for asked in (False, True))
        self._prefixes_space = any(self._pieces[id].startswith(b" ") for id in bare[:1])
        self.puts_bos = whole[:1] == [self.bos_id]

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
                pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=LONGEST_PIECE,  # letters, each of which stands for a byte
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator((valid(text) for text in texts), trainer)
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
        """A tokenizer.json, a tokenizer.model of SentencePiece or Llama 3, or the tokenizer.bin of llama2.c.

        They are told apart by content. In a folder, the first of `IN_A_FOLDER` that is there. BOS and EOS are those
        that the file names, or the CONFIGS beside a tokenizer.json or tokenizer.model, else those of usual names.
        Raises InputError E310.
        """
        path = Path(path)
        if _is_folder(path):
            names = [name for name in IN_A_FOLDER if (path / name).is_file()]
            if not names:
                broken(path, f"holds none of {', '.join(IN_A_FOLDER)}")
            path /= names[0]
        data = _read(path)
        model = path.name == "tokenizer.model"
        beside = _beside(path) if model else {}
        config = parse(beside.get(CONFIG, b"{}"), CONFIG)
        files = _files_of(data, path, puts_bos=config.get("add_bos_token") is not False)
        if files["tokenizer.json"] is data:
            return cls(files | (beside or _beside(path)), path)
        if not model:
            return cls(files, path)
        # What a class of transformers is told there is no longer true of the tokenizer.json made here.
        said = {key: value for key, value in config.items() if key == "chat_template" or _token(key, value)}
        made = {CONFIG: dump({**parse(files[CONFIG], CONFIG), **said})}
        tokenizer = cls(files | beside | made, path)
        tokenizer._lacks_none(path, config)
        return tokenizer

    def _lacks_none(self, path: Path, config: Mapping[str, Any]) -> None:
        """Raises E310 where the files beside a tokenizer.model add tokens to it that begin or end texts, or that the
        chat template writes. transformers kept them so before it had tokenizer.json."""
        added = path.with_name(ADDED)
        names = [*parse(_read(added), added).items()] if added.is_file() else []
        listed = config.get("added_tokens_decoder")
        for id, token in listed.items() if isinstance(listed, dict) else ():
            names.append((str(token.get("content") if isinstance(token, dict) else token), id))
        used = (
            self.chat_template or "",
            *(self.named_tokens.get(key, "") for key in ("bos_token", "eos_token")),
        )
        for name, id in names:
            there = self._core.token_to_id(name.encode("utf-8", "replace").decode())
            if str(there) != str(id) and any(name in text for text in used):
                fix = "make a tokenizer.json:  AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                if path.with_name("tokenizer.json").is_file():
                    fix = "give its folder, or the tokenizer.json in it"
                broken(path, f"lacks {name[:80]!r}, which the files beside it add to it", fix)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text; the names of control tokens inside it are ordinary characters. Raises E302."""
        ids = self._core.encode(valid(text), add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to go on with: after BOS where `puts_bos`, and never none at all."""
        return self.encode(text, bos=self.puts_bos) or [self.bos_id]

    def marks(self, ids: Iterable[int]) -> dict[int, str]:
        """For each of these control tokens a name that stands for it in `encode_marked`, and that nobody can type.

        It is drawn at random (80 bits) from characters for private use, which have no upper case and are no space.
        """
        fresh = sorted({*ids} - self._marks.keys())
        for id in fresh:
            assert id in self.special_ids, id
            self._marks[id] = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(5)) + chr(
                0x100000 + len(self._marks) % 0xFFFD
            )
        added = [
            AddedToken(
                self._marks[id],
                single_word=self._added[id].single_word,
                lstrip=self._added[id].lstrip,
                rstrip=self._added[id].rstrip,
                normalized=self._added[id].normalized,
                special=False,  # or the core would take it for text
            )
            for id in fresh
        ]
        self._core.add_tokens(added)
        self._marked |= {self._core.token_to_id(self._marks[id]) or 0: id for id in fresh}
        return {id: self._marks[id] for id in ids}

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` of a text in which marks become control tokens; and where in it each id begins and ends.

        All of it in one go, so that merges go across wherever no control token stands. Raises E302.
        """
        encoding = self._core.encode(valid(text), add_special_tokens=False)
        return [self._marked.get(id, id) for id in encoding.ids], encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [valid(text) for text in texts]
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
            "tokenizer_config.json": dump(config),
            "special_tokens_map.json": dump({"bos_token": bos, "eos_token": eos}),
        }
        return {**made, **self._files}


def valid(text: str) -> str:
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


# Reading files, which may hold anything.


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that no system has
        broken(path, f"cannot be read: {error.strerror}")


def _read(path: Path) -> bytes:
    """The whole file, if it is a regular one of at most LARGEST_FILE bytes."""
    try:
        if not path.is_file():
            broken(path, "is not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        broken(path, f"cannot be read: {error.strerror}")
    if len(data) > LARGEST_FILE:
        broken(path, f"is larger than {LARGEST_FILE} bytes")
    return data


def _beside(path: Path) -> dict[str, bytes]:
    return {name: _read(path.with_name(name)) for name in CONFIGS if path.with_name(name).is_file()}


def _files_of(data: bytes, path: Path, puts_bos: bool) -> dict[str, bytes]:
    """The files of the tokenizer that data describes, whatever the file is called; puts_bos is for SentencePiece."""
    start = data[:1000].lstrip().lower()
    if not start:
        broken(path, "is empty")
    if start.startswith(b"version https://git-lfs"):
        broken(
            path,
            "is a pointer of Git LFS, not the file itself",
            "fetch the file it stands for:  git lfs pull",
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        broken(
            path, "is a web page, perhaps one that says why the download failed", "download the file itself"
        )
    if start.startswith(b"gguf"):
        broken(
            path, "is a GGUF, which carries its tokenizer itself", "give it as the model, without --tokenizer"
        )
    if data[2:4] == b"\0\0":  # the length of the longest piece, far below 65,536
        return from_llama2c(data, path)
    if start.startswith(b"{"):
        return {"tokenizer.json": data}
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data[:1000]):
        return from_tiktoken(data, path, _names_of_llama_3(path))
    if data.startswith(b"\x0a"):
        return from_sentencepiece(data, path, puts_bos)
    broken(path, "is neither JSON nor SentencePiece, nor ranks in base64, nor a tokenizer of llama2.c")


def _names_of_llama_3(path: Path) -> tuple[str, ...]:
    """Llama 3 and 3.1 have one file of ranks. Meta's params.json beside it tells which it is; else it is the later."""
    beside = path.with_name("params.json")
    if not beside.is_file():
        return LLAMA_3_1
    return LLAMA_3_1 if parse(_read(beside), beside).get("use_scaled_rope") else LLAMA_3


@contextmanager
def _panics_told(where: object) -> Iterator[None]:
    """What the library says about a file becomes E310; a panic of its Rust side is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        broken(where, f"is not a tokenizer ({str(error)[:200]})")


def _core(data: bytes, layout: Layout, where: object) -> Core:
    with _panics_told(where):
        # First without vocabulary and merges: what is wrong elsewhere is then found with little memory.
        Core.from_str(json.dumps(layout.parts))
        core = Core.from_buffer(data)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # what a user types is text, even if it looks like <|eot_id|>
    names = {id: token for token, id in layout.vocab.items() if id in layout.added}
    for id, token in names.items():
        if core.token_to_id(token) != id:
            broken(where, f"added token {token!r} has id {id}, but gets {core.token_to_id(token)}")
    control = {id: token for id, token in names.items() if layout.added[id]}
    with _panics_told(where):
        encodings = core.encode_batch([*control.values()], add_special_tokens=False)
    for token, encoding in zip(control.values(), encodings, strict=True):
        if not control.keys().isdisjoint(encoding.ids):
            broken(where, f"a text that holds {token!r} would be encoded as a control token")
    return core


def _token_reader(layout: Layout, where: object) -> Callable[[str], bytes]:
    """The function from a token, as the file spells it, to its bytes."""
    decoder = json.dumps(layout.parts.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder or '"ByteLevel"' in json.dumps(layout.parts.get("pre_tokenizer")):
        byte_of = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
        return lambda token: (
            bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()
        )
    if not layout.model.get("byte_fallback"):
        broken(where, "is neither byte-level nor has byte fallback, so that not every text can be encoded")
    space = "▁" if "▁" in decoder or "Metaspace" in decoder else " "

    def to_bytes(token: str) -> bytes:
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(space, " ").encode()

    return to_bytes


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
            config = parse(files[name], name)
            begins += [*ids_in(config.get("bos_token_id")), *id_named(config.get("bos_token"))]
            stops += [*ids_in(config.get("eos_token_id")), *id_named(config.get("eos_token"))]
    # transformers writes the ids 1 and 2 for a model whose maker named none: the tokenizer's own BOS goes first
    if "tokenizer_config.json" in files:
        named = parse(files["tokenizer_config.json"], "tokenizer_config.json").get("bos_token")
        begins = [*id_named(named), *begins]
    stops = stops or [vocab[name] for name in EOS_NAMES if name in vocab][:1]
    begins = begins or [vocab[name] for name in BOS_NAMES if name in vocab][:1] or stops[:1]
    if not stops:
        broken(where, "names no token that ends a text (eos_token in a tokenizer_config.json beside it)")
    return begins[0], stops[0], frozenset(stops)


def _token(key: str, value: object) -> str | None:
    """The token that an entry of a tokenizer_config.json names, if it names one."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if key.endswith("_token") and isinstance(text, str) else None


def _for_chats(files: Mapping[str, bytes]) -> tuple[str | None, dict[str, str]]:
    """The chat template, wherever newer and older programs keep it, and the tokens that have a name."""
    named: dict[str, str] = {}
    template = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # where they differ, the latter holds
        config = parse(files[name], name) if name in files else {}
        for key, value in config.items():
            if (text := _token(key, value)) is not None:
                named[key] = text
        template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        default = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(default, {}).get("template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    for text in (template, *named.values()):
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            broken("tokenizer_config.json", "holds half of a character (a lone surrogate)")
    return template if isinstance(template, str) else None, named


def _is_control(name: str, names: Collection[str], ends: bool, template: str) -> bool:
    """Whether an added token that tokenizer.json does not call special is one all the same: in brackets, and it begins
    or `ends` a text, or a chat template writes it, as <|im_start|> or DeepSeek's <｜User｜>. If it were left as it is,
    a person could type it. What comes in pairs, <think> and </think>, is text: it is shown, and templates cut it out.
    """
    other = "<" + name[2:] if name.startswith("</") else "</" + name[1:]
    return bool(re.fullmatch(r"<.+>|\[.+\]", name)) and (ends or (name in template and other not in names))

"""Files that are made up: right in most, with a few lies about lengths, places, kinds and numbers.

Whoever damages bytes at random seldom gets past the first check of a format. Here a file is put together from its
parts, so that what stands around a lie holds.
"""

import base64
import json
import math
import pickletools
import re
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40)
NUMBERS += (2**48, 2**60, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
TEXTS = ("", "a", "\0", "\x1b[2J", "\ud800", "ß😀", "▁", "aa", "a" * 33, "ab" * 300, "x" * 70_000, "9" * 5000)
TEXTS += (
    "llama",
    "<s>",
    "<|eot_id|>",
    "../model.safetensors",
    "/dev/zero",
    "a\\b",
    ".safetensors",
    "▁" * 300,
)
SHORT = TEXTS[:8]
LARGEST = 2**20  # bytes of numbers behind a header


def few(chance: Random) -> range:
    return range(chance.choice((1, 1, 1, 2, 4)))


def rarely(large: int, small: int, chance: Random) -> int:
    """The large number once in 200 times: what is large takes its time."""
    return large if chance.random() < 0.005 else small


def cut_or_longer(data: bytes, chance: Random) -> bytes:
    """Mostly the data itself."""
    kind = chance.randrange(12)
    return data[: chance.randrange(len(data) + 1)] if kind == 0 else data + bytes(chance.choice((0, kind)))


# ---- JSON: config.json, params.json, the index, tokenizer.json, the header of safetensors ------------

VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 4, 8, 64, 0.5, 1e-5, 1e308, math.nan, math.inf)
VALUES += (-(2**63), 2**31, 2**53, 2**63, 10**400, [], {}, [0, 0], [1], [8, 8], [2**40] * 4, [1] * 5000, [[]])
VALUES += ([2**47] * 1000, 10**4299, -(10**4299), ["F32"])
VALUES += ({"a": {}}, "F32", "BF16", "F64", "I64", "F8_E4M3", "linear", "llama3", *NUMBERS, *TEXTS)
STEPS = (
    "Replace",
    "Prepend",
    "Strip",
    "NFKC",
    "Sequence",
    "Split",
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Fuse",
)
VALUES += tuple(
    {
        "type": kind,
        "pattern": {"String": "a"},
        "content": "b",
        "prepend": "_",
        "normalizers": [],
        "decoders": [],
    }
    for kind in STEPS
)


def lying_json(value: Any, chance: Random) -> bytes:
    """The value with some of it gone, in another's place or said twice, and with others' values."""
    value = deepcopy(value)
    for _ in few(chance):
        inside, key = _place(value, chance)
        kind = chance.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1:
            other, its = _place(value, chance)
            inside[key] = deepcopy(other[its])
        elif kind == 2 and isinstance(inside, dict):
            inside[chance.choice(TEXTS)] = inside[key]
        elif kind == 3 and type(inside[key]) is int:
            inside[key] += chance.choice((-8, -1, 1, 8, 2**31))
        else:
            inside[key] = deepcopy(chance.choice(VALUES))
        if not value:
            break
    text = json.dumps(value)
    if chance.random() < 0.1:  # what json.dumps does not write
        found = list(re.finditer(r'(?<=\{)|\d+|"[^"]*"', text)) or [re.match("", text)]
        at = chance.choice(found)
        said = json.dumps(chance.choice((*value, "a")) if isinstance(value, dict) else "a") + ": 1, "
        deep = chance.choice((10, 100, 1000, rarely(100_000, 3, chance)))
        many = rarely(600_000, 3, chance)  # of the smallest things that take the most memory
        odd = ("1" + "0" * 5000, "1e999", "-0", "-", "[" * deep, '{"a":' * deep, "[" + "{}," * many + "{}]")
        new = chance.choice(odd) if at[0] else said
        text = text[: at.start()] + new + text[at.end() :]
    return text.encode()


def _place(value: Any, chance: Random) -> tuple[Any, Any]:
    """An object or a list somewhere in the value, and a key or a number of it."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inside = value[key]
        if not isinstance(inside, (dict, list)) or not inside or chance.random() < 0.2:
            return value, key
        value = inside


def safetensors(header: dict[str, Any], chance: Random) -> bytes:
    """Tensors that overlap, leave gaps, come twice or are of odd shapes and kinds, and headers of another length."""
    header = deepcopy(header)
    at = 0
    relaid = chance.random() < 0.5
    if relaid:  # other shapes, each with a place of its size
        for _ in few(chance):
            entry = chance.choice(list(header.values()))
            size = chance.choice((0, 1, 2, 3, 4, 8, 9, 4000))
            entry["shape"] = chance.choice(([size], [size, 8], [8, size, 1], [1] * size, [size] * 3, [8, 8]))
            entry["dtype"] = chance.choice(("F32", "F32", "F16", "BF16", "F64", "I8"))
        for entry in header.values():
            size = math.prod(entry["shape"]) * {"F32": 4, "F64": 8, "I8": 1}.get(entry["dtype"], 2)
            at += chance.choice((-4, 4, 0)) if chance.random() < 0.02 else 0
            entry["data_offsets"] = [at, at + size]
            at += size
    else:
        at = max(entry["data_offsets"][1] for entry in header.values())
    if rarely(1, 0, chance):
        header["a" * chance.randrange(2**20)] = {
            "dtype": "F32",
            "shape": [0] * 10_000,
            "data_offsets": [at, at],
        }
    text = json.dumps(header).encode() if relaid and chance.random() < 0.8 else lying_json(header, chance)
    length = chance.choice(NUMBERS) if chance.random() < 0.05 else len(text)
    return struct.pack("<Q", length) + text + cut_or_longer(bytes(min(max(0, at), LARGEST)), chance)


# ---- GGUF ------------------------------------------------------------------------------------------

STRING, ARRAY = 8, 9
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
Key = list[Any]  # name, type, and the value, or for an array [type, elements]
Entry = list[Any]  # of the table of tensors: name, axes, type, offset
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 30: (1, 2)}


def gguf(keys: list[Key], shapes: dict[str, list[int]], chance: Random) -> bytes:
    """Keys and tensors of a Llama, with others among them, twice, of other types, sizes, alignments and places."""
    keys, tensors, end = [[*key] for key in keys], list[Entry](), 0
    for name, axes in shapes.items():
        kind = chance.choice([*BLOCKS]) if len(axes) > 1 else 0
        numbers, size = BLOCKS[kind]
        tensors.append([name, axes, kind, end])
        end += -(-math.prod(axes) // numbers * size // 32) * 32
    for _ in few(chance):
        key, entry = chance.choice(keys), chance.choice(tensors)
        kind = chance.randrange(12)
        if kind == 0:
            key[1:] = _typed(chance)
        elif kind == 1:
            keys.insert(chance.randrange(len(keys)), [chance.choice((*TEXTS, key[0])), *_typed(chance)])
        elif kind == 2:
            keys.remove(key)
        elif kind == 3:
            name = chance.choice(
                ("general.alignment", "split.count", "llama.expert_count", "llama.rope.scaling.type")
            )
            keys.append(
                [name, *chance.choice(([4, chance.choice((0, 1, 8, 31, 2**16, 2**31))], _typed(chance)))]
            )
        elif kind in (4, 5) and (arrays := [key for key in keys if key[1] == ARRAY and key[2][1]]):
            key = chance.choice(arrays)
            key[2] = [key[2][0], _other_elements(*key[2], chance)]
        elif kind == 6:
            entry[0] = chance.choice(
                (*TEXTS, chance.choice(tensors)[0], "rope_freqs.weight", "output.weight")
            )
        elif kind == 7:
            axes = [chance.choice((*NUMBERS, 8, 8, 16)) for _ in range(chance.choice((0, 1, 2, 4, 5, 40)))]
            entry[1] = chance.choice((axes, entry[1][::-1], entry[1][:1], [*entry[1], 1]))
        elif kind == 8:
            entry[2] = chance.choice((0, 1, 2, 3, 8, 10, 12, 13, 14, 24, 30, 99, 2**31))
        elif kind == 9:
            entry[3] = chance.choice((*NUMBERS, chance.choice(tensors)[3], entry[3] ^ 32, end))
        elif kind == 10:
            tensors.insert(0, [chance.choice((entry[0], "a")), *entry[1:]])
        else:
            tensors.remove(entry)
        if not (keys and tensors):
            break
    counts = [len(tensors), len(keys)]
    if chance.random() < 0.05:
        counts[chance.randrange(2)] = chance.choice(NUMBERS)
    head = b"GGUF" + struct.pack("<IQQ", chance.choice((3, 3, 3, 3, 2, 1, 4)), *counts)
    head += b"".join(
        _gguf_text(name) + struct.pack("<I", kind) + _gguf_value(kind, value) for name, kind, value in keys
    )
    for name, axes, kind, offset in tensors:
        head += _gguf_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    body = chance.randbytes(end) if chance.random() < 0.2 else bytes(end)
    return head + bytes(-len(head) % 32) + cut_or_longer(body, chance)


def _typed(chance: Random) -> list[Any]:
    """A type and a value of it, an array in every second case."""
    if chance.random() < 0.02:
        return [chance.choice((13, 255, 2**31)), None]
    kind = chance.choice((*LETTERS, STRING))
    if chance.random() < 0.5:
        return [kind, _element(kind, chance)]
    if chance.random() < 0.05:  # an array of arrays, or of no type
        return [ARRAY, [chance.choice((ARRAY, 13, 2**31)), []]]
    length = chance.choice((0, 1, 2, 3, 300, rarely(50_000, 4, chance)))
    element = _element(kind, chance) if kind != STRING or length < 4 else chance.choice(SHORT)
    return [ARRAY, [kind, [element] * length]]


def _element(kind: int, chance: Random) -> Any:
    if kind == STRING:
        return chance.choice(TEXTS)
    if LETTERS[kind] in "fd":
        return chance.choice((0.0, -1.0, 1e-5, 8.0, 1e30, math.nan, math.inf))
    size = struct.calcsize(LETTERS[kind])
    number = chance.choice(NUMBERS).to_bytes(8, "little")[:size]
    return struct.unpack(f"<{LETTERS[kind]}", number)[0]


def _other_elements(kind: int, elements: list[Any], chance: Random) -> list[Any]:
    at = chance.randrange(len(elements) + 1)
    new = chance.choice((_element(kind, chance), *elements[:1], *elements[-1:]))
    return chance.choice(
        (elements[:at], [*elements[:at], new, *elements[at + 1 :]], [*elements, new], elements * 2)
    )


def _gguf_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _gguf_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _gguf_text(value)
    if kind == ARRAY:
        inner, elements = value
        head = struct.pack("<IQ", inner, len(elements))
        if inner == STRING:
            return head + b"".join(map(_gguf_text, elements))
        return head + (struct.pack(f"<{len(elements)}{LETTERS[inner]}", *elements) if elements else b"")
    return struct.pack(f"<{LETTERS[kind]}", value) if kind in LETTERS else b""


# ---- pth: a pickle in a zip archive ----------------------------------------------------------------

REBUILD, ORDERED = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"
DOUBLING = b"q\1h\1\x86" * 60  # a tuple of itself twice, and again: 2**60 elements, to those who look at all
ALLOWED = [
    code
    for code in pickletools.opcodes
    if code.code.encode("latin-1") in b".(JKMN\x88\x89X}])ueshqjrRQtbc\x85\x86\x87"
]
KINDS = (
    b"FloatStorage",
    b"HalfStorage",
    b"BFloat16Storage",
    b"DoubleStorage",
    b"IntStorage",
    b"UntypedStorage",
)


def pth(tensors: dict[str, tuple[int, ...]], chance: Random) -> bytes:
    """What torch.save writes for tensors of these shapes, but for what is changed in pickle, storages and archive."""
    counts = {name: math.prod(shape) for name, shape in tensors.items()}
    facts: list[dict[str, Any]] = [
        {"name": name, "kind": KINDS[0], "key": str(i), "numbers": counts[name], "offset": 0, "shape": shape,
         "stride": tuple(math.prod(shape[j + 1 :]) for j in range(len(shape)))}
        for i, (name, shape) in enumerate(tensors.items())
    ]  # fmt: skip
    entries = [["a/data.pkl", b""], ["a/byteorder", b"little"], ["a/version", b"3\n"]]
    entries += [[f"a/data/{fact['key']}", bytes(4 * fact["numbers"])] for fact in facts]
    lie = chance.randrange(3)
    for _ in few(chance) if lie == 0 else ():
        _change_tensor(facts, chance)
    program = [b"\x80\2", b"}", b"("]
    for fact in facts:
        program += _rebuilt(**fact)
    program += [b"u", b"."]
    if lie == 1:
        program = _other_program(program, chance)
    entries[0][1] = b"".join(program)
    return zipped(entries, chance if lie == 2 else None, chance)


def _change_tensor(facts: list[dict[str, Any]], chance: Random) -> None:
    fact, other = chance.choice(facts), chance.choice(facts)
    what = chance.choice((*fact, "key", "shape", "stride"))
    if chance.random() < 0.3:
        fact[what] = other[what]
    elif what in ("numbers", "offset"):
        fact[what] = chance.choice((*NUMBERS, -1, -(2**63), fact[what] + 1))
    elif what in ("shape", "stride"):
        sizes = tuple(
            chance.choice((0, 1, 8, 64, -1, *NUMBERS)) for _ in range(chance.choice((0, 1, 2, 4, 5, 500)))
        )
        fact[what] = chance.choice((sizes, fact[what][::-1], (*fact[what], 1), (0,) * len(fact[what])))
    elif what == "kind":
        fact[what] = chance.choice(KINDS)
    elif what == "key":  # one storage for all
        for each in facts:
            each["key"], each["numbers"] = fact["key"], fact["numbers"]
    else:
        facts.append({**fact, "name": chance.choice((*TEXTS, "rope.freqs"))})


def _rebuilt(
    name: str,
    kind: bytes,
    key: str,
    numbers: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> list[bytes]:
    """The instructions that put one tensor on the stack, behind its name."""
    storage = [
        b"(",
        _unicode("storage"),
        b"ctorch\n" + kind + b"\n",
        _unicode(key),
        _unicode("cpu"),
        _int(numbers),
    ]
    sizes = [b"(", *map(_int, shape), b"t", b"(", *map(_int, stride), b"t"]
    return [
        _unicode(name),
        REBUILD,
        b"(",
        *storage,
        b"t",
        b"Q",
        _int(offset),
        *sizes,
        b"\x89",
        ORDERED,
        b")",
        b"R",
        b"t",
        b"R",
    ]


def _unicode(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def _other_program(program: list[bytes], chance: Random) -> list[bytes]:
    """The program with a few instructions gone, changed or twice; or one of random instructions."""
    if chance.random() < 0.3:
        return [
            chance.choice(program) if chance.random() < 0.7 else _instruction(chance)
            for _ in range(chance.choice((1, 10, 100, rarely(20_000, 30, chance))))
        ]
    program = [*program]
    for _ in few(chance):
        at = chance.randrange(len(program))
        new = chance.choice(
            (_instruction(chance), _instruction(chance), chance.choice(program), DOUBLING, b"")
        )
        program[at : at + chance.randrange(2)] = [new] * chance.choice((1, 1, 1, rarely(5000, 2, chance)))
    return program


def _instruction(chance: Random) -> bytes:
    """One of pickle's instructions, mostly of those that a dict of tensors needs, with some argument."""
    code = chance.choice(ALLOWED if chance.random() < 0.7 else pickletools.opcodes)
    size = code.arg.n if code.arg else 0
    argument = chance.choice((b"os\nsystem\n", b"1\n", b"__builtin__\neval\n", REBUILD[1:]))
    if size >= 0:
        argument = chance.choice((chance.randrange(4), 2**63)).to_bytes(8, "little")[:size]
    elif size < -1:  # behind its length, in 1, 4, 4 or 8 bytes
        length = chance.choice(NUMBERS) if chance.random() < 0.2 else 20
        argument = length.to_bytes(8, "little")[: {-2: 1, -3: 4, -4: 4}.get(size, 8)] + bytes(20)
    return code.code.encode("latin-1") + argument


def zipped(entries: list[list[Any]], lies: Random | None, chance: Random) -> bytes:
    """A zip archive of names and contents; with lies in its headers, its table of contents or its end."""
    out, table = b"", b""
    liar = lies.randrange(len(entries)) if lies else -1
    kind = lies.randrange(14) if lies else -1
    for number, (text, data) in enumerate(entries):
        name, extra = text.encode(), b""
        fields = {
            "flags": 0,
            "method": 0,
            "packed": len(data),
            "size": len(data),
            "name": len(name),
            "at": len(out),
        }
        if lies and number == liar and kind < 6:
            fields[[*fields][kind]] = lies.choice(NUMBERS) % (2**16 if kind in (0, 1, 4) else 2**32)
        elif lies and number == liar and kind == 6:
            data = zlib.compress(bytes(lies.choice((10, 10**6))))
            fields |= {"method": 8, "packed": len(data)}
        elif (
            lies and number == liar and kind == 7
        ):  # zip64: the true numbers stand in a field behind the name
            extra = struct.pack(
                "<HH3Q", 1, lies.choice((24, 24, 8, 0)), *(lies.choice(NUMBERS) for _ in range(3))
            )
            fields |= {"packed": 2**32 - 1, "size": 2**32 - 1, "at": 2**32 - 1}
        elif lies and number == liar and kind == 8:
            name = lies.choice((entries[0][0].encode(), b"\xff", b"../x", b"a/data/0", b"x" * 60_000, b""))
            fields["name"] = len(name)
        flags, method, packed, size, length, at = fields.values()
        one = struct.pack("<4s5H3L2H", b"PK\3\4", 0, flags, method, 0, 0, 0, packed, size, length, len(extra))
        out += one + name + extra + data
        one = struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            0,
            0,
            flags,
            method,
            0,
            0,
            0,
            packed,
            size,
            length,
            len(extra),
            0,
            0,
            0,
            0,
            at,
        )
        table += (one + name + extra) * (2 if number == liar and kind == 9 else 1)
    end: list[int] = [0, 0, len(entries), len(entries), len(table), len(out), 0]
    if lies and kind in (10, 11):
        at = lies.randrange(2, 7)
        end[at] = lies.choice((*NUMBERS, len(table) - 1, len(out) + 1)) % (2**32 if at in (4, 5) else 2**16)
    large = b""
    if lies and kind in (12, 13):  # the end again, for archives of more than 4 GiB, and where it is
        odd = [lies.choice((*NUMBERS, len(table), len(out))) for _ in range(4)]
        numbers = chance.choice((odd, [len(entries), len(entries), len(table), len(out)]))
        large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
        large += struct.pack("<4sLQL", b"PK\6\7", 0, lies.choice((len(out) + len(table), odd[0])), 1)
        end[2:6] = [2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1]
    return out + table + large + struct.pack("<4s4H2LH", b"PK\5\6", *end)


# ---- vocabularies ----------------------------------------------------------------------------------

Pieces = list[tuple[bytes, float, int]]  # a piece, its score, and its type as SentencePiece counts them


def other_pieces(pieces: Pieces, chance: Random) -> Pieces:
    """With some that are empty, long, twice, of other types, no text, or among many like them."""
    pieces = [*pieces]
    for _ in few(chance):
        at = chance.randrange(len(pieces))
        piece, score, kind = pieces[at]
        new: Pieces = [(piece, score, kind)]
        choice = chance.randrange(7)
        if choice == 0:
            new = []
        elif choice == 1:
            new = [(piece, chance.choice((math.nan, math.inf, -math.inf, 0.0, pieces[-1][1], 1e38)), kind)]
        elif choice == 2:
            new = [(piece, score, chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 255)))]
        elif choice == 3:
            odd = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
            new = [(chance.choice((odd, b"\xff\xfe", b"a" * 256, pieces[-1][0], piece * 2)), score, kind)]
        elif choice == 4:
            new *= 2
        elif choice == 5:  # runs
            new += [
                (piece * length, -float(chance.choice((length, 0))), kind)
                for length in range(2, chance.choice((4, 40)))
            ]
        else:  # words of a few letters, in every order
            alphabet = chance.choice((b"ab", b"aeiou thrs", piece[:4] or b"x"))
            words = chance.choice((2, 20, rarely(5000, 60, chance)))
            new += [
                (bytes(chance.choices(alphabet, k=chance.choice((2, 3, 5, 60)))), -float(number), kind)
                for number in range(words)
            ]
        pieces[at : at + 1] = new
        if not pieces:
            break
    return pieces


def pieces_as(write: Callable[[Pieces, Random], bytes], pieces: Pieces, chance: Random) -> bytes:
    return write(other_pieces(pieces, chance), chance)


def sentencepiece(pieces: Pieces, chance: Random | None = None) -> bytes:
    """A tokenizer.model: a protobuf of pieces, and of a BPE with byte fallback."""
    out = b""
    for piece, score, kind in pieces:
        out += field(1, field(1, piece) + field(2, struct.pack("<f", score)) + field(3, kind))
    trainer = [(3, 2), (35, 1)]
    normalizer = [(3, 1), (4, 0), (5, 1)]
    if chance:
        for _ in few(chance) if chance.random() < 0.3 else ():
            fields = chance.choice((trainer, normalizer))
            value = chance.choice((0, 1, 2, 2**64 - 1, b"", b"</s>", b"\xff", bytes(4)))
            fields.append((chance.choice((1, 2, 3, 4, 5, 24, 35, 46, 47, 2**28)), value))
    out += field(2, b"".join(field(*each) for each in trainer))
    out += field(3, b"".join(field(*each) for each in normalizer))
    if chance and chance.random() < 0.1:
        out += chance.choice(
            (
                b"\x0b",
                b"\x0a\xff\xff\xff\xff\x0f",
                b"\x80" * 20,
                field(5, field(2, b"x")),
                field(1, 7),
                b"\x0a\0" * 9,
            )
        )
    return out


def field(number: int, value: int | bytes) -> bytes:
    """Of a protobuf: a whole number, or bytes; four bytes of the field 2 are a float."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if number == 2 and len(value) == 4:
        return _varint(number << 3 | 5) + value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def tokenizer_bin(pieces: Pieces, chance: Random | None = None) -> bytes:
    """A tokenizer.bin of llama2.c."""
    longest = max((len(piece) for piece, _, _ in pieces), default=0)
    liar = chance.randrange(20 * len(pieces) + 1) if chance else -1
    out = struct.pack("<i", longest)
    for number, (piece, score, _) in enumerate(pieces):
        length = chance.choice((0, -1, 1, 2**31 - 1)) if chance and number == liar else len(piece)
        out += struct.pack("<fi", score, length) + piece
    return out


def tiktoken(pieces: Pieces, chance: Random | None = None) -> bytes:
    """A tokenizer.model of Llama 3: the 256 bytes, then the ordinary pieces; each in base64, and its rank."""
    tokens = [bytes([byte]) for byte in range(256)] + [piece for piece, _, kind in pieces if kind == 1]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(dict.fromkeys(tokens))]
    for _ in few(chance) if chance and chance.random() < 0.7 else ():
        at = chance.randrange(len(lines))
        token, _, rank = lines[at].partition(b" ")
        new = (
            token + b" " + lines[-1].rpartition(b" ")[2],
            token + b" -1",
            token + b" 1e3",
            rank + b" " + rank,
            token,
            b"",
            b"= 1",
        )
        lines[at : at + 1] = chance.choice(([], [lines[at]] * 2, [chance.choice(new)], [chance.choice(new)]))
    return b"\n".join(lines) + b"\n"


# ---- llama2.c --------------------------------------------------------------------------------------


def llama2c(chance: Random) -> bytes:
    """A header of small sizes, often with an odd one, and as many zeros as it asks for."""
    version = chance.randrange(3)
    heads = chance.choice((1, 2, 4))
    dim, hidden = 2 * heads * chance.choice((1, 2, 4)), chance.choice((1, 2, 8, 24))
    layers, vocab, context = (
        chance.choice((1, 1, 2, rarely(300, 3, chance))),
        chance.choice((1, 9, 300)),
        4,
    )
    sizes = [dim, hidden, layers, heads, heads // chance.choice((1, 1, heads)), vocab, context]
    group = chance.choice((1, 2, 4))
    matrices = layers * dim * (2 * dim + 2 * dim // heads * sizes[4] + 3 * hidden) + vocab * dim
    tied = chance.random() < 0.5
    matrices += 0 if tied else vocab * dim
    floats = matrices + (2 * layers + 1) * dim + (context * dim // heads if version == 0 else 0)
    length = 4 * floats if version < 2 else 4 * (floats - matrices) + matrices + 4 * matrices // group
    if chance.random() < 0.4:
        sizes[chance.randrange(7)] = chance.choice(
            (0, -1, -(2**31), 3, 5, *(n for n in NUMBERS if n < 2**31))
        )
    if version == 0:
        sizes[5] = sizes[5] if tied else min(2**31 - 1, -sizes[5])
        head = struct.pack("<7i", *sizes)
    else:
        head = struct.pack(
            "<2I7iBi", 0x616B3432, version, *sizes, tied, chance.choice((group, group, group, 0, -1, 3))
        )
        head = head.ljust(256, b"\0")
    return head + cut_or_longer(bytes(min(length, LARGEST)), chance)

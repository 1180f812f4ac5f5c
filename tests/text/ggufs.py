"""The metadata of a GGUF, read and written as the format is described: for tests only, it trusts what it reads."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(file: BinaryIO) -> dict[str, Any]:
    def plain(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]

    def value(kind: int) -> Any:
        if kind in PLAIN:
            return plain(PLAIN[kind])
        if kind == 8:
            return file.read(plain("Q")).decode()
        inside, count = plain("I"), plain("Q")
        if inside in PLAIN:
            code = f"{count}{PLAIN[inside]}"
            return list(struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}"))))
        return [value(inside) for _ in range(count)]

    assert file.read(4) == b"GGUF"
    _, _, keys = plain("I"), plain("Q"), plain("Q")
    return {value(8): value(plain("I")) for _ in range(keys)}


def write_metadata(metadata: dict[str, Any], path: Path) -> None:
    """A GGUF of version 3 without tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> bytes:
        match value:
            case bool():
                return struct.pack("<I?", 7, value)
            case int():
                return struct.pack("<II", 4, value)
            case str():
                return struct.pack("<I", 8) + text(value)
            case [str(), *_]:
                return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
            case [float(), *_]:
                return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
            case [int(), *_]:
                return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        raise TypeError(value)

    body = b"".join(text(key) + typed(value) for key, value in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)

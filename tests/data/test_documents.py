"""Files and folders: what is read, what is left out, what is an error, and nothing that hangs."""

import json
import os
import socket
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.checkpoint.folder import write_folder
from babyllama.checkpoint.run import Run
from babyllama.data import documents
from babyllama.data.documents import PIECE, PREPARED, Reading, cut, find_files, read_file
from babyllama.errors import BabyLlamaError, InputError, MachineError, UsageError

READING = Reading()
ILL_FORMED = {
    "lone continuation": b"\x80",
    "overlong slash": b"\xc0\xaf",
    "overlong in three": b"\xe0\x80\xaf",
    "surrogate": b"\xed\xa0\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "never used": b"\xff",
    "cut in two": b"\xe6\x97",
    "Latin-1 é": b"caf\xe9 ",
}


def _texts(file: Path, **reading: str) -> list[str]:
    return [document.text for document in read_file(file, Reading(**reading))]


def _code(call) -> str:
    with pytest.raises(BabyLlamaError) as error:
        call()
    assert error.value.fix
    return error.value.code


# Bytes to text.


def test_line_ends_and_byte_order_mark_are_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\nfour \xef\xbb\xbf")
    assert _texts(file) == ["one\ntwo\nthree\n\nfour \ufeff"]


@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), st.integers(1, 9))
def test_chunks_of_any_size_give_the_same_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "chunked.txt"
    file.write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", chunk)
        assert _texts(file) == [text]


@pytest.mark.parametrize("name", ILL_FORMED)
@pytest.mark.parametrize("before", [b"", b"one\ntwo\n", b"x" * 70_000 + b"\n" * 5])
def test_bytes_that_are_not_utf8_are_e302_at_their_offset_and_line(
    tmp_path: Path, name: str, before: bytes
) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(before + ILL_FORMED[name])
    offset = len(before) + (3 if name == "Latin-1 é" else 0)
    line = before.count(b"\n") + 1
    with pytest.raises(InputError) as error:
        _texts(file)
    assert error.value.code == "E302"
    assert f"byte offset {offset}, line {line}:" in str(error.value)
    assert f"bad.txt:{line}" in error.value.where
    assert "--encoding latin-1" in error.value.fix
    assert "--on-bad-text replace" in error.value.fix
    assert "\ufffd" in "".join(_texts(file, on_bad_text="replace"))


def test_the_named_encoding_is_used(tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_bytes("café\r\n".encode("latin-1"))
    assert _texts(file, encoding="latin-1") == ["café\n"]
    file.write_bytes("café 日本".encode("utf-16"))
    assert _texts(file, encoding="utf-16") == ["café 日本"]


def test_utf16_read_as_utf8_says_so(tmp_path: Path) -> None:
    file = tmp_path / "notepad.txt"
    for encoding in ("utf-16-le", "utf-16-be"):
        file.write_bytes("\ufeffhello".encode(encoding))
        with pytest.raises(InputError, match="UTF-16") as error:
            _texts(file)
        assert (error.value.code, error.value.fix) == ("E302", "--encoding utf-16")
    file.write_bytes("hello".encode("utf-16-le"))  # without a mark it is just bytes with NULs
    assert _code(lambda: find_files(file, READING)) == "E305"


def test_a_nul_far_into_a_file_is_e305(tmp_path: Path) -> None:
    file = tmp_path / "late.txt"
    file.write_bytes(b"a\n" * 50_000 + b"\0")
    with pytest.raises(InputError, match="50001") as error:
        _texts(file)
    assert error.value.code == "E305"


@pytest.mark.parametrize(
    ("setting", "value"), [("encoding", "utf-88"), ("encoding", "hex"), ("on_bad_text", "skip")]
)
def test_an_unknown_encoding_or_choice_is_e101(setting: str, value: str) -> None:
    with pytest.raises(UsageError) as error:
        Reading(**{setting: value})
    assert error.value.code == "E101"


# Text to documents.


@given(st.lists(st.text("ab \n日")), st.integers(1, 20))
def test_pieces_are_the_text_and_short_enough(chunks: list[str], size: int) -> None:
    pieces = list(cut(chunks, size))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= size for piece in pieces)
    assert all(len(piece) > size // 2 for piece in pieces[:-1])


def test_pieces_end_at_paragraphs_then_lines_then_words() -> None:
    assert list(cut(["aaaa bb\ncc\n\ndd ee\nff gg hh"], 16)) == ["aaaa bb\ncc\n\n", "dd ee\nff gg hh"]
    assert list(cut(["aaaa bb\ncc dd ee ff gg"], 12)) == ["aaaa bb\n", "cc dd ee ff ", "gg"]
    assert list(cut(["aaaa bb cc dd"], 9)) == ["aaaa bb ", "cc dd"]
    assert list(cut(["a" * 25], 10)) == ["a" * 10, "a" * 10, "a" * 5]


def test_a_short_file_is_one_document_and_a_long_one_many(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = "".join(f"Paragraph {n} says something.\n\n" for n in range(3000))
    file.write_text(text, encoding="utf-8")
    long = _texts(file)
    assert "".join(long) == text
    assert len(long) >= 4
    assert all(PIECE // 2 < len(piece) <= PIECE and piece.endswith("\n\n") for piece in long[:-1])
    file.write_text(text[:60_000], encoding="utf-8")
    assert _texts(file) == [text[:60_000]]


def test_a_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = ["one\r\ntwo", "with \u2028 inside", "日本 \U0001f389"]  # the last two are written as they are
    file.write_text(
        "\n\n".join(json.dumps({"text": row}, ensure_ascii=row.isascii()) for row in rows) + "\n",
        encoding="utf-8",
    )
    assert _texts(file) == ["one\ntwo", *rows[1:]]
    file.write_text('{"story": "a"}\n', encoding="utf-8")
    assert _texts(file, field="story") == ["a"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a"', "JSON"),
        ("plain text", "JSON"),
        ('["a"]', "object"),
        ('{"story": "a"}', "its fields are story"),
        ('{"text": 3}', "no text"),
        ('{"text": null}', "no text"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_e306_with_its_number(tmp_path: Path, line: str, found: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "good"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=found) as error:
        _texts(file)
    assert error.value.code == "E306"
    assert error.value.where.endswith("rows.jsonl:3")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ('{"title": "a", "n": 1}', "--field title"),
        ('{"n": 1, "the story": "a", "title": "b"}', "--field 'the story'   or  --field title"),
        ('{"text": null, "n": 1}', "correct or delete this row"),
    ],
)
def test_the_remedy_names_the_fields_that_hold_a_text(tmp_path: Path, line: str, fix: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(InputError) as error:
        _texts(file)
    assert error.value.fix.endswith(fix)


def test_half_a_surrogate_pair_in_jsonl_is_e302(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ok"}\n{"text": "a\\ud83d b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="U\\+D83D") as error:
        _texts(file)
    assert error.value.code == "E302"
    assert error.value.where.endswith("rows.jsonl:2")
    assert _texts(file, on_bad_text="replace") == ["ok", "a\ufffd b"]


def test_a_line_without_end_is_e306(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 100_000)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "' + "a" * 300_000, encoding="utf-8")
    assert _code(lambda: _texts(file)) == "E306"


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    rows = [f"row {n} 日本\r\n" for n in range(1000)]
    parquet.write_table(pyarrow.table({"text": rows, "n": list(range(1000)), "none": [None] * 1000}), file)
    assert _texts(file) == [row.replace("\r\n", "\n") for row in rows]
    for field, found in (("story", "its fields are text, n, none"), ("n", "row 1"), ("none", "row 1")):
        with pytest.raises(InputError, match=found) as error:
            _texts(file, field=field)
        assert error.value.code == "E306"
    file.write_bytes(file.read_bytes()[:-50])
    assert _code(lambda: _texts(file)) == "E306"


def test_parquet_without_pyarrow_is_e406(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MachineError, match=r"pip install pyarrow$") as error:
        _texts(tmp_path / "rows.parquet")
    assert error.value.code == "E406"


# Folders.


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.py", "C.TXT", "-dash and space.txt", "ünï\n.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    files, skipped = find_files(tmp_path, READING)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        *("-dash and space.txt", "C.TXT", "b.txt", "ünï\n.txt", "a/y.py", "a/z.md"),
    ]
    assert not skipped


@pytest.mark.skipif(os.name != "posix", reason="pipes and links are POSIX")
def test_what_is_no_text_file_is_left_out_of_a_folder_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "binary.txt").write_bytes(b"MZ\0\0")
    (tmp_path / "gzip.md").write_bytes(b"\x1f\x8bxx")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
    files, skipped = find_files(tmp_path, READING)
    assert [file.name for file in files] == ["good.txt"]
    assert skipped == {
        "hidden": 2,
        "other kind": 1,
        "binary": 2,
        "empty": 1,
        "link to a folder": 1,
        "unreadable": 1,
        "not a file": 3,
    }


def test_runs_and_prepared_data_are_left_out_of_a_folder_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    run = Run.create(tmp_path / "runs" / "text", {"plan": {}})
    run.record(step=1)
    write_folder(run.path / "data", {"train.bin": b""}, PREPARED)
    write_folder(tmp_path / "ids", {"train.bin": b"", "notes.md": b"ours"}, PREPARED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"scripts": "of the user"}', encoding="utf-8")
    (tmp_path / "mine" / "manifest.json").write_text('{"kind": "extension"}', encoding="utf-8")
    (tmp_path / "mine" / "more.txt").write_text("more", encoding="utf-8")
    files, skipped = find_files(tmp_path, READING)
    assert [file.name for file in files] == ["good.txt", "more.txt"]
    assert skipped == {"a run": 1, "prepared data": 1, "other kind": 2}
    assert find_files(run.path, READING) == ([], {"a run": 1})


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")
def test_what_is_no_text_file_is_an_error_when_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "binary.txt").write_bytes(b"a" * 5000 + struct.pack("<d", 0.0))
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\n1 0 obj")
    (tmp_path / "texts.gz").write_bytes(b"\x1f\x8b\x08\x08abc")
    named = [tmp_path / name for name in ("pipe.txt", "binary.txt", "paper.pdf", "texts.gz")]
    for path in (*named, Path("/dev/zero")):
        assert _code(lambda path=path: find_files(path, READING)) == "E305"
    (tmp_path / "self.txt").symlink_to("self.txt")
    assert _code(lambda: find_files(tmp_path / "self.txt", READING)) == "E403"


def test_a_sparse_file_of_ten_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "huge.txt"
    with file.open("wb") as opened:
        opened.truncate(10 * 2**30)
    assert _code(lambda: find_files(file, READING)) == "E305"
    assert _code(lambda: _texts(file)) == "E305"


def test_a_file_that_vanishes_is_e403(tmp_path: Path) -> None:
    assert _code(lambda: _texts(tmp_path / "gone.txt")) == "E403"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything"
)
def test_a_file_that_may_not_be_read_is_e403(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("secret", encoding="utf-8")
    file.chmod(stat.S_IWUSR)
    assert _code(lambda: find_files(file, READING)) == "E403"

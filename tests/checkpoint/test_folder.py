"""Folders that appear whole or not at all, and notice when a byte of them changes."""

import errno
import os
import random
import subprocess
import sys

import pytest

from babyllama.checkpoint import folder as folders
from babyllama.checkpoint.folder import replace_file, sweep, verify_folder, write_folder
from babyllama.errors import InputError, MachineError

FILES = {"a.bin": bytes(range(256)) * 40, "b.json": b'{"x": 1}', "empty": b""}


@pytest.fixture
def written(tmp_path):
    write_folder(tmp_path / "step", FILES, {"step": 7})
    return tmp_path / "step"


def test_a_written_folder_holds_its_files_and_a_manifest_that_agrees(written):
    assert {path.name for path in written.iterdir()} == {*FILES, "manifest.json"}
    assert all((written / name).read_bytes() == content for name, content in FILES.items())
    assert verify_folder(written)["step"] == 7


def test_files_follow_the_umask_like_any_other_file(written):
    umask = os.umask(0)
    os.umask(umask)
    assert (written / "a.bin").stat().st_mode & 0o777 == 0o666 & ~umask


def test_every_flipped_bit_is_noticed(written):
    chance = random.Random(0)
    for _ in range(1000):
        path = written / chance.choice([*FILES, "manifest.json"])
        before = path.read_bytes()
        if not before:
            continue
        changed = bytearray(before)
        changed[chance.randrange(len(before))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(InputError) as caught:
            verify_folder(written)
        assert caught.value.code in ("E204", "E205", "E206", "E208")
        assert path.name in caught.value.where
        path.write_bytes(before)
    verify_folder(written)


@pytest.mark.parametrize("length", [0, 1, 5000, 10239])
def test_a_file_cut_short_is_noticed(written, length):
    with (written / "a.bin").open("r+b") as file:
        file.truncate(length)
    with pytest.raises(InputError, match=r"10,?240") as caught:
        verify_folder(written)
    assert caught.value.code == "E205" and caught.value.where.endswith("a.bin")


def test_a_missing_file_is_noticed(written):
    (written / "b.json").unlink()
    with pytest.raises(InputError, match=r"b\.json.*missing") as caught:
        verify_folder(written)
    assert caught.value.code == "E205"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E206"),
        (b"\xff\xfe", "E206"),
        (b"[]", "E206"),
        (b"[" * 100_000, "E206"),
        (b"{}", "E206"),
        (b'{"format": 1, "files": {}}', "E206"),
        (b'{"format": 1, "files": {"../a.bin": {"bytes": 1}}}', "E206"),
        (b'{"format": 1, "files": {"a.bin": 3}}', "E206"),
        (b'{"format": 99, "files": {"a.bin": {}}}', "E208"),
        (b" " * (5 * 2**20), "E206"),
    ],
)
def test_a_manifest_that_lies_or_is_none_is_refused(written, content, code):
    (written / "manifest.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        verify_folder(written)
    assert caught.value.code == code


def test_a_full_disk_leaves_nothing_behind_and_the_rest_untouched(written, monkeypatch):
    real, written_so_far = os.fsync, []

    def full_at_the_second(handle):
        written_so_far.append(handle)
        if len(written_so_far) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(folders.os, "fsync", full_at_the_second)
    with pytest.raises(MachineError, match="No space left") as caught:
        write_folder(written.parent / "next", FILES)
    assert caught.value.code == "E401" and caught.value.where.endswith("next")
    assert [path.name for path in written.parent.iterdir()] == ["step"]
    monkeypatch.undo()
    verify_folder(written)


def test_a_disk_that_would_become_full_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    with pytest.raises(MachineError) as caught:
        write_folder(tmp_path / "step", FILES)
    assert caught.value.code == "E401" and list(tmp_path.iterdir()) == []


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    replace_file(path, b"old")

    def fails(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders.os, "fsync", fails)
    with pytest.raises(MachineError) as caught:
        replace_file(path, b"new")
    assert caught.value.code == "E403" and path.read_bytes() == b"old"
    monkeypatch.undo()
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="whether a process runs is asked on POSIX alone")
def test_what_killed_writers_left_of_a_file_goes_when_it_is_written_again(tmp_path):
    path = tmp_path / "a[1].gguf"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, running, fresh, other = (
        tmp_path / name
        for name in (f".tmp-{path.name}-{gone.pid}", f".tmp-{path.name}-{os.getppid()}",
                     f".tmp-{path.name}-0{gone.pid}", f".tmp-{path.name}-b-{gone.pid}")
    )  # fmt: skip
    for each in (left, running, fresh, other):
        each.write_bytes(b"half")
        os.utime(each, (1, 1))
    os.utime(fresh)  # perhaps of another machine that writes to the same disk
    replace_file(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, running, fresh, other])
    folder = tmp_path / f".tmp-model-{gone.pid}"
    folder.mkdir()
    (folder / "half").write_bytes(b"half")
    os.utime(folder, (1, 1))
    write_folder(tmp_path / "model", FILES)
    assert not folder.exists()


def test_left_overs_of_a_killed_writer_are_swept(tmp_path):
    for name in (".tmp-step-1", ".del-step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    (tmp_path / ".tmp-run.json").write_bytes(b"x")
    (tmp_path / "step-3").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]

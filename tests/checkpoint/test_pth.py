"""Files of torch.save: read as torch reads them, without running what is in them; and files that are none."""

import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama.checkpoint.pth import LONGEST_PICKLE, MOST_INSTRUCTIONS, Archive
from babyllama.errors import InputError


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rewritten(path: Path, source: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive again, with `change(name, data)` in place of each entry: new data, a list of entries, or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            found = change(name, old.read(name))
            for each_name, data in found if isinstance(found, list) else [(name, found)]:
                if data is not None:
                    new.writestr(each_name, data)
    return path


def with_pickle(path: Path, program: bytes) -> Path:
    source = saved(path.with_suffix(".source"), {"a": torch.ones(3)})
    return rewritten(path, source, lambda name, data: program if name.endswith("data.pkl") else data)


def refusal(path: Path) -> str:
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        Archive(path)
    assert time.process_time() - began < 1
    assert caught.value.code == "E212"
    return caught.value.found


VALUES = {
    "several kinds": lambda: {f"t{i}": torch.randn(3, 4).to(kind) for i, kind in enumerate(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64))},
    "a state dict": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict(),
    "parameters": lambda: dict(torch.nn.Linear(3, 4).named_parameters()),
    "views of one storage": lambda: dict(zip("abc", torch.arange(12.0).view(3, 4), strict=True)),
    "axes of one": lambda: {"a": torch.arange(6.0).view(1, 6), "b": torch.arange(6.0).view(6, 1).t()},
    "many": lambda: OrderedDict((f"layers.{i}.weight", torch.full((2, 2), float(i))) for i in range(1500)),
}  # fmt: skip


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_every_tensor_is_what_torch_reads(tmp_path: Path, make: Any) -> None:
    path = saved(tmp_path / "a.pth", make())
    expected, archive = torch.load(path, weights_only=True), Archive(path)
    assert archive.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = archive.tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.detach())


def test_tensors_of_one_storage_are_known_as_one(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    tensors = Archive(saved(tmp_path / "a.pth", {"a": weight, "b": weight, "c": weight.clone()})).tensors
    assert tensors["a"] == tensors["b"] != tensors["c"]


def test_a_tensor_of_three_names_and_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    assert "3 names" in refusal(saved(tmp_path / "a.pth", {"a": weight, "b": weight, "c": weight}))
    overlapping = {"first": weight[:3], "second": weight[1:]}
    assert "another tensor still is" in refusal(saved(tmp_path / "b.pth", overlapping))
    side_by_side = {"first": weight[:2], "second": weight[2:]}
    assert Archive(saved(tmp_path / "c.pth", side_by_side)).tensors.keys() == side_by_side.keys()


# ---- what could run


class Calls:
    """What pickle makes of it: a call."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def resolved() -> Iterator[list[str]]:
    """Everything that a pickle has had looked up while the test ran, and every program that was started."""
    found: list[str] = []
    listening = [True]

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if listening and event in ("pickle.find_class", "os.system", "subprocess.Popen"):
            found.append(f"{event} {given[:2]}")

    sys.addaudithook(hear)  # which cannot be taken away again
    yield found
    listening.clear()


CALLS = {
    "a command": Calls(os.system, "echo harm"),
    "an expression": Calls(eval, "1 + 1"),
    "a file opened": Calls(open, "harm.txt", "w"),
    "a file of torch.save": Calls(torch.load, "other.pth"),
    "attributes": Calls(getattr, "text", "__class__"),
    "a tensor by another function": Calls(torch.zeros, 3),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_could_run_is_refused_and_not_even_looked_up(
    tmp_path: Path, call: Calls, protocol: int, resolved: list[str]
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": call, "b": torch.ones(3)}, path, pickle_protocol=protocol)
    resolved.clear()
    found = refusal(path)
    assert "which no tensor needs" in found or "which no dict of tensors needs" in found
    assert resolved == []
    pickle.loads(pickle.dumps(OrderedDict()))  # the listener does hear
    assert resolved


def test_reading_a_good_file_looks_nothing_up_either(tmp_path: Path, resolved: list[str]) -> None:
    path = saved(tmp_path / "a.pth", {"a": torch.ones(3)})
    resolved.clear()
    assert Archive(path).tensor("a").tolist() == [1, 1, 1]
    assert resolved == []


@pytest.mark.parametrize("name", ["INST", "OBJ", "NEWOBJ", "EXT1", "STACK_GLOBAL", "BUILD of nothing", "POP"])
def test_instructions_that_no_dict_of_tensors_needs_are_refused(tmp_path: Path, name: str) -> None:
    programs = {
        "INST": b"(S'echo harm'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'echo harm'\no.",
        "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "EXT1": b"\x80\x02\x82\x01.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "BUILD of nothing": b"\x80\x02}b.",
        "POP": b"\x80\x02}}0.",
    }
    refusal(with_pickle(tmp_path / "a.pth", programs[name]))


# ---- what could take for ever, or all memory


def test_a_pickle_that_grows_without_end_is_refused_in_time(tmp_path: Path) -> None:
    doubled = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    refusal(with_pickle(tmp_path / "as a key.pth", b"\x80\x02}" + doubled[2:] + b"K\x01s."))
    refusal(with_pickle(tmp_path / "as a value.pth", b"\x80\x02}X\x01\x00\x00\x00a" + doubled[2:] + b"s."))
    refusal(
        with_pickle(
            tmp_path / "as a shape.pth", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + doubled[2:] + b"R."
        )
    )
    many = b"\x80\x02}" + b"}q\x01" * MOST_INSTRUCTIONS
    refusal(with_pickle(tmp_path / "many.pth", many[: LONGEST_PICKLE - 1] + b"."))
    refusal(with_pickle(tmp_path / "long.pth", b"\x80\x02}" + b"N" * LONGEST_PICKLE + b"."))
    refusal(
        with_pickle(tmp_path / "a text of 2^60 bytes.pth", b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.")
    )
    refusal(with_pickle(tmp_path / "no end.pth", b"\x80\x02}"))
    refusal(with_pickle(tmp_path / "marks.pth", b"\x80\x02" + b")" * 90_000 + b"(t" * 50_000 + b"."))
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x03tQ"
    axes = b"(" + b"K\xff" * 9000 + b"t"
    long = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + axes * 2 + b"\x89}tR"
    assert "makes no sense" in refusal(
        with_pickle(tmp_path / "axes.pth", b"\x80\x02}X\x01\0\0\0a" + long + b"s.")
    )
    refusal(with_pickle(tmp_path / "nothing.pth", b""))


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", {"a": torch.zeros(2**20)})
    path = rewritten(tmp_path / "a.pth", source, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**15
    assert "compressed" in refusal(path)


@pytest.mark.parametrize("layout", ["sparse", "meta", "strided", "expanded", "integers", "complex"])
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, layout: str) -> None:
    values = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2**40, device="meta"),
        "strided": lambda: torch.arange(12.0).view(3, 4)[:, ::2],
        "expanded": lambda: torch.ones(1).expand(2**40),
        "integers": lambda: torch.arange(3),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
    }
    refusal(saved(tmp_path / "a.pth", {"a": values[layout]()}))


NO_DICTS = ([torch.ones(2)], torch.ones(2), {}, {"a": 1}, {1: torch.ones(2)}, {"a": {"b": torch.ones(2)}})


@pytest.mark.parametrize("value", NO_DICTS)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    refusal(saved(tmp_path / "a.pth", value))


# ---- archives that lie


def changed(tmp_path: Path, change: Any) -> Path:
    source = saved(tmp_path / "source.pth", {"a": torch.ones(100), "b": torch.ones(50)})
    return rewritten(tmp_path / "a.pth", source, change)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    def short(name: str, data: bytes) -> bytes:
        return data[:-4] if name.endswith("/0") else data

    def twice(name: str, data: bytes) -> list[tuple[str, bytes]]:
        return [(name, data), (name, data)] if name.endswith("/0") else [(name, data)]

    def two_pickles(name: str, data: bytes) -> list[tuple[str, bytes]]:
        return [(name, data), ("other/data.pkl", data)] if name.endswith("data.pkl") else [(name, data)]

    def missing(name: str, data: bytes) -> bytes | None:
        return None if name.endswith("data/1") else data

    def big_endian(name: str, data: bytes) -> bytes:
        return b"big" if name.endswith("byteorder") else data

    for change in (short, twice, two_pickles, missing, big_endian):
        refusal(changed(tmp_path, change))


def test_bytes_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pth", {"a": torch.ones(100)}).read_bytes()
    end = good.rfind(b"PK\5\6")
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    bad = [b"", b"PK\5\6", good[: len(good) // 2], legacy.getvalue(), b"\0" * 1000, pickle.dumps({"a": 1})]
    large = good.rfind(b"PK\6\6") + 40
    bad += [good[:large] + struct.pack("<Q", 2**40) + good[large + 8 :], good.replace(b"PK\3\4", b"PK\3\5")]
    bad += [good[: end + 12] + struct.pack("<II", 2**31, 0) + good[end + 20 :]]
    for content in bad:
        (tmp_path / "a.pth").write_bytes(content)
        refusal(tmp_path / "a.pth")


def test_every_cut_and_many_flips_are_refused_or_read(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pth", {"a": torch.ones(10), "b": torch.ones(5)}).read_bytes()
    path, generator = tmp_path / "a.pth", torch.Generator().manual_seed(0)
    contents = [good[:cut] for cut in range(0, len(good), 7)]
    for place in torch.randint(0, len(good), (600,), generator=generator).tolist():
        contents.append(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
    outcomes = {"read": 0, "refused": 0}
    for content in contents:
        path.write_bytes(content)
        try:
            archive = Archive(path)
            for name in archive.tensors:
                archive.tensor(name)
            outcomes["read"] += 1
        except InputError as error:
            assert error.code == "E212"
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"a": torch.ones(1000)})
    archive = Archive(path)
    os.truncate(path, archive.tensors["a"].begin + 100)
    with pytest.raises(InputError) as caught:
        archive.tensor("a")
    assert caught.value.code == "E212"

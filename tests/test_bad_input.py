"""Whatever a person gives or the machine does: a code, what was found, one remedy, no traceback, nothing lost."""

import contextlib
import multiprocessing
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from babyllama import api
from babyllama.checkpoint.run import Run, locked
from babyllama.cli import main

sys.path.insert(0, str(Path(__file__).parent / "torture"))
from disk_full import small_disk
from forks import CannotError

FAST = ["--steps", "6", "--size", "100k", "--device", "cpu", "--set", "context=32", "--set", "batch_size=4"]
FAST += ["--set", "save_every=2", "--set", "threads=1", "--set", "evaluations=1"]
STORY = "Once there was a king who had three sons, and the youngest was called Simpleton. "


@pytest.fixture
def refused(capsys):
    """Run the command line and hold what it says to the form of every error: refused(code, status, *arguments)."""

    def run(code, status, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(each) for each in arguments])
        said = capsys.readouterr()
        assert left.value.code == status, said.err
        assert said.err.startswith(f"error[{code}]: ") and "\n  Fix: " in said.err, said.err
        assert "Traceback" not in said.err + said.out
        return said.err

    return run


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i}. {STORY}\n\n" for i in range(300)), encoding="utf-8")
    return path


@pytest.fixture
def trained(book, tmp_path) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["train", str(book), "--out", str(tmp_path / "run"), *FAST])
    assert not left.value.code
    return tmp_path / "run"


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E301"),
        (b" \n\t\n ", "E301"),
        (b"x", "E303"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 20, "E305"),
        (b"caf\xe9 au lait, " * 100, "E302"),
        (STORY.encode("utf-16"), "E302"),
        (STORY[:30].encode(), "E303"),
    ],
    ids=["empty", "white space", "one byte", "binary", "latin-1", "utf-16", "shorter than the context"],
)
def test_a_text_that_cannot_be_trained_on_is_refused(tmp_path, refused, content, code):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    said = refused(code, 3, "train", path, "--out", tmp_path / "run", *FAST)
    assert "text.txt" in said or "tokens" in said
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_place_of_a_bad_byte_is_named(tmp_path, refused):
    path = tmp_path / "text.txt"
    path.write_bytes(b"first line\nsecond caf\xe9\n" * 50)
    said = refused("E302", 3, "train", path, "--out", tmp_path / "run", *FAST)
    assert "line 2" in said and "byte offset 21" in said and "--encoding" in said


def test_a_text_that_does_not_exist_is_refused(tmp_path, refused):
    refused("E308", 3, "train", tmp_path / "nowhere.txt", "--out", tmp_path / "run")
    assert "fairy-tales" in refused("E308", 3, "train", "fairytales", "--out", tmp_path / "run")


def test_a_vocabulary_larger_than_the_text_allows_is_refused(tmp_path, refused, book):
    refused("E304", 3, "train", book, "--out", tmp_path / "run", "--vocab-size", 50_000, *FAST)


def test_after_a_refusal_the_same_folder_can_be_used(tmp_path, refused, book):
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    refused("E301", 3, "train", empty, "--out", tmp_path / "run", *FAST)
    with pytest.raises(SystemExit) as left:
        main(["train", str(book), "--out", str(tmp_path / "run"), *FAST])
    assert not left.value.code and Run(tmp_path / "run").steps()[-1] == 6


# ---- settings ------------------------------------------------------------------------------------


def test_an_unknown_setting_names_the_nearest(tmp_path, refused, book):
    said = refused("E101", 2, "train", book, "--out", tmp_path / "run", "--set", "learnig_rate=0.1")
    assert "learning_rate" in said
    assert "--minutes" in refused("E101", 2, "train", book, "--minuts", "3")
    refused("E101", 2, "trian", book)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--set", "learning_rate"], "E101"),
        (["--set", "learning_rate=fast"], "E102"),
        (["--set", "learning_rate=-1"], "E102"),
        (["--set", "learning_rate=nan"], "E102"),
        (["--set", "batch_size=0"], "E102"),
        (["--set", "batch_size=1.5"], "E102"),
        (["--set", "precision=float8"], "E101"),
        (["--size", "big"], "E102"),
        (["--size", "0M"], "E102"),
        (["--steps", "-3"], "E102"),
        (["--minutes", "-3"], "E102"),
        (["--minutes", "0"], "E102"),
        (["--minutes", "nan"], "E102"),
        (["--minutes", "1", "--steps", "1"], "E103"),
        (["--tokens", "1M", "--steps", "1"], "E103"),
        (["--tokens", "0"], "E102"),
        (["--tokens", "plenty"], "E102"),
        (["--device", "abacus"], "E101"),
        (["--steps", "many"], "E101"),
        (["--seed", "9" * 30], "E102"),
        (["--seed", "-1"], "E102"),
        (["--set", "threads=100000"], "E102"),
        (["--set", "context=0"], "E102"),
        (["--set", "device=cpu"], "E101"),
        (["--set", "tell=1"], "E101"),
        (["--set", "out=x"], "E101"),
        (["--step", "3"], "E103"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, refused, book, arguments, code):
    refused(code, 2, "train", book, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_wrong_setting_is_said_before_the_text_is_read(tmp_path, refused, book, monkeypatch):
    def reads(*arguments, **options):
        raise AssertionError("the text was read first")

    monkeypatch.setattr(api, "prepare", reads)
    for arguments in (["--set", "warmup=3"], ["--size", "x"], ["--steps", "0"], ["--device", "abacus"]):
        refused(
            "E101" if "abacus" in arguments else "E102",
            2,
            "train",
            book,
            "--out",
            tmp_path / "run",
            *arguments,
        )


def test_training_on_nothing_is_refused(refused):
    refused("E103", 2, "train")


def test_a_plan_larger_than_the_memory_is_refused_before_it_is_tried(tmp_path, refused, book, monkeypatch):
    monkeypatch.setattr("babyllama.machine.memory", lambda: (2**33, 2**24))
    said = refused("E404", 4, "train", book, "--out", tmp_path / "run", "--size", "1B", "--steps", "1")
    assert "GiB" in said


# ---- folders -------------------------------------------------------------------------------------


def _hold(path, ready):
    with locked(path):
        ready.set()
        time.sleep(120)


def test_a_folder_in_use_by_another_run_is_refused(tmp_path, refused, book, trained):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(trained, ready))
    holder.start()
    try:
        assert ready.wait(60)
        assert f"process {holder.pid}" in refused("E402", 4, "train", book, "--out", trained, *FAST)
        refused("E402", 4, "train", "--resume", trained)
    finally:
        holder.kill()
        holder.join()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, refused, book, trained):
    assert "--resume" in refused("E403", 4, "train", book, "--out", trained, *FAST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear", encoding="utf-8")
    refused("E403", 4, "train", book, "--out", tmp_path / "mine", *FAST)
    refused("E403", 4, "train", book, "--out", book, *FAST)
    assert book.stat().st_size > 1000 and (tmp_path / "mine" / "letters.txt").exists()


def test_nothing_is_swept_from_a_folder_that_is_none_of_ours(tmp_path, refused, book):
    mine = tmp_path / "mine"
    (mine / ".tmp-work").mkdir(parents=True)
    for name in (".tmp-work/thesis.txt", ".tmp-notes.txt", ".del-x"):
        (mine / name).write_text("dear", encoding="utf-8")
    before = sorted(mine.rglob("*"))
    refused("E403", 4, "train", book, "--out", mine, *FAST)
    assert sorted(mine.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "3"],
        ["--seed", "0"],
        ["--device", "cpu"],
        ["--vocab-size", "300"],
        ["--encoding", "utf-8"],
        ["--field", "text"],
        ["--set", "warmup=0"],
        ["--out", "x"],
        ["--size", "3M"],
        ["--on-bad-text", "error"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_resumed_run_takes_no_new_settings(refused, trained, arguments):
    assert arguments[0] in refused("E104", 2, "train", "--resume", trained, *arguments)


def test_prepared_data_takes_no_other_vocabulary(tmp_path, refused, book):
    with contextlib.suppress(SystemExit):
        main(["data", str(book), "--out", str(tmp_path / "ids")])
    refused("E103", 2, "train", tmp_path / "ids", "--out", tmp_path / "run", "--vocab-size", 300, *FAST)


def test_strategies_choose_their_own_temperature(refused, trained):
    refused("E103", 2, "generate", trained, "Once", "--strategies", "--temperature", 1)


@pytest.mark.parametrize("name", ["a [bold]b[/bold]", "q[/b]", "with space", "--x"])
def test_a_folder_may_have_any_name_and_is_printed_as_it_can_be_typed(tmp_path, book, capsys, name):
    with contextlib.suppress(SystemExit):
        main(["train", str(book), "--out", str(tmp_path / name), *FAST])
    said = capsys.readouterr().out
    assert f"Saved in {tmp_path / name}." in said
    assert shlex.join(["babyllama", "generate", str(tmp_path / name)]) + " " in said


def test_a_run_json_without_its_plan_is_refused(trained, refused):
    (trained / "run.json").write_bytes(b'{"format": 1}')
    refused("E206", 3, "train", "--resume", trained)


def test_a_best_step_with_a_flipped_bit_tells_no_story(trained, refused):
    path = Run(trained).folder(Run(trained).best()) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused("E204", 3, "generate", trained, "Once")


def test_a_defect_of_ours_is_an_error_with_a_code_too(trained, refused, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *arguments, **options: 1 / 0)
    assert "--debug" in refused("E901", 1, "generate", trained, "Once")
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(trained), "Once", "--debug"])


def test_what_is_no_run_is_not_resumed(tmp_path, refused):
    refused("E201", 3, "train", "--resume", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    refused("E201", 3, "train", "--resume", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [40, 200, 700, 1500, 2600, 3800])
def test_a_full_disk_is_said_and_loses_nothing(tmp_path, refused, book, kilobytes):
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", kilobytes))
        except CannotError as reason:
            pytest.skip(str(reason))
        said = refused("E401", 4, "train", book, "--out", disk / "run", *FAST)
        assert "No space left" in said
        assert not list(disk.rglob(".tmp-*"))
        if (disk / "run" / "run.json").exists() and (steps := Run(disk / "run").steps()):
            assert Run(disk / "run").newest_intact() == (steps[-1], [])


# ---- models --------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_and_said(trained, capsys):
    path = Run(trained).folder(6) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(["train", "--resume", str(trained)])
    said = capsys.readouterr().out
    assert (
        not left.value.code
        and "passed over" in said
        and "step-00000006" in said
        and "Going on from step 4" in said
    )
    assert Run(trained).newest_intact() == (6, [])


def test_a_truncated_checkpoint_is_passed_over_and_said(trained, capsys):
    with (Run(trained).folder(6) / "optim.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit) as left:
        main(["train", "--resume", str(trained)])
    assert not left.value.code and "passed over" in capsys.readouterr().out


def test_a_damaged_step_asked_for_is_refused(trained, refused):
    path = Run(trained).folder(6) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused("E205", 3, "train", "--resume", trained, "--step", 6)
    refused("E205", 3, "generate", trained, "Once", "--step", 6)
    refused("E207", 3, "generate", trained, "Once", "--step", 5)


def test_a_run_without_an_intact_step_starts_nothing(trained, refused):
    for step in Run(trained).steps():
        (Run(trained).folder(step) / "model.safetensors").write_bytes(b"")
    assert "step-00000006" in refused("E207", 3, "train", "--resume", trained)


def test_a_model_that_is_none_is_refused(tmp_path, refused, book):
    refused("E201", 3, "generate", tmp_path / "nowhere", "Once")
    refused("E201", 3, "generate", tmp_path, "Once")
    refused("E209", 3, "generate", book, "Once")
    refused("E201", 3, "info", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["--temperature", "-1"], "E102", 2),
        (["--temperature", "nan"], "E102", 2),
        (["--top-p", "0"], "E102", 2),
        (["--top-k", "-1"], "E102", 2),
        (["--max-tokens", "-1"], "E102", 2),
        (["--seed", "-1"], "E102", 2),
        (["--tokenizer", "nowhere.json"], "E310", 3),
    ],
)
def test_generation_options_out_of_range_are_refused(trained, refused, arguments, code, status):
    refused(code, status, "generate", trained, "Once", *arguments)


def test_a_prompt_longer_than_the_context_is_refused(trained, refused):
    assert "context 32" in refused("E311", 3, "generate", trained, STORY * 9)


def test_control_characters_of_a_model_do_not_reach_the_terminal(trained, monkeypatch, capsys):
    monkeypatch.setattr(
        api.LoadedLlama, "stream", lambda self, prompt, **options: iter(["red \x1b[31m", "bell \x07"])
    )
    for extra, seen in (([], False), (["--raw"], True)):
        with contextlib.suppress(SystemExit):
            main(["generate", str(trained), "x", *extra])
        assert ("\x1b" in capsys.readouterr().out) is seen


def test_a_real_process_shows_no_traceback_and_leaves_with_the_status(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "babyllama",
            "train",
            str(tmp_path / "nowhere"),
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3 and done.stderr.startswith("error[E308]: ") and "Traceback" not in done.stderr

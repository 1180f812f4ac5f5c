"""A run on disk: what is kept, what is resumed, who may write."""

import multiprocessing
import os
import time

import pytest

from babyllama.checkpoint import folder
from babyllama.checkpoint.run import Run, locked
from babyllama.errors import InputError, MachineError


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {"text": "x"})


def save(run, step, bits=None):
    run.save(step, {"model.safetensors": bytes([step % 256]) * 1000}, {"step": step, "bits_per_byte": bits})


def damage(run, step):
    path = run.folder(step) / "model.safetensors"
    path.write_bytes(b"?" + path.read_bytes()[1:])


def test_the_newest_two_and_the_best_are_kept(run):
    for step, bits in ((10, 3.0), (20, 1.5), (30, 2.0), (40, 2.5), (50, None)):
        save(run, step, bits)
    assert run.steps() == [20, 40, 50]
    assert run.best() == 20


def test_of_equally_good_steps_the_newest_is_best(run):
    save(run, 1, 2.0)
    save(run, 2, 2.0)
    assert run.best() == 2


def test_steps_are_ordered_by_number_not_by_time(run):
    save(run, 20)
    save(run, 30)
    os.utime(run.folder(20))  # touched later
    os.utime(run.folder(30), (0, 0))
    assert run.newest_intact()[0] == 30


def test_a_damaged_step_is_passed_over_and_named(run):
    save(run, 1)
    save(run, 2)
    damage(run, 2)
    step, problems = run.newest_intact()
    assert step == 1
    assert [problem.code for problem in problems] == ["E204"] and "step-00000002" in problems[0].where


def test_a_step_asked_for_by_number_is_not_replaced_by_another(run):
    save(run, 1)
    save(run, 2)
    damage(run, 2)
    with pytest.raises(InputError) as caught:
        run.checked(2)
    assert caught.value.code == "E204"
    with pytest.raises(InputError, match="saved: 1, 2") as caught:
        run.checked(3)
    assert caught.value.code == "E207"


def test_a_run_whose_every_step_is_damaged_says_so_and_starts_nothing(run):
    save(run, 1)
    save(run, 2)
    damage(run, 1)
    damage(run, 2)
    with pytest.raises(InputError, match=r"step-00000002.*step-00000001") as caught:
        run.newest_intact()
    assert caught.value.code == "E207" and len(run.steps()) == 2


def test_a_bad_new_step_never_pushes_the_last_good_one_out(run, monkeypatch):
    save(run, 1)
    save(run, 2)
    save(run, 3)
    monkeypatch.setattr(
        "babyllama.checkpoint.run.verify_folder",
        lambda path: (_ for _ in ()).throw(InputError("E204", "x", "y", "z")),
    )
    with pytest.raises(InputError):
        save(run, 4)
    assert run.steps() == [2, 3, 4]


def test_a_step_reached_again_replaces_the_damaged_one(run):
    save(run, 1)
    save(run, 2)
    damage(run, 2)
    save(run, 2)
    assert run.newest_intact() == (2, [])


def test_a_step_reached_again_stays_where_the_new_one_cannot_be_written(run, monkeypatch):
    save(run, 1, bits=2.0)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "sync", full)
    with pytest.raises(MachineError):
        save(run, 1, bits=3.0)
    assert run.checked(1) and run.state(1)["bits_per_byte"] == 2.0


def test_a_step_reached_again_comes_back_where_the_new_one_cannot_take_its_name(run, monkeypatch):
    save(run, 1, bits=2.0)
    real = folder.Path.rename

    def busy(self, target):
        if self.name.startswith(".tmp-"):
            raise OSError(13, "held by another program")
        return real(self, target)

    monkeypatch.setattr(folder.Path, "rename", busy)
    with pytest.raises(MachineError):
        save(run, 1, bits=3.0)
    assert run.checked(1) and run.state(1)["bits_per_byte"] == 2.0
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_an_old_step_that_cannot_be_looked_at_now_is_no_reason_to_stop(run, monkeypatch):
    for step in (1, 2, 3):
        save(run, step, bits=2.0 - step / 10)
    real = Run.state

    def busy(self, step):
        if step == 2:
            raise MachineError("E403", "state.json", "cannot be read now", "try again")
        return real(self, step)

    monkeypatch.setattr(Run, "state", busy)
    save(run, 4, bits=1.5)
    assert run.steps() == [2, 3, 4]  # which is best is not known, so none is removed
    monkeypatch.undo()
    save(run, 5, bits=1.4)
    assert run.steps() == [4, 5]


def test_a_second_run_does_not_start_in_the_same_folder(run):
    with pytest.raises(MachineError, match="already holds a run") as caught:
        Run.create(run.path, {})
    assert caught.value.code == "E403" and "--resume" in caught.value.fix


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letters.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MachineError) as caught:
        Run.create(tmp_path, {})
    assert caught.value.code == "E403" and [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as caught:
            Run(path)
        assert caught.value.code == "E201"


@pytest.mark.parametrize(
    ("content", "code"), [("", "E206"), ("{}", "E206"), ('{"format": 99}', "E208"), ('{"format": 1}', "E206")]
)
def test_a_run_json_that_cannot_be_used_is_refused(run, content, code):
    (run.path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Run(run.path)
    assert caught.value.code == code


def test_a_metrics_line_cut_by_a_crash_is_passed_over(run):
    run.record(step=1)
    run.record(step=2)
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    assert run.metrics() == [{"step": 1}]


def _hold(path, ready):
    with locked(path):
        ready.set()
        time.sleep(60)


def test_the_lock_is_one_persons_at_a_time_and_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(MachineError, match=f"process {holder.pid}") as caught, locked(tmp_path):
            pass
        assert caught.value.code == "E402"
    finally:
        holder.kill()
        holder.join()
    with locked(tmp_path):
        pass


def test_a_save_gives_up_the_later_steps_of_another_course(run):
    for step in (10, 20, 30):
        save(run, step)
    damage(run, 30)
    save(run, 15)
    assert run.steps() == [15]  # 10 went when 30 was saved, 20 and 30 with the course they belong to
    assert run.newest_intact() == (15, [])


def test_a_damaged_step_names_an_intact_one(run):
    save(run, 1)
    save(run, 2)
    damage(run, 2)
    with pytest.raises(InputError) as caught:
        run.checked(2)
    assert "--step 1" in caught.value.fix


def test_every_flipped_bit_of_run_json_is_noticed(run):
    path = run.path / "run.json"
    before = path.read_bytes()
    for bit in range(len(before) * 8):
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(InputError) as caught:
            Run(run.path)
        assert caught.value.code in ("E206", "E208")


def test_a_start_that_was_killed_can_be_repeated_and_nobody_elses_hidden_files_are_touched(tmp_path):
    for name in (".tmp-notes.txt", ".del-x"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(MachineError):
        Run.refuse_taken(tmp_path)
    (tmp_path / ".lock").touch()
    Run.refuse_taken(tmp_path)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"3\n", b"[]\n", b'{"step": \n'])
def test_a_line_of_metrics_that_is_none_is_passed_over(run, line):
    run.record(step=1)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(line)
    run.record(step=2)
    assert run.metrics() == [{"step": 1}, {"step": 2}]

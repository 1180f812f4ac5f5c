"""Threads that work side by side: results in order, one thread of PyTorch's for each, no error lost."""

import threading
import time

import pytest
import torch

from babyllama.train.workers import Workers


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 17])
def test_every_task_is_done_once_and_answered_in_its_place(count, tasks):
    assert Workers(count).each(lambda i: i * i, range(tasks)) == [i * i for i in range(tasks)]


def test_two_work_at_once():
    meeting = threading.Barrier(2)
    Workers(2).each(lambda i: meeting.wait(60), range(2))  # one after the other would never meet


@pytest.mark.parametrize("count", [1, 3])
def test_each_worker_computes_in_one_thread_and_afterwards_all_is_as_before(count):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = Workers(count).each(lambda i: torch.get_num_threads(), range(6))
        assert found == [1] * 6 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_of_one_is_raised_when_all_have_ended():
    done = []

    def work(i: int) -> None:
        if i == 0:
            raise ValueError("of the first")
        time.sleep(0.3)
        done.append(i)

    with pytest.raises(ValueError, match="of the first"):
        Workers(3).each(work, range(3))
    assert sorted(done) == [1, 2]

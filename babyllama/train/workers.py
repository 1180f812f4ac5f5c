"""Threads that work side by side, where PyTorch's own would wait for one another inside every product."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def shares(length: int, parts: int) -> list[slice]:
    """`parts` slices, side by side, that cover `length` things as evenly as can be; some are empty if there are few."""
    ends = [length * i // parts for i in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


class Workers:
    """`count` threads; what one of them asks PyTorch for is done in itself, not spread over others."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def each(self, do: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """do(task) for every task; the results in their order. An exception is raised when all begun have ended."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.count == 1:
                return [do(task) for task in tasks]
            futures = [self.pool.submit(do, task) for task in tasks]
            wait(futures)
            return [future.result() for future in futures]
        finally:
            torch.set_num_threads(before)

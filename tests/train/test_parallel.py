"""Two processes that share a batch compute the gradient of the whole: torch's own data parallelism around our Llama."""

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from weights import randomised

from babyllama.data.batches import IGNORE
from babyllama.model import Config, Llama
from babyllama.train.loop import loss_sum

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

RANKS = 2
LENGTHS = (16, 1, 3, 2, 16, 9, 1, 16)  # targets of each row: 22 for the first process, 42 for the second


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    chance = np.random.default_rng(0)
    tokens, targets = chance.integers(0, 61, (2, 8, 16))
    for row, length in enumerate(LENGTHS):
        targets[row, length:] = IGNORE
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def model(tied: bool) -> Llama:
    config = Config(
        vocab_size=61, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16, tie_embeddings=tied
    )
    return randomised(Llama(config, seed=0), 0.3, seed=1)


def gradients(made: Llama) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}


def work(rank: int, folder: Path, done: Barrier) -> None:
    """What one process does: its half of the rows, and the mean over both that DistributedDataParallel makes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for tied in (False, True):
        mine = model(tied)
        shared = DistributedDataParallel(mine)
        tokens, targets = (each.chunk(RANKS)[rank] for each in rows())
        counted = (targets != IGNORE).sum()
        dist.all_reduce(
            counted
        )  # target tokens of both: a mean of two means would weigh the shorter half more
        (loss_sum(shared(tokens), targets) * RANKS / counted).backward()
        save_file(gradients(mine), folder / f"{tied}-{rank}.safetensors")
    done.wait(60)
    os._exit(0)  # nothing is left to do; taking threads of gloo down in order aborts now and then


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    done = context.Barrier(RANKS)
    workers = [context.Process(target=work, args=(rank, folder, done)) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        alive = worker.is_alive()
        worker.kill()
        assert not alive and worker.exitcode == 0
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_with_ragged_targets_compute_the_gradient_of_one(found, tied):
    tokens, targets = rows()
    whole = model(tied)
    (loss_sum(whole(tokens), targets) / sum(LENGTHS)).backward()
    expected = gradients(whole)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for rank in range(RANKS):
        shared = load_file(found / f"{tied}-{rank}.safetensors")
        assert shared.keys() == expected.keys() == dict(whole.named_parameters()).keys()
        for name, grad in expected.items():
            assert float((shared[name] - grad).abs().max()) <= 1e-6 * largest, name


def test_the_mean_of_the_means_of_two_processes_is_another_gradient():
    """The mistake that the test above is for is large enough for it to see."""
    tokens, targets = rows()
    whole, mean_of_means = model(False), model(False)
    (loss_sum(whole(tokens), targets) / sum(LENGTHS)).backward()
    for some, wanted in zip(tokens.chunk(RANKS), targets.chunk(RANKS), strict=True):
        (loss_sum(mean_of_means(some), wanted) / (wanted != IGNORE).sum() / RANKS).backward()
    right, wrong = gradients(whole), gradients(mean_of_means)
    largest = max(float(grad.abs().max()) for grad in right.values())
    assert max(float((wrong[name] - right[name]).abs().max()) for name in right) > 0.01 * largest


def test_targets_that_are_missing_are_not_predicted():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[4, IGNORE, IGNORE], [IGNORE, 0, 6]])
    loss = loss_sum(logits, targets)
    known = logits.log_softmax(-1)
    assert loss.item() == pytest.approx(-(known[0, 0, 4] + known[1, 1, 0] + known[1, 2, 6]).item(), rel=1e-6)
    loss.backward()
    assert logits.grad.abs().sum(-1).ne(0).tolist() == targets.ne(IGNORE).tolist()

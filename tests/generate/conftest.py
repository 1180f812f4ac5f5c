"""Random models whose mistakes show, and one thread: these models are too small to share out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from weights import randomised

from babyllama.model import Config, Llama


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_llama() -> Callable[..., Llama]:
    """random_llama(n_kv_heads=2, ...): weights from Normal(0, 0.15), gains about 1, as in the oracle's tests.

    Such weights make attention sharp: a wrong mask, slot or position moves the logits by their own size.
    """

    def make(**sizes: Any) -> Llama:
        usual: dict[str, Any] = dict(vocab_size=97, dim=48, n_layers=3, n_heads=6, max_seq_len=192)
        config = Config(**{**usual, **sizes})
        return randomised(Llama(config, seed=None).eval(), seed=7, gain=1.0)

    return make

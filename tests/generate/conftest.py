"""Random models whose mistakes show, and one thread: these models are too small to share out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

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
        model = Llama(config, seed=None).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                mean = 1.0 if name.endswith("norm.weight") else 0.0
                weight.normal_(mean, 0.15, generator=generator)
        return model

    return make

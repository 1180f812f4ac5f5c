"""Keys and values of earlier tokens, so that each token is worked on once.

    slot             0    1    2    3    4    5            a token's slot is its position in its row
    row 0          [ k0 | k1 | k2 | k3 |    |    ]         lengths[0] = 4
    row 1          [ k0 | k1 | ~  |    |    |    ]         lengths[1] = 2;  ~ came from padding

A row shorter than the others needs no padding on its left and no mask of its own: the model lets a query look
at the slots up to its own position, and what padding on the right leaves behind (~) lies after that, until the
row's next token is written over it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from babyllama.errors import InputError, MachineError
from babyllama.model import Config


class KVCache:
    """Room for max_len tokens in each of batch_size rows: 2 · n_layers · K · hd numbers a token.

    `lengths` is the number of tokens each row holds. Only `advance` moves it: the model appends a layer at a
    time, and all layers of one pass write to the same slots.

    Raises MachineError E404 where there is no memory for it.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_len = max_len
        self.lengths: Int[Tensor, " B"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size  # the same, where reading it never waits for the device
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        try:  # zeros, not empty: a masked slot is multiplied by 0, and 0 · NaN would be NaN
            self.keys: Float[Tensor, "L B K max_len hd"] = torch.zeros(shape, dtype=dtype, device=device)
            self.values: Float[Tensor, "L B K max_len hd"] = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            found = f"no memory for {batch_size} rows of {max_len} tokens in {config.n_layers} layers"
            raise MachineError("E404", "cache", found, "ask for fewer tokens or fewer rows") from error

    def append(
        self, layer: int, k: Float[Tensor, "B K T hd"], v: Float[Tensor, "B K T hd"]
    ) -> tuple[Float[Tensor, "B K S hd"], Float[Tensor, "B K S hd"]]:
        """Store k and v from slot lengths[b] on; give slots 0 .. S-1 (views), S = max(lengths) + T.

        Raises InputError E311 where S is above max_len.
        """
        T, longest = k.shape[2], max(self._lengths)
        S = longest + T
        if self.max_len < S:
            found = f"{S} tokens, room for {self.max_len}"
            raise InputError(
                "E311", "cache", found, f"stop at {self.max_len} tokens, or begin anew with fewer"
            )
        keys, values = self.keys[layer], self.values[layer]
        if min(self._lengths) == longest:
            keys[:, :, longest:S], values[:, :, longest:S] = k, v
        else:
            rows = torch.arange(len(self._lengths), device=k.device)[:, None]  # (B, 1)
            slots = self.lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
            keys[rows, :, slots] = k.transpose(1, 2)  # (B, T, K, hd)
            values[rows, :, slots] = v.transpose(1, 2)
        return keys[:, :, :S], values[:, :, :S]

    def advance(self, counts: Sequence[int]) -> None:
        """Take the last pass's tokens as held: counts[b] real ones in row b; what is beyond them was padding."""
        assert len(counts) == len(self._lengths) and all(count >= 0 for count in counts), counts
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        assert max(self._lengths) <= self.max_len, (self._lengths, self.max_len)
        self.lengths = torch.tensor(self._lengths, device=self.lengths.device)

"""The loss of a step and its gradients on the CPU, near the speed of the cores. What it computes is model.py, no more.

Each worker, one thread, takes some rows of the batch through the whole model and back, so threads meet between casting
the weights, working and adding up, and never wait inside. Between the matrix products, which PyTorch does, stand the
kernels of kernels.py; q, k and v are one product, gate and up another; all large buffers are made once. The derivatives
are written out below, in the order of the forward pass and then backwards; tests/train/test_cpu.py holds loss and
gradients equal to those of model.py.

Layout: all weights lie in one flat tensor, all gradients in another, and the model's parameters become views of them:
[wq wk wv | wo | w_gate w_up | w_down] of each layer, lm_head, tok_embeddings, gains. The first part, as far as it is
multiplied, is copied to the products' precision once a step.
"""

import math
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babyllama.costs import QUERIES
from babyllama.data.batches import IGNORE
from babyllama.model import Config, Llama, rope_tables
from babyllama.train import kernels
from babyllama.train.recipe import Plan
from babyllama.train.step import dropout_keys
from babyllama.train.workers import Workers, shares


class CPUStep:
    """loss and gradients of one batch after another. The parameters of `model` are moved into one tensor."""

    def __init__(self, model: Llama, plan: Plan) -> None:
        self.config, self.model = model.config, model
        self.dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
        self.plan = plan
        self._flatten()
        count = max(1, min(plan.threads, plan.batch_size))
        self.rows, self.rows_at_once = shares(plan.batch_size, count), plan.batch_size
        self.working = torch.empty(self.multiplied, dtype=self.dtype)
        self.parts = torch.empty(count, self.multiplied, dtype=self.dtype)
        embedded = self.table
        if plan.embedding_norm:  # what the norm makes of the table, its rows' 1 / rms, and its gradient
            embedded, self.rms = buffer(*self.table.shape), buffer(len(self.table))
            self.dembedded = buffer(*self.table.shape)
        self.parameters = Parameters(self.config, self.working, self.gains, embedded)
        self.workers = [
            _Worker(self.config, plan.context, rows, self.parameters, part, self.dtype)
            for rows, part in zip(self.rows, self.parts, strict=True)
        ]
        self.threads, self.tasks = Workers(count), range(count)
        self.slices, self.ids = shares(self.multiplied, count), shares(self.config.vocab_size, count)

    def _flatten(self) -> None:
        """Move the parameters into `self.flat`; their gradients will stand in `self.gradients`, in the same order."""
        tied, L = self.model.lm_head is None, self.config.n_layers
        matrices = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
        matrices += [f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down")]
        names = [f"layers.{i}.{matrix}" for i in range(L) for matrix in matrices]
        names += ["tok_embeddings"] if tied else ["lm_head", "tok_embeddings"]
        names += [f"layers.{i}.{norm}" for i in range(L) for norm in ("attention_norm", "ffn_norm")]
        names += ["norm"]
        order = [self.model.get_parameter(f"{name}.weight") for name in names]
        ends = list(accumulate(weight.numel() for weight in order))
        behind = self.config.dim  # as `buffer` has it
        self.flat, self.gradients = (torch.zeros(ends[-1] + behind)[:-behind] for _ in range(2))
        self.views: list[tuple[torch.nn.Parameter, Tensor]] = []  # each parameter, and its gradient's place
        for weight, end in zip(order, ends, strict=True):
            place = slice(end - weight.numel(), end)
            self.flat[place] = weight.detach().flatten()
            weight.data = self.flat[place].view(weight.shape)
            self.views.append((weight, self.gradients[place].view(weight.shape)))
        self.table = self.model.tok_embeddings.weight.detach()
        gains = 2 * L + 1
        embedding = ends[-1 - gains]  # where the embedding ends
        self.multiplied = embedding if tied else embedding - self.table.numel()
        self.gains = self.flat[embedding:].view(gains, -1)
        self.dgains = self.gradients[embedding:].view(gains, -1)
        self.dtable = self.gradients[embedding - self.table.numel() : embedding].view(self.table.shape)

    def __call__(self, tokens: Tensor, targets: Tensor, counted: int, step: int, part: int = 0) -> float:
        """Nats of a batch (B, T) by the targets counted in all parts of a step; the gradients are in `.grad`.

        `part` 0 begins a step, the later ones add to its gradients.
        """
        keys = dropout_keys(self.plan, step, part)
        if part == 0:
            self.threads.each(lambda i: self._refresh(i, self.plan.embedding_norm), self.tasks)
        nats = self.threads.each(lambda i: self._work(i, tokens, targets, counted, keys), self.tasks)
        self.threads.each(lambda i: self._gather(i, part > 0), self.tasks)
        self.threads.each(lambda i: self._gather_looked_up(self.ids[i], part > 0), self.tasks)
        for weight, gradient in self.views:
            weight.grad = gradient
        return sum(nats) / counted

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), with nothing dropped. T is the context of the plan."""
        batch = torch.zeros(self.rows[-1].stop, tokens.shape[1], dtype=tokens.dtype)
        found = []
        self.threads.each(lambda i: self._refresh(i, norm=False), self.tasks)
        for some in tokens.split(len(batch)):
            batch[: len(some)] = some
            answers = self.threads.each(lambda i: self._answer(i, batch), self.tasks)
            found.append(torch.cat(answers)[: len(some)])
        return torch.cat(found)

    def _answer(self, i: int, tokens: Tensor) -> Tensor:
        worker = self.workers[i]
        worker.tokens[:] = tokens[self.rows[i]].flatten()
        worker.dropout = Dropout([], 0.0)
        worker.forward()
        return worker.logits.view(worker.R, worker.T, -1).float()

    def _refresh(self, i: int, norm: bool) -> None:
        """Bring a share of the weights that are multiplied with, or looked up, up to date."""
        self.working[self.slices[i]] = self.flat[self.slices[i]]
        if self.plan.embedding_norm:
            ids = self.ids[i]
            table, embedded = self.table[ids], self.parameters.table[ids]
            if norm:
                self.rms[ids] = (table.square().mean(-1) + self.config.norm_eps).rsqrt()
                torch.mul(table, self.rms[ids, None], out=embedded)
            else:
                embedded.copy_(table)

    def _work(self, i: int, tokens: Tensor, targets: Tensor, counted: int, keys: list[int]) -> float:
        rows, worker = self.rows[i], self.workers[i]
        worker.tokens[:] = tokens[rows].flatten()
        worker.targets[:] = targets[rows].flatten()
        worker.dropout = Dropout(keys, self.plan.dropout)
        worker.forward()
        nats = worker.loss(1.0 / counted)
        worker.backward()
        return nats

    def _gather(self, i: int, more: bool) -> None:
        """Add up a share of the workers' gradients."""
        part, total = self.parts[:, self.slices[i]], self.gradients[self.slices[i]]
        kernels.add_up(_array(part), _array(total), more)
        if i == 0:
            if not more:
                self.dgains.zero_()
            for worker in self.workers:
                self.dgains += worker.dgains

    def _gather_looked_up(self, ids: slice, more: bool) -> None:
        """The same for the rows `ids` of the embedding."""
        norm, tied = self.plan.embedding_norm, self.model.lm_head is None
        if not more and not tied:  # tied: what the head's share of the gradient is stands there already
            self.dtable[ids] = 0
        looked_up = self.dtable
        if norm:
            looked_up = self.dembedded
            looked_up[ids] = 0
        for worker in self.workers:
            kernels.add_rows(worker.np.tokens, worker.np.dx, _array(looked_up), ids.start, ids.stop)
        if norm:
            given, table, rms, total = (
                _array(each[ids]) for each in (looked_up, self.table, self.rms, self.dtable)
            )
            kernels.rms_backward(given, table, rms, total)


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, and behind them free memory for one row more.

    Compiled code asks first whether two arrays overlap, within bounds that can reach a row too far, and takes a slower
    loop if they seem to; its sums come in another order. With that row, a step has the same bits wherever they lie.
    """
    return torch.zeros(math.prod(shape) + shape[-1], dtype=dtype)[: math.prod(shape)].view(shape)


class Dropout:
    """Which numbers of each residual branch are dropped: site 0 is the embedding, then each layer's two branches."""

    def __init__(self, keys: list[int], rate: float) -> None:
        self.keys = [np.uint32(key) for key in keys]
        self.threshold, self.scale = np.uint32(rate * 2**32), np.float32(1 / (1 - rate))
        self.on = rate > 0

    def __call__(self, x: np.ndarray, first: int, site: int) -> None:
        if self.on:
            kernels.dropout(x, first, self.keys[site], self.threshold, self.scale)


class Parameters:
    """Views of the flat weights, or of the flat gradients, as the products take them."""

    def __init__(self, config: Config, flat: Tensor, gains: Tensor, table: Tensor) -> None:
        D, F, L = config.dim, config.hidden_dim, config.n_layers
        heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        shapes = [(heads + 2 * kv, D), (D, heads), (2 * F, D), (D, F)]
        layer = sum(a * b for a, b in shapes)
        self.qkv, self.wo, self.gate_up, self.w_down = (
            [flat[at + i * layer :][: a * b].view(a, b) for i in range(L)]
            for at, (a, b) in zip(accumulate([0] + [a * b for a, b in shapes]), shapes, strict=False)
        )
        self.head = flat[L * layer :].view(config.vocab_size, D)
        self.gains, self.table = gains, table


class _Worker:
    """Some rows, all the way. Every tensor that a kernel touches has a numpy view of the same memory in `np`.

    R rows of T tokens, n = R · T of them. H query heads of hd numbers share K heads of keys and values, g = H / K each;
    heads stand as (R·K, T·g, hd), the g queries of a token side by side, so that one product serves all of them.
    Residual state 0 is the embedding, 2i + 1 follows the attention of layer i, 2i + 2 its feed-forward.
    """

    def __init__(
        self, config: Config, T: int, rows: slice, parameters: Parameters, part: Tensor, dtype: torch.dtype
    ) -> None:
        R = rows.stop - rows.start
        self.config, self.T, self.R, self.parameters = config, T, R, parameters
        self.first = rows.start * T * config.dim  # place in the batch of this worker's first residual number
        D, F, V, L = config.dim, config.hidden_dim, config.vocab_size, config.n_layers
        H, K, hd = config.n_heads, config.n_kv_heads, config.head_dim
        n, g, states = R * T, H // K, 2 * L + 1
        self.grads = Parameters(config, part, buffer(states, D), parameters.table)
        self.dgains = self.grads.gains
        self.blocks = [(begin, min(begin + QUERIES, T)) for begin in range(0, T, QUERIES)]

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return buffer(*shape, dtype=dtype)

        f32 = torch.float32
        self.tokens, self.targets = make(n, dtype=torch.int64), make(n, dtype=torch.int64)
        # Kept until the way back: y = x · rms · gain, queries and keys rotated, attention weights by block of queries.
        self.x, self.rms = make(states, n, D, dtype=f32), make(states, n, dtype=f32)
        self.y = make(states, n, D)
        self.q, self.k, self.v = make(L, R * K, T * g, hd), make(L, R * K, T, hd), make(L, R * K, T, hd)
        self.attention = [[make(R * K, (e - b) * g, e) for b, e in self.blocks] for _ in range(L)]
        self.heads = make(L, n, H * hd)
        self.gate_up, self.product = make(L, n, 2 * F), make(L, n, F)
        # Used again by each layer: before rotation, heads by head, what a branch adds to the residual stream.
        self.qkv = make(n, (H + 2 * K) * hd)
        self.by_head = make(R * K, T * g, hd)
        self.branch = make(n, D)
        self.logits = make(n, V)
        self.dropout = Dropout([], 0.0)
        # Gradients, each of what is named behind the d; of gate_up, qkv and logits they take the place of the values.
        self.dx, self.dx_rounded, self.dy = make(n, D, dtype=f32), make(n, D), make(n, D)
        self.dproduct, self.dheads = make(n, F), make(n, H * hd)
        self.dq, self.dk, self.dv = make(R * K, T * g, hd), make(R * K, T, hd), make(R * K, T, hd)
        self.dattention = [make(R * K, (e - b) * g, e) for b, e in self.blocks]
        self.scratch = make(max(T, V), dtype=f32)
        cos, sin = rope_tables(config, torch.arange(T)[None])
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.np = _Arrays(self)
        self.scale = np.float32(math.log2(math.e) / math.sqrt(hd))
        self.dscale = np.float32(1 / math.sqrt(hd))

    # ---- forward -------------------------------------------------------------------------------

    def forward(self) -> None:
        w, a = self.parameters, self.np
        torch.index_select(w.table, 0, self.tokens, out=self.x[0])
        self.dropout(a.x[0], self.first, 0)
        self.branch.zero_()
        self._norm(0)
        for i in range(self.config.n_layers):
            torch.mm(self.y[2 * i], w.qkv[i].t(), out=self.qkv)
            kernels.split_rotate(a.qkv, a.cos, a.sin, a.q[i], a.k[i], a.v[i], self.scale)
            self._attend(i)
            self._rows(self.heads[i]).copy_(self._heads(self.by_head))
            torch.mm(self.heads[i], w.wo[i].t(), out=self.branch)
            self.dropout(a.branch, self.first, 2 * i + 1)
            self._norm(2 * i + 1)
            torch.mm(self.y[2 * i + 1], w.gate_up[i].t(), out=self.gate_up[i])
            kernels.swiglu(a.gate_up[i], a.product[i])
            torch.mm(self.product[i], w.w_down[i].t(), out=self.branch)
            self.dropout(a.branch, self.first, 2 * i + 2)
            self._norm(2 * i + 2)
        torch.mm(self.y[-1], w.head.t(), out=self.logits)

    def _norm(self, i: int) -> None:
        a, eps = self.np, np.float32(self.config.norm_eps)
        kernels.add_norm(a.x[max(0, i - 1)], a.branch, a.x[i], a.y[i], a.rms[i], a.gains[i], eps)

    def _attend(self, i: int) -> None:
        q, k, v = self.q[i], self.k[i], self.v[i]
        g = q.shape[1] // self.T
        for block, (begin, end) in enumerate(self.blocks):
            queries = slice(begin * g, end * g)
            weights = self.attention[i][block]
            torch.bmm(q[:, queries], k[:, :end].mT, out=weights)
            kernels.causal_softmax(self.np.attention[i][block], begin, g, self.np.scratch)
            self.by_head[:, queries] = torch.bmm(weights, v[:, :end])

    def loss(self, scale: float) -> float:
        """Nats, summed; the logits become their gradient."""
        a = self.np
        return kernels.cross_entropy(a.logits, a.targets, IGNORE, np.float32(scale), a.scratch)

    # ---- backward ------------------------------------------------------------------------------

    def backward(self) -> None:
        """For each y = x Wᵀ of the way there: dW = dyᵀ x, into the worker's own part, and dx = dy W."""
        w, g, a = self.parameters, self.grads, self.np
        self.dx.zero_()
        self.dgains.zero_()
        torch.mm(self.logits.t(), self.y[-1], out=g.head)
        torch.mm(self.logits, w.head, out=self.dy)
        self._norm_backward(-1)
        for i in reversed(range(self.config.n_layers)):
            self.dropout(a.dx_rounded, self.first, 2 * i + 2)
            torch.mm(self.dx_rounded.t(), self.product[i], out=g.w_down[i])
            torch.mm(self.dx_rounded, w.w_down[i], out=self.dproduct)
            kernels.swiglu_backward(a.gate_up[i], a.dproduct)  # gate_up is now its gradient
            torch.mm(self.gate_up[i].t(), self.y[2 * i + 1], out=g.gate_up[i])
            torch.mm(self.gate_up[i], w.gate_up[i], out=self.dy)
            self._norm_backward(2 * i + 1)
            self.dropout(a.dx_rounded, self.first, 2 * i + 1)
            torch.mm(self.dx_rounded.t(), self.heads[i], out=g.wo[i])
            torch.mm(self.dx_rounded, w.wo[i], out=self.dheads)
            self._heads(self.by_head).copy_(self._rows(self.dheads))
            self._attend_backward(i)
            kernels.join_rotate_backward(a.dq, a.dk, a.dv, a.cos, a.sin, a.qkv, self.dscale)
            torch.mm(self.qkv.t(), self.y[2 * i], out=g.qkv[i])
            torch.mm(self.qkv, w.qkv[i], out=self.dy)
            self._norm_backward(2 * i)
        self.dropout(a.dx, self.first, 0)

    def _norm_backward(self, i: int) -> None:
        a = self.np
        kernels.norm_backward(a.dy, a.x[i], a.rms[i], a.gains[i], a.dx, a.dx_rounded, a.dgains[i])

    def _attend_backward(self, i: int) -> None:
        """With weights w = softmax(q kᵀ) and heads w v: dv = wᵀ dheads, dw = dheads vᵀ, and with the gradient of the
        scores ds = w (dw - Σ w dw), summed over the keys: dq = ds k, dk = dsᵀ q."""
        q, k, v, dheads = self.q[i], self.k[i], self.v[i], self.by_head
        g = q.shape[1] // self.T
        for block, (begin, end) in reversed(list(enumerate(self.blocks))):
            queries = slice(begin * g, end * g)
            weights, dweights = self.attention[i][block], self.dattention[block]
            first = block == len(self.blocks) - 1  # the last block sees every key
            torch.bmm(dheads[:, queries], v[:, :end].mT, out=dweights)
            kernels.causal_softmax_backward(self.np.attention[i][block], self.np.dattention[block], begin, g)
            # The scores were computed with q · log₂ e / √hd: as dk is taken with that q, its log₂ e is taken out
            _add(self.dv[:, :end], weights.mT, dheads[:, queries], first)
            _add(self.dk[:, :end], dweights.mT, q[:, queries], first, math.log(2))
            self.dq[:, queries] = torch.bmm(dweights, k[:, :end])

    # ---- views ---------------------------------------------------------------------------------

    def _rows(self, rows: Tensor) -> Tensor:
        """(n, H·hd) as (R, T, K, g·hd)."""
        return rows.view(self.R, self.T, self.config.n_kv_heads, -1)

    def _heads(self, heads: Tensor) -> Tensor:
        """(R·K, T·g, hd) as (R, T, K, g·hd)."""
        return heads.view(self.R, self.config.n_kv_heads, self.T, -1).transpose(1, 2)


def _add(total: Tensor, a: Tensor, b: Tensor, first: bool, factor: float = 1.0) -> None:
    torch.baddbmm(total, a, b, beta=0.0 if first else 1.0, alpha=factor, out=total)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory for numpy, which has no bfloat16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Arrays:
    """The tensors of a worker as numpy sees them, under the same names."""

    def __init__(self, worker: _Worker) -> None:
        for name, value in vars(worker).items():
            if isinstance(value, Tensor):
                setattr(self, name, _array(value))
            elif name in ("attention", "dattention"):
                setattr(self, name, _nested(value))
        self.gains = _array(worker.parameters.gains)

    def __getattr__(self, name: str) -> Any:  # for type checkers: the names are those of the worker
        raise AttributeError(name)


def _nested(value: Any) -> Any:
    return [_nested(one) for one in value] if isinstance(value, list) else _array(value)

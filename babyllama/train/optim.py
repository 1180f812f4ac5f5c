"""What one step does to the weights: AdamW or Muon, by the role of each parameter, along a schedule.

A step at `progress` in [0, 1] of the run takes, for each weight w with its update u,

    w ← w - rate · (u + decay · w)        rate = the role's peak rate · schedule(plan, progress)

where `decay` is 0 but for matrices. It is plan.weight_decay, so that what is taken off falls with the rate; with
plan.weight_decay_falls it is plan.weight_decay · schedule(plan, progress), which falls with the schedule squared.
With plan.cautious the entries whose update points the other way do not decay.

Sources: [AdamW] arXiv:1711.05101  [Muon] https://kellerjordan.github.io/posts/muon/  [NorMuon] arXiv:2510.05491
         [Polar Express] arXiv:2505.16932  [Cautious] arXiv:2510.12402  [D2Z] arXiv:2502.15938
         [GroupMuon] arXiv:2605.08933
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from babyllama.model import Llama
from babyllama.train.recipe import Plan
from babyllama.train.workers import Workers, shares

# ---- roles ---------------------------------------------------------------------------------------

ROLES = ("matrix", "embedding", "head", "gain")
Weights = Mapping[str, Tensor]  # by parameter name, "layers.0.attention.wq.weight"


def role(name: str) -> str:
    """What a parameter is there for; the embedding of a tied model is its head too, and counts as embedding."""
    if name.endswith("norm.weight"):
        return "gain"
    return {"tok_embeddings.weight": "embedding", "lm_head.weight": "head"}.get(name, "matrix")


def by_role(model: Llama) -> dict[str, dict[str, Tensor]]:
    """All parameters of a model, each under its one role."""
    members: dict[str, dict[str, Tensor]] = {kind: {} for kind in ROLES}
    for name, weight in model.named_parameters():
        members[role(name)][name] = weight
    return members


def rates(plan: Plan) -> dict[str, float]:
    """The rate of each role at the schedule's peak."""
    return {
        "matrix": plan.learning_rate,
        "embedding": plan.embedding_rate or plan.learning_rate,
        "head": plan.head_rate or plan.learning_rate,
        "gain": plan.gain_rate or plan.learning_rate,
    }


# ---- schedule ------------------------------------------------------------------------------------


def schedule(plan: Plan, progress: float) -> float:
    """The share of their peak that all rates have at `progress` in [0, 1]: up to 1 over the warm-up, then down to
    plan.final, which is exactly what is left at the end and after it.

    linear  down in a straight line from the end of the warm-up. A decay all the way to 0 is worth a good part of a
            run's compute: [D2Z].
    wsd     stays at 1, and goes down in a straight line over the last plan.decay of the run ("warmup, stable, decay").
    cosine  down by half a wave of the cosine from the end of the warm-up.
    """
    rise = (progress + 1e-3) / plan.warmup if plan.warmup else 1.0
    share = plan.decay if plan.schedule == "wsd" else 1 - plan.warmup  # of the run, over which it goes down
    fall = max(0.0, min(1.0, (1 - progress) / share))
    if plan.schedule == "cosine":
        fall = (1 - math.cos(math.pi * fall)) / 2
    return min(rise, plan.final + (1 - plan.final) * fall)


# ---- Muon ----------------------------------------------------------------------------------------

# Steps x ← a x + b x³ + c x⁵ that take singular values from [l, 1] to near 1, where one polynomial used so often would
# be slower: [Polar Express], algorithm 1, with its margin of 1.01 for rounding. No other 3 and 4 come nearer.
POLYNOMIALS = {
    number: [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in steps]
    for number, steps in {
        3: (  # l = 0.01
            (8.093368513, -23.62043033, 17.44615175),
            (3.636585554, -2.721926747, 0.5365462883),
            (2.661299986, -1.977154522, 0.452616407),
        ),
        4: (  # l = 0.003
            (8.383673613, -24.76590586, 18.35708189),
            (4.043420434, -3.011404994, 0.5695121503),
            (3.505570617, -2.626653836, 0.5257194048),
            (2.490115939, -1.834275083, 0.4368347069),
        ),
        5: (  # the first five of the paper's eight, whose l is 0.001
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        ),
    }.items()
}
NORMUON_BETA = 0.95  # memory of the rows' second moments: [NorMuon]


def orthogonalize(
    x: Float[Tensor, "N R C"], polynomials: int = 5, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N R C"]:
    """Each matrix U S Vᵀ becomes about U Vᵀ: its singular values go to 1, its directions stay.

    Singular values of at least 0.01 of the matrix's norm end in [0.70, 1.27] by 3 `polynomials`, those of 0.003 and
    more in [0.77, 1.20] by 4 and in [0.86, 1.13] by 5. Smaller ones grow about 75-, 280- and 970-fold, and a matrix of
    zeros stays one. Products only, no decomposition, in `dtype`; all N matrices in one call for each.
    """
    tall = x.shape[1] > x.shape[2]
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (N, 1, 1): no singular value is above it
    x = (x / (1.01 * norms).clamp(min=1e-12)).to(dtype)
    for a, b, c in POLYNOMIALS[polynomials]:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b x² + c x⁴
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


def along_heads(name: str) -> int | None:
    """The dimension of a matrix (out, in) along which the attention's heads stand side by side; None: neither."""
    return {"wq": 0, "wk": 0, "wv": 0, "wo": 1}.get(name.removesuffix(".weight").rpartition(".")[2])


def split_heads(x: Float[Tensor, "N R C"], along: int, head_dim: int) -> Tensor:
    """(N, heads · head_dim, C) -> (N · heads, head_dim, C), or, `along` 1, (N, R, heads · hd) -> (N · heads, R, hd)."""
    heads = x.unflatten(along + 1, (-1, head_dim))
    return (heads if along == 0 else heads.transpose(1, 2)).flatten(0, 1)


def join_heads(x: Tensor, along: int, count: int) -> Float[Tensor, "N R C"]:
    """The N = `count` matrices of which split_heads made x."""
    heads = x.unflatten(0, (count, -1))
    return heads.flatten(1, 2) if along == 0 else heads.transpose(1, 2).flatten(2)


def even_rows(update: Float[Tensor, "N R C"], second: Float[Tensor, "N R 1"]) -> Float[Tensor, "N R C"]:
    """Each row divided by the root of its mean square over time, and the whole brought back to its norm.

    `second`, the mean squares, is brought up to date. Rows that were 0 so far stay 0. Source: [NorMuon], algorithm 1.
    """
    second.lerp_(update.square().mean(-1, keepdim=True), 1 - NORMUON_BETA)
    even = update / second.sqrt().clamp(min=1e-10)
    before, after = (torch.linalg.vector_norm(each, dim=(1, 2), keepdim=True) for each in (update, even))
    return even * (before / after.clamp(min=1e-10))


class Muon:
    """Momentum, orthogonalised: all directions of a matrix move equally far, however small their gradients.

    Matrices of one shape are worked on as one batch. The update of an (out, in) matrix is scaled by √max(1, out / in).
    With plan.muon_by_head the rows of wq, wk and wv that belong to a head, and its columns of wo, are a matrix of their
    own: MuonSplit in [GroupMuon], where groups of heads were better still. The update's Frobenius norm stays the same,
    for a fraction of the products.
    Differs from torch.optim.Muon in that, in the batches, in products in the precision of the plan, in the polynomials,
    and in that no gradient is too small for it.  Source: [Muon], with Nesterov's momentum.
    """

    def __init__(self, matrices: Weights, plan: Plan) -> None:
        self.plan = plan
        self.dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
        alike: dict[tuple[torch.Size, int | None], dict[str, Tensor]] = {}
        for name, weight in matrices.items():
            along = along_heads(name) if plan.muon_by_head else None
            alike.setdefault((weight.shape, along), {})[name] = weight
        # On a CPU each thread takes some of all that are alike; another device takes all of them at once.
        self.workers = Workers(plan.threads if plan.device == "cpu" else 1)
        self.batches, self.along = [], []
        for (_, along), named in alike.items():
            for some in _split(named, self.workers.count):
                self.batches.append(some)
                self.along.append(along)
        self.momenta = [torch.stack([*map(torch.zeros_like, batch.values())]) for batch in self.batches]
        self.second_moments = [torch.zeros_like(momentum[..., :1]) for momentum in self.momenta]  # of NorMuon

    def step(self, rate: float, decay: float) -> None:
        self.workers.each(lambda i: self._update(i, rate, decay), range(len(self.batches)))

    @torch.no_grad()
    def _update(self, i: int, rate: float, decay: float) -> None:
        batch, momentum, second = self.batches[i], self.momenta[i], self.second_moments[i]
        beta = self.plan.momentum
        gradients = torch.stack([gradient(weight) for weight in batch.values()])  # (N, out, in)
        momentum.lerp_(gradients, 1 - beta)
        updates, along, number = gradients.lerp_(momentum, beta), self.along[i], self.plan.muon_polynomials
        if along is None:
            updates = orthogonalize(updates, number, self.dtype)
        else:
            heads = split_heads(updates, along, self.plan.model.head_dim)
            updates = join_heads(orthogonalize(heads, number, self.dtype), along, len(updates))
        if self.plan.normuon:
            updates = even_rows(updates, second)
        scale = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
        for weight, update in zip(batch.values(), updates, strict=True):
            if decay and self.plan.cautious:
                weight.addcmul_(weight, agreeing(weight, update), value=-rate * decay)
            elif decay:
                weight.mul_(1 - rate * decay)
            weight.sub_(update, alpha=rate * scale)

    def memory(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the tensor of everything remembered between steps."""
        for batch, momentum, second in zip(self.batches, self.momenta, self.second_moments, strict=True):
            for i, name in enumerate(batch):
                yield f"{name}.momentum", momentum[i]
                if self.plan.normuon:
                    yield f"{name}.second_moment", second[i]


def _split(named: Weights, parts: int) -> list[Weights]:
    some = [list(named)[share] for share in shares(len(named), parts)]
    return [{name: named[name] for name in names} for names in some if names]


def gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "a step without a backward pass"
    return weight.grad


def agreeing(weight: Tensor, update: Tensor) -> Tensor:
    """1 where a weight and its update have the same sign, or one of them is 0; 0 elsewhere.

    To subtract the update brings such an entry nearer to 0 as it is; decay only helps. Source: [Cautious], algorithm 1.
    """
    return torch.mul(weight, update).ge_(0)


# ---- AdamW ---------------------------------------------------------------------------------------

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # as torch names them


def make_adamw(members: Mapping[str, Weights], plan: Plan) -> torch.optim.AdamW:
    """AdamW over one group for each role; only matrices decay: a gain or a rare token's row would be pulled to 0 for
    nothing. Source: [AdamW]. `fused` updates all parameters in one pass over memory."""
    groups: list[dict[str, Any]] = [
        {"params": [*members[kind].values()], "role": kind, "lr": rates(plan)[kind]} for kind in members
    ]
    for group in groups:
        group["weight_decay"] = plan.weight_decay if group["role"] == "matrix" else 0.0
    fused = plan.device == "cpu" or plan.device.startswith("cuda")
    made = torch.optim.AdamW(groups, betas=(plan.beta1, plan.beta2), eps=1e-10, fused=fused)
    # torch would do this at the first step; like this there is memory to write and to read before it.
    for weight in (weight for group in groups for weight in group["params"]):
        step = torch.zeros((), device=weight.device if fused else "cpu")
        made.state[weight] = {"step": step} | {key: torch.zeros_like(weight) for key in MOMENTS[1:]}
    return made


# ---- the optimiser -------------------------------------------------------------------------------


class Optimizer:
    """All that moves the weights of a model: AdamW for every role, or Muon for the matrices and AdamW for the rest."""

    def __init__(self, model: Llama, plan: Plan) -> None:
        self.plan = plan
        members = by_role(model)
        self.muon = Muon(members.pop("matrix"), plan) if plan.optimizer == "muon" else None
        self.adamw = make_adamw(members, plan)
        self.weights = {
            name: weight for name, weight in model.named_parameters() if role(name) in members
        }  # AdamW's

    def rate(self, progress: float) -> float:
        """The rate of the matrices."""
        return self.plan.learning_rate * schedule(self.plan, progress)

    def step(self, progress: float) -> None:
        """One update from the gradients, at `progress` in [0, 1] of the run."""
        factor, rate = schedule(self.plan, progress), self.rate(progress)
        decay = self.plan.weight_decay * (factor if self.plan.weight_decay_falls else 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rates(self.plan)[group["role"]] * factor
            if group["role"] == "matrix":
                group["weight_decay"] = 0.0 if self.plan.cautious else decay
        if self.muon is not None:
            self.muon.step(rate, decay)
        elif self.plan.cautious and decay:
            self._step_cautiously(rate * decay)
            return
        self.adamw.step()

    @torch.no_grad()
    def _step_cautiously(self, shrinkage: float) -> None:
        """AdamW's step, then its matrices' decay: what of it agrees with an update is known only afterwards."""
        before = {name: weight.clone() for name, weight in self.weights.items() if role(name) == "matrix"}
        self.adamw.step()
        for name, old in before.items():
            weight = self.weights[name]
            weight.addcmul_(old, agreeing(old, self.adamw.state[weight]["exp_avg"]), value=-shrinkage)

    def tensors(self) -> dict[str, Tensor]:
        """All memory between steps, by parameter: "norm.weight.exp_avg", "layers.0.attention.wq.weight.momentum"."""
        return adamw_tensors(self.weights, self.adamw) | dict(self.muon.memory() if self.muon else ())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave; steps go on with the same bits. Raises KeyError naming what is missing."""
        load_adamw(self.weights, self.adamw, tensors)
        for name, kept in self.muon.memory() if self.muon else ():
            kept.copy_(tensors[name])


def adamw_tensors(weights: Weights, adamw: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{name}.{key}": adamw.state[weight][key] for name, weight in weights.items() for key in MOMENTS}


def load_adamw(weights: Weights, adamw: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        for key in MOMENTS:
            tensor = tensors[f"{name}.{key}"]
            counts_on_cpu = key == "step" and not adamw.defaults["fused"]  # as torch itself keeps it
            device = torch.device("cpu") if counts_on_cpu else weight.device
            adamw.state[weight][key] = tensor.to(device, copy=True)


# ---- average of the weights ----------------------------------------------------------------------


class Average:
    """The mean of a model's weights over the run so far, where what is plan.average older counts half as much.

    Time is the progress of the run, so that an average means the same in a run of steps and in one of seconds. Weights
    reached after a stretch of progress d count 1 - 2^(-d / plan.average), those before 2^(-d / plan.average) of what
    they did; divided by the sum of all counts, so that the untrained model counts for nothing. Takes plan.average > 0.
    """

    def __init__(self, model: Llama, plan: Plan) -> None:
        self.half_life = plan.average
        self.progress = 0.0  # at the last update
        self.mean = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: Llama, progress: float) -> None:
        """Take in the weights of the model as they are at `progress`, after a step."""
        if progress <= self.progress:
            return
        newer, all_counts = (  # 1 - 2^-x, exact for x near 0 too
            -math.expm1(-math.log(2) * stretch / self.half_life)
            for stretch in (progress - self.progress, progress)
        )
        named = dict(model.named_parameters())
        torch._foreach_lerp_([*self.mean.values()], [named[name] for name in self.mean], newer / all_counts)
        self.progress = progress

    def weights(self) -> Weights:
        """The mean, by parameter name; before the first update the weights that the model had."""
        return self.mean

    def tensors(self) -> dict[str, Tensor]:
        """What `load` needs, "norm.weight.average" and so on: no name is also one of Optimizer's."""
        progress = torch.tensor(self.progress, dtype=torch.float64)
        return {f"{name}.average": mean for name, mean in self.mean.items()} | {"average.progress": progress}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError naming what is missing."""
        for name, mean in self.mean.items():
            mean.copy_(tensors[f"{name}.average"])
        self.progress = float(tensors["average.progress"])

"""What a Llama costs: published counts, built models, and what autograd really keeps."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from babyllama import costs
from babyllama.errors import UsageError
from babyllama.model import Config, Llama

SMALL = Config(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
REAL = {
    # name: (Config, parameters as published or counted in the weights)
    "Llama 1 and 2, 7B": (
        Config(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, hidden_dim=11008, max_seq_len=4096),
        6_738_415_616,
    ),
    "Llama 3, 8B": (
        Config(vocab_size=128256, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336),
        8_030_261_248,
    ),
    "Llama 3.2, 1B": (
        Config(
            vocab_size=128256,
            dim=2048,
            n_layers=16,
            n_heads=32,
            n_kv_heads=8,
            hidden_dim=8192,
            tie_embeddings=True,
        ),
        1_235_814_400,
    ),
    "SmolLM2, 135M": (
        Config(
            vocab_size=49152,
            dim=576,
            n_layers=30,
            n_heads=9,
            n_kv_heads=3,
            hidden_dim=1536,
            tie_embeddings=True,
        ),
        134_515_008,
    ),
    "stories260K": (
        Config(
            vocab_size=512,
            dim=64,
            n_layers=5,
            n_heads=8,
            n_kv_heads=4,
            hidden_dim=172,
            tie_embeddings=True,
        ),
        260_032,
    ),
}
SHAPES = [
    SMALL,
    Config(vocab_size=100, dim=48, n_layers=3, n_heads=4, tie_embeddings=True),
    Config(vocab_size=100, dim=40, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=72),
]


@pytest.mark.parametrize("name", REAL)
def test_published_models_have_their_published_number_of_parameters(name):
    config, published = REAL[name]
    assert costs.parameters(config).total == published


@pytest.mark.parametrize("config", SHAPES)
def test_the_count_equals_the_parameters_of_a_built_model_component_by_component(config):
    counted: dict[str, int] = dict.fromkeys(costs.parameters(config).as_dict(), 0)
    for name, weight in Llama(config).named_parameters():
        component = (
            "embedding" if name.startswith("tok_embeddings")
            else "head" if name.startswith("lm_head")
            else "norms" if "norm" in name
            else "attention" if ".attention." in name
            else "feed_forward"
        )  # fmt: skip
        counted[component] += weight.numel()
    assert counted == costs.parameters(config).as_dict()


def test_a_block_is_counted_name_by_name():
    block = Llama(SMALL).layers[0]
    counted = {name.split(".")[-2]: weight.numel() for name, weight in block.named_parameters()}
    assert counted == costs.block_parameters(SMALL)
    assert list(counted) == list(costs.block_parameters(SMALL))


@pytest.mark.parametrize("config", SHAPES)
def test_forward_flops_equal_the_products_that_torch_counts(config):
    from torch.utils.flop_counter import FlopCounterMode

    context = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Llama(config)(torch.zeros(1, context, dtype=torch.long), fused=False)
    assert counter.get_total_flops() == context * costs.forward_flops(config, context).total


def test_training_flops_follow_the_rule_six_and_twelve():
    n, context = costs.parameters(SMALL), 16
    head = SMALL.vocab_size * SMALL.dim
    attention = 12 * SMALL.n_layers * SMALL.n_heads * SMALL.head_dim * context
    assert costs.training_flops(SMALL, context).total == 6 * (n.matrices + head) + attention
    assert costs.training_flops(SMALL, context).attention_scores == attention


def test_a_tied_head_saves_parameters_but_no_flops():
    tied = Config(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, tie_embeddings=True)
    assert costs.parameters(SMALL).total - costs.parameters(tied).total == 64 * 32
    assert costs.forward_flops(SMALL, 8) == costs.forward_flops(tied, 8)


@pytest.mark.parametrize("config", SHAPES)
def test_the_activation_estimate_is_within_a_tenth_of_what_autograd_keeps(config):
    B, T = 3, 32
    model, kept = Llama(config), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address is reused
        return tensor

    tokens = torch.zeros(B, T, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    logits_and_their_gradient = 2 * 4 * B * T * config.vocab_size
    measured = sum(size for size, _ in kept.values()) + logits_and_their_gradient
    assert costs.training_bytes(config, B, T, device="cuda").activations == pytest.approx(measured, rel=0.1)


def test_weights_gradients_and_moments_are_four_numbers_a_parameter():
    held, n = costs.training_bytes(SMALL, 1, 1, device="cuda"), costs.parameters(SMALL).total
    assert held.weights + held.gradients + held.optimizer == 16 * n
    kept = costs.training_bytes(SMALL, 1, 1, device="cuda", average=True)
    assert kept.total == held.total + 4 * n


def tensors_of(*holders) -> dict[int, int]:
    """Address -> bytes, up to the last that a tensor shows, of every memory that these objects, and what they hold,
    have tensors in."""
    found, seen, waiting = {}, set(), [*holders]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            memory, shown = one.untyped_storage().data_ptr(), one.storage_offset() + one.numel()
            found[memory] = max(found.get(memory, 0), shown * one.itemsize)
            if isinstance(one, torch.nn.Parameter):
                waiting.append(one.grad)
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, torch.nn.Module):
            waiting += one.parameters()
        elif type(one).__module__.startswith(("babyllama", "torch.optim")) and hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return found


MUON = {"optimizer": "muon", "embedding_rate": 0.01, "head_rate": 0.01, "gain_rate": 0.01}
HELD = [  # shape, rows, context, settings
    (0, 1, 8, {"threads": 1}),
    (0, 5, 16, {"threads": 2, "embedding_norm": True, **MUON}),
    (1, 3, 300, {"threads": 8, "precision": "bfloat16"}),
    (2, 2, 513, {"threads": 2, "average": 0.1, **MUON, "normuon": True}),
    (2, 4, 64, {"threads": 3, "precision": "bfloat16", "embedding_norm": True, "average": 0.1}),
]


@pytest.mark.parametrize(("shape", "rows", "context", "settings"), HELD)
def test_the_bytes_of_a_step_on_a_cpu_are_those_of_its_tensors(shape, rows, context, settings):
    from babyllama.train.cpu import CPUStep
    from babyllama.train.optim import Average, Optimizer
    from babyllama.train.recipe import Plan

    config = SHAPES[shape]
    plan = Plan(model=config, context=context, batch_size=rows, steps=1, **settings)
    model = Llama(config, seed=0)
    step, optimizer = CPUStep(model, plan), Optimizer(model, plan)
    tokens = torch.zeros(rows, context, dtype=torch.long)
    step(tokens, tokens, tokens.numel(), step=0)
    optimizer.step(0.0)
    average = Average(model, plan) if plan.average else None
    counted = costs.training_bytes(
        config,
        rows,
        context,
        workers=plan.threads,
        bytes_per_number=2 if plan.precision == "bfloat16" else 4,
        optimizer=plan.optimizer,
        average=plan.average > 0,
        embedding_norm=plan.embedding_norm,
    )
    remembered = sum(tensors_of(optimizer, average).values()) - sum(tensors_of(model).values())
    held = sum(tensors_of(model, step, optimizer, average).values())
    counters = 4 * len(optimizer.weights)  # of AdamW's steps
    assert counted.optimizer == remembered - counters
    assert counted.total == held - counters
    assert counted.weights == 4 * costs.parameters(config).total


def test_the_cache_of_llama_2_7b_is_two_gibibytes_at_4096_tokens_in_float16():
    assert costs.cache_bytes(REAL["Llama 1 and 2, 7B"][0], 1, 4096, bytes_per_number=2) == 2 * 2**30


def test_everything_at_once_is_the_same_as_one_by_one():
    together = costs.costs(SMALL, batch_size=4)
    assert together.context == SMALL.max_seq_len
    assert together.training_bytes == costs.training_bytes(SMALL, 4, SMALL.max_seq_len)
    assert together.forward_flops.total * 3 == together.training_flops.total


@pytest.mark.parametrize(("batch_size", "context"), [(0, 8), (-1, 8), (1, -3)])
def test_nothing_and_less_than_nothing_cannot_be_trained_on(batch_size, context):
    with pytest.raises(UsageError) as error:
        costs.costs(SMALL, batch_size, context)
    assert error.value.code == "E102"


LLAMA_405B = Config(vocab_size=128256, dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, hidden_dim=53248)


@pytest.mark.parametrize("config", [*SHAPES, LLAMA_405B, *(config for config, _ in REAL.values())])
def test_the_drawing_fits_78_columns_and_says_the_real_numbers(config):
    drawing = costs.block_drawing(config)
    lines = drawing.split("\n")
    assert max(map(len, lines)) <= 78
    assert {line.index("│", 6) for line in lines if line.startswith(" │   │")} == {61}, "a broken box"
    assert {len(line) for line in lines if line.endswith(("┐", "┘"))} == {62}
    for number in costs.block_parameters(config).values():
        assert f"{number:,}" in drawing
    assert f"{config.n_kv_heads} head" in drawing and f"(B, T, {config.dim})" in drawing


def test_the_drawing_of_a_grouped_block():
    assert costs.block_drawing(SMALL) == DRAWN


DRAWN = """\
 x   (B, T, 32)                                   block 1 of 2      parameters
 │
 ├──►┌─ attention ───────────────────────────────────────────┐
 │   │ attention_norm  32                                    │              32
 │   │ wq      32 → 32  4 heads of 8, rotated                │           1,024
 │   │ wk      32 → 16  2 heads of 8, rotated                │             512
 │   │ wv      32 → 16  2 heads of 8                         │             512
 │   │ softmax(q kᵀ / √8) v   each k, v for 2 query heads    │
 │   │ wo      32 → 32                                       │           1,024
 ⊕◄──└───────────────────────────────────────────────────────┘
 │
 ├──►┌─ feed_forward ────────────────────────────────────────┐
 │   │ ffn_norm  32                                          │              32
 │   │ w_gate  32 → 96                                       │           3,072
 │   │ w_up    32 → 96                                       │           3,072
 │   │ silu(gate) · up                                       │
 │   │ w_down  96 → 32                                       │           3,072
 ⊕◄──└───────────────────────────────────────────────────────┘
 │
 ▼                                                   one block          12,352"""


def test_costs_are_counted_without_torch():
    code = "import sys; import babyllama.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

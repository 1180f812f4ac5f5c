"""Hugging Face folders, the native format: `config.json`, `model.safetensors` and the tokenizer's files.

What stands in `config.json` and what tensors are called is translated by two tables, each read in both directions.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from babyllama.checkpoint.folder import read_json
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"

CONFIG_KEYS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
NEEDED = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "norm_eps")
LARGEST = {
    "vocab_size": 2**20,
    "dim": 2**16,
    "n_layers": 2**10,
    "n_heads": 2**10,
    "hidden_dim": 2**18,
    "max_seq_len": 2**24,
}

TENSOR_NAMES = {  # ours: theirs; N is the number of the layer
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.N.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "layers.N.feed_forward.w_gate.weight": "model.layers.N.mlp.gate_proj.weight",
    "layers.N.feed_forward.w_up.weight": "model.layers.N.mlp.up_proj.weight",
    "layers.N.feed_forward.w_down.weight": "model.layers.N.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
THEIRS_TO_OURS = {theirs: ours for ours, theirs in TENSOR_NAMES.items()}


def rename(name: str, table: Mapping[str, str] = TENSOR_NAMES) -> str:
    """The other name of a tensor: rename("layers.3.attention.wq.weight") is "model.layers.3.self_attn.q_proj.weight".

    Raises KeyError for a name that is in no row of the table.
    """
    number = next((part for part in name.split(".") if part.isdecimal()), "N")
    general = ".".join("N" if part == number else part for part in name.split("."))
    return table[general].replace("N", number, 1)


# ---- config.json ---------------------------------------------------------------------------------


def config_json(config: Config, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """What stands in config.json. RoPE is written in the old keys and in transformers 5's, so that both can read it."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    value: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
    }
    if tokenizer is not None:
        value |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": _one_or_list(tokenizer)}
    return value


def read_config(path: Path) -> Config:
    """The Config in a config.json, old keys or new.

    Raises InputError E202 naming the key, its value and the rule when this is not the configuration of a Llama.
    """
    raw = read_json(path, code="E202")

    def refuse(key: str, found: str) -> InputError:
        return InputError(
            "E202", f"{path}, {key}", found, "use a Llama model whose config.json is complete and unchanged"
        )

    if raw.get("model_type") != "llama":
        raise refuse("model_type", f"is {raw.get('model_type')!r}, expected 'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", f"is {raw['hidden_act']!r}, Llama has 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise refuse(key, "is true, Llama has no biases")
    values: dict[str, Any] = {}
    for ours, theirs in CONFIG_KEYS.items():
        value = raw.get(theirs)
        if value is None:
            if ours in NEEDED:
                raise refuse(theirs, "is missing")
            continue
        wanted = bool if ours == "tie_embeddings" else float if ours == "norm_eps" else int
        values[ours] = _number(value, wanted, partial(refuse, theirs))
        if ours in LARGEST and not 0 < value <= LARGEST[ours]:
            raise refuse(theirs, f"is {value}, expected 1 to {LARGEST[ours]:,}")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise refuse(key, f"is {raw[key]!r:.60}, expected an object")
        rope |= raw.get(key) or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        values["rope_theta"] = _number(theta, float, lambda found: refuse("rope_theta", found))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise refuse("rope_scaling", f"is of type {kind!r}; 'linear' and 'llama3' are known")
    if kind != "default":
        keys = {"factor": "factor"}
        if kind == "llama3":
            keys |= {
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_max_seq_len": "original_max_position_embeddings",
            }
        scaling = {
            ours: _number(rope.get(theirs), float, partial(refuse, f"rope_scaling.{theirs}"))
            for ours, theirs in keys.items()
        }
        if not all(0 < value < math.inf for value in scaling.values()) or scaling.get(
            "low_freq_factor", 0
        ) >= scaling.get("high_freq_factor", 1):
            raise refuse("rope_scaling", f"has impossible factors: {rope}")
        if "original_max_seq_len" in scaling:
            scaling["original_max_seq_len"] = int(scaling["original_max_seq_len"])
        values["rope_scaling"] = RopeScaling(kind=kind, **scaling)
    try:
        return Config(**values)
    except UsageError as error:
        raise refuse(CONFIG_KEYS.get(error.where, error.where), error.found) from None


def _number(value: Any, kind: type, refuse: Callable[[str], InputError]) -> Any:
    """`value` as a bool, int or float; whatever else JSON can hold there is refused."""
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = type(value) in (int, float) and abs(value) < 2**53 and (kind is float or value == int(value))
    if not fits:
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise refuse(f"is {value!r:.60}, expected {expected}")
    return kind(value)


def _one_or_list(tokenizer: Tokenizer) -> int | list[int]:
    """The end tokens as config.json has them; the first of several is the one that ends a document."""
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    return [tokenizer.eos_id, *others] if others else tokenizer.eos_id


# ---- folders -------------------------------------------------------------------------------------


def model_files(config: Config, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face folder: `transformers` opens it as it is, weights and tokenizer."""
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _one_or_list(tokenizer),
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    tensors = {rename(name): weight.detach().cpu().contiguous() for name, weight in weights.items()}
    return {
        "config.json": json.dumps(config_json(config, tokenizer), indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        **tokenizer.files(),
    }


def read_model(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The Config and the weights (float32, our names) of a Hugging Face folder.

    Raises InputError E202 for the configuration, E203 listing every tensor that is missing, unexpected or of another
    shape than the configuration says, E205 when a file is missing or cut short. Nothing is allocated before the shapes
    in the file's header are known to be the configuration's.
    """
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        expected = {
            name: tuple(weight.shape) for name, weight in Llama(config, seed=None).state_dict().items()
        }
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(
            "E205", str(path), "is missing", "point to a folder that holds config.json and model.safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = {theirs: tuple(file.get_slice(theirs).get_shape()) for theirs in file.keys()}  # noqa: SIM118
            _compare(path, found, expected)
            weights = {name: file.get_tensor(rename(name)).float() for name in expected}
    except SafetensorError as error:
        raise InputError(
            "E205",
            str(path),
            f"is not a whole safetensors file ({error})",
            "copy it again, or use an older step",
        ) from None
    return config, weights


def build(config: Config, weights: Mapping[str, Tensor]) -> Llama:
    """A model with exactly these weights, in evaluation mode. Raises RuntimeError unless names and shapes fit."""
    with torch.device("meta"):
        model = Llama(config, seed=None)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _compare(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    wanted = {rename(name): shape for name, shape in expected.items()}
    if "lm_head.weight" not in wanted:  # tied: some writers store the shared matrix a second time
        found = {name: shape for name, shape in found.items() if name != "lm_head.weight"}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not part of a Llama" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {found[name]}, config.json says {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(
            "E203", str(path), shown, "use the config.json and the weights of one and the same model"
        )

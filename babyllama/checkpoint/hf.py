"""Hugging Face folders, the native format: `config.json`, `model.safetensors` and the tokenizer's files.

What stands in `config.json` and what tensors are called is translated by two tables, each read in both directions.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from babyllama.checkpoint.contents import Stored, Weights, compare, config_from, number, plain, shapes
from babyllama.checkpoint.folder import opened, read_json, read_part
from babyllama.errors import InputError
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import GENERATION, Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: which tensor is in which
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
LONGEST_HEADER = 2 * 2**20  # bytes of JSON; a Llama of 126 layers has 0.15 MB
MOST_SHARDS = 1000
MOST_AXES = 8  # of a tensor; a Llama's have two

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
        fix = "use a Llama model whose config.json is complete and unchanged"
        return InputError("E202", f"{path}, {key}", found, fix)

    if raw.get("model_type") != "llama":
        raise refuse("model_type", f"is {plain(raw.get('model_type'))}, expected llama")
    if raw.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", f"is {plain(raw['hidden_act'])}, Llama has silu")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise refuse(key, "is true, Llama has no biases")
    values = {ours: raw[theirs] for ours, theirs in CONFIG_KEYS.items() if raw.get(theirs) is not None}
    for ours in NEEDED:
        if ours not in values:
            raise refuse(CONFIG_KEYS[ours], "is missing")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise refuse(key, f"is {plain(raw[key])}, expected an object")
        rope |= raw.get(key) or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        values["rope_theta"] = theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise refuse("rope_scaling", f"is of type {plain(kind)}; linear and llama3 are known")
    if kind != "default":
        keys = {"factor": "factor"}
        if kind == "llama3":
            keys |= {
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_max_seq_len": "original_max_position_embeddings",
            }
        scaling = {
            ours: number(rope.get(theirs), float, f"rope_scaling.{theirs}", refuse)
            for ours, theirs in keys.items()
        }
        if not all(0 < value < math.inf for value in scaling.values()) or scaling.get(
            "low_freq_factor", 0
        ) >= scaling.get("high_freq_factor", 1):
            raise refuse("rope_scaling", f"has impossible factors: {plain(scaling)}")
        if "original_max_seq_len" in scaling:
            scaling["original_max_seq_len"] = int(scaling["original_max_seq_len"])
        values["rope_scaling"] = RopeScaling(kind=kind, **scaling)
    return config_from(values, CONFIG_KEYS, refuse)


def _one_or_list(tokenizer: Tokenizer) -> int | list[int]:
    """The end tokens as config.json has them; the first of several is the one that ends a document."""
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    return [tokenizer.eos_id, *others] if others else tokenizer.eos_id


# ---- folders -------------------------------------------------------------------------------------


def model_files(config: Config, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face folder: `transformers` opens it as it is, weights and tokenizer."""
    tensors = {rename(name): weight.detach().cpu().contiguous() for name, weight in weights.items()}
    return {
        "config.json": json.dumps(config_json(config, tokenizer), indent=2).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        **text_files(tokenizer),
    }


def text_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files, and the generation_config.json: the one that it came with, or what we recommend; in both,
    every token that ends a text."""
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": _one_or_list(tokenizer)}
    generation = tokenizer.generation
    if generation.keys() <= ends.keys():
        generation = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    return {GENERATION: json.dumps({**generation, **ends}, indent=2).encode(), **tokenizer.files()}


def read_model(folder: Path, weights: Path | None = None) -> tuple[Config, Weights]:
    """The Config and the weights of a Hugging Face folder, in one safetensors file or several.

    weights  a file beside its config.json to take them from; None, or one of the folder's own: from those.

    Raises InputError E202 for the configuration, E203 listing every tensor that is missing, unexpected or of another
    shape than the configuration says, E205 when a file is missing, cut short or no safetensors file. Nothing is
    allocated before the shapes in the files' headers are known to be the configuration's.
    """
    config = read_config(folder / "config.json")
    files = _files(folder)
    if weights is not None and weights not in files:
        files = [weights]
    found: dict[str, tuple[Path, Stored]] = {}
    for path in files:
        for name, stored in _header(path).items():
            if name in found:
                raise _damaged(path, f"holds {plain(name)}, which {found[name][0].name} holds too")
            found[name] = path, stored
    where = files[0] if len(files) == 1 else folder
    expected = {rename(name): shape for name, shape in shapes(config).items()}
    there = {name: stored.shape for name, (_, stored) in found.items() if not _needless(name, config)}
    compare(there, expected, where, "config.json")

    def read(name: str) -> Tensor:
        path, stored = found[rename(name)]
        data = read_part(path, stored.begin, stored.bytes, code="E205")
        if len(data) < stored.bytes:
            raise _damaged(path, f"ends inside {name}; it had been longer")
        return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)

    return config, Weights(config, read, where)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors under the names that Hugging Face gives them."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _needless(name: str, config: Config) -> bool:
    """Tensors that some writers add: frequencies, which follow from the configuration, and a tied head once more."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those that its index names, which lie in it."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    places = read_json(index, code="E205").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _damaged(index, "has no weight_map")
    names = list(dict.fromkeys(map(str, places.values())))
    if len(names) > MOST_SHARDS:
        raise _damaged(index, f"names {len(names):,} files, at most {MOST_SHARDS:,} are read")
    for name in names:
        if not _inside(folder, name):
            found = f"names {plain(name)}, which is not a safetensors file of this folder"
            raise _damaged(index, found)
    return [folder / name for name in names]


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a file of the folder: no way out of it, and no link to elsewhere but to the `blobs`
    of a cache of huggingface_hub, whose models are snapshots/REVISION with links to ../../blobs."""
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        return False
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    try:
        return (folder / name).resolve().parent in roots
    except (ValueError, OSError):  # a name that no system has
        return False


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, whose numbers may only be of some kinds, and fill it without gap or overlap.

    Source: https://huggingface.co/docs/safetensors
    """
    with opened(path, code="E205") as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            found = f"its header would have {length:,} bytes, its own size is {size:,}"
            raise _damaged(path, f"is not a safetensors file ({found})")
        raw = file.read(length)

    twice = object()
    try:
        header = json.loads(
            raw, object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else twice
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"has a header that is not JSON ({str(error)[:100]})") from None
    if header is twice or (isinstance(header, dict) and twice in header.values()):
        raise _damaged(path, "has two entries of one name in its header")
    tensors: dict[str, Stored] = {}
    for name, entry in header.items() if isinstance(header, dict) else [("", None)]:
        if name == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not isinstance(shape, list) or not all(type(each) is int and 0 <= each < 2**48 for each in shape):
            raise _damaged(path, f"has no shape for {plain(name)} in its header")
        if len(shape) > MOST_AXES:
            raise _damaged(path, f"has {len(shape):,} axes for {plain(name)}, at most {MOST_AXES} are read")
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise _damaged(path, f"holds {plain(name)} as {plain(entry.get('dtype'))}; known are {known}")
        if (
            not isinstance(offsets, list)
            or [type(each) for each in offsets] != [int, int]
            or not 0 <= offsets[0] <= offsets[1] <= size
        ):
            raise _damaged(path, f"does not say where {plain(name)} begins and ends")
        stored = Stored(tuple(shape), DTYPES[entry["dtype"]], 8 + length + offsets[0])
        if offsets[1] - offsets[0] != stored.bytes:
            found = f"{offsets[1] - offsets[0]:,} bytes, its shape asks for {stored.bytes:,}"
            raise _damaged(path, f"has for {plain(name)} {found}")
        tensors[name] = stored
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].bytes)):
        if stored.begin != end:
            raise _damaged(
                path, f"has {plain(name)} at byte {stored.begin:,}, where the one before ends at {end:,}"
            )
        end += stored.bytes
    if end != size:
        raise _damaged(path, f"has {size:,} bytes, its header asks for {end:,}")
    return tensors


def _damaged(path: Path, found: str) -> InputError:
    return InputError("E205", str(path), found, "copy it again, or use an older step")


def build(config: Config, weights: Mapping[str, Tensor]) -> Llama:
    """A model with exactly these weights, in evaluation mode. Raises RuntimeError unless names and shapes fit."""
    with torch.device("meta"):
        model = Llama(config, seed=None)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()

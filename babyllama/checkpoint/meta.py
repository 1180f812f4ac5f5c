"""Meta's own folders: params.json and consolidated.00.pth, 01, ...: one file for each of the GPUs it was split for.

Rows of wq and wk are in pairs: see layout.py. Each file of several holds a part of every matrix, cut along one axis:

    wq wk wv  w1 (gate) w3 (up)  output    rows
    wo  w2 (down)                          columns
    tok_embeddings                         columns in Llama 1 and 2, rows in Llama 3
    norms                                  the whole, in every file

params.json has no place for head_dim (dim / n_heads), the context or tied embeddings, and for RoPE's scaling only
`use_scaled_rope`: factor 8 of a context of 8192, as in Llama 3.1, and 32 for the two sizes of Llama 3.2, as their
config.json on the hub says. (Meta's own code takes 8 for them too: its issues 166 and 241.)
Source: https://github.com/meta-llama/llama-models, models/llama3/args.py and model.py
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babyllama.checkpoint.contents import KINDS, Shape, Weights, compare, config_from, number, plain, shapes
from babyllama.checkpoint.folder import read_json
from babyllama.checkpoint.hf import rename
from babyllama.checkpoint.layout import halves_to_pairs, heads_of, pairs_to_halves
from babyllama.checkpoint.pth import Archive
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, RopeScaling, hidden_width

PARAMS, FILES = "params.json", "consolidated.*.pth"
SIZES = (
    "vocab_size",
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "rope_theta",
)  # as we call them too
NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
NAMES = {  # ours: theirs; N is the number of the layer
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.N.attention_norm.weight": "layers.N.attention_norm.weight",
    "layers.N.attention.wq.weight": "layers.N.attention.wq.weight",
    "layers.N.attention.wk.weight": "layers.N.attention.wk.weight",
    "layers.N.attention.wv.weight": "layers.N.attention.wv.weight",
    "layers.N.attention.wo.weight": "layers.N.attention.wo.weight",
    "layers.N.ffn_norm.weight": "layers.N.ffn_norm.weight",
    "layers.N.feed_forward.w_gate.weight": "layers.N.feed_forward.w1.weight",
    "layers.N.feed_forward.w_down.weight": "layers.N.feed_forward.w2.weight",
    "layers.N.feed_forward.w_up.weight": "layers.N.feed_forward.w3.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
DERIVED = "rope.freqs"  # some files hold the frequencies too
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w_down.weight")
MOST_SHARDS = 64
LLAMA_3_2 = {(2048, 16), (3072, 28)}  # dim, n_layers of 1B and 3B
CONTEXTS = {"scaled": 131072, "Llama 3": 8192, "Llama 2": 4096, "Llama 1": 2048}


def read_meta(folder: Path) -> tuple[Config, Weights]:
    """The sizes and the weights of a folder.

    Raises InputError E212 (params.json or a file), E203 (tensors), E205 (a file is missing).
    """
    archives = [Archive(path) for path in _files(folder)]
    config, tied = _config(folder / PARAMS, archives)
    n = len(archives)
    axes: dict[str, int] = {}
    expected: dict[str, Shape] = {}
    for name, shape in shapes(config).items():
        axis = _axis(name, shape, archives) if n > 1 else None
        if axis is not None:
            if shape[axis] % n:
                raise _wrong(folder / PARAMS, f"{name}, {shape}, cannot be cut in {n}")
            axes[name], shape = axis, tuple(size // n if i == axis else size for i, size in enumerate(shape))
        expected[rename(name, NAMES)] = shape
    if tied:
        expected[NAMES["lm_head.weight"]] = expected[NAMES["tok_embeddings.weight"]]
    for archive in archives:
        there = {name: each.shape for name, each in archive.tensors.items() if name != DERIVED}
        compare(there, expected, archive.path, PARAMS)

    def read(name: str) -> Tensor:
        parts = [archive.tensor(rename(name, NAMES)).float() for archive in archives]
        if name in axes:
            weight = torch.cat(parts, axes[name])
        else:
            weight = parts[0]
            if any(not torch.equal(weight, part) for part in parts[1:]):
                found = f"{name} is not the same in all files: they are of different models"
                raise _wrong(folder, found)
        heads = heads_of(name, config)
        return pairs_to_halves(weight, heads) if heads else weight

    return config, Weights(config, read, folder)


def is_part(path: Path) -> bool:
    """Whether this file is one of a model in Meta's format, by its name and what lies beside it."""
    return path.match(FILES) and (path.parent / PARAMS).is_file()


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob(FILES))
    numbers = [path.name.split(".")[1] for path in files]
    wanted = [f"{i:02d}" for i in range(len(files))]
    if not files or numbers != wanted or len(files) > MOST_SHARDS:
        shown = ", ".join(plain(path.name) for path in files[:8]) or "none"
        found = f"holds {shown}; expected consolidated.00.pth and so on, without a gap"
        raise InputError("E205", folder, found, "copy all files of the model again")
    return files


def _config(path: Path, archives: list[Archive]) -> tuple[Config, bool]:
    """The sizes; what params.json leaves open, the tensors tell. And whether head and table are stored as one."""
    params = read_json(path, code="E212")

    def refuse(key: str, found: str) -> InputError:
        return _wrong(path, f"{key} {found}")

    values: dict[str, Any] = {}
    for ours in SIZES:
        if params.get(ours) is not None:
            values[ours] = number(params[ours], KINDS.get(ours, int), ours, refuse)
        elif ours in NEEDED:
            raise refuse(ours, "is missing")
    first, n = archives[0].tensors, len(archives)
    table, head = first.get("tok_embeddings.weight"), first.get("output.weight")
    gate = first.get("layers.0.feed_forward.w1.weight")
    for name, each in (("tok_embeddings.weight", table), ("layers.0.feed_forward.w1.weight", gate)):
        if each is None or len(each.shape) != 2:
            found = f"{name} is missing, or no matrix"
            raise InputError("E203", archives[0].path, found, "use another copy of this model")
    assert table is not None and gate is not None
    if values.get("vocab_size", -1) == -1:  # as in Llama 1 and 2, whose tokenizer says it
        values["vocab_size"] = table.shape[0] * (n if table.shape[1] == values["dim"] else 1)
    values["hidden_dim"] = gate.shape[0] * n
    values.setdefault("rope_theta", 10000.0)
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise refuse("use_scaled_rope", f"is {plain(scaled)}, expected true or false")
    values["rope_scaling"] = _scaled(values["dim"], values["n_layers"]) if scaled else None
    if scaled:
        values["max_seq_len"] = CONTEXTS["scaled"]
    elif values["rope_theta"] != 10000.0:
        values["max_seq_len"] = CONTEXTS["Llama 3"]
    else:
        values["max_seq_len"] = CONTEXTS["Llama 1" if values["norm_eps"] < 1e-5 else "Llama 2"]
    values["tie_embeddings"] = tied = head == table
    return config_from(values, {}, refuse), tied


def _scaled(dim: int, n_layers: int) -> RopeScaling:
    """What use_scaled_rope stands for in a model of this size."""
    return RopeScaling(kind="llama3", factor=32.0 if (dim, n_layers) in LLAMA_3_2 else 8.0)


def _axis(name: str, shape: Shape, archives: list[Archive]) -> int | None:
    """Along which a matrix is cut."""
    if len(shape) == 1:
        return None
    if name == "tok_embeddings.weight":
        return 0 if archives[0].tensors[name].shape[-1] == shape[1] else 1
    return 1 if name.endswith(BY_COLUMNS) else 0


def _wrong(path: Path, found: str) -> InputError:
    return InputError("E212", path, found, "use the params.json and the files of one and the same model")


# ---- writing -------------------------------------------------------------------------------------


def meta_parts(config: Config, weights: Mapping[str, Tensor], shards: int = 1) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, name and contents, one after the other; matrices are cut as Llama 3's are.

    Raises UsageError E105 when Meta's format has no place for something of this model.
    """
    refusals = {
        "head_dim": config.head_dim * config.n_heads != config.dim,
        "RoPE's scaling": config.rope_scaling not in (None, _scaled(config.dim, config.n_layers)),
    }
    for what, refused in refusals.items():
        if refused:
            found = f"params.json has no place for this model's {what}"
            raise UsageError("E105", "--to meta", found, "export it as gguf, or use its Hugging Face folder")
    cut = [size for name, shape in shapes(config).items() for size in shape[_cut_axis(name, shape) :][:1]]
    if shards < 1 or any(size % shards for size in cut):
        found = f"{shards} does not divide every matrix of this model"
        raise UsageError("E102", "--shards", found, "use 1")
    yield PARAMS, json.dumps(_params(config), indent=2).encode()
    for shard in range(shards):
        tensors = {}
        for name in shapes(config):
            weight = weights[name].detach().float()
            if heads := heads_of(name, config):
                weight = halves_to_pairs(weight, heads)
            if weight.dim() == 2:
                weight = weight.chunk(shards, _cut_axis(name, tuple(weight.shape)))[shard]
            tensors[rename(name, NAMES)] = weight.clone()
        if config.tie_embeddings:
            tensors["output.weight"] = tensors["tok_embeddings.weight"]
        file = io.BytesIO()
        torch.save(tensors, file)
        yield f"consolidated.{shard:02d}.pth", file.getvalue()


def _cut_axis(name: str, shape: Shape) -> int:
    """Where a matrix is cut; for a norm, behind its last axis."""
    return 1 if len(shape) == 1 or name.endswith(BY_COLUMNS) else 0


def _params(config: Config) -> dict[str, Any]:
    """Meta's code computes the width of the feed-forward: from a multiple, and a multiplier where one is needed."""
    width: dict[str, Any] = {}
    for multiple in (2**k for k in range(12, -1, -1)):
        if hidden_width(config.dim, multiple) == config.hidden_dim:
            width = {"multiple_of": multiple}
            break
    else:
        plain_width = int(2 * 4 * config.dim / 3)
        width = {"multiple_of": 1, "ffn_dim_multiplier": (config.hidden_dim + 0.5) / plain_width}
        assert hidden_width(config.dim, 1, width["ffn_dim_multiplier"]) == config.hidden_dim
    params = {name: getattr(config, name) for name in SIZES} | width
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params

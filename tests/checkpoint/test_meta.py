"""Meta's folders: whole and cut in parts, read and written as Meta's own code computes with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import randomised

from babyllama.checkpoint import meta
from babyllama.checkpoint.meta import meta_parts, read_meta
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, Llama, RopeScaling, rope_frequencies

SCALED = RopeScaling(kind="llama3", factor=8.0)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_heads": 6},
    "grouped": {"n_heads": 6, "n_kv_heads": 2},
    "tied": {"n_heads": 12, "n_kv_heads": 4, "tie_embeddings": True},
    "another width": {"n_heads": 6, "hidden_dim": 200, "norm_eps": 1e-6},
    "scaled": {"n_heads": 6, "n_kv_heads": 2, "rope_theta": 5e5, "rope_scaling": SCALED},
}


def model(**shape: Any) -> Llama:
    config = Config(**{**dict(vocab_size=90, dim=96, n_layers=2, max_seq_len=128), **shape})
    return randomised(Llama(config, seed=3).eval())


def put(folder: Path, llama: Llama, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in meta_parts(llama.config, llama.state_dict(), shards):
        (folder / name).write_bytes(content)
    return folder


def whole(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by Meta's names, its files joined as Llama 3's code would hold them."""
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    found = {}
    for name in parts[0]:
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        found[name] = (
            parts[0][name] if parts[0][name].dim() == 1 else torch.cat([p[name] for p in parts], axis)
        )
    return found


def logits_by_hand(
    params: dict[str, Any], w: dict[str, Tensor], frequencies: Tensor, tokens: Tensor
) -> Tensor:
    """What Meta's model.py computes for tokens (T,), in float64: pairs are neighbours, turned as complex numbers."""
    H, K, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    w = {name: weight.double() for name, weight in w.items()}
    T = len(tokens)
    turns = torch.polar(
        torch.ones(T, len(frequencies)).double(), torch.outer(torch.arange(T), frequencies).double()
    )

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    x = w["tok_embeddings.weight"][tokens]
    mask = torch.full((T, T), -torch.inf).triu(1).double()
    for i in range(params["n_layers"]):
        layer = {
            name.removeprefix(f"layers.{i}."): each for name, each in w.items() if f"layers.{i}." in name
        }
        h = norm(x, layer["attention_norm.weight"])
        q, k, v = ((h @ layer[f"attention.{name}.weight"].T) for name in ("wq", "wk", "wv"))
        q, k = turned(q.view(T, H, -1)), turned(k.view(T, K, -1))
        k, v = (each.reshape(T, K, -1).repeat_interleave(H // K, dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + mask
        heads = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + heads @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate, up = h @ layer["feed_forward.w1.weight"].T, h @ layer["feed_forward.w3.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_second_hand_computes_the_same_with_what_is_written(
    tmp_path: Path, shape: dict[str, Any], shards: int
) -> None:
    llama = model(**shape)
    params = json.loads((put(tmp_path, llama, shards) / "params.json").read_text(encoding="utf-8"))
    tokens = torch.randint(0, 90, (100,), generator=torch.Generator().manual_seed(0))
    expected = logits_by_hand(params, whole(tmp_path), rope_frequencies(llama.config), tokens)
    with torch.no_grad():
        found = llama(tokens[None])[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_written_is_read_again_to_the_bit(tmp_path: Path, shape: dict[str, Any], shards: int) -> None:
    llama = model(**shape)
    config, weights = read_meta(put(tmp_path, llama, shards))
    assert {**vars(config), "max_seq_len": 128} == vars(
        llama.config
    )  # of the context Meta's files say nothing
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())


def test_the_table_of_llama_2_is_cut_by_columns(tmp_path: Path) -> None:
    llama = model(**SHAPES["grouped"])
    put(tmp_path, llama, 2)
    for i, half in enumerate(llama.tok_embeddings.weight.detach().chunk(2, 1)):
        path = tmp_path / f"consolidated.{i:02d}.pth"
        torch.save(
            {**torch.load(path), "tok_embeddings.weight": half.clone(), "rope.freqs": torch.ones(8)}, path
        )
    params = json.loads((tmp_path / "params.json").read_text(encoding="utf-8"))
    params |= {"vocab_size": -1}
    del params["rope_theta"]
    (tmp_path / "params.json").write_text(json.dumps(params), encoding="utf-8")
    config, weights = read_meta(tmp_path)
    assert (config.vocab_size, config.max_seq_len, config.rope_theta) == (90, 4096, 10000.0)
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(tmp_path: Path, kind: torch.dtype) -> None:
    llama = model(**SHAPES["plain"]).to(kind).float()
    path = put(tmp_path, llama) / "consolidated.00.pth"
    torch.save({name: each.to(kind) for name, each in torch.load(path).items()}, path)
    _, weights = read_meta(tmp_path)
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())


@pytest.mark.parametrize("hidden", [256, 257, 200, 1, 96, 1000])
def test_metas_rule_gives_every_width_of_the_feed_forward(tmp_path: Path, hidden: int) -> None:
    """As model.py has it: two thirds, times the multiplier, up to the next multiple."""
    params = json.loads(dict(meta_parts(*written(hidden_dim=hidden)))["params.json"])
    width = int(2 * (4 * 96) / 3)
    if "ffn_dim_multiplier" in params:
        width = int(params["ffn_dim_multiplier"] * width)
    assert params["multiple_of"] * -(-width // params["multiple_of"]) == hidden


def written(**shape: Any) -> tuple[Config, dict[str, Tensor]]:
    llama = model(n_heads=6, **shape)
    return llama.config, llama.state_dict()


def test_contexts_are_those_of_the_llama_that_the_sizes_tell(tmp_path: Path) -> None:
    shapes = {2048: {"norm_eps": 1e-6}, 4096: {}, 8192: {"rope_theta": 5e5}}
    for context, shape in {**shapes, 131072: {"rope_theta": 5e5, "rope_scaling": SCALED}}.items():
        assert read_meta(put(tmp_path, model(n_heads=6, **shape)))[0].max_seq_len == context


# ---- what is refused


def refusal(folder: Path, code: str = "E212") -> str:
    with pytest.raises(InputError) as caught:
        dict(read_meta(folder)[1])
    assert caught.value.code == code, caught.value
    return caught.value.found


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None, 10**400, [6]])
@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps"])
def test_impossible_sizes_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = put(tmp_path, model(**SHAPES["grouped"])) / "params.json"
    if (key, value) in (("n_kv_heads", None), ("norm_eps", 1.5), ("norm_eps", True)):
        value = "x"  # those are possible, or of no matter
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8"
    )
    with pytest.raises(InputError) as caught:
        read_meta(tmp_path)
    assert caught.value.code in ("E203", "E212")


def test_files_that_are_missing_or_of_different_models_are_refused(tmp_path: Path) -> None:
    llama = model(**SHAPES["grouped"])
    put(tmp_path, llama, 2)
    first, second = (tmp_path / f"consolidated.0{i}.pth" for i in range(2))
    other = torch.load(second)
    other["norm.weight"] = other["norm.weight"] + 1
    torch.save(other, second)
    assert "different models" in refusal(tmp_path)
    second.unlink()
    refusal(tmp_path, "E203")  # half of every matrix
    first.rename(second)
    refusal(tmp_path, "E205")
    second.unlink()
    refusal(tmp_path, "E205")
    (tmp_path / "params.json").unlink()
    put(tmp_path, llama)
    (tmp_path / "params.json").write_text("{", encoding="utf-8")
    refusal(tmp_path)


def test_tensors_are_compared_with_the_sizes(tmp_path: Path) -> None:
    path = put(tmp_path, model(**SHAPES["grouped"])) / "consolidated.00.pth"
    tensors = torch.load(path)
    tensors["layers.0.attention.wq.bias"] = torch.zeros(96)
    del tensors["layers.1.feed_forward.w2.weight"]
    tensors["output.weight"] = torch.zeros(3, 3)
    torch.save(tensors, path)
    found = refusal(tmp_path, "E203")
    for part in ("w2.weight is missing", "wq.bias is not part", "output.weight has shape (3, 3)"):
        assert part in found
    del tensors["output.weight"]  # a table that is the head too stands there under both names
    torch.save(tensors, path)
    assert "output.weight is missing" in refusal(tmp_path, "E203")


def test_rope_is_scaled_by_32_in_the_two_sizes_of_llama_3_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' config.json of the same weights has it; Meta's own code takes 8 (its issues 166 and 241)."""
    assert {(2048, 16), (3072, 28)} == meta.LLAMA_3_2
    monkeypatch.setattr(meta, "LLAMA_3_2", {(96, 2)})  # a small one in their place
    for dim, layers, factor in ((96, 2, 32.0), (96, 1, 8.0), (48, 2, 8.0)):
        scaling = RopeScaling(kind="llama3", factor=factor)
        llama = model(n_heads=6, dim=dim, n_layers=layers, rope_theta=5e5, rope_scaling=scaling)
        config, _ = read_meta(put(tmp_path / f"{dim} {layers}", llama))
        assert config.rope_scaling == scaling


def test_what_the_format_has_no_place_for_is_refused_with_the_reason() -> None:
    shapes: dict[str, dict[str, Any]] = {
        "head_dim": {"head_dim": 32},
        "scaling": {"rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
        "RoPE's scaling": {"rope_scaling": RopeScaling(kind="linear", factor=8.0)},
    }
    for reason, shape in shapes.items():
        with pytest.raises(UsageError) as caught:
            next(meta_parts(*written(**shape)))
        assert caught.value.code == "E105"
        assert reason in caught.value.found
    for shards in (0, -1, 7):
        with pytest.raises(UsageError) as caught:
            next(meta_parts(*written(), shards))
        assert caught.value.code == "E102"

"""llama2.c's files: read, and computed with by a second hand; and files that are none."""

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import randomised

from babyllama.checkpoint.llama2c import VERSIONS, llama2c_parts, read_llama2c
from babyllama.errors import InputError, UsageError
from babyllama.model import Config, Llama, RopeScaling

Weights = dict[str, np.ndarray]
HEADER = dict(dim=24, hidden_dim=20, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=-13, max_seq_len=9)


def in_order(header: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes by run.c's names, in run.c's order."""
    dim, hidden, L, H, K, V, S = header.values()
    hd = dim // H
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding_table": (abs(V), dim), "rms_att_weight": (L, dim),
        "wq": (L, H * hd, dim), "wk": (L, K * hd, dim), "wv": (L, K * hd, dim), "wo": (L, dim, H * hd),
        "rms_ffn_weight": (L, dim), "w1": (L, hidden, dim), "w2": (L, dim, hidden), "w3": (L, hidden, dim),
        "rms_final_weight": (dim,), "freq_cis_real": (S, hd // 2), "freq_cis_imag": (S, hd // 2),
    }  # fmt: skip
    if V < 0:
        shapes["wcls"] = (-V, dim)
    return shapes


def written(path: Path, header: dict[str, int], seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in in_order(header).items()}
    content = struct.pack("<7i", *header.values()) + b"".join(w.tobytes() for w in weights.values())
    path.write_bytes(content)
    return weights


def logits_by_hand(header: dict[str, int], w: Weights, tokens: list[int]) -> np.ndarray:
    """What run.c computes, a token at a time in float64: pairs are neighbours, w1 gates, w3 is up."""
    dim, _, L, H, K, _, _ = header.values()
    hd = dim // H
    out, keys, values = [], [[] for _ in range(L)], [[] for _ in range(L)]

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * x / np.sqrt((x * x).mean() + 1e-5)

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        angles = position / 10000.0 ** (np.arange(0, hd, 2) / hd)
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack((z.real, z.imag), axis=-1).reshape(x.shape)

    for position, token in enumerate(tokens):
        x = w["token_embedding_table"][token].astype(np.float64)
        for i in range(L):
            h = norm(x, w["rms_att_weight"][i])
            q = turn((w["wq"][i] @ h).reshape(H, hd), position)
            keys[i].append(turn((w["wk"][i] @ h).reshape(K, hd), position))
            values[i].append((w["wv"][i] @ h).reshape(K, hd))
            heads = []
            for head in range(H):
                of = head // (H // K)
                scores = np.array([q[head] @ k[of] for k in keys[i]]) / np.sqrt(hd)
                scores = np.exp(scores - scores.max())
                heads.append(sum(s * v[of] for s, v in zip(scores / scores.sum(), values[i], strict=True)))
            x = x + w["wo"][i] @ np.concatenate(heads)
            h = norm(x, w["rms_ffn_weight"][i])
            gate = w["w1"][i] @ h
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ h))
        out.append(w.get("wcls", w["token_embedding_table"]) @ norm(x, w["rms_final_weight"]))
    return np.array(out)


@pytest.mark.parametrize(
    "changes", [{}, {"vocab_size": 13}, {"n_kv_heads": 6}, {"n_heads": 12, "n_kv_heads": 4}]
)
def test_a_model_that_was_read_computes_what_run_c_does(tmp_path: Path, changes: dict[str, int]) -> None:
    header = {**HEADER, **changes}
    weights = written(tmp_path / "model.bin", header)
    config, read = read_llama2c(tmp_path / "model.bin")
    model = Llama(config, seed=None)
    model.load_state_dict(read)  # strict: no name is missing, none is left over
    tokens = [1, 5, 12, 0, 7, 7, 3, 9, 2]
    expected = logits_by_hand(header, weights, tokens)
    with torch.no_grad():
        found = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_sizes_come_from_the_header(tmp_path: Path) -> None:
    written(tmp_path / "model.bin", HEADER)
    config, weights = read_llama2c(str(tmp_path / "model.bin"))
    assert config == Config(
        vocab_size=13, dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, hidden_dim=20, max_seq_len=9,
        norm_eps=1e-5, rope_theta=10000.0, tie_embeddings=False,
    )  # fmt: skip
    assert "lm_head.weight" in weights
    written(tmp_path / "tied.bin", {**HEADER, "vocab_size": 13})
    config, weights = read_llama2c(tmp_path / "tied.bin")
    assert config.tie_embeddings and "lm_head.weight" not in weights


def test_weights_are_independent_of_the_file_and_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    original = written(path, HEADER)
    _, weights = read_llama2c(path)
    assert all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights.values())
    for weight in weights.values():
        weight.zero_()
    again = read_llama2c(path)[1]["tok_embeddings.weight"]
    assert np.array_equal(again.numpy(), original["token_embedding_table"])


def test_stories260k_has_the_sizes_it_is_known_for(fixture_file: Callable[[str], Path]) -> None:
    config, weights = read_llama2c(fixture_file("stories260K.bin"))
    assert (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads) == (
        64,
        172,
        5,
        8,
        4,
    )
    assert (config.vocab_size, config.max_seq_len, config.tie_embeddings) == (512, 512, True)
    assert sum(weight.numel() for weight in weights.values()) == 260_032


# ---- files that are none -------------------------------------------------------------------------


def refusal(path: Path, content: bytes | None = None) -> str:
    """The message of E209, which comes within a second and without memory for what the file promises."""
    if content is not None:
        path.write_bytes(content)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(InputError) as caught:
            read_llama2c(path)
        seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.code, caught.value.where) == ("E209", str(path))
    assert seconds < 1 and peak < 1_000_000
    return caught.value.found


def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    written(path, HEADER)
    content = path.read_bytes()
    for wrong in (content[:-1], content + b"\0", content[:-4], content[:28], content + content):
        assert f"{len(wrong)} bytes; its header asks for {len(content)}" in refusal(path, wrong)


@pytest.mark.parametrize("length", [0, 1, 4, 27])
def test_a_file_shorter_than_a_header_is_refused(tmp_path: Path, length: int) -> None:
    assert f"{length} bytes" in refusal(tmp_path / "model.bin", b"\1" * length)


IMPOSSIBLE = [(name, value) for name in HEADER for value in (0, -1, -(2**31))]
IMPOSSIBLE = [pair for pair in IMPOSSIBLE if pair[0] != "vocab_size" or pair[1] == 0]  # below 0 it is untied


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, name: str, value: int) -> None:
    path = tmp_path / "model.bin"
    written(path, HEADER)
    header = struct.pack("<7i", *{**HEADER, name: value}.values())
    assert "every size must be above 0" in refusal(path, header + path.read_bytes()[28:])


@pytest.mark.parametrize("changes", [{"n_heads": 5}, {"n_heads": 24}, {"n_kv_heads": 4}, {"n_kv_heads": 12}])
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    assert "must be a multiple" in refusal(
        tmp_path / "x.bin", struct.pack("<7i", *{**HEADER, **changes}.values())
    )


@pytest.mark.parametrize("name", [*HEADER, "all"])
def test_huge_sizes_are_refused_without_making_room_for_them(tmp_path: Path, name: str) -> None:
    huge: dict[str, Any] = {**HEADER, "n_heads": 1, "n_kv_heads": 1}
    for each in HEADER if name == "all" else [name]:
        huge[each] = 2**31 - 2 if each in ("dim", "n_heads", "n_kv_heads") else 2**31 - 1
    if name in ("n_heads", "n_kv_heads"):
        huge |= {"dim": 2 * (2**30 - 1), "n_heads": 2**30 - 1}  # the largest that fit
        huge["n_kv_heads"] = huge["n_heads"]
    refusal(tmp_path / "model.bin", struct.pack("<7i", *huge.values()) + b"\0" * 1000)


@pytest.mark.parametrize("version", [0, 3, 77])
def test_other_versions_are_named_as_not_supported(tmp_path: Path, version: int) -> None:
    content = struct.pack("<Ii", 0x616B3432, version) + b"\0" * 500
    assert f"version {version} of llama2.c's format is not supported" in refusal(
        tmp_path / "model.bin", content
    )


@given(content=st.binary(max_size=200))
def test_no_other_bytes_are_taken_for_a_model(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    refusal(tmp_path_factory.getbasetemp() / "random.bin", content)


def test_a_folder_or_nothing_at_the_path_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.bin"):
        with pytest.raises(InputError) as caught:
            read_llama2c(path)
        assert caught.value.code == "E201"


# ---- writing


def model(**shape: Any) -> Llama:
    config = Config(**{**dict(vocab_size=40, dim=48, n_layers=2, n_heads=6, max_seq_len=32), **shape})
    return randomised(Llama(config, seed=1).eval(), 0.3)


def put(path: Path, llama: Llama, version: int) -> Path:
    path.write_bytes(b"".join(llama2c_parts(llama.config, llama.state_dict(), version)))
    return path


SHAPES = ({}, {"n_kv_heads": 2}, {"tie_embeddings": True}, {"n_heads": 3, "n_kv_heads": 1, "hidden_dim": 100})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", [0, 1])
def test_what_is_written_is_read_again_to_the_bit(
    tmp_path: Path, version: int, shape: dict[str, Any]
) -> None:
    llama = model(**shape)
    config, weights = read_llama2c(put(tmp_path / "model.bin", llama, version))
    assert config == llama.config
    assert weights.keys() == llama.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_version_0_is_what_a_second_hand_computes_with(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    llama = model(**shape)
    data = put(tmp_path / "model.bin", llama, 0).read_bytes()
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    header = dict(zip(names, struct.unpack("<7i", data[:28]), strict=True))
    at, weights = 28, {}
    for name, sizes in in_order(header).items():
        weights[name] = np.frombuffer(data, "<f4", int(np.prod(sizes)), at).reshape(sizes)
        at += weights[name].nbytes
    assert at == len(data)
    tokens = [1, 5, 39, 7, 7, 0, 12]
    expected = logits_by_hand(header, weights, tokens)
    with torch.no_grad():
        found = llama(torch.tensor([tokens]))[0].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [*SHAPES, {"dim": 64, "hidden_dim": 192, "n_heads": 4}])
def test_version_2_keeps_a_byte_for_each_number(tmp_path: Path, shape: dict[str, Any]) -> None:
    llama = model(**shape)
    path = put(tmp_path / "model.bin", llama, 2)
    config, weights = read_llama2c(path)
    assert config == llama.config
    for name, weight in llama.state_dict().items():
        error = (weights[name] - weight).abs().max()
        assert error == 0 if weight.dim() == 1 else 0 < error <= weight.abs().max() / 253
    assert path.stat().st_size < 4 * sum(weight.numel() for weight in llama.parameters()) * 0.6


def test_groups_of_version_2_divide_every_row(tmp_path: Path) -> None:
    for dim, hidden, group in ((64, 192, 64), (48, 96, 16), (96, 100, 4), (48, 101, 1)):
        data = put(tmp_path / "model.bin", model(dim=dim, hidden_dim=hidden, n_heads=2), 2).read_bytes()
        assert struct.unpack_from("<i", data, 37) == (group,)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_byte_more_or_less_is_refused(tmp_path: Path, version: int) -> None:
    data = put(tmp_path / "model.bin", model(), version).read_bytes()
    for content in (data[:-1], data + b"\0", data[:100], data[:30]):
        assert f"{len(content)} bytes" in refusal(tmp_path / "other.bin", content)


def test_what_the_format_has_no_place_for_is_refused_with_the_reason() -> None:
    shapes: dict[str, dict[str, Any]] = {
        "rope_theta 500000": {"rope_theta": 5e5},
        "norm_eps 1e-06": {"norm_eps": 1e-6},
        "scaling of RoPE": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
        "heads of another width": {"head_dim": 12},
    }
    for reason, shape in shapes.items():
        llama = model(**shape)
        with pytest.raises(UsageError) as caught:
            next(llama2c_parts(llama.config, llama.state_dict()))
        assert caught.value.code == "E105"
        assert reason in caught.value.found
    with pytest.raises(UsageError) as caught:
        next(llama2c_parts(model().config, model().state_dict(), 3))
    assert caught.value.code == "E102"


def test_the_published_file_comes_back_byte_for_byte(fixture_file: Callable[[str], Path]) -> None:
    path = fixture_file("stories260K.bin")
    assert b"".join(llama2c_parts(*read_llama2c(path))) == path.read_bytes()

"""The Hugging Face border: what we write they open, what they write we open, and what is wrong is named."""

import json
import os
import struct
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from weights import randomised

from babyllama.checkpoint.hf import (
    INDEX,
    LONGEST_HEADER,
    TENSOR_NAMES,
    THEIRS_TO_OURS,
    build,
    config_json,
    model_files,
    read_config,
    read_model,
    rename,
)
from babyllama.errors import InputError
from babyllama.model import Config, Llama, RopeScaling
from babyllama.text.tokenizer import Tokenizer

TEXT = (
    "It was the ducklings' first summer; 1, 22, 333 of them. Größe 😀 <|end_of_text|>\n\n  two\tspaces " * 9
)
SHAPES = {
    "plain": {"n_heads": 6},
    "grouped": {"n_heads": 6, "n_kv_heads": 2},
    "tied": {"n_heads": 12, "n_kv_heads": 4, "tie_embeddings": True},
    "wide heads": {"n_heads": 4, "head_dim": 32, "norm_eps": 1e-6},
    "llama3": {"n_heads": 6, "rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
    "linear": {"n_heads": 6, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def make(tokenizer, **shape):
    config = Config(vocab_size=tokenizer.vocab_size, dim=48, n_layers=2, max_seq_len=64, **shape)
    return randomised(Llama(config, seed=3)).eval()


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_saved_model_opens_in_transformers_with_the_same_ids_and_logits(tmp_path, tokenizer, shape):
    ours = make(tokenizer, **shape)
    put(tmp_path, model_files(ours.config, ours.state_dict(), tokenizer))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = "It was the ducklings' first 22 summers. Größe 😀"
    ids = tokenizer.encode(words, bos=True)
    assert their_tokenizer(words)["input_ids"] == ids
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == words
    with torch.no_grad():
        ids = torch.tensor([ids])
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_saving_and_loading_changes_nothing(tmp_path, tokenizer, shape):
    ours = make(tokenizer, **shape)
    put(tmp_path, model_files(ours.config, ours.state_dict(), tokenizer))
    config, weights = read_model(tmp_path)
    assert config == ours.config
    again = build(config, weights)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("scaling", [None, "llama3", "linear"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_we_open(tmp_path, scaling, tied):
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    if scaling:
        rope = {"rope_theta": 5e5, "rope_type": scaling, "factor": 8.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    sizes = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    theirs = LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, rope_parameters=rope, max_position_embeddings=256)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = build(*read_model(tmp_path))
    ids = torch.randint(0, 90, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_old_and_new_rope_keys_mean_the_same(tmp_path):
    config = Config(
        vocab_size=9,
        dim=8,
        n_layers=1,
        n_heads=2,
        rope_theta=5e5,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    )
    both = config_json(config)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    oldest = {
        **old,
        "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in old["rope_scaling"].items()},
    }
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    for number, form in enumerate((both, old, oldest, new)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(form), encoding="utf-8")
        assert read_config(path) == config


def test_every_tensor_has_one_name_on_each_side():
    assert len(THEIRS_TO_OURS) == len(TENSOR_NAMES)
    assert rename("layers.12.ffn_norm.weight") == "model.layers.12.post_attention_layernorm.weight"
    assert (
        rename("model.layers.12.mlp.up_proj.weight", THEIRS_TO_OURS) == "layers.12.feed_forward.w_up.weight"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen3"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("vocab_size", None),
        ("vocab_size", "9"),
        ("vocab_size", True),
        ("vocab_size", 1.5),
        ("vocab_size", 10**400),
        ("hidden_size", 2**31),
        ("hidden_size", -1),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", None),
        ("rms_norm_eps", 0),
        ("head_dim", 3),
        ("tie_word_embeddings", "no"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
        ("rope_parameters", {"rope_theta": "big"}),
    ],
)
def test_a_config_that_is_no_llamas_is_refused_naming_the_key(tmp_path, key, value):
    good = config_json(Config(vocab_size=9, dim=8, n_layers=1, n_heads=2))
    good.pop("head_dim" if key == "num_attention_heads" else "", None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**good, key: value}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert caught.value.code == "E202"
    named = "rope" if key == "rope_parameters" else "hidden_size" if key == "num_attention_heads" else key
    assert named in caught.value.where


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5])
def test_a_config_that_is_not_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.code == "E202"


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    tensors = load(files["model.safetensors"])
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
    put(tmp_path, {**files, "model.safetensors": save(tensors)})
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "E203"
    for part in (
        "model.norm.weight is missing",
        "model.extra.weight is not part",
        "lm_head.weight has shape",
    ):
        assert part in caught.value.found


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_cut_weight_file_is_refused(tmp_path, tokenizer, cut):
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    put(tmp_path, {**files, "model.safetensors": files["model.safetensors"][:cut]})
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "E205"


def test_what_happens_to_a_file_changes_nothing_that_was_read_and_is_told_of_the_rest(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    put(tmp_path, model_files(ours.config, ours.state_dict(), tokenizer))
    _, weights = read_model(tmp_path)
    name, path = "tok_embeddings.weight", tmp_path / "model.safetensors"
    before = weights[name]
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(before, ours.state_dict()[name])
    os.truncate(path, 1000)
    assert torch.equal(before, ours.state_dict()[name])
    with pytest.raises(InputError) as caught:
        weights["norm.weight"]
    assert caught.value.code == "E205"


def test_half_precision_weights_are_read_as_float32(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    half = {name: weight.to(torch.bfloat16) for name, weight in ours.state_dict().items()}
    put(tmp_path, model_files(ours.config, half, tokenizer))
    _, weights = read_model(tmp_path)
    assert all(
        weights[name].dtype == torch.float32 and torch.equal(weights[name], half[name].float())
        for name in half
    )


# ---- weights in several files


def test_sharded_weights_of_transformers_are_read(tmp_path):
    sizes = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = build(*read_model(tmp_path))
    ids = torch.randint(0, 90, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def sharded(tmp_path, tokenizer):
    """A folder whose weights are in two files, and what its index says."""
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    tensors = load(files.pop("model.safetensors"))
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    folder = put(tmp_path / "model", files)
    for place in set(places.values()):
        (folder / place).write_bytes(save({name: tensors[name] for name in names if places[name] == place}))
    write_index(folder, places)
    return folder, places


def write_index(folder, places):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


@pytest.fixture
def files_opened():
    """Every path that is opened while the test runs."""
    found, listening = [], [True]

    def hear(event, given):
        if listening and event == "open":
            found.append(str(given[0]))

    sys.addaudithook(hear)  # which cannot be taken away again
    yield found
    listening.clear()


PATHS = (
    "absolute",
    "above",
    "backslash",
    "subfolder",
    "number",
    "none",
    "pickle",
    "pipe",
    "missing",
    "link",
    "zero",
    "half",
)


@pytest.mark.parametrize("kind", PATHS)
def test_no_path_in_an_index_leaves_the_folder(tmp_path, sharded, files_opened, kind):
    folder, places = sharded
    first = sorted(set(places.values()))[0]
    outside = tmp_path / "outside.safetensors"
    (folder / first).rename(outside)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.safetensors").write_bytes(outside.read_bytes())
    names = {
        "absolute": str(outside),
        "above": "../outside.safetensors",
        "backslash": "..\\outside.safetensors",
        "subfolder": "sub/a.safetensors",
        "number": 7,
        "none": None,
        "pickle": "weights.bin",
        "zero": "\0.safetensors",
        "half": "\ud800.safetensors",
    }
    if kind in names:
        write_index(
            folder, {name: names[kind] if place == first else place for name, place in places.items()}
        )
    elif kind == "pipe":
        os.mkfifo(folder / first)
    elif kind == "link":
        (folder / first).symlink_to(outside)
    files_opened.clear()
    with pytest.raises(InputError) as caught:
        read_model(folder)
    assert caught.value.code == "E205"
    assert not [path for path in files_opened if path.endswith("outside.safetensors") or "sub" in path]


def test_a_link_within_a_cache_of_models_is_followed(tmp_path, sharded):
    """As huggingface_hub lays them out: snapshots/REVISION/file is a link to ../../blobs/HASH."""
    folder, places = sharded
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    for number, place in enumerate(sorted(set(places.values()))):
        (folder / place).rename(tmp_path / "blobs" / str(number))
        (folder / place).symlink_to(f"../../blobs/{number}")
    folder.rename(tmp_path / "snapshots" / "revision")
    assert len(dict(read_model(tmp_path / "snapshots" / "revision")[1])) == 21


def test_an_index_that_contradicts_its_files_is_refused(sharded):
    folder, places = sharded
    first, second = sorted(set(places.values()))
    (folder / second).write_bytes((folder / first).read_bytes())
    with pytest.raises(InputError) as caught:
        read_model(folder)
    assert caught.value.code == "E205"
    assert "holds too" in caught.value.found
    for content in (
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}},
    ):
        (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            read_model(folder)
        assert caught.value.code == "E205"


# ---- headers that lie


def safetensors(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A = entry()
HEADERS = {
    "nothing": b"",
    "length 0": safetensors(b"", length=0),
    "length 1": safetensors(b"{", length=1),
    "longer than the file": safetensors({"a": A}, b"\0" * 8, length=10**6),
    "length 2^63": safetensors({"a": A}, b"\0" * 8, length=2**63),
    "99 MB in a file of 10 bytes": struct.pack("<Q", 99 * 10**6) + b"{}",
    "longer than any": struct.pack("<Q", LONGEST_HEADER + 1) + b" " * (LONGEST_HEADER + 1),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "not JSON": safetensors(b"{nothing}"),
    "an array": safetensors(b"[1, 2]"),
    "nested too deep": safetensors(b'{"a":' * 10**5),
    "a space in front": safetensors(b" " + json.dumps({"a": A}).encode(), b"\0" * 8),
    "two entries of one name": safetensors(
        b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), b"\0" * 8
    ),
    "overlapping": safetensors({"a": A, "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "a hole": safetensors({"a": A, "b": entry(offsets=(12, 20))}, b"\0" * 20),
    "bytes behind the last": safetensors({"a": A}, b"\0" * 9),
    "negative offsets": safetensors({"a": entry(offsets=(-8, 0))}, b"\0" * 8),
    "offsets the wrong way": safetensors({"a": entry(offsets=(8, 0))}, b"\0" * 8),
    "a negative axis": safetensors({"a": entry(shape=(-2,))}, b"\0" * 8),
    "axes that overflow": safetensors({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8),
    "a thousand axes": safetensors({"a": entry(shape=(1,) * 1000)}, b"\0" * 8),
    "numbers that need more bytes": safetensors({"a": entry(shape=(2**30,))}, b"\0" * 8),
    "an axis of half a number": safetensors({"a": entry(shape=(1.5,))}, b"\0" * 8),
    "digits without end": safetensors({"a": entry(shape=(2**47,) * 7)}, b"\0" * 8),
    "axes without end": safetensors({"a": entry(shape=(2**47,) * 10**5)}, b"\0" * 8),
    "offsets of many digits": safetensors({"a": entry(offsets=(-(10**4299), 10**4299))}, b"\0" * 8),
    "a kind in a list": safetensors({"a": entry(dtype=["F32"])}, b"\0" * 8),
    "a kind that is an object": safetensors({"a": entry(dtype={})}, b"\0" * 8),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "an unknown kind": safetensors({"a": entry(dtype="F31")}, b"\0" * 8),
    "whole numbers": safetensors({"a": entry(dtype="I32")}, b"\0" * 8),
    "a million empty tensors": safetensors({str(i): entry((0,), (0, 0)) for i in range(10**5)}),
}


def moved(header, data):
    """Two tensors of one size in the place of one."""
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    header[first]["data_offsets"] = header[second]["data_offsets"]
    return header, data


def with_a_hole(header, data):
    for entry in header.values():
        entry["data_offsets"] = [8 + at for at in entry.get("data_offsets", [0, 0])]
    return header, bytes(8) + data


def shorter_by_one(header, data):
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [begin, end - 4]
    return header, data


def with_one_twice(header, data):
    """The same entry once more: the other readers take the last."""
    name = "model.norm.weight"
    raw = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    return raw.encode(), data


LIES = {
    "two entries of one name": [with_one_twice],
    "at byte": [moved, with_a_hole],
    "its header asks for": [
        lambda header, data: (header, data + b"\0"),
        lambda header, data: (header, data[:-1]),
    ],
    "its shape asks for": [shorter_by_one],
}


@pytest.mark.parametrize(("found", "lie"), [(found, lie) for found, lies in LIES.items() for lie in lies])
def test_a_header_in_which_all_is_a_llama_but_the_places_is_refused(tmp_path, tokenizer, found, lie):
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    length = int.from_bytes(files["model.safetensors"][:8], "little")
    header = json.loads(files["model.safetensors"][8 : 8 + length])
    header.pop("__metadata__")
    header, data = lie(header, files["model.safetensors"][8 + length :])
    put(tmp_path, {**files, "model.safetensors": safetensors(header, data)})
    with pytest.raises(InputError, match=found) as caught:
        read_model(tmp_path)
    assert caught.value.code == "E205"


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_hostile_header_is_refused_at_once_and_in_little_memory(tmp_path, content):
    config = config_json(Config(vocab_size=9, dim=8, n_layers=1, n_heads=2))
    put(tmp_path, {"config.json": json.dumps(config).encode(), "model.safetensors": content})
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 2**26
    tracemalloc.stop()
    assert caught.value.code in ("E203", "E205")


@pytest.mark.parametrize("what", ["objects", "a name", "config.json"])
def test_the_longest_json_takes_no_more_memory_than_any_other_file(tmp_path, what):
    config = json.dumps(config_json(Config(vocab_size=9, dim=8, n_layers=1, n_heads=2))).encode()
    objects = b'{"a": [%b{}]' % (b"{}," * (LONGEST_HEADER // 3 - 1000))
    header = {"ab" * (LONGEST_HEADER // 2 - 100): entry((0,), (0, 0))} if what == "a name" else objects + b"}"
    files = {"config.json": config, "model.safetensors": safetensors(header)}
    if what == "config.json":
        files["config.json"] = objects + b", " + config[1:]
    put(tmp_path, files)
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2 * max(map(len, files.values())) + 2**26
    tracemalloc.stop()
    assert caught.value.code in ("E203", "E205")


def test_a_name_from_a_file_cannot_write_on_the_terminal(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    tensors = load(files["model.safetensors"])
    name = "\x1b[31mred\u202e" + "a" * 10**5
    put(tmp_path, {**files, "model.safetensors": save({**tensors, name: torch.ones(1)})})
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert "\\x1b[31mred\\u202e" in caught.value.found
    assert len(caught.value.found) < 500


def test_sizes_beyond_all_memory_are_refused_without_asking_for_it(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    files = model_files(ours.config, ours.state_dict(), tokenizer)
    large = {
        "vocab_size": 2**20,
        "hidden_size": 6 * 2**13,
        "intermediate_size": 2**18,
        "num_hidden_layers": 1024,
    }
    config = {**json.loads(files["config.json"]), **large}
    put(tmp_path, {**files, "config.json": json.dumps(config).encode()})
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "E203"
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path, tokenizer):
    ours = make(tokenizer, n_heads=6)
    ours.norm.weight.data[3] = torch.inf
    put(tmp_path, model_files(ours.config, ours.state_dict(), tokenizer))
    _, weights = read_model(tmp_path)
    assert len(weights["tok_embeddings.weight"]) == ours.config.vocab_size
    with pytest.raises(InputError) as caught:
        build(ours.config, weights)
    assert caught.value.code == "E211"
    assert "norm.weight holds 1 numbers" in caught.value.found

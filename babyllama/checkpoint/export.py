"""A model of any format -> the files of another, each written whole or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from babyllama.checkpoint.contents import check_ids, plain
from babyllama.checkpoint.folder import new_folder, replace_file, replace_file_by_parts
from babyllama.checkpoint.gguf import gguf_parts
from babyllama.checkpoint.hf import model_files, text_files
from babyllama.checkpoint.llama2c import llama2c_parts
from babyllama.checkpoint.meta import meta_parts
from babyllama.errors import MachineError, UsageError
from babyllama.model import Config
from babyllama.text.export import to_gguf, to_llama2c
from babyllama.text.tokenizer import Tokenizer

FORMATS = {"gguf": ".gguf", "llama2c": ".bin", "meta": "", "hf": ""}  # and how what is written is called


def export(
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    to: str,
    kind: str = "f32",
    shards: int = 1,
    version: int = 0,
) -> list[Path]:
    """Write the model to `out`, a file (gguf, llama2c) or a folder (meta, hf). Returns what was written.

    kind       of numbers, gguf only: f32, f16, bf16, q8_0 or q4_0.
    shards     files to cut the matrices into, meta only.
    version    of llama2.c's format: 0, 1, or 2 with a byte for each number.
    tokenizer  None: llama2c without its tokenizer file. The others need one.

    With a GGUF goes a Modelfile, which Ollama makes a model from; with a model.bin its tokenizer.

    Raises UsageError E101, E102, E105 (the format has no place for something of this model), InputError E309 (a
    tokenizer of another model), E310, MachineError E401, E403.
    """
    if to not in FORMATS:
        raise UsageError("E101", "--to", f"{to!r} is not a format", f"choose one of {', '.join(FORMATS)}")
    beside = out.with_name(bare(out.name) + ".Modelfile") if to == "gguf" else out
    if to == "llama2c" and tokenizer is not None:
        beside = tokenizer_beside(out)
    if tokenizer is not None:
        check_ids(tokenizer.vocab_size, config)
    for path in (out, beside):
        try:
            there = path.exists()
        except OSError as error:  # a name that no system has
            found = f"cannot be written to ({error.strerror})"
            raise MachineError("E403", plain(path), found, "choose another --out") from None
        if there:
            fix = "choose another --out, or remove it first"
            raise MachineError("E403", path, "is there already, and nothing is written over it", fix)
    if to == "gguf":
        assert tokenizer is not None
        vocabulary = to_gguf(tokenizer, config.vocab_size)
        replace_file_by_parts(out, gguf_parts(config, weights, vocabulary, kind, bare(out.name)))
        replace_file(beside, modelfile(out.name, "tokenizer.chat_template" in vocabulary))
        return [out, beside]
    if to == "llama2c":
        pieces = None if tokenizer is None else to_llama2c(tokenizer, config.vocab_size)
        replace_file_by_parts(out, llama2c_parts(config, weights, version))
        if pieces is None:
            return [out]
        replace_file(beside, pieces)
        return [out, beside]
    assert tokenizer is not None
    if to == "meta":
        files: Iterable[tuple[str, bytes]] = (
            pair
            for part in (meta_parts(config, weights, shards), text_files(tokenizer).items())
            for pair in part
        )
    else:
        files = model_files(config, weights, tokenizer).items()
    with new_folder(out, {"step": 0}) as folder:
        for name, content in files:
            (folder / name).write_bytes(content)
    return [out]


def tokenizer_beside(path: Path) -> Path:
    """Where the tokenizer of the llama2.c file at `path` is put."""
    return path.with_name(bare(path.name) + "-tokenizer.bin")


def bare(name: str) -> str:
    """The name of a model's file or folder without the ending that tells its format: "Llama-3.2-1B" has none."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending in ("gguf", "bin", "pth", "safetensors") else name


def modelfile(name: str, has_template: bool) -> bytes:
    """What `ollama create` asks for. Ollama finds a template in the file; without one a prompt is only continued."""
    lines = [f"FROM ./{name}", "PARAMETER temperature 0.8", "PARAMETER top_p 0.95"]
    if not has_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return ("\n".join(lines) + "\n").encode()

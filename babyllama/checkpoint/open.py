"""Any Llama on disk, recognised by what is in it and not by what it is called."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from babyllama.checkpoint.contents import Weights
from babyllama.checkpoint.folder import opened
from babyllama.checkpoint.gguf import MAGIC, read_gguf
from babyllama.checkpoint.hf import has_weights, read_model
from babyllama.checkpoint.llama2c import read_llama2c
from babyllama.checkpoint.meta import PARAMS, is_part, read_meta
from babyllama.errors import InputError, UsageError
from babyllama.model import Config
from babyllama.text.tokenizer import Tokenizer
from babyllama.text.vocabularies import from_gguf

FIX = "give a run, a saved step, a Hugging Face folder, Meta's folder, a GGUF or a llama2.c file"
AS_SAFETENSORS = "open it with transformers, and save it with save_pretrained, which writes safetensors"
NOT_A_MODEL = {  # how a file begins: what such a file is; a llama2.c file has two zeros behind two bytes of its width
    rb"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch it with:  git lfs pull",
    rb"<[!?A-Za-z][^\0]": "is a page of HTML or XML, which a server sends instead of a file that it does not give",
    rb'\{\s*"': "is JSON; the weights lie beside it",
    rb"\x80[\x02-\x05][^\0]": "is a bare pickle, which is not read; torch.save has made zip archives since torch 1.6",
}


@dataclass(frozen=True)
class OnDisk:
    """A model that was recognised and found whole; its numbers are read when they are asked for."""

    path: Path
    format: str
    config: Config
    weights: Weights
    tokenizer: Callable[
        [], Tokenizer
    ]  # raises InputError E310, or UsageError E103 where the format carries none


def open_llama(path: str | Path) -> OnDisk:
    """The model at `path`: a Hugging Face folder, Meta's folder, a GGUF, a llama2.c file, or a file of such a folder.

    Raises InputError E201 when nothing at `path` is a model; E202, E203, E205, E209, E210, E212 when one is broken.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    with opened(path, code="E201") as (file, size):
        first = file.read(256)
    for begin, what in NOT_A_MODEL.items():
        if (
            re.match(rb"\s*" + begin, first) and first[8:9] != b"{"
        ):  # as it stands behind a safetensors' length
            raise InputError("E201", path, what, FIX)
    if not size:
        raise InputError("E201", path, "is empty", "copy or download it again")
    if first.startswith(MAGIC):
        config, weights, metadata = read_gguf(path)
        return OnDisk(path, "GGUF", config, weights, lambda: Tokenizer(from_gguf(metadata, path), path))
    if first[8:9] == b"{":  # safetensors; the sizes stand beside it
        return _open_folder(path.parent, weights=path)
    if first.startswith(b"PK\3\4"):
        if is_part(path):
            return _open_folder(path.parent)
        found = "is a zip archive, and none of Meta's: consolidated.00.pth and so on beside a params.json"
        raise InputError("E201", path, found, f"{FIX}; a .pth or .bin of another kind: {AS_SAFETENSORS}")
    config, weights = read_llama2c(path)
    return OnDisk(path, "llama2.c", config, weights, lambda: _no_tokenizer(path))


def _open_folder(folder: Path, weights: Path | None = None) -> OnDisk:
    """`weights`: the safetensors file that was named, if one was."""
    if (folder / "config.json").is_file():
        if weights is None and not has_weights(folder) and any(folder.glob("pytorch_model*.bin")):
            found = "holds its weights as pytorch_model.bin, a pickle, which is not read"
            raise InputError("E201", folder, found, AS_SAFETENSORS)
        config, tensors = read_model(folder, weights)
        return OnDisk(folder, "Hugging Face", config, tensors, lambda: Tokenizer.load(folder))
    if weights is None and (folder / PARAMS).is_file():
        config, tensors = read_meta(folder)
        return OnDisk(folder, "Meta", config, tensors, lambda: Tokenizer.load(folder))
    found = "holds no config.json and no params.json, so that the sizes of a model in it are not known"
    raise InputError("E201", folder, found, FIX)


def _no_tokenizer(path: Path) -> Tokenizer:
    found = "is a llama2.c file, which carries no tokenizer"
    raise UsageError("E103", str(path), found, "name its tokenizer file:  --tokenizer tokenizer.bin")

"""Stock llama.cpp, as the package xllamacpp carries it: its C interface, called to encode with a vocabulary."""

import ctypes as c
import importlib.util
from pathlib import Path
from typing import Any

import pytest


class _Settings(c.Structure):
    """llama_model_params of llama.h. Its layout changes now and then: the tests look at two defaults first."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("devices", "buffer_types")),
        *((name, c.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c.c_void_p) for name in ("tensor_split", "progress", "progress_data", "overrides")),
        *((name, c.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host")),
        *((name, c.c_bool) for name in ("no_alloc", "load_mtp")),
    )


def _loaded() -> Any:
    found = importlib.util.find_spec("xllamacpp")
    if not found or not found.origin:
        pytest.skip("the package xllamacpp, which carries llama.cpp, is not installed")
    try:
        llama = c.PyDLL(str(next(Path(found.origin).parent.glob("*.abi3.so"))))
    except (OSError, StopIteration) as error:
        pytest.skip(f"llama.cpp does not start on this machine: {error}")
    llama.llama_model_default_params.restype = _Settings
    llama.llama_model_load_from_file.restype = llama.llama_model_get_vocab.restype = c.c_void_p
    llama.llama_model_load_from_file.argtypes = [c.c_char_p, _Settings]
    llama.llama_model_get_vocab.argtypes = llama.llama_model_free.argtypes = [c.c_void_p]
    numbers = c.POINTER(c.c_int32)
    llama.llama_tokenize.argtypes = [
        c.c_void_p,
        c.c_char_p,
        c.c_int32,
        numbers,
        c.c_int32,
        c.c_bool,
        c.c_bool,
    ]
    llama.llama_vocab_is_eog.argtypes = [c.c_void_p, c.c_int32]
    llama.llama_vocab_is_eog.restype = c.c_bool
    return llama


_SILENT = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda level, text, data: None)


class LlamaCpp:
    """The vocabulary of a GGUF, which may have no tensors. The test that asks for one skips without llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.llama = _loaded()
        self.llama.llama_log_set(_SILENT, None)
        settings = self.llama.llama_model_default_params()
        if (settings.n_gpu_layers, settings.use_extra_bufts) != (-1, True):
            pytest.skip("this version of llama.cpp keeps its settings in another order")
        settings.vocab_only = True
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, "llama.cpp does not read this file"
        self.vocab = self.llama.llama_model_get_vocab(self.model)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        raw = text.encode()
        ids = (c.c_int32 * (len(raw) + 8))()
        count = self.llama.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), add_special, False)
        return ids[:count]

    def ends(self, size: int) -> set[int]:
        return {id for id in range(size) if self.llama.llama_vocab_is_eog(self.vocab, id)}

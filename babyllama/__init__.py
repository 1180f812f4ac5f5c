"""Baby Llama: a Llama from scratch, to read, to train, to look inside and to take along.

    run = babyllama.train("fairy-tales", minutes=3, out="runs/tales")
    llama = babyllama.load("runs/tales")

Importing this is cheap: what a name needs is loaded when the name is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from babyllama import train as train
    from babyllama.api import LoadedLlama as LoadedLlama
    from babyllama.api import load as load
    from babyllama.api import resume as resume
    from babyllama.checkpoint.run import Run as Run
    from babyllama.errors import BabyLlamaError as BabyLlamaError
    from babyllama.model import Config as Config
    from babyllama.model import Llama as Llama
    from babyllama.text.tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "resume": "babyllama.api",
    "load": "babyllama.api",
    "LoadedLlama": "babyllama.api",
    "Run": "babyllama.checkpoint.run",
    "BabyLlamaError": "babyllama.errors",
    "Config": "babyllama.model",
    "Llama": "babyllama.model",
    "Tokenizer": "babyllama.text.tokenizer",
}
__all__ = [
    "BabyLlamaError",
    "Config",
    "Llama",
    "LoadedLlama",
    "Run",
    "Tokenizer",
    "load",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "train":  # a package that can be called
        return import_module("babyllama.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'babyllama' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Baby Llama: a Llama from scratch."""

__version__ = "0.1.0"

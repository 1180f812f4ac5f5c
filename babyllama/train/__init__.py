"""Batches -> weights.

`babyllama.train` is this package and also the function that trains: calling the package calls `babyllama.api.train`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from babyllama.api import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

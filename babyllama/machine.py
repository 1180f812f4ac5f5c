"""What this machine has, what of it to use, and whether it computes rightly.

The facts (`look`) need no library beyond Python and, for accelerators, torch: Linux is read from /proc and
/sys, macOS from sysctl, Windows through its own calls. A container's limits (cgroups 1 and 2) count as the
machine's. What cannot be found out is None or empty, never a guess. `python -m babyllama doctor` prints all
of it.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama.errors import UsageError

if TYPE_CHECKING:
    import torch

# ---- facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch can use. `memory` in bytes; on Apple silicon it is shared with the CPU."""

    device: str  # "cuda:0", "mps"
    name: str
    memory: int | None


@dataclass(frozen=True)
class Machine:
    """The facts about this machine, as this process may use it. Memory in bytes."""

    system: str  # "Linux 6.1 x86_64"
    python: str
    cpu: str
    cores: int  # physical ones
    threads: int  # logical ones: more than cores where each core runs two threads
    memory_total: int | None
    memory_available: int | None
    bf16: tuple[str, ...]  # the CPU's own bfloat16 instructions: "avx512_bf16", "amx_bf16", "arm_bf16"
    torch: str
    torch_threads: int
    accelerators: tuple[Accelerator, ...]


def look() -> Machine:
    """Find out everything about this machine; a fraction of a second, most of it the import of torch."""
    import torch

    total, available = memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu_name(),
        cores=physical_cores(),
        threads=logical_cores(),
        memory_total=total,
        memory_available=available,
        bf16=bf16_instructions(),
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        accelerators=accelerators(),
    )


def accelerators() -> tuple[Accelerator, ...]:
    """The GPUs that this build of torch can use, CUDA (or ROCm) first."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(Accelerator(f"cuda:{i}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Accelerator("mps", cpu_name(), memory()[0]))
    return tuple(found)


def devices() -> list[str]:
    """Every device to compute on: "cpu", and each accelerator by its full name."""
    return ["cpu", *(one.device for one in accelerators())]


def has_device(device: str) -> bool:
    """Whether this machine has it; "cuda" stands for "cuda:0"."""
    return ("cuda:0" if device == "cuda" else device) in devices()


def require_device(device: str) -> None:
    """Raises UsageError E101 for a --device that this machine does not have."""
    if not has_device(device):
        found = f"{device!r} is not a device that torch finds here"
        raise UsageError("E101", "--device", found, "see what there is:  babyllama doctor")


def logical_cores(root: Path = Path("/")) -> int:
    """Hardware threads that this process may run on at once, at least 1."""
    return max(1, math.ceil(min(len(_allowed_cpus()), _cgroup_cpus(root))))


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: its CPU affinity and its container's quota respected.

    The number of threads for matrix products: two threads of one core share its arithmetic units, so they
    bring nothing. A quota of 1.5 CPUs counts as 2.
    """
    if sys.platform == "darwin":
        number = _sysctl("hw.physicalcpu")
        cores = int(number) if number.isdigit() else logical_cores()
    elif sys.platform == "win32":
        cores = _windows_physical_cores() or logical_cores()
    else:
        cores = len(separate_cpus(root))
    return max(1, min(cores, logical_cores(root)))


def separate_cpus(root: Path = Path("/")) -> list[int]:
    """One hardware thread, the lowest, of each physical core that this process may use. Where /sys does not say which
    belong together (it is Linux's), each counts as a core."""
    cores: dict[object, int] = {}
    for cpu in sorted(_allowed_cpus()):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package, core = _text(topology / "physical_package_id"), _text(topology / "core_id")
        cores.setdefault((package, core) if core else cpu, cpu)
    return sorted(cores.values())


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """(total, available) bytes of memory for this process; a container's limit lowers both."""
    if sys.platform == "darwin":
        return _mac_memory()
    if sys.platform == "win32":
        return _windows_memory()
    facts = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, number, *_ = [*line.replace(":", " ").split(), "", ""]
        if number.isdigit():
            facts[name] = int(number) * 1024  # meminfo counts in KiB
    total, available = facts.get("MemTotal"), facts.get("MemAvailable")
    for limit, used in _cgroup_memory(root):
        total = limit if total is None else min(total, limit)
        available = limit - used if available is None else min(available, limit - used)
    return total, available if available is None else max(0, available)


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that `device` has left for this process; None where nothing tells. MPS shares the memory of the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return memory()[1]


def cpu_name(root: Path = Path("/")) -> str:
    """The name its maker gave the CPU, else the architecture."""
    name = ""
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string")
    elif sys.platform == "win32":
        name = platform.processor()
    else:
        for line in _text(root / "proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model"):
                name = value.strip()
                break
    return " ".join(name.split()) or platform.machine()


def bf16_instructions(root: Path = Path("/")) -> tuple[str, ...]:
    """The CPU's instructions for bfloat16 products. On Windows, which does not list them, empty."""
    if sys.platform == "darwin":
        return ("arm_bf16",) if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else ()
    flags: set[str] = set()
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86 and Arm
            flags = set(value.split())
            break
    names = {"avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16", "bf16": "arm_bf16"}
    return tuple(ours for theirs, ours in names.items() if theirs in flags)


# ---- where the systems keep these facts ----------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _allowed_cpus() -> set[int]:
    """Numbers of the hardware threads that this process is allowed on."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no affinity
        return set(os.sched_getaffinity(0))
    if sys.platform == "win32" and (mask := _windows_affinity()):
        return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}
    return set(range(os.cpu_count() or 1))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of the cgroups that hold this process, innermost first; every one of them may set a limit.

    Version 2 has one tree (the line "0::/path"), version 1 one for each controller ("4:cpu,cpuacct:/path").
    Inside a container the path is often the host's and does not exist here; the folders above it do.
    """
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = mount / path.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))]
    return folders


def _cgroup_cpus(root: Path) -> float:
    """CPUs that the container may keep busy; infinite without a quota."""
    cpus = math.inf
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2: "max 100000"
        quota = quota or _text(folder / "cpu.cfs_quota_us")  # version 1: -1 without a quota
        period = period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            cpus = min(cpus, int(quota) / int(period))
    return cpus


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup that has a limit. Droppable file pages do not count as used."""
    found = []
    for folder in _cgroups(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if not limit.isdigit() or int(limit) >= 1 << 60:  # version 1 writes "no limit" as almost 2^63
            continue
        droppable = 0
        for line in _text(folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file") and value.isdigit():
                droppable = int(value)
        found.append((int(limit), max(0, int(used or 0) - droppable)))
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _sysctl(name: str) -> str:
    return _output("/usr/sbin/sysctl", "-n", name)


def _mac_memory() -> tuple[int | None, int | None]:
    total = _sysctl("hw.memsize")
    return (int(total) if total.isdigit() else None), _mac_available(_output("/usr/bin/vm_stat"))


def _mac_available(vm_stat: str) -> int | None:
    """Bytes that macOS could give: pages that are free, or hold only what can be read again."""
    head, *lines = vm_stat.splitlines() or [""]
    page = next((int(word) for word in head.split() if word.isdigit()), 0)  # "(page size of 16384 bytes)"
    wanted = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    pages = [line.partition(":")[2].strip(" .") for line in lines if line.startswith(wanted)]
    return page * sum(int(number) for number in pages if number.isdigit()) or None


def _windows_memory() -> tuple[int | None, int | None]:
    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "available", "c", "d", "e", "f", "g")),
        ]  # fmt: skip

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    try:
        if not ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
            return None, None
    except (AttributeError, OSError):
        return None, None
    return status.total, status.available


def _windows_affinity() -> int:
    """A bit for each hardware thread of its group that this process may use; 0 if Windows does not say."""
    ours, systems = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        kernel.GetProcessAffinityMask.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        done = kernel.GetProcessAffinityMask(
            kernel.GetCurrentProcess(), ctypes.byref(ours), ctypes.byref(systems)
        )
    except (AttributeError, OSError):
        return 0
    return ours.value if done else 0


def _windows_physical_cores() -> int:
    """Records of the kind "processor core" (0) that Windows lists; 0 if it does not."""
    length = ctypes.c_uint32()
    try:
        ask = ctypes.WinDLL("kernel32").GetLogicalProcessorInformationEx  # type: ignore[attr-defined]
        ask(0, None, ctypes.byref(length))  # the first call fails, and says how much room the answer needs
        answer = ctypes.create_string_buffer(length.value)
        if not ask(0, answer, ctypes.byref(length)):
            return 0
    except (AttributeError, OSError):
        return 0
    return _count_records(answer.raw[: length.value])


def _count_records(answer: bytes) -> int:
    """Each record starts with its kind and its size, two 32-bit numbers."""
    records = at = 0
    while at + 8 <= len(answer) and (size := int.from_bytes(answer[at + 4 : at + 8], "little")):
        records, at = records + 1, at + size
    return records


# ---- what to use ---------------------------------------------------------------------------------


def best_device() -> str:
    """The first that torch finds of "cuda", "mps", "cpu". Whether it computes rightly, self_check says."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass(frozen=True)
class Precision:
    """The precision to train in, and why: the speed of one product in both, in FLOPs per second."""

    best: str  # "float32" or "bfloat16"
    float32: float
    bfloat16: float  # 0 where it was not measured


SECONDS = 0.3  # long enough that, on a busy machine too, each precision has its turn undisturbed
WORTHWHILE = 1.25  # times faster that bfloat16 must be, since rounding the operands takes time too


def best_precision(device: str = "cpu") -> str:
    """Where matrix products are clearly faster in bfloat16, "bfloat16", else "float32".

    The answer can differ from one call to the next on a busy machine, so a run asks once, writes it down,
    and never asks again when it is resumed.
    """
    return measure_precision(device).best


def measure_precision(device: str = "cpu") -> Precision:
    """Time one product of a small Llama's size in float32 and in bfloat16, by turns.

    Having the instructions is not enough (a build of torch may not use them), so it is measured, and the
    best time of several is taken, since other programs can only make a product slower. On a CPU one thread is timed,
    and all physical cores are said to do as many times as much: that is how training uses them (train/cpu.py), and
    threads that wait for one another would be told slower on a busy machine. MPS is not asked and stays in float32:
    what it does with bfloat16 depends on the chip and on the version of macOS.
    """
    import torch

    threads, cores = torch.get_num_threads(), 1
    if device == "cpu":
        torch.set_num_threads(1)
        cores = physical_cores()
    try:
        return _measure_precision(device, cores)
    finally:
        torch.set_num_threads(threads)


def _measure_precision(device: str, cores: int) -> Precision:
    import torch

    m, k, n = (1024, 256, 768) if device == "cpu" else (4096, 1024, 4096)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(device)
    right = torch.randn(k, n, generator=generator).to(device)
    kinds = [torch.float32] if device.startswith("mps") else [torch.float32, torch.bfloat16]
    operands = {kind: (left.to(kind), right.to(kind)) for kind in kinds}
    best = dict.fromkeys(kinds, math.inf)
    turn, began = 0, time.perf_counter()
    while turn < 8 or time.perf_counter() - began < SECONDS:
        for kind, (a, b) in operands.items():
            if turn >= 2 and best[kind] > 10 * min(best.values()):
                continue  # emulated, perhaps: not waited for again (the first times are slow for everyone)
            start = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            best[kind] = min(best[kind], time.perf_counter() - start)
        turn += 1
    speeds = {kind: cores * 2 * m * k * n / seconds for kind, seconds in best.items()}
    float32, bfloat16 = speeds[torch.float32], speeds.get(torch.bfloat16, 0.0)
    return Precision("bfloat16" if bfloat16 > WORTHWHILE * float32 else "float32", float32, bfloat16)


def _wait(device: str) -> None:
    """Until a device has done what it was asked; the CPU always has."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


# ---- whether it computes rightly -----------------------------------------------------------------

LIMIT = 2e-3  # relative: float32 stays below 1e-5, TF32 near 1e-3, a wrong kernel is off by 0.1 and more


@dataclass(frozen=True)
class SelfCheck:
    """Largest error of a device against the CPU, relative to the largest number of the right answer."""

    device: str
    logits: float
    gradients: float
    products: float
    seconds: float

    @property
    def passed(self) -> bool:
        return all(error <= LIMIT for error in (self.logits, self.gradients, self.products))

    def __str__(self) -> str:
        errors = f"logits {self.logits:.1e}, gradients {self.gradients:.1e}, products {self.products:.1e}"
        return f"{self.device}: largest relative errors: {errors} (limit {LIMIT:.0e})"


def self_check(device: str = "cpu") -> SelfCheck:
    """Let the device compute, in float32, something of which the answer is known; about two seconds.

    1. A tiny Llama, forward and backward, against the same on the CPU in float64.
    2. Matrix products of sizes at which devices have been wrong while small ones were right: a vocabulary of more
       than 32,768 (pytorch #116769, #109457) and a sum over more than 32,768 numbers (#195163).

    A device that fails must not be used; the caller raises NumericalError E503 with these numbers.

    Raises UsageError E101 when torch has no such device.
    """
    start = time.perf_counter()
    if not has_device(device):
        found = f"no such device, expected one of {', '.join(devices())}"
        raise UsageError("E101", device, found, "choose one of them")
    logits, gradients = _model_error(device)
    return SelfCheck(device, logits, gradients, _product_error(device), time.perf_counter() - start)


def _model_error(device: str) -> tuple[float, float]:
    """Relative errors of the logits, and of the gradient of the worst parameter."""
    import torch
    import torch.nn.functional as F

    from babyllama.model import Config, Llama

    config = Config(vocab_size=512, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (4, 64), generator=generator)
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():  # the real initialisation has zeros, which would hide half of it
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)

    def compute(device: str, kind: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.to("cpu").to(kind).to(device)  # in this order, since MPS has no float64
        logits = model(tokens.to(device))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().to(device))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return logits.detach().cpu().double(), [gradient.cpu().double() for gradient in gradients]

    right, right_gradients = compute("cpu", torch.float64)
    found, found_gradients = compute(device, torch.float32)
    pairs = zip(found_gradients, right_gradients, strict=True)
    return _error(found, right), max(_error(a, b) for a, b in pairs)


def _product_error(device: str) -> float:
    """Relative error of the worst of the large products. The largest, 2 GB, is only for accelerators."""
    import torch

    generator = torch.Generator().manual_seed(1)
    sizes = [(1025, 2, 32769), (32, 32800, 32)]
    if device != "cpu":
        sizes.append((9 * 1024, 2, 50304))
    worst = 0.0
    for m, k, n in sizes:
        left, right = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        product = left.to(device) @ right.to(device)
        rows = sorted({*range(0, m, max(1, m // 64)), m - 1})  # a sample: the CPU is slow to do all of them
        found = torch.stack([product[row].cpu() for row in rows]).double()
        del product
        worst = max(worst, _error(found, left[rows].double() @ right.double()))
    return worst


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest number of the right answer; infinite for NaN."""
    error = ((found - right).abs().max() / right.abs().max()).item()
    return error if math.isfinite(error) else math.inf

"""Facts about machines of every kind, read from imitated files; and a self-check that finds wrong numbers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from babyllama import machine
from babyllama.errors import UsageError

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


def imitate(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def meminfo(total: int, available: int) -> str:
    total, available = total // 1024, available // 1024
    return f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\nHugePages_Free: 0\n"


# ---- this machine, whatever it is


def test_this_machine_has_plausible_facts():
    facts = machine.look()
    assert 1 <= facts.cores <= facts.threads <= (os.cpu_count() or 1)
    assert facts.cpu and facts.torch == torch.__version__
    assert facts.torch_threads == torch.get_num_threads()
    if sys.platform in ("linux", "darwin", "win32"):
        assert facts.memory_total and facts.memory_available
        assert 0 < facts.memory_available <= facts.memory_total
        assert facts.memory_total > 256 * MIB


def test_cores_and_memory_are_found_without_torch():
    code = "import sys; from babyllama import machine as m; m.physical_cores(), m.memory()"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@linux
def test_cpu_affinity_is_respected():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code += "; from babyllama import machine as m; print(m.physical_cores(), m.logical_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1 1\n"


# ---- imitated machines


@linux
def test_two_threads_of_one_core_are_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: {0, 1, 2, 3, 5})
    cores = {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1), 5: (1, 1)}  # cpu -> (package, core)
    topology = "sys/devices/system/cpu/cpu{}/topology/{}"
    files = {topology.format(cpu, "physical_package_id"): str(package) for cpu, (package, _) in cores.items()}
    files |= {topology.format(cpu, "core_id"): str(core) for cpu, (_, core) in cores.items()}
    imitate(tmp_path, files)
    assert (machine.physical_cores(tmp_path), machine.logical_cores(tmp_path)) == (3, 5)
    assert machine.separate_cpus(tmp_path) == [0, 1, 5]


@linux
@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("150000 100000", 2),
        ("400000 100000", 4),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("9900000 100000", 8),
    ],
)
def test_the_cpu_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: set(range(8)))
    imitate(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert machine.physical_cores(tmp_path) == cores


@linux
def test_the_cpu_quota_of_cgroup_version_1(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: set(range(8)))
    folder = "sys/fs/cgroup/cpu/docker/abc"
    files = {f"{folder}/cpu.cfs_quota_us": "300000", f"{folder}/cpu.cfs_period_us": "100000"}
    imitate(tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n0::/", **files})
    assert machine.physical_cores(tmp_path) == 3
    imitate(tmp_path, {f"{folder}/cpu.cfs_quota_us": "-1"})
    assert machine.physical_cores(tmp_path) == 8


@linux
def test_the_memory_limit_of_an_outer_cgroup_counts_and_droppable_pages_do_not(tmp_path):
    outer = "sys/fs/cgroup/user.slice"
    imitate(
        tmp_path,
        {
            "proc/meminfo": meminfo(8000 * MIB, 6000 * MIB),
            "proc/self/cgroup": "0::/user.slice/inner.scope",
            "sys/fs/cgroup/user.slice/inner.scope/memory.max": "max",
            f"{outer}/memory.max": str(1000 * MIB),
            f"{outer}/memory.current": str(700 * MIB),
            f"{outer}/memory.stat": f"anon 5\ninactive_file {200 * MIB}\n",
        },
    )
    assert machine.memory(tmp_path) == (1000 * MIB, 500 * MIB)


@linux
def test_the_memory_limit_of_cgroup_version_1_and_none(tmp_path):
    files = {
        "proc/meminfo": meminfo(8000 * MIB, 6000 * MIB),
        "proc/self/cgroup": "7:memory:/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    imitate(tmp_path, files)
    assert machine.memory(tmp_path) == (8000 * MIB, 6000 * MIB)
    limited = {"memory.limit_in_bytes": str(512 * MIB), "memory.usage_in_bytes": str(600 * MIB)}
    imitate(tmp_path, {f"sys/fs/cgroup/memory/{name}": text for name, text in limited.items()})
    assert machine.memory(tmp_path) == (512 * MIB, 0)


@linux
@pytest.mark.parametrize(
    ("cpuinfo", "name", "bf16"),
    [
        (
            "model name\t: AMD  EPYC 9575F\nflags\t\t: fpu avx512_bf16 sse2",
            "AMD EPYC 9575F",
            ("avx512_bf16",),
        ),
        ("model name\t: Xeon\nflags\t\t: amx_bf16 avx512_bf16", "Xeon", ("avx512_bf16", "amx_bf16")),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm", None, ("arm_bf16",)),
        ("model name\t: Old One\nflags\t\t: sse2 avx2", "Old One", ()),
        ("", None, ()),
    ],
)
def test_the_cpu_says_its_name_and_its_bfloat16_instructions(tmp_path, cpuinfo, name, bf16):
    imitate(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert machine.cpu_name(tmp_path) == name or (name is None and machine.cpu_name(tmp_path))
    assert machine.bf16_instructions(tmp_path) == bf16


@linux
def test_a_system_that_says_nothing_gives_none_and_still_a_core(tmp_path):
    assert machine.memory(tmp_path) == (None, None)
    assert machine.physical_cores(tmp_path) >= 1


def test_free_memory_of_a_mac_is_read_from_vm_stat():
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\nPages active:                           5000.\n"
        "Pages inactive:                           20.\nPages speculative:                         3.\n"
        "Pages wired down:                        700.\nPages purgeable:                           7.\n"
    )
    assert machine._mac_available(text) == 40 * 16384
    assert machine._mac_available("") is None


def test_the_records_of_windows_are_counted_by_their_sizes():
    record = (0).to_bytes(4, "little") + (48).to_bytes(4, "little") + bytes(40)
    assert machine._count_records(record * 6) == 6
    assert machine._count_records(b"") == 0
    assert machine._count_records(bytes(16)) == 0, "a size of zero must not loop for ever"


@pytest.mark.skipif(sys.platform == "win32", reason="asks other systems for what only Windows has")
def test_what_only_windows_has_is_unknown_elsewhere():
    assert machine._windows_memory() == (None, None)
    assert machine._windows_affinity() == machine._windows_physical_cores() == 0


# ---- what to use


def test_the_best_device_is_one_that_this_machine_has():
    names = ["cpu", *(one.device.split(":")[0] for one in machine.accelerators())]
    assert machine.best_device() in names
    assert machine.best_device() != "cpu" or names == ["cpu"]


def test_devices_are_known_by_name():
    assert machine.has_device("cpu") and machine.has_device(machine.best_device())
    assert not machine.has_device("cuda:99") and not machine.has_device("abacus")
    assert machine.has_device("cuda") == torch.cuda.is_available()


def test_precision_is_measured_both_ways_and_follows_its_rule():
    measured = machine.measure_precision()
    assert measured.float32 > 1e8 and measured.bfloat16 > 1e6
    faster = measured.bfloat16 > machine.WORTHWHILE * measured.float32
    assert measured.best == ("bfloat16" if faster else "float32")
    assert machine.best_precision() in ("bfloat16", "float32")


@pytest.mark.parametrize(("slow", "best"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_the_slower_precision_is_not_chosen(monkeypatch, slow, best):
    clock = [0.0]

    def product(a, b):
        clock[0] += 0.02 if a.dtype == slow else 0.01

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    measured = machine.measure_precision()
    assert measured.best == best
    assert {round(measured.float32 / measured.bfloat16, 6)} <= {2.0, 0.5}


# ---- the self-check


def test_this_cpu_computes_rightly_and_in_seconds():
    check = machine.self_check("cpu")
    assert check.passed, str(check)
    assert max(check.logits, check.gradients, check.products) < 1e-4
    assert check.seconds < 20


def test_an_attention_that_is_wrong_in_one_head_fails_the_check(monkeypatch):
    right = F.scaled_dot_product_attention

    def wrong(q, k, v, **options):
        heads = right(q, k, v, **options)
        if q.dtype == torch.float32:  # the reference is computed in float64
            heads = torch.cat((heads[:, :-1], 1.1 * heads[:, -1:]), dim=1)
        return heads

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    check = machine.self_check("cpu")
    assert not check.passed and check.logits > machine.LIMIT and check.products < 1e-4


def test_a_gradient_that_is_wrong_fails_the_check(monkeypatch):
    right = F.silu

    class Lossy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 0.5 * gradient

    def wrong(x):
        return Lossy.apply(right(x)) if x.dtype == torch.float32 else right(x)

    monkeypatch.setattr(F, "silu", wrong)
    check = machine.self_check("cpu")
    assert not check.passed and check.gradients > machine.LIMIT and check.logits < 1e-4


@pytest.mark.parametrize("defect", ["columns beyond 32768", "sums beyond 32767", "not a number"])
def test_products_that_are_wrong_only_when_large_fail_the_check(monkeypatch, defect):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        product = right(a, b)
        if a.dtype != torch.float32:
            return product
        if defect == "columns beyond 32768" and product.shape[-1] > 32768:
            product[:, 32768:] = 0
        if defect == "sums beyond 32767" and a.shape[-1] > 32767:
            product = right(a[:, :32767], b[:32767])
        if defect == "not a number" and product.shape[0] > 1024:
            product[-1, -1] = math.nan
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    check = machine.self_check("cpu")
    assert not check.passed and check.products > machine.LIMIT and check.logits < 1e-4


def test_a_device_that_is_not_there_is_a_usage_error():
    with pytest.raises(UsageError) as error:
        machine.self_check("cuda:99")
    assert error.value.code == "E101" and "cpu" in error.value.found


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_computes_rightly():
    assert machine.self_check("cuda").passed

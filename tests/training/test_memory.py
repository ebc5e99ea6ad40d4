"""The memory cap with a fake GPU; test_gpu.py tests it on a real one."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest
import torch

from savant_ray.config import Config
from savant_ray.events import Notice
from savant_ray.model.transformer import n_parameters
from savant_ray.training import device as device_module
from savant_ray.training import loop
from savant_ray.training.device import (
    GIB,
    MARGIN_GB,
    MAX_OUTSIDE_GB,
    allocator_fraction,
    cap_memory,
    memory_used_gb,
    update_memory_cap,
)
from savant_ray.training.memory import OUTSIDE_GB, estimated_gb, expected_fit
from savant_ray.training.state import BatchFit
from tests.training.tiny import CPU, RecordingHost, local_batches, tiny_config, tiny_state

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("limit", "total", "outside", "expected"),
    [(10, 80, 0.5, 9.4), (10, 10, 0.4, 9.5), (24, 10, 0.4, 9.5), (1, 10, 2.0, 0.0)],
)
def test_memory_outside_the_allocator_counts_towards_the_limit(
    limit: float, total: float, outside: float, expected: float
) -> None:
    assert MARGIN_GB == 0.1
    assert allocator_fraction(limit, total, outside) * total == pytest.approx(expected)


def test_a_cpu_has_no_cap_and_reports_its_resident_size() -> None:
    assert "has no effect" in (cap_memory(CPU, 10.0) or "")
    before = memory_used_gb(CPU)
    with mmap.mmap(-1, 100 << 20) as kept:  # fresh pages: an allocator may have some left over
        kept.write(bytes(100 << 20))
        assert memory_used_gb(CPU) - before > 0.08


NEW_PAGES = """
import ctypes, resource, torch
from savant_ray.training.device import keep_freed_memory

keep_freed_memory(torch.device("cpu"))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(4 << 20) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_step_on_a_cpu_takes_the_memory_that_the_steps_before_have_freed() -> None:
    output = subprocess.run([sys.executable, "-c", NEW_PAGES], capture_output=True, text=True, check=True)
    assert int(output.stdout) < 1000  # in the last round, of 40,960 pages


class FakeNVML:
    """NVML on a machine with one GPU: the bytes that each process holds, the calls, and whether they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory: dict[int, int] = {}
        self.calls: list[str] = []
        self.fails_at = ""
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: self._call("init"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: self._call("handle"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: self._processes())

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _processes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.memory.items()]


class FakeGPU:
    """A GPU of 12 GiB: memory reserved by the allocator, and memory held outside it, in GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, by_nvml: float | None = None) -> None:
        self.total, self.reserved, self.outside, self.fraction = 12.0, 0.0, 0.5, 1.0
        for name, answer in {
            "get_device_properties": lambda device: SimpleNamespace(total_memory=int(self.total * GIB), uuid="7"),
            "memory_reserved": lambda device: int(self.reserved * GIB),
            "mem_get_info": lambda device: tuple(
                int(x * GIB) for x in (self.total - self.reserved - self.outside, self.total)
            ),
            "set_per_process_memory_fraction": self.set_fraction,
            "empty_cache": self.empty_cache,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        nvml = FakeNVML(monkeypatch)
        nvml.memory = {} if by_nvml is None else {os.getpid(): int(by_nvml * GIB)}

    def set_fraction(self, fraction: float, index: int | None) -> None:
        assert index is None or isinstance(index, int), "PyTorch refuses a device without a number"
        self.fraction = fraction

    def empty_cache(self) -> None:
        self.reserved = 1.0


def test_without_nvml_memory_that_is_not_free_counts_up_to_2_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGPU(monkeypatch)
    gpu.reserved = 3.0
    assert device_module.outside_allocator_gb(CUDA) == pytest.approx(0.5, abs=1e-6)
    gpu.outside = 7.0  # another process
    assert device_module.outside_allocator_gb(CUDA) == MAX_OUTSIDE_GB == 2.0
    FakeGPU(monkeypatch, by_nvml=3.25).reserved = 3.0
    assert device_module.outside_allocator_gb(CUDA) == pytest.approx(0.25, abs=1e-6), "NVML can tell processes apart"


@pytest.mark.parametrize("problem", ["cannot be initialized", "knows no such GPU", "does not see the process"])
def test_nvml_that_is_missing_or_does_not_see_the_process_is_not_used(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, nvml = FakeGPU(monkeypatch), FakeNVML(monkeypatch)
    if problem == "does not see the process":
        nvml.memory = {-1: 5 * GIB}
    else:
        nvml.memory, nvml.fails_at = {os.getpid(): 5 * GIB}, "handle"
        device_module.outside_allocator_gb(CUDA)  # after a failure it is initialized again
        nvml.fails_at = "init" if problem == "cannot be initialized" else "handle"
    assert device_module.outside_allocator_gb(CUDA) == pytest.approx(gpu.outside, abs=1e-6)


def test_nvml_is_initialized_once_and_again_only_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGPU(monkeypatch)
    nvml = FakeNVML(monkeypatch)
    nvml.memory = {os.getpid(): GIB}
    for _ in range(2):
        nvml.fails_at = "handle"
        device_module.outside_allocator_gb(CUDA)
        nvml.fails_at, nvml.calls = "", []
        assert [device_module.outside_allocator_gb(CUDA) for _ in range(3)] == [1.0, 1.0, 1.0]
        assert nvml.calls == ["init", "handle", "handle", "handle"]


def test_the_second_cap_subtracts_what_libraries_hold_and_frees_cached_blocks_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGPU(monkeypatch)
    assert cap_memory(CUDA, 10.0) is None
    assert gpu.fraction * gpu.total == pytest.approx(9.4, abs=1e-6)
    gpu.reserved = 9.0
    assert update_memory_cap(CUDA, 10.0) is None and gpu.reserved == 9.0
    gpu.outside, gpu.reserved = 0.9, 9.3
    note = update_memory_cap(CUDA, 10.0) or ""
    assert gpu.fraction * gpu.total == pytest.approx(9.0, abs=1e-6) and gpu.reserved == 1.0
    assert "libraries hold 0.9 GiB" in note and "leaves 9.0 of training.vram_limit_gb = 10" in note
    assert update_memory_cap(CPU, 10.0) is None


def under(limit_gb: float, **model: int) -> Config:
    return Config.from_dict({"model": model, "training": {"vram_limit_gb": limit_gb}})


def test_the_estimate_is_that_of_the_measured_step_and_the_larger_chunks_of_logits_since_then() -> None:
    config = under(10.0)
    fit = BatchFit.from_config(config, CUDA)
    assert 8.35 < estimated_gb(config, fit) < 8.35 + 0.85
    assert expected_fit(config) == fit, "it ran under 10 GiB without recomputation"


@pytest.mark.parametrize("model", [{}, {"n_loops": 24}, {"max_seq_len": 4096}, {"dim": 3072, "n_heads": 48}])
def test_more_memory_never_fits_less_and_the_estimate_stays_below_the_limit(model: dict[str, int]) -> None:
    speed = (0, False)
    for limit_gb in (4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 80.0):
        config = under(limit_gb, **model)
        fit = expected_fit(config)
        if fit is None:
            assert speed == (0, False)
            continue
        assert estimated_gb(config, fit) < limit_gb - OUTSIDE_GB
        assert (fit.rows, not fit.recompute_loops) >= speed
        speed = (fit.rows, not fit.recompute_loops)
    assert speed == (12, True)


def test_the_memory_is_estimated_for_the_largest_number_of_loops() -> None:
    deeper = Config.from_dict({"training": {"double_loops_fraction": 0.1}})
    twice = Config.from_dict({"model": {"n_loops": 2 * deeper.model.n_loops}})
    fits = [BatchFit.from_config(config, CUDA) for config in (deeper, twice)]
    assert estimated_gb(deeper, fits[0]) == estimated_gb(twice, fits[1]) > estimated_gb(Config(), fits[0])


def test_each_smaller_choice_needs_less_memory_and_a_model_larger_than_the_card_fits_nowhere() -> None:
    config = under(6.0, dim=2048, n_heads=32, max_seq_len=2048)
    fit = BatchFit.from_config(config, CUDA)
    estimates = [estimated_gb(config, fit)]
    while fit.rows > 1:
        fit = fit.smaller()
        estimates.append(estimated_gb(config, fit))
    assert estimates == sorted(estimates, reverse=True) and len(set(estimates)) == len(estimates)
    assert expected_fit(under(6.0, dim=4096, n_heads=64)) is None


def test_what_libraries_hold_is_subtracted_from_the_cap_after_the_first_step_and_after_each_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny_config().to_dict()
    settings["validation"]["every_steps"] = 4
    config, host = Config.from_dict(settings), RecordingHost()
    state = tiny_state(config)
    monkeypatch.setattr(
        loop, "update_memory_cap", lambda device, limit_gb: f"step {state.step}: {limit_gb:g} are too few"
    )
    loop.train(state, config, local_batches(state, config), host)
    notes = [event.text for event in host.events if isinstance(event, Notice)]
    assert notes == [f"rank 0: step {step}: 10 are too few" for step in (1, 4, 6)]


def test_the_sums_of_deterministic_steps_count_and_give_way_as_everything_else() -> None:
    config = under(10.0)
    settings = config.to_dict()
    settings["training"]["deterministic"] = True
    deterministic = Config.from_dict(settings)
    fit = BatchFit.from_config(config, CUDA)
    sums_gb = 4 * 4 * n_parameters(config.model) / GIB  # 16 micro-batches: four levels
    assert estimated_gb(deterministic, fit) == pytest.approx(estimated_gb(config, fit) + sums_gb)
    assert expected_fit(deterministic) == fit.smaller()


def test_the_peak_memory_of_a_process_does_not_include_that_of_its_parent() -> None:
    child = "import torch; from savant_ray.training.device import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    parent = (
        "import subprocess, sys; held = bytes(range(256)) * (4 * 10**6); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    printed = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    assert 0.05 < float(printed) < 0.9, "GiB; the parent has more"

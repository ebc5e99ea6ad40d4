"""The soak test detects growing memory, open files and step times, and nothing else."""

from __future__ import annotations

from tests.torture.soak import Sample, growth, slowdown


def looks(mib: float, files: int) -> list[Sample]:
    """Return samples of a driver whose memory and open files grow by this much from beginning to end."""
    return [Sample(5.0 * at, "driver", 400 + mib * at / 100, 50 + files * at // 100) for at in range(101)]


def test_constant_memory_and_step_times_pass_the_soak() -> None:
    assert list(growth(looks(mib=20, files=5))) == [] and list(slowdown([0.01, 0.012] * 500)) == []


def test_leaks_and_slower_steps_fail_the_soak() -> None:
    assert ["holds" in text for text in growth(looks(mib=200, files=0))] == [True]
    assert ["open files" in text for text in growth(looks(mib=0, files=30))] == [True]
    (message,) = slowdown([0.001 * (1 + step / 1000) for step in range(2000)])
    assert "ms at the beginning" in message

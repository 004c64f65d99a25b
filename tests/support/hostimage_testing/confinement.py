"""What a process of a job may do."""

from __future__ import annotations

import os

from hostimage_testing.processes import Process
from hostimaged.system.syscalls import Capability


def check_confined(process: Process, allowed: frozenset[Capability]) -> None:
    """``process`` can do what is ``allowed`` and no more, gains nothing by any program, and is polite."""
    assert Capability.SYS_ADMIN not in allowed
    status = process.status()
    if os.geteuid() == 0:
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            assert int(status[kind], 16) == _bits(allowed), (process.name, kind, status[kind])
    for kind in ("CapInh", "CapAmb"):
        assert int(status[kind], 16) & ~_bits(allowed) == 0, (process.name, kind)
    assert status["NoNewPrivs"] == "1", process.name
    assert process.nice == min(os.nice(0) + 10, 19), process.name


def _bits(capabilities: frozenset[Capability]) -> int:
    return sum(1 << capability for capability in capabilities)

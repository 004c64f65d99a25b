"""A scratch host: the plain directories of ``--root DIR``."""

from __future__ import annotations

from pathlib import Path

from hostimaged.system.paths import HostPaths

ACCEPT_ANYTHING = '{"default": [{"type": "insecureAcceptAnything"}]}'
BOOT_ID = "6fd4e9a2-0e0f-4c8e-9a8e-7a0c3a1b2c3d"


def scratch_host(
    root: Path,
    *,
    policy: str = ACCEPT_ANYTHING,
    registries: str = "",
    settings: str = 'verity = "opportunistic"\n',
) -> HostPaths:
    """Make the files that a host has before hostimaged first runs on it; returns its paths."""
    containers = root / "etc/containers"
    containers.mkdir(parents=True, exist_ok=True)
    (containers / "policy.json").write_text(policy)
    (containers / "registries.conf").write_text(registries)
    (root / "etc/hostimaged.toml").write_text(settings)
    boot_id = root / "proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True, exist_ok=True)
    boot_id.write_text(BOOT_ID + "\n")
    (root / "sysroot").mkdir(exist_ok=True)
    return HostPaths.scratch(root)

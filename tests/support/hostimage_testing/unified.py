"""Pulls in two stages without a daemon, and what podman makes of the store afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hostimage_testing.tools import Finished, require, run
from hostimaged.composefs.repository import Sharing, Verity
from hostimaged.oci.pull import PullResult
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage.fetch import Fetched, Wanted, fetch_image
from hostimaged.oci.storage.imports import import_image
from hostimaged.progress import Reporter, Silent
from hostimaged.system.paths import HostPaths

#: What podman's containers need on machines without a cgroup of their own, and nothing of the network.
RUN_OPTIONS = (
    "--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024",
    "--network", "none",
)  # fmt: skip
#: The mounts that bootc, too, makes for podman; $0 is the store, what follows is run.
_AS_BOOTC = """
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm &&
mkdir -p /run/bootc/storage /run/other && exec 3</run/bootc/storage &&
mount --bind "$0" /run/bootc/storage && exec "$@"
"""
_OURS = ("--root", "/run/bootc/storage", "--runroot", "/proc/self/fd/3")


@dataclass(frozen=True)
class Unified:
    """What the two stages gave."""

    fetched: Fetched
    result: PullResult


def fetch(host: HostPaths, reference: str, reporter: Reporter | None = None, **options: Any) -> Fetched:
    """The first stage; ``options`` are those of ``Wanted``."""
    return fetch_image(
        host,
        Wanted(ImageReference.parse(reference), **options),
        verity=Verity.OPPORTUNISTIC,
        lock_timeout=5,
        reporter=reporter or Silent(),
    )


def import_fetched(
    host: HostPaths, fetched: Fetched, reporter: Reporter | None = None, sharing: Sharing = Sharing.REQUIRE
) -> PullResult:
    """The second stage."""
    return import_image(
        host,
        fetched.reference,
        fetched.image_id,
        fetched.manifest_digest,
        verity=Verity.OPPORTUNISTIC,
        lock_timeout=5,
        reporter=reporter or Silent(),
        sharing=sharing,
    )


def pull_unified(host: HostPaths, reference: str, **options: Any) -> Unified:
    """Both stages, nothing copied."""
    fetched = fetch(host, reference, **options)
    return Unified(fetched, import_fetched(host, fetched))


def podman(host: HostPaths, *arguments: str, own: bool = True) -> Finished:
    """Real podman, run as bootc runs it and not by our code; the mounts end with it.

    Without ``own`` it has a store in memory, and that of the host is an additional one.
    """
    where = _OURS if own else (
        "--root", "/run/other/root", "--runroot", "/run/other/run", "--storage-driver", "overlay",
        "--storage-opt", "additionalimagestore=/run/bootc/storage",
    )  # fmt: skip
    return run(
        "unshare", "--mount", "--propagation", "private", "sh", "-c", _AS_BOOTC, str(host.store),
        require("podman"), *where, *arguments,
    )  # fmt: skip


def run_in_image(host: HostPaths, image: str, *command: str) -> str:
    """What ``command`` prints in a container of ``image``, by ``podman run`` with another store of its own.

    podman cannot run containers on the store itself: a run directory that is a descriptor is one for podman
    alone, and not for what it starts.
    """
    require("runc")
    return podman(host, "run", "--rm", "--pull=never", *RUN_OPTIONS, image, *command, own=False).out

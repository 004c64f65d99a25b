"""Where things are on a host. No other module names an absolute host path.

Nothing here touches the file system; a path that a caller's string is joined to is opened beneath its root by
``hostimaged.system.syscalls.open_beneath``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

#: Where a boot loader finds what is in /boot, if that is a directory of the root file system.
BOOT_IN_ROOT: Final = "/boot"
_STORAGE: Final = "var/lib/containers/storage"
#: Where podman finds the store of the host (``HostPaths.store``), in mounts that it alone sees (bootc).
STORE_ALIAS: Final = Path("/run/bootc/storage")
#: Where podman finds a private directory of the job that runs it, and skopeo what root's own store keeps for
#: the time of a boot: in the same mounts.
SHARED_PLACE: Final = Path("/run/bootc/job")
STORE_RUNS: Final = Path("/run/containers/storage")
#: What podman and skopeo find on the machine, unless their mounts show something else there: configuration,
#: where they keep things, and what is kept for the time of a boot.
CONTAINERS_CONFIGURATION: Final = Path("/etc/containers")
CONTAINERS_HOME: Final = Path("/var/lib/containers")
VOLATILE: Final = (Path("/run"), Path("/dev/shm"))  # noqa: S108 (hidden, not used)
#: How names of hosts are looked up; it may lead to what is volatile.
RESOLVER: Final = Path("/etc/resolv.conf")
#: Where a policy knows the files of a store (bootc).
LABELLED_STORE: Final = Path("/") / _STORAGE


@dataclass(frozen=True, slots=True)
class ContainersConfig:
    """Configuration of the containers stack, as skopeo reads it.

    ``explicit`` says that the files are given to skopeo by option (a scratch root); a live host leaves skopeo
    to its own search, save for the auth file. ``auth_files`` are candidates, the first that exists counts.
    """

    policy: Path
    registries: Path
    certs_dir: Path
    auth_files: tuple[Path, ...]
    explicit: bool
    #: root's containers-storage.
    storage: Path


@dataclass(frozen=True, slots=True)
class HostPaths:
    """The places of one host; made by ``live``, ``scratch`` or ``target``.

    ``physical_root`` holds the repository and all state; ``marker_dir`` the staged marker; ``run_dir`` our
    own volatile state. Facts about the running system (``cmdline``, ``mountinfo``, ``boot_id``, ``efivars``,
    ``selinux_enforce``, which exists if SELinux is on) are None where there is no running system to ask. The
    ``esp`` of a running host is known once it was looked for (``esp_sought``). ``next_root`` is where systemd
    looks for the root that a soft reboot starts. ``host_mounts`` is the table of mounts of the host's own
    namespace, and ``host_namespace`` stands for it; None if we are in it.
    """

    physical_root: Path
    boot: Path
    esp: Path | None
    etc: Path
    usr: Path
    run_dir: Path
    marker_dir: Path | None
    cmdline: Path | None
    mountinfo: Path | None
    boot_id: Path | None
    efivars: Path | None
    containers: ContainersConfig
    scratch_root: Path | None = None
    selinux_enforce: Path | None = None
    esp_sought: bool = False
    next_root: Path | None = None
    host_mounts: Path | None = None
    host_namespace: Path | None = None

    @classmethod
    def live(cls) -> Self:
        """The running host."""
        return replace(
            cls._below(Path("/"), containers=_live_containers()),
            # systemd's namespace is the host's: services have others, and we may be one.
            host_mounts=Path("/proc/1/mountinfo"),
            host_namespace=Path("/proc/1/ns/mnt"),
        )

    @classmethod
    def scratch(cls, root: Path) -> Self:
        """A host made of plain directories below ``root`` (option ``--root``)."""
        root = root.absolute()
        containers = ContainersConfig(
            policy=root / "etc/containers/policy.json",
            registries=root / "etc/containers/registries.conf",
            certs_dir=root / "etc/containers/certs.d",
            auth_files=_auth_files(root),
            explicit=True,
            storage=root / _STORAGE,
        )
        return cls._below(root, containers=containers, scratch_root=root, esp=root / "efi")

    @classmethod
    def target(cls, sysroot: Path, boot: Path, esp: Path | None) -> Self:
        """A host that does not run: an offline install below ``sysroot``."""
        return cls(
            physical_root=sysroot,
            boot=boot,
            esp=esp,
            etc=sysroot / "etc",
            usr=sysroot / "usr",
            run_dir=sysroot / "state/hostimaged/run",
            marker_dir=None,
            cmdline=None,
            mountinfo=None,
            boot_id=None,
            efivars=None,
            containers=_live_containers(),
        )

    @classmethod
    def _below(
        cls,
        root: Path,
        *,
        containers: ContainersConfig,
        scratch_root: Path | None = None,
        esp: Path | None = None,
    ) -> Self:
        return cls(
            physical_root=root / "sysroot",
            boot=root / "boot",
            esp=esp,
            etc=root / "etc",
            usr=root / "usr",
            run_dir=root / "run/hostimaged",
            marker_dir=root / "run/composefs",
            cmdline=root / "proc/cmdline",
            mountinfo=root / "proc/self/mountinfo",
            boot_id=root / "proc/sys/kernel/random/boot_id",
            efivars=root / "sys/firmware/efi/efivars",
            containers=containers,
            scratch_root=scratch_root,
            selinux_enforce=root / "sys/fs/selinux/enforce",
            next_root=root / "run/nextroot",
        )

    @property
    def boot_mounts(self) -> list[Path]:
        """Where the file systems that a host boots from are usually mounted: /boot, and the ESP."""
        return [self.boot, self.boot.with_name("efi"), self.boot / "efi"]

    @property
    def repository(self) -> Path:
        """The composefs repository."""
        return self.physical_root / "composefs"

    @property
    def store(self) -> Path:
        """The containers-storage that holds images of hosts with unified storage, and bound images."""
        return self.repository / "bootc/storage"

    @property
    def store_link(self) -> Path:
        """Leads to the directory of that store; bootc, and /usr/lib/bootc/storage of images, go this way."""
        return self.physical_root / "ostree/bootc"

    @property
    def store_runs(self) -> Path:
        """What podman keeps of that store while the host runs."""
        return self.run_dir.with_name("bootc") / "storage"

    @property
    def deployments(self) -> Path:
        """Holds a directory for each deployment."""
        return self.physical_root / "state/deploy"

    @property
    def state(self) -> Path:
        """Our own persistent state."""
        return self.physical_root / "state/hostimaged"

    @property
    def pulls(self) -> Path:
        """The rows of what was pulled, and from where."""
        return self.state / "pulls.json"

    @property
    def fetched_manifest(self) -> Path:
        """The manifest of what was last fetched into the store, if the store has none like it."""
        return self.state / "fetched.json"

    @property
    def update_policy(self) -> Path:
        """How far updates go without being asked, if somebody chose."""
        return self.state / "policy.json"

    @property
    def expected_boot(self) -> Path:
        """What the next boot is to start."""
        return self.state / "expected.json"

    @property
    def held_back(self) -> Path:
        """The deployment that is staged and not to be activated."""
        return self.state / "held-back.json"

    @property
    def failed_boots(self) -> Path:
        """Deployments that were to boot and did not."""
        return self.state / "failed-boots.json"

    @property
    def transaction(self) -> Path:
        """The journal of the operation under way, or interrupted."""
        return self.state / "transaction.json"

    @property
    def made_tags(self) -> Path:
        """Which tags of deployments were made here, not by bootc."""
        return self.state / "tags.json"

    @property
    def store_record(self) -> Path:
        """Which images of bootc's store need no time to be waited for, see ``host.storerecord``."""
        return self.state / "store.json"

    @property
    def collection_due(self) -> Path:
        """Is there from the moment a deployment went that left garbage until that is collected."""
        return self.state / "collection-due"

    @property
    def temporary(self) -> Path:
        """Private directories of running jobs; emptied by recovery."""
        return self.state / "tmp"

    @property
    def settings(self) -> tuple[Path, ...]:
        """The settings file, then the directories of drop-ins in rising order of precedence."""
        return (
            self.etc / "hostimaged.toml",
            self.usr / "lib/hostimaged.d",
            self.etc / "hostimaged.d",
        )

    @property
    def daemon_lock(self) -> Path:
        """Held exclusively by the daemon of this root."""
        return self.run_dir / "daemon.lock"

    @property
    def job_lock(self) -> Path:
        """Held exclusively by the worker of a mutating job."""
        return self.run_dir / "lock"

    @property
    def jobs_file(self) -> Path:
        """Job ids and running jobs, kept over restarts of the daemon within a boot."""
        return self.run_dir / "jobs.json"

    @property
    def holds_file(self) -> Path:
        """The hold on background jobs, kept over restarts of the daemon within a boot."""
        return self.run_dir / "hold.json"

    @property
    def boot_file(self) -> Path:
        """What was wrong with the last boot, for as long as this one lasts."""
        return self.run_dir / "boot.json"

    @property
    def updates_file(self) -> Path:
        """The last check of the tracked image, kept over restarts of the daemon within a boot."""
        return self.run_dir / "check.json"

    @property
    def sizes_file(self) -> Path:
        """The last measurement of sizes, kept over restarts of the daemon within a boot."""
        return self.run_dir / "sizes.json"

    @property
    def verified_file(self) -> Path:
        """How the last verification of the repository ended, kept over restarts within a boot."""
        return self.run_dir / "verified.json"


def _auth_files(root: Path) -> tuple[Path, ...]:
    """The auth files bootc passes, most specific first."""
    return (
        root / "run/ostree/auth.json",
        root / "etc/ostree/auth.json",
        root / "usr/lib/ostree/auth.json",
    )


def _live_containers() -> ContainersConfig:
    return ContainersConfig(
        policy=Path("/etc/containers/policy.json"),
        registries=Path("/etc/containers/registries.conf"),
        certs_dir=Path("/etc/containers/certs.d"),
        auth_files=_auth_files(Path("/")),
        explicit=False,
        storage=Path("/") / _STORAGE,
    )

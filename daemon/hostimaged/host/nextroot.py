"""Puts the root of a deployment together as its initramfs would, and places it whole, or not at all.

A program of its own (``python -m hostimaged.host.nextroot``), as it takes a process with one thread. It works
in a mount namespace that nobody else sees and that ends with it, whenever that is: nothing is left of an
assembly that failed or was killed. Only the finished tree goes, in one step, into the host's namespace::

    <target>/            a tmpfs to work in
        physical/        the physical root, writable
        image/           the EROFS image
        root/            what is placed: the overlay, its sysroot, etc and var
        volatile-*/      each a tmpfs for changes that end with the boot

Facts: boot-initramfs.md 3 to 5 (bootc 1.16). A detached mount can be a layer of an overlay since Linux 6.15
only, so layers are mounted somewhere first.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hostimaged.host.setuproot import MountMode
from hostimaged.system import mountcalls, syscalls
from hostimaged.system.loop import loop_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Mounts upon mounts that are taken away at most.
MAX_STACKED: Final = 16

_IMAGE: Final = "image"
_ROOT: Final = "root"
_PHYSICAL: Final = "physical"
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NAMESPACE: Final = "/proc/self/ns/mnt"


class Action(StrEnum):
    """What the program is to do."""

    #: Put a root together, and place it instead of what is there.
    PLACE = "place"
    #: Take away what is there.
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done; paths are absolute, in this program's namespace.

    ``target``: where the root is placed, a directory or nothing, in the namespace that the descriptor
    ``namespace`` stands for; -1 for this program's own. ``source``: what the root is called in the table of
    mounts, ``volatile_source`` the same of one whose changes end with the boot, "" for none of these.
    ``image``: descriptor of the EROFS image, whose digest was checked; ``verity``: whether the kernel is to
    check the digest of each file too. ``objects`` and ``state``, the deployment's directory, are below
    ``physical_root``.
    """

    action: Action
    target: str
    namespace: int = -1
    image: int = -1
    verity: bool = False
    source: str = ""
    volatile_source: str = ""
    physical_root: str = ""
    objects: str = ""
    state: str = ""
    etc: MountMode = MountMode.BIND
    var: MountMode = MountMode.BIND

    def render(self) -> str:
        """As the program's argument."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """From the program's argument."""
        found: dict[str, Any] = json.loads(text)
        for name, kind in (("action", Action), ("etc", MountMode), ("var", MountMode)):
            found[name] = kind(found[name])
        return cls(**found)


class Failed(Exception):
    """``doing`` did not work, for the reason ``code`` (errno), ``text``."""

    def __init__(self, doing: str, code: int, text: str) -> None:
        super().__init__(doing, code, text)
        self.doing, self.code, self.text = doing, code, text

    def render(self) -> str:
        """As the program prints it."""
        return json.dumps([self.doing, self.code, self.text])

    @classmethod
    def parse(cls, line: str) -> Failed | None:
        """From what the program printed; None if that is something else."""
        try:
            doing, code, text = json.loads(line)
        except (ValueError, TypeError):
            return None
        return cls(str(doing), code if isinstance(code, int) else 0, str(text))


@contextmanager
def _step(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(doing, error.errno or errno.EIO, error.strerror or "input/output error") from None


def run(plan: Plan) -> None:
    """Carry out a plan; changes the namespace of this process. Raises ``Failed``."""
    namespace = plan.namespace
    if namespace == -1:
        with _step("cannot look at the mounts"):
            namespace = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    if plan.action is Action.REMOVE:
        _remove(plan, namespace)
        return
    try:
        _begin(plan, namespace)
        tree = _Assembly(plan).tree()
        with _step(f"cannot place the root at {plan.target}"):
            mountcalls.enter_mounts(namespace)
            _place(tree, plan.target)
    except Failed:
        # An empty directory would be taken for a root.
        with suppress(Failed):
            _remove(plan, namespace)
        raise


def _begin(plan: Plan, namespace: int) -> None:
    """Take away what is there, make the directory, and go on in a namespace of this process.

    The first two in the namespace of the host, where nothing covers what can be written. An upper directory
    cannot serve two overlays, so that the old root goes before the new one is begun.
    """
    with _step(f"cannot make {plan.target}"):
        own = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mountcalls.enter_mounts(namespace)
            _take_away(plan.target)
            os.makedirs(plan.target, 0o755, exist_ok=True)
            mountcalls.enter_mounts(own)
        finally:
            os.close(own)
        syscalls.unshare_mounts()
        syscalls.mount("/", syscalls.MS_REC | syscalls.MS_PRIVATE)


def _remove(plan: Plan, namespace: int) -> None:
    with _step(f"cannot take away the root at {plan.target}"):
        mountcalls.enter_mounts(namespace)
        _take_away(plan.target)
    # systemd takes an empty directory for a root.
    with suppress(OSError):
        os.rmdir(plan.target)


def _take_away(target: str) -> None:
    for _ in range(MAX_STACKED):
        try:
            mountcalls.detach(target)
        except OSError as error:
            # EINVAL: it is no mount.
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise
    raise OSError(errno.EBUSY, "too many mounts lie upon each other")


def _place(tree: int, target: str) -> None:
    directory = os.open(target, _DIRECTORY)
    try:
        mountcalls.place_mount(tree, directory)
    finally:
        os.close(directory)


class _Assembly:
    """Works in the namespace of this process; all descriptors are left to its end, which is near."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def tree(self) -> int:
        """The whole root, not placed anywhere. Raises ``Failed``."""
        self._begin()
        self._mount_image()
        if self._plan.volatile_source:
            with _step("cannot make the root one whose changes are lost"):
                self._overlay(self._plan.volatile_source, self._open(_ROOT), self._volatile(_ROOT))
        self._mount_physical_root()
        self._mount_own("etc", self._plan.etc)
        self._mount_own("var", self._plan.var)
        with _step("cannot take the root over"):
            return mountcalls.clone_mount(self._open(_ROOT), recursive=True)

    def _begin(self) -> None:
        with _step(f"cannot use {self._plan.physical_root}"):
            # Before anything covers it.
            physical = mountcalls.clone_mount(os.open(self._plan.physical_root, _DIRECTORY))
            mountcalls.set_attributes(physical, remove=mountcalls.ATTR_RDONLY)
            _place(mountcalls.make_mount("tmpfs", options={"mode": "0700"}), self._plan.target)
            os.chdir(self._plan.target)
            for name in (_IMAGE, _ROOT, _PHYSICAL):
                os.mkdir(name, 0o700)
            _place(physical, _PHYSICAL)

    def _open(self, path: str) -> int:
        return os.open(path, _DIRECTORY | os.O_NOFOLLOW)

    def _mount_image(self) -> None:
        with _step("cannot mount the image"):
            _place(self._image(), _IMAGE)
        with _step("cannot mount the files of the image"):
            objects = self._below_physical(self._plan.objects)
            options = {"metacopy": "on", "redirect_dir": "on"}
            if self._plan.verity:
                options["verity"] = "require"
            image = self._open(_IMAGE)
            options["lowerdir"] = f"/proc/self/fd/{image}::/proc/self/fd/{objects}"
            overlay = mountcalls.make_mount(
                "overlay",
                source=self._plan.source,
                options=options,
                read_only=True,
                attributes=mountcalls.ATTR_RDONLY,
            )
            _place(overlay, _ROOT)

    def _image(self) -> int:
        """The mount of the EROFS image.

        A file can be mounted since Linux 6.12, though not on every file system. It may count as one of the
        levels that can lie upon each other, and with another overlay to come there is none to spare.
        """
        if not self._has_overlays:
            try:
                source = f"/proc/self/fd/{self._plan.image}"
                return mountcalls.make_mount("erofs", source=source, read_only=True)
            except OSError as error:
                if error.errno != errno.ENOTBLK:
                    raise
        with loop_device(self._plan.image) as device:
            return mountcalls.make_mount("erofs", source=device, read_only=True)

    @property
    def _has_overlays(self) -> bool:
        overlays = (MountMode.OVERLAY, MountMode.TRANSIENT)
        return bool(self._plan.volatile_source) or self._plan.etc in overlays or self._plan.var in overlays

    def _mount_physical_root(self) -> None:
        with _step("cannot mount the physical root in the new one"):
            try:
                directory = self._in_root("sysroot")
            except (FileNotFoundError, NotADirectoryError):
                # Such an image boots, and then nothing finds the physical root; the initramfs says nothing.
                return
            physical = mountcalls.clone_mount(self._open(_PHYSICAL))
            mountcalls.set_attributes(physical, add=mountcalls.ATTR_RDONLY)
            mountcalls.place_mount(physical, directory)

    def _mount_own(self, name: str, mode: MountMode) -> None:
        """Mount what the deployment has of its own as ``name``."""
        if mode is MountMode.NONE:
            return
        with _step(f"cannot mount /{name} of the deployment"):
            directory = self._in_root(name)
            if mode is MountMode.TRANSIENT:
                self._overlay("transient", directory, self._volatile(name))
                return
            # A link leads to the one /var of all deployments.
            own = self._below_physical(f"{self._plan.state}/{name}")
            if mode is MountMode.BIND:
                mountcalls.place_mount(mountcalls.clone_mount(own), directory)
            else:
                self._overlay("overlay", directory, own)

    def _volatile(self, name: str) -> int:
        """A new tmpfs."""
        place = f"volatile-{name}"
        os.mkdir(place, 0o700)
        _place(mountcalls.make_mount("tmpfs", options={"mode": "0755"}), place)
        return self._open(place)

    def _overlay(self, source: str, lower: int, changes: int) -> None:
        """Mount an overlay on ``lower`` whose upper and work directory are in ``changes``."""
        # The merged directory has the mode of the upper one.
        for name, mode in (("upper", 0o755), ("work", 0o700)):
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=changes)
                os.chmod(name, mode, dir_fd=changes)
        options = {
            "lowerdir": f"/proc/self/fd/{lower}",
            "upperdir": f"/proc/self/fd/{changes}/upper",
            "workdir": f"/proc/self/fd/{changes}/work",
        }
        mountcalls.place_mount(mountcalls.make_mount("overlay", source=source, options=options), lower)

    def _below_physical(self, path: str) -> int:
        """The directory ``path`` of the physical root, out of which no link leads."""
        relative = os.path.relpath(path, self._plan.physical_root)
        return syscalls.open_beneath(self._open(_PHYSICAL), relative, os.O_PATH | os.O_DIRECTORY)

    def _in_root(self, name: str) -> int:
        return os.open(f"{_ROOT}/{name}", _DIRECTORY | os.O_NOFOLLOW)


def main(argv: Sequence[str]) -> int:
    """Carry out the plan that is the only argument; a failure is a line on standard output."""
    try:
        run(Plan.parse(argv[0]))
    except Failed as failure:
        print(failure.render())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

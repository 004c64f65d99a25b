"""A deployment that is to be made: what its image brings, its entry, its kernel and its state directory.

Used by staging and by the first deployment. Nothing is written but by ``write_kernel`` and ``write_state``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.boot import bls
from hostimaged.boot.files import TreeFiles, content_size, open_content
from hostimaged.boot.grubcfg import MenuEntry
from hostimaged.boot.loader import uki_key
from hostimaged.boot.resources import Kernel
from hostimaged.host import etcseed, space, statedirs
from hostimaged.host.artifacts import boot_digest, read_pieces
from hostimaged.host.bootfs import directory, told
from hostimaged.host.bootwrite import kernel_entry, uki_entry
from hostimaged.host.etctree import read_image, subdirectory
from hostimaged.host.menu import MenuItem
from hostimaged.host.model import BootType
from hostimaged.host.setuproot import SetupRoot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.cmdline import Cmdline
    from hostimaged.composefs.tree import Directory, Leaf
    from hostimaged.host.bootimage import BootImage
    from hostimaged.host.model import HostState
    from hostimaged.host.origin import Origin
    from hostimaged.host.session import Session
    from hostimaged.ids import BootDigest


class NewDeployment:
    """The deployment of ``boot`` on the host ``state``; see the module.

    ``systemd_version`` is that of the host's ``bootctl``, None if unknown. ``share``: a kernel that is there
    may be started by its entry too.
    """

    def __init__(
        self,
        session: Session,
        state: HostState,
        boot: BootImage,
        *,
        systemd_version: int | None = None,
        share: bool = True,
    ) -> None:
        self._session = session
        self._state = state
        self._boot = boot
        self._repository = session.repository
        self._systemd_version = systemd_version
        self.id = boot.id
        self.tree: Directory = read_image(self._repository, boot.id)
        self.files = TreeFiles(self.tree, self._repository)
        self.setup = SetupRoot.load(self.files)
        self.boot_type = boot.resources.boot_type
        self.boot_digest = self._digest()
        self._shared = self._shared_kernel() if share else None

    def _digest(self) -> BootDigest:
        resources = self._boot.resources
        if not isinstance(resources, Kernel):
            return self._boot.uki.boot_digest
        return boot_digest(self._pieces(resources.vmlinuz), self._pieces(resources.initrd))

    def _pieces(self, leaf: Leaf) -> Iterator[bytes]:
        return read_pieces(lambda: open_content(leaf, self._repository))

    def _shared_kernel(self) -> str | None:
        """The artifact of another deployment with the same kernel and initrd, which a live entry starts."""
        if self.boot_type is not BootType.BLS:
            return None
        kernels = self._session.kernels(self._state)
        complete = {found.name for found in kernels.found() if found.complete}
        for row in self._state.deployments:
            # Only what the live menu starts: a staged one goes before this one comes.
            if row.live is None or row.live.artifact not in complete:
                continue
            if row.boot_digest is not None and row.boot_digest != self.boot_digest:
                continue
            # The origin says what was written; whether it still is there is worth reading it once.
            if kernels.boot_digest(row.live.artifact) == self.boot_digest:
                return row.live.artifact
        return None

    def require_space(self, *, freed: int = 0) -> None:
        """Raise ``NoSpace`` unless there is room on both file systems for what is really missing.

        ``freed``: bytes on the boot file system that are made free before.
        """
        etc = subdirectory(self.tree, b"etc")
        seed = etcseed.seed_bytes(etc, self.setup.etc)
        space.require(self._session.paths.physical_root, seed, "the new /etc")
        resources = self._boot.resources
        if not isinstance(resources, Kernel):
            target = self._session.ukis(self._state).directory
            space.require(target, content_size(resources.leaf) - freed, "the unified kernel image")
        elif self._shared is None:
            size = content_size(resources.vmlinuz) + content_size(resources.initrd)
            space.require(self._session.kernels(self._state).directory, size - freed, "the kernel")

    def menu_item(self, options: Cmdline, *, is_menu: bool) -> MenuItem:
        """What the boot loader is told; ``options`` name this deployment, and do not count for a UKI."""
        release = self._boot.os_release
        fallback = str(self.id)
        version = release.entry_version(fallback)
        if self.boot_type is BootType.BLS:
            entry = kernel_entry(
                self.id,
                title=release.title(fallback),
                version=version,
                options=str(options),
                directory=bls.kernel_directory(self._shared or self.id),
                prefix=self._state.dirs.prefix,
            )
            return MenuItem(self.id, entry, release.id)
        label = release.boot_label(fallback)
        if is_menu:
            return MenuItem(self.id, MenuEntry.new(label, self.id), release.id)
        key = uki_key(self._state.dirs.loader, self._systemd_version)
        prefix = f"/{bls.UKI_DIRECTORY}"
        return MenuItem(
            self.id, uki_entry(self.id, title=label, version=version, key=key, prefix=prefix), release.id
        )

    def write_kernel(self, addons: tuple[str, ...] = ()) -> None:
        """Write kernel and initrd unless they are there, or the UKI with those of its add-ons."""
        resources = self._boot.resources
        if isinstance(resources, Kernel):
            if self._shared is None:
                self._session.kernels(self._state).write(
                    self.id, self._pieces(resources.vmlinuz), self._pieces(resources.initrd)
                )
            return
        wanted = [
            (addon.name, self._pieces(addon.leaf)) for addon in resources.addons if addon.name in addons
        ]
        self._session.ukis(self._state).write(self.id, self._pieces(resources.leaf), wanted)

    def write_state(self, origin: Origin, *, seed_var: bool = False) -> None:
        """Make the state directory, in place of one that is left over and that nothing refers to.

        With ``seed_var`` the shared ``/var`` gets the image's, if it is empty.
        """
        session = self._session
        statedirs.remove(session.paths, session.work, self.id)
        built = statedirs.begin(session.paths, session.work, self.id)
        with told("cannot make the state of the deployment"), directory(built) as target:
            etcseed.seed_etc(self.tree, self._repository, target, self.setup.etc, session.reporter)
        session.reporter.at("stage.etc")
        if seed_var:
            with (
                told("cannot make /var"),
                directory(statedirs.shared_var(session.paths).parent) as shared,
            ):
                etcseed.seed_var(self.tree, self._repository, shared, session.reporter)
        statedirs.finish(session.paths, built, self.id, origin)

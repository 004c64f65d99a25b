"""The first deployment into an empty root, as image builders and installers make it (operations.md 6).

The same code as staging, with no deployment to start from: the entries are live at once. No boot loader is
installed and nothing is partitioned.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot import grubcfg, kargs
from hostimaged.boot.cmdline import Cmdline, Parameter, validate_arguments
from hostimaged.boot.loader import Bootloader
from hostimaged.boot.resources import Kernel
from hostimaged.boot.selinux import Policy
from hostimaged.errors import HostimageError, InvalidArgs, PreconditionFailed
from hostimaged.host import bootfs, bootimage, boundimages, boundstore, journal, statedirs
from hostimaged.host.bootfs import told
from hostimaged.host.bootsets import GrubSets, digest
from hostimaged.host.journal import Operation, Transaction
from hostimaged.host.menu import live_menu
from hostimaged.host.model import BootType
from hostimaged.host.newdeployment import NewDeployment
from hostimaged.host.origin import Origin, origin_name
from hostimaged.host.recover import recover, settle
from hostimaged.host.storelabels import of_policy
from hostimaged.host.tags import tag_deployment
from hostimaged.oci.storage import owned
from hostimaged.progress import Phase
from hostimaged.system import durable

if TYPE_CHECKING:
    from hostimaged.host.bootimage import BootImage
    from hostimaged.host.bootsets import BootSetStore
    from hostimaged.host.imgref import OriginReference
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import ManifestDigest

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = (
    "deploy.image",
    "deploy.tagged",
    "deploy.bound",
    "deploy.journal",
    "deploy.kernel",
    "stage.etc",
    "deploy.state",
    "deploy.entries",
    "deploy.done",
)

#: The link by which bootc finds its storage, and its text (deployments.md 2.1).
_BOOTC_LINK: Final = "ostree/bootc"
_BOOTC_LINK_TEXT: Final = "../composefs/bootc"
_SELINUX: Final = "security.selinux"
#: How file_contexts(5) tells kinds of files apart.
_KINDS: Final = {stat.S_IFDIR: ord("d"), stat.S_IFREG: ord("-"), stat.S_IFLNK: ord("l")}


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What to deploy: a manifest in the repository, under the reference that updates follow.

    ``arguments`` are kernel arguments, ``addons`` names of add-ons of the UKI. ``esp_uuid`` is needed for
    GRUB with a UKI: the UUID of the file system on the ESP. ``bound``: whether the images that it is bound to
    are fetched; without them the host would have to, at its first boot.
    """

    manifest_digest: ManifestDigest
    reference: OriginReference
    arguments: tuple[str, ...] = ()
    addons: tuple[str, ...] = ()
    esp_uuid: str = ""
    bound: bool = True


def deploy(session: Session, request: DeployRequest) -> dict[str, Any]:
    """Make the first deployment; ``result`` is ``deployed``.

    Raises ``PreconditionFailed`` if there is one already, and what staging raises.
    """
    grub = session.bootloader in (Bootloader.GRUB, Bootloader.GRUB_CC)
    arguments = validate_arguments(request.arguments, grub=grub)
    session.reporter.phase(Phase.STAGING)
    boot = bootimage.generate(session.repository, request.manifest_digest, session.reporter)
    _check_request(boot, request, arguments)
    session.reporter.at("deploy.image")
    tag_deployment(session.paths, session.repository, request.manifest_digest)
    session.repository.sync()
    session.reporter.at("deploy.tagged")
    state = settle(session)
    if state.sets.entries or state.visible:
        raise PreconditionFailed("there is a deployment already: stage the image instead")
    new = NewDeployment(session, state, boot, share=False)
    new.require_space()
    bound = boundimages.read(new.tree, session.repository) if request.bound else ()
    fetched = boundstore.fetch(session.paths, bound, session.reporter)
    session.reporter.at("deploy.bound")
    is_menu = new.boot_type is BootType.UKI and state.dirs.grub_dir is not None
    if state.sets.is_menu and not is_menu:
        raise PreconditionFailed(
            f"{state.dirs.grub_dir}/{GrubSets.LIVE} hides the entry that the image needs: remove it"
        )
    item = new.menu_item(_options(session, boot, new, arguments), is_menu=is_menu)
    # Entries of other systems stay.
    menu = live_menu(state).having([item])
    files = menu.render(state.dirs.loader, is_menu=is_menu)
    path = session.paths.transaction
    transaction = Transaction(
        Operation.DEPLOY,
        session.boot_id,
        session.now(),
        before=digest(None if state.sets.live is None else state.sets.live.raw),
        after=files.digest,
        target=new.id,
        state_dir=True,
    )
    try:
        journal.write(path, transaction)
        session.reporter.at("deploy.journal")
        new.write_kernel(request.addons)
        session.reporter.at("deploy.kernel")
        origin = Origin.new(request.reference, new.boot_type, new.boot_digest, request.manifest_digest)
        new.write_state(origin, seed_var=True)
        _label(session, new)
        _link_storage(session)
        # The entry is on another file system, and must not be there before what it needs.
        session.repository.sync()
        session.reporter.at("deploy.state")
        _prepared_store(session, state, request, is_menu=is_menu).replace_live(files)
        session.steady().reporter.at("deploy.entries")
    except (HostimageError, OSError):
        with contextlib.suppress(HostimageError, OSError):
            recover(session.steady(), session.state())
        raise
    journal.remove(path)
    session.steady().reporter.at("deploy.done")
    return {
        "result": "deployed",
        "deployment": str(new.id),
        "manifest-digest": str(request.manifest_digest),
        "kernel-arguments": item.options,
        **fetched,
    }


def _check_request(boot: BootImage, request: DeployRequest, arguments: tuple[Parameter, ...]) -> None:
    resources = boot.resources
    if isinstance(resources, Kernel):
        if request.addons:
            raise InvalidArgs("the image has no unified kernel image that add-ons could belong to")
        return
    if arguments:
        raise InvalidArgs("kernel arguments are inside the unified kernel image, and signed with it")
    known = {addon.name for addon in resources.addons}
    for name in request.addons:
        if name not in known:
            raise InvalidArgs(f"the image has no add-on {name!r} of its unified kernel image")


def _options(
    session: Session, boot: BootImage, new: NewDeployment, arguments: tuple[Parameter, ...]
) -> Cmdline:
    """``rw``, as state is written on the physical root; the caller's; the deployment; the image's own."""
    optional = not session.repository.secure
    own = kargs.read_kargs(new.files, boot.architecture)
    return (
        Cmdline((Parameter("rw"),))
        .adding(arguments)
        .with_composefs(new.id, optional=optional)
        .adding(map(Parameter, own))
    )


def _prepared_store(
    session: Session, state: HostState, request: DeployRequest, *, is_menu: bool
) -> BootSetStore:
    """Where the entry goes, with what is taken for granted there: for GRUB with UKIs the UUID of the ESP.

    Entries of other systems do not decide it: what the image boots by does.
    """
    loader, grub = state.dirs.loader_dir, state.dirs.grub_dir
    if not is_menu or grub is None:
        if loader is not None:
            with told(f"cannot make {loader}"):
                bootfs.make_directory(loader)
        return session.store(state)
    with told(f"cannot write {grub / 'efiuuid.cfg'}"):
        bootfs.make_directory(grub)
        if request.esp_uuid:
            durable.replace_file(grub / "efiuuid.cfg", grubcfg.serialise_efiuuid(request.esp_uuid))
    return GrubSets(grub)


def _link_storage(session: Session) -> None:
    link = session.paths.physical_root / _BOOTC_LINK
    with told(f"cannot make {link}"):
        link.parent.mkdir(mode=0o755, exist_ok=True)
        if not os.path.lexists(link):
            link.symlink_to(_BOOTC_LINK_TEXT)


def _label(session: Session, new: NewDeployment) -> None:
    """Label what lies around the seeded trees, whose content has the image's own labels."""
    policy = Policy.load(new.files)
    if policy is None:
        return
    root = session.paths.physical_root
    state, var = statedirs.state_directory(session.paths, new.id), statedirs.shared_var(session.paths)
    around = {path for path in (*state.parents, *var.parents) if path != root and path.is_relative_to(root)}
    for path in (*sorted(around), state, state / statedirs.VAR, state / origin_name(new.id)):
        with told(f"cannot label {path}"):
            kind = stat.S_IFMT(path.lstat().st_mode)
            label = policy.label(b"/" + os.fsencode(path.relative_to(root)), _KINDS[kind])
            if label is not None:
                os.setxattr(path, _SELINUX, label, follow_symlinks=False)
    if owned.exists(session.paths):
        # With all that is in it by now: podman knows nothing of the policy here.
        owned.ensure(session.paths, session.work, session.reporter.at, of_policy(policy))

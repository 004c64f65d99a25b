"""Done without the daemon: ``hostimaged finalize`` at shutdown, ``boot-check``, ``deploy`` and ``collect``.

All take the locks that jobs take, and tell failures in one line on standard error.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.loader import Bootloader
from hostimaged.composefs.repository import RepositoryMissing, Verity
from hostimaged.errors import BootLoaderError, HostimageError, NoSpace, ReadOnly, from_os_error
from hostimaged.host import espmount, marker
from hostimaged.host.imgref import OriginReference
from hostimaged.host.session import DEFAULT_LOCK_TIMEOUT, open_session
from hostimaged.host.space import with_places
from hostimaged.ids import ManifestDigest
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Phase, Silent
from hostimaged.system import mounts
from hostimaged.system.boot import read_boot_id
from hostimaged.system.locks import FileLock
from hostimaged.system.paths import HostPaths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hostimaged.host.collectplan import Rules

#: Seconds: what the unit's five minutes to stop leave after a minute for the work.
FINALIZE_LOCK_TIMEOUT: Final = 240.0
#: Seconds: nobody waits for it.
_BOOT_CHECK_LOCK_TIMEOUT: Final = 60.0
#: As in the settings file.
_MAX_DAYS: Final = 36500
_DISK_UUIDS: Final = Path("/dev/disk/by-uuid")
_UUID: Final = re.compile(r"[0-9A-Za-z-]{1,64}\Z")


class _Told(Silent):
    """Says on standard error what is being done."""

    def phase(self, phase: Phase) -> None:
        """See ``Reporter``."""
        print(f"hostimaged: {phase}", file=sys.stderr)

    def message(self, text: str) -> None:
        """See ``Reporter``."""
        print(f"hostimaged: {text}", file=sys.stderr)


def finalize_main(argv: Sequence[str]) -> int:
    """``hostimaged finalize``: exit code 0 also if nothing is staged, else that of the error."""
    parser = argparse.ArgumentParser(
        prog="hostimaged finalize",
        description="Activate the staged deployment; to be run at shutdown.",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="a host made of plain files below DIR")
    _add_lock_timeout(parser, FINALIZE_LOCK_TIMEOUT)
    arguments = parser.parse_args(argv)
    paths = HostPaths.live() if arguments.root is None else HostPaths.scratch(arguments.root)
    return _told(paths, lambda: _finalize(paths, arguments.lock_timeout))


def _add_lock_timeout(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--lock-timeout",
        type=float,
        default=default,
        metavar="SECONDS",
        help="how long to wait for other programs (default: %(default)s)",
    )


def _finalize(paths: HostPaths, lock_timeout: float) -> dict[str, Any]:
    if paths.marker_dir is None or not os.path.lexists(paths.marker_dir / marker.NAME):
        # Most shutdowns: nothing is mounted, locked or read for them.
        return {"result": "nothing-staged"}
    from hostimaged.host import softreboot
    from hostimaged.host.finalize import finalize

    deadline = time.monotonic() + lock_timeout

    def patience() -> float:
        return max(deadline - time.monotonic(), 0)

    # Whatever happens from here on: a soft reboot never starts an /etc that is not merged, or being removed.
    withdrawn = softreboot.withdraw_staged(paths)
    _make_writable(paths)
    _make_run_directory(paths)
    try:
        with (
            FileLock(paths.job_lock, timeout=patience(), what=str(paths.job_lock)),
            open_session(paths, Silent(), lock_timeout=patience()) as session,
        ):
            session.lock_timeout = patience()
            result = finalize(session)
            if withdrawn is not None and result["result"] == "finalized":
                softreboot.place_activated(session, withdrawn)
            return result
    except RepositoryMissing:
        return {"result": "nothing-staged"}


def _make_run_directory(paths: HostPaths) -> None:
    try:
        paths.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"cannot make {paths.run_dir}") from error


def _make_writable(paths: HostPaths) -> None:
    """Of a running host, for this process alone; what cannot be is told when it is written to."""
    if paths.scratch_root is not None:
        return
    for path in (paths.physical_root, *paths.boot_mounts):
        with suppress(OSError):
            mounts.make_writable(path)


def boot_check_main(argv: Sequence[str]) -> int:
    """``hostimaged boot-check``: exit code 0 whatever it finds, which is told on standard error too."""
    parser = argparse.ArgumentParser(
        prog="hostimaged boot-check",
        description="Compare what runs with what was to be booted; to be run after each boot.",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="a host made of plain files below DIR")
    arguments = parser.parse_args(argv)
    paths = HostPaths.live() if arguments.root is None else HostPaths.scratch(arguments.root)
    return _told(paths, lambda: _boot_check(paths))


def _boot_check(paths: HostPaths) -> dict[str, Any]:
    from hostimaged.host import bootcheck
    from hostimaged.host.lastshutdown import last_words

    if paths.scratch_root is None:
        with suppress(OSError):
            mounts.make_writable(paths.physical_root)
    _make_run_directory(paths)
    # A daemon that runs already might be staging.
    with (
        FileLock(paths.job_lock, timeout=_BOOT_CHECK_LOCK_TIMEOUT, what=str(paths.job_lock)),
        _with_entries(paths) as places,
    ):
        found = bootcheck.check(places, read_boot_id(paths.boot_id), int(time.time()), last_words)
    if message := found.get("message"):
        print(f"hostimaged: {message}", file=sys.stderr)
    return found


@contextmanager
def _with_entries(paths: HostPaths) -> Iterator[HostPaths]:
    """``paths`` with the ESP; without, what runs can still be compared, and standard error tells."""
    with ExitStack() as ends:
        try:
            found = ends.enter_context(espmount.reached(paths))
        except BootLoaderError as error:
            print(f"hostimaged: {error.message}; what was staged is not looked at", file=sys.stderr)
            found = paths
        yield found


def deploy_main(argv: Sequence[str]) -> int:
    """``hostimaged deploy``: exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(
        prog="hostimaged deploy",
        description="Make the first deployment in an empty root, without boot loader or partitions.",
    )
    parser.add_argument("image", metavar="IMAGE", help="where to pull from, as transport:name")
    for name, what in (
        ("sysroot", "the mounted physical root"),
        ("boot", "the mounted boot directory of GRUB"),
        ("esp", "the mounted EFI system partition"),
        ("root", "in place of these three: a host made of plain files below DIR"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=what)
    parser.add_argument("--target-image", metavar="REF", help="what updates follow (default: IMAGE)")
    parser.add_argument(
        "--karg", action="append", default=[], metavar="A", help="a kernel argument; may be repeated"
    )
    parser.add_argument("--bootloader", choices=[str(each) for each in Bootloader], default="systemd")
    parser.add_argument("--verity", choices=[str(each) for each in Verity], default="require")
    parser.add_argument(
        "--uki-addon", action="append", default=[], metavar="N", help="an add-on to install; may be repeated"
    )
    parser.add_argument("--esp-uuid", default="", metavar="UUID", help="of the ESP, for GRUB with UKIs")
    parser.add_argument(
        "--bound-images",
        choices=("pull", "skip"),
        default="pull",
        help="what to do about container images that IMAGE is bound to (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    paths = _target(parser, arguments)
    return _told(paths, lambda: _deploy(paths, arguments))


def _target(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> HostPaths:
    """The places to deploy to; wrong usage ends the program."""
    places = [arguments.sysroot, arguments.boot, arguments.esp]
    if arguments.root is not None:
        if any(place is not None for place in places):
            parser.error("--root stands in place of --sysroot, --boot and --esp")
        return HostPaths.scratch(arguments.root)
    if any(place is None for place in places):
        parser.error("--sysroot, --boot and --esp are required, or --root")
    sysroot, boot, esp = (place.absolute() for place in places)
    return HostPaths.target(sysroot, boot, esp)


def _deploy(paths: HostPaths, arguments: argparse.Namespace) -> dict[str, Any]:
    # Not for the finalizer, which has little time.
    from hostimaged.host.deploy import DeployRequest, deploy
    from hostimaged.oci.pull import pull_image

    source = ImageReference.parse(arguments.image)
    target = source if arguments.target_image is None else ImageReference.parse(arguments.target_image)
    _make_run_directory(paths)
    reporter = _Told()
    with FileLock(paths.job_lock, timeout=0, what=str(paths.job_lock)):
        pulled = pull_image(
            paths,
            source,
            expect_digest=None,
            verity=Verity(arguments.verity),
            lock_timeout=0,
            reporter=reporter,
        )
        request = DeployRequest(
            ManifestDigest(str(pulled.manifest_digest)),
            OriginReference.of(target),
            tuple(arguments.karg),
            tuple(arguments.uki_addon),
            arguments.esp_uuid or ("" if paths.esp is None else _find_uuid(paths.esp)),
            bound=arguments.bound_images == "pull",
        )
        with open_session(paths, reporter, bootloader=Bootloader(arguments.bootloader)) as session:
            return deploy(session, request)


def _find_uuid(esp: Path) -> str:
    """UUID of the file system that is mounted at ``esp``, as udev knows it; "" if it does not."""
    with suppress(OSError):
        device = esp.stat().st_dev
        for link in _DISK_UUIDS.iterdir():
            if link.stat().st_rdev == device and _UUID.match(link.name):
                return link.name
    return ""


def collect_main(argv: Sequence[str]) -> int:
    """``hostimaged collect``: exit code 0 also if nothing is removed, else that of the error."""
    # Not for the finalizer, which has little time.
    from hostimaged.host.collectplan import Rules

    rules = Rules()
    parser = argparse.ArgumentParser(
        prog="hostimaged collect",
        description="Collect garbage on the disk of a host that does not run.",
    )
    parser.add_argument(
        "--sysroot", type=Path, metavar="DIR", required=True, help="the mounted physical root"
    )
    parser.add_argument(
        "--boot", type=Path, metavar="DIR", help="the mounted boot directory of GRUB (default: SYSROOT/boot)"
    )
    parser.add_argument(
        "--esp", type=Path, metavar="DIR", help="the mounted EFI system partition (default: BOOT/efi)"
    )
    parser.add_argument(
        "--bootloader",
        choices=[str(each) for each in Bootloader],
        help="whose boot entries count (default: those that are there)",
    )
    parser.add_argument(
        "--keep-pulled",
        type=_days,
        default=rules.keep_pulled,
        metavar="DAYS",
        help="how long images stay that were pulled and not deployed (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    _add_lock_timeout(parser, DEFAULT_LOCK_TIMEOUT)
    arguments = parser.parse_args(argv)
    rules = replace(rules, keep_pulled=arguments.keep_pulled)
    paths = _collected(arguments)
    return _told(paths, lambda: _collect(paths, arguments, rules), tell=_tell_collected)


def _days(text: str) -> int:
    with suppress(ValueError):
        if 0 <= (days := int(text)) <= _MAX_DAYS:
            return days
    raise argparse.ArgumentTypeError(f"not a number from 0 to {_MAX_DAYS}: {text!r}")


def _collected(arguments: argparse.Namespace) -> HostPaths:
    """The host to collect on."""
    sysroot = arguments.sysroot.absolute()
    boot = sysroot / "boot" if arguments.boot is None else arguments.boot.absolute()
    esp = boot / "efi" if arguments.esp is None else arguments.esp.absolute()
    return HostPaths.target(sysroot, boot, esp)


def _collect(paths: HostPaths, arguments: argparse.Namespace, rules: Rules) -> dict[str, Any]:
    from hostimaged.host.offline import collect_offline, refuse_running

    refuse_running(paths.physical_root, HostPaths.live())
    if not arguments.dry_run:
        # Not before it is known to be the root of a host: nothing is left where there is none.
        if not paths.repository.is_dir():
            raise RepositoryMissing(path=paths.repository)
        _make_run_directory(paths)
    return collect_offline(
        paths,
        rules,
        bootloader=None if arguments.bootloader is None else Bootloader(arguments.bootloader),
        lock_timeout=arguments.lock_timeout,
        preview=arguments.dry_run,
        reporter=Silent(),
    )


def _tell_collected(result: dict[str, Any]) -> None:
    for reason in result.get("reasons", ()):
        print(f"hostimaged: {reason}", file=sys.stderr)
    keys = ("objects-removed", "objects-bytes", "boot-bytes", "deployments-kept")
    print(" ".join([result["result"], *(f"{key}={result[key]}" for key in keys if key in result)]))


def _tell(result: dict[str, Any]) -> None:
    print(" ".join(str(result[key]) for key in ("result", "deployment") if key in result))


def _told(
    paths: HostPaths,
    work: Callable[[], dict[str, Any]],
    tell: Callable[[dict[str, Any]], None] = _tell,
) -> int:
    try:
        result = work()
    except HostimageError as failure:
        error = with_places(failure, paths) if isinstance(failure, (NoSpace, ReadOnly)) else failure
        print(f"hostimaged: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hostimaged: {error.hint}", file=sys.stderr)
        return error.exit_code
    tell(result)
    return 0

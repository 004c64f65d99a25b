"""What is fuzzed of a host's state: origins, markers, sidecars, mounts, and facts of the running system.

See ``targets.py``, which registers these functions.
"""

from __future__ import annotations

from collections.abc import Callable

from hostimaged.boot.esp import mount_at, parse_mountinfo
from hostimaged.errors import BootLoaderError, DamagedState, HostimageError, InvalidArgs
from hostimaged.host import origin as origins
from hostimaged.host.booted import booted_from
from hostimaged.host.imginfo import ImgInfo
from hostimaged.host.imgref import OriginReference
from hostimaged.host.marker import Marker
from hostimaged.host.setuproot import SetupRoot, SetupRootError
from hostimaged.ids import BootDigest, ManifestDigest
from hostimaged.oci.times import microseconds, utc_text


def origin(data: bytes) -> None:
    """An origin: what is written of it is read as the same, also with more in it."""
    found = origins.Origin.parse(data, "x.origin")
    assert origins.Origin.parse(found.serialise(), "x.origin").serialise() == found.serialise()
    if found.reference is not None:
        assert OriginReference.parse(str(found.reference)) == found.reference
        assert found.reference.image is None or str(found.reference.image)
    digest = ManifestDigest("sha256:" + "a" * 64)
    try:
        more = found.with_manifest_digest(digest).with_boot_digest(BootDigest("b" * 64))
    except InvalidArgs:
        return
    again = origins.Origin.parse(more.serialise(), "x.origin")
    assert (again.manifest_digest, again.boot_digest) == (digest, BootDigest("b" * 64))
    assert (again.reference, again.boot_type) == (found.reference, found.boot_type)


def marker(data: bytes) -> None:
    """The marker of what is staged."""
    found = Marker.parse(data)
    assert Marker.parse(found.serialise()) == found


def imginfo(data: bytes) -> None:
    """The sidecar of old, and the time in it."""
    found = ImgInfo.parse(data, "x.imginfo")
    assert found.manifest.config_digest.hex
    created = found.config.created or ""
    normal = utc_text(created)
    assert normal is None or microseconds(normal) == microseconds(created)


def facts(data: bytes) -> None:
    """The kernel's command line, and after a zero byte the table of mounts."""
    cmdline, _, table = data.partition(b"\0")
    found = booted_from(cmdline.decode("utf-8", "surrogateescape"), mount_at(parse_mountinfo(table), b"/"))
    assert found is None or found.soft_rebooted == (found.id != found.cmdline_id)


def setup_root(data: bytes) -> None:
    """The configuration of the initramfs; as nobody else reads it, it is read twice."""
    found = SetupRoot.parse(data)
    text = f"etc.mount = '{found.etc}'\nroot.transient = {found.transient_root}\n"
    if found.var_given:
        text += f"var.mount = '{found.var}'\n"
    assert SetupRoot.parse(text.lower().encode()) == found


FUNCTIONS: list[tuple[Callable[[bytes], None], tuple[type[HostimageError], ...], int]] = [
    (origin, (DamagedState,), 4 << 10),
    (marker, (DamagedState,), 1 << 10),
    (imginfo, (DamagedState,), 8 << 10),
    (facts, (BootLoaderError,), 4 << 10),
    (setup_root, (SetupRootError,), 4 << 10),
]

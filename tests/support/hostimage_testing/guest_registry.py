"""A registry on the host's loopback that guests reach by a name of their own, with verified TLS.

The network of a guest leads nowhere (``restrict=on``) but to one forwarded address, at which each connection
is joined to the registry's port. Images of guests know name, address and certificate (``files``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.registry import Certificate, Registry, running_registry
from hostimage_testing.tools import require, run

#: As guests call it.
HOST = "registry.test:5000"
#: What guests that have a network follow: a tag, which tests move from version to version.
FOLLOWED = f"docker://{HOST}/os:latest"
_NAME, _PORT = HOST.split(":")
_ADDRESS, _GUEST_ADDRESS, _NETWORK = "10.0.2.100", "10.0.2.15", "10.0.2.0/24"
_DAYS = "3650"
#: Without a request for an address: that takes seconds.
_INTERFACE = f"""\
[Match]
Type=ether

[Network]
Address={_GUEST_ADDRESS}/24
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


def certificate(cache: Path) -> Certificate:
    """The registry's certificate, made once and kept in ``cache``; it is its own authority."""
    found = Certificate(cache / "registry.crt", cache / "registry.key")
    if not (found.certificate.exists() and found.key.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        names = f"subjectAltName=DNS:{_NAME},IP:127.0.0.1"
        argv = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        argv += ["-days", _DAYS, "-subj", f"/CN={_NAME}", "-addext", names]
        run(require("openssl"), *argv, "-keyout", found.key, "-out", found.certificate)
    return found


def files(known: Certificate) -> dict[str, str]:
    """What an image has for the network and the registry, by path."""
    return {
        "etc/hosts": f"127.0.0.1 localhost\n{_ADDRESS} {_NAME}\n",
        "etc/systemd/network/10-guest.network": _INTERFACE,
        f"etc/containers/certs.d/{HOST}/ca.crt": known.certificate.read_text(),
    }


@dataclass(frozen=True)
class GuestRegistry:
    """A running registry; ``images`` has a layout for each version."""

    registry: Registry
    images: Path

    @property
    def network(self) -> list[str]:
        """What the emulator is told of the network."""
        socat = f"cmd:{require('socat')} STDIO TCP:{self.registry.host}"
        forward = f"guestfwd=tcp:{_ADDRESS}:{_PORT}-{socat}"
        return [
            *("-netdev", f"user,id=net,restrict=on,net={_NETWORK},{forward}"),
            # Without its ROM: nothing is to be booted from there.
            *("-device", "virtio-net-pci,netdev=net,romfile="),
        ]

    def offer(self, version: str, layout: Path | None = None, name: str = "os") -> None:
        """Let the tag be of this version, which is in its own layout unless another is given.

        ``name``: of the repository, if it is not the one that guests follow.
        """
        source = f"oci:{layout or self.images / version}:latest"
        target = f"docker://{self.registry.host}/{name}:latest"
        certificates = ["--dest-cert-dir", str(self.registry.certificates)]
        run(require("skopeo"), "--insecure-policy", "copy", "--quiet", "--preserve-digests",
            *certificates, source, target, timeout=600)  # fmt: skip


@contextlib.contextmanager
def running(directory: Path, known: Certificate, images: Path) -> Iterator[GuestRegistry]:
    """Start the registry, which keeps its data below ``directory``; stopped at the end."""
    with running_registry(directory, known) as registry:
        yield GuestRegistry(registry, images)

"""Which signature requirement applies to an image: the look-up of containers-policy.json(5).

Nothing is verified here. The look-up says whether an image may be fetched by a way that checks no signatures;
where it may not, skopeo enforces the policy, reading the same file. The scopes are those of containers-image
5.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import SignatureRejected
from hostimaged.oci.reference import ImageReference, Transport

if TYPE_CHECKING:
    from pathlib import Path

#: A policy names scopes and keys; inline key data is a few KiB each.
MAX_POLICY: Final = 1 << 20
_ACCEPT: Final = "insecureAcceptAnything"
_REJECT: Final = "reject"
#: Requirements that a signature has to meet.
_SIGNED: Final = frozenset({"signedBy", "sigstoreSigned"})
_PATH_SCOPED: Final = frozenset({Transport.OCI, Transport.OCI_ARCHIVE, Transport.DIR})


@dataclass(frozen=True, slots=True)
class Requirements:
    """The requirements that apply to one image: all of them must be met."""

    types: tuple[str, ...]

    @property
    def accepts_anything(self) -> bool:
        """Whether no signature is asked for, so that any way of fetching will do."""
        return all(kind == _ACCEPT for kind in self.types)

    @property
    def demands_signature(self) -> bool:
        """Whether an image without a valid signature is refused for certain."""
        return not _SIGNED.isdisjoint(self.types)

    @property
    def rejects(self) -> bool:
        """Whether no signature could help."""
        return _REJECT in self.types


#: Some requirement applies, and skopeo has to find out which.
_UNRESOLVED: Final = Requirements(("",))


class _Malformed(ValueError):
    """Not the form of containers-policy.json(5)."""


def requirement(policy_file: Path, reference: ImageReference) -> Requirements:
    """The requirements ``policy_file`` has for ``reference``.

    Raises ``SignatureRejected`` when the file is missing, unreadable or malformed: without a policy nothing
    says that an image may be trusted.
    """
    default, transports = _load(policy_file)
    scopes = transports.get(reference.transport.value, {})
    if reference.transport is Transport.CONTAINERS_STORAGE and any(scopes):
        # Its scopes begin with the place of the store, which only the storage library knows.
        return _UNRESOLVED
    for scope in [*_scopes(reference), ""]:
        if scope in scopes:
            return scopes[scope]
    return default


def _load(policy_file: Path) -> tuple[Requirements, dict[str, dict[str, Requirements]]]:
    """The default, and for each transport its scopes."""
    policy = _read(policy_file)
    try:
        transports = policy.pop("transports", {})
        default = _requirements(policy.pop("default"))
        if policy or not isinstance(transports, dict):
            raise _Malformed
        return default, {
            transport: {scope: _requirements(value) for scope, value in scopes.items()}
            for transport, scopes in transports.items()
        }
    except (_Malformed, KeyError, AttributeError):
        raise SignatureRejected(f"the signature policy {policy_file} is not valid") from None


def _requirements(value: Any) -> Requirements:
    if not isinstance(value, list) or not value:
        raise _Malformed
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise _Malformed
        if item["type"] in (_ACCEPT, _REJECT) and len(item) != 1:
            raise _Malformed
    return Requirements(tuple(item["type"] for item in value))


def _read(policy_file: Path) -> dict[str, Any]:
    try:
        with policy_file.open("rb") as file:
            raw = file.read(MAX_POLICY + 1)
    except FileNotFoundError:
        raise SignatureRejected(f"there is no signature policy: {policy_file} does not exist") from None
    except OSError as error:
        raise SignatureRejected(
            f"the signature policy {policy_file} cannot be read: {error.strerror}"
        ) from None
    if len(raw) > MAX_POLICY:
        raise SignatureRejected(f"the signature policy {policy_file} is larger than {MAX_POLICY} bytes")
    try:
        policy = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        policy = None
    if not isinstance(policy, dict):
        raise SignatureRejected(f"the signature policy {policy_file} is not valid")
    return policy


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # containers-image rejects a policy with duplicate keys, and so hides no rule behind another.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _scopes(reference: ImageReference) -> list[str]:
    """Scopes that may apply, most specific first, without the transport's own default."""
    if reference.transport in _PATH_SCOPED:
        return _path_scopes(os.path.realpath(reference.path))
    named = reference.named
    if named is None:
        return []
    scopes = [str(named), named.repository]
    name = named.repository
    while "/" in name:
        name = name.rpartition("/")[0]
        scopes.append(name)
    host = name.partition(":")[0]
    while "." in host:
        host = host.partition(".")[2]
        scopes.append("*." + host)
    return scopes


def _path_scopes(path: str) -> list[str]:
    # The path itself and its parents, "/" excepted: that is the transport's default, written "".
    scopes = []
    while path and path != "/":
        scopes.append(path)
        path = os.path.dirname(path)
    return scopes

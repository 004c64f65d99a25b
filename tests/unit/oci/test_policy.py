"""Which requirement of policy.json applies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostimaged.errors import SignatureRejected
from hostimaged.oci.policy import MAX_POLICY, requirement
from hostimaged.oci.reference import ImageReference

ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
DIGEST = "sha256:" + "a" * 64


def signed(name: str) -> list[dict[str, Any]]:
    return [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": f"/{name}"}]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tmp_path / "policy.json"


def kinds(policy: Path, reference: str, **content: Any) -> tuple[str, ...]:
    policy.write_text(json.dumps({"default": REJECT} | content))
    return requirement(policy, ImageReference.parse(reference)).types


def test_default(policy: Path) -> None:
    policy.write_text(json.dumps({"default": ACCEPT}))
    found = requirement(policy, ImageReference.parse("docker://x"))
    assert found.accepts_anything
    assert not found.rejects
    policy.write_text(json.dumps({"default": [*ACCEPT, *REJECT]}))
    found = requirement(policy, ImageReference.parse("docker://x"))
    assert found.rejects
    assert not found.accepts_anything, "all requirements must be met"


@pytest.mark.parametrize(
    ("requirements", "demanded"),
    [
        (ACCEPT, False),
        (REJECT, False),
        (signed("key"), True),
        ([{"type": "sigstoreSigned", "keyPath": "/key"}], True),
        ([*ACCEPT, *signed("key")], True),
        ([{"type": "somethingNew"}], False),
    ],
)
def test_what_demands_a_signature(policy: Path, requirements: list[dict[str, Any]], demanded: bool) -> None:
    policy.write_text(json.dumps({"default": requirements}))
    assert requirement(policy, ImageReference.parse("docker://x")).demands_signature is demanded


def test_most_specific_docker_scope_counts(policy: Path) -> None:
    """Taking away the scope that matched, the next more general one matches."""
    order = [
        "sub.example.com:5000/ns/repo:tag",
        "sub.example.com:5000/ns/repo",
        "sub.example.com:5000/ns",
        "sub.example.com:5000",
        "*.example.com",
        "*.com",
        "",
    ]
    scopes = {scope: [{"type": f"t{i}"}] for i, scope in enumerate(order)}
    for i, scope in enumerate(order):
        found = kinds(policy, "docker://sub.example.com:5000/ns/repo:tag", transports={"docker": scopes})
        assert found == (f"t{i}",)
        del scopes[scope]
    assert kinds(policy, "docker://sub.example.com:5000/ns/repo:tag", transports={"docker": {}}) == (
        "reject",
    )


def test_docker_scopes_that_do_not_match(policy: Path) -> None:
    for scope in (
        "example",
        "repo",
        "*.example.com:5000",
        "sub.example.com",
        "sub.example.com:5000/ns/rep",
        "com",
    ):
        transports = {"docker": {scope: ACCEPT}}
        assert kinds(policy, "docker://sub.example.com:5000/ns/repo", transports=transports) == ("reject",)


def test_docker_scope_is_the_expanded_name(policy: Path) -> None:
    transports = {"docker": {"docker.io/library/busybox": ACCEPT, "busybox": signed("x")}}
    assert kinds(policy, "docker://busybox", transports=transports) == ("insecureAcceptAnything",)
    transports = {"docker": {f"a.io/b@{DIGEST}": ACCEPT}}
    assert kinds(policy, f"docker://a.io/b@{DIGEST}", transports=transports) == ("insecureAcceptAnything",)


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "dir"])
def test_path_scopes(policy: Path, tmp_path: Path, transport: str) -> None:
    place = tmp_path / "a/b"
    place.mkdir(parents=True)
    reference = f"{transport}:{place}"
    for scope in (place, place.parent, tmp_path):
        assert kinds(policy, reference, transports={transport: {str(scope): ACCEPT}}) == (
            "insecureAcceptAnything",
        )
    assert kinds(policy, reference, transports={transport: {str(tmp_path / "a/bc"): ACCEPT}}) == ("reject",)
    assert kinds(policy, reference, transports={transport: {"/": ACCEPT}}) == ("reject",)
    assert kinds(policy, reference, transports={"docker": {"": ACCEPT}}) == ("reject",)


def test_path_scope_is_without_links(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "trusted").symlink_to("real")
    reference = f"oci:{tmp_path / 'trusted'}:v1"
    assert kinds(policy, reference, transports={"oci": {str(tmp_path / "trusted"): ACCEPT}}) == ("reject",)
    assert kinds(policy, reference, transports={"oci": {str(tmp_path / "real"): ACCEPT}}) == (
        "insecureAcceptAnything",
    )


def test_transports_without_scopes_of_their_own(policy: Path) -> None:
    transports = {
        "docker-archive": {"": ACCEPT},
        "docker-daemon": {"": ACCEPT, "docker.io/library/x": signed("k")},
    }
    assert kinds(policy, "docker-archive:/x:y", transports=transports) == ("insecureAcceptAnything",)
    assert kinds(policy, "docker-daemon:x:1", transports=transports) == ("signedBy",)
    assert kinds(policy, f"docker-daemon:{DIGEST}", transports=transports) == ("insecureAcceptAnything",)


def test_storage_scopes_are_left_to_skopeo(policy: Path) -> None:
    storage = {"": ACCEPT}
    assert kinds(policy, "containers-storage:x", transports={"containers-storage": storage}) == (
        "insecureAcceptAnything",
    )
    policy.write_text(
        json.dumps(
            {"default": ACCEPT, "transports": {"containers-storage": {"[overlay@/x]": REJECT, "": ACCEPT}}}
        )
    )
    found = requirement(policy, ImageReference.parse("containers-storage:x"))
    assert not found.demands_signature, "nobody knows which scope applies"
    assert not found.accepts_anything
    assert not found.rejects


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "{}", '{"default": []}', '{"default": {}}', '{"default": [{}]}',
        '{"default": [{"type": 1}]}', '{"default": [{"type": "insecureAcceptAnything", "x": 1}]}',
        '{"default": [{"type": "insecureAcceptAnything"}], "other": 1}',
        '{"default": [{"type": "insecureAcceptAnything"}], "transports": []}',
        '{"default": [{"type": "insecureAcceptAnything"}], "transports": {"oci": []}}',
        '{"default": [{"type": "insecureAcceptAnything"}], "transports": {"oci": {"/x": []}}}',
        '{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_policy_rejects(policy: Path, text: str) -> None:
    policy.write_text(text)
    with pytest.raises(SignatureRejected, match="not valid"):
        requirement(policy, ImageReference.parse("docker://x"))


def test_no_policy_rejects(policy: Path) -> None:
    with pytest.raises(SignatureRejected, match=r"no signature policy: .*policy.json does not exist"):
        requirement(policy, ImageReference.parse("docker://x"))
    policy.mkdir()
    with pytest.raises(SignatureRejected, match="cannot be read"):
        requirement(policy, ImageReference.parse("docker://x"))


def test_policy_is_bounded(policy: Path) -> None:
    policy.write_bytes(b" " * (MAX_POLICY + 1))
    with pytest.raises(SignatureRejected, match="larger than"):
        requirement(policy, ImageReference.parse("docker://x"))

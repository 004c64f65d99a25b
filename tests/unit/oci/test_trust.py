"""Which tracked images may be followed without a password."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hostimaged.oci.reference import ImageReference
from hostimaged.oci.trust import Trust, source_trust, weak_component
from hostimaged.system.paths import HostPaths

ANYTHING = {"type": "insecureAcceptAnything"}
SIGNED = {"type": "sigstoreSigned", "keyPath": "/etc/pki/key.pub"}
INSECURE = '[[registry]]\nlocation = "registry.example"\ninsecure = true\n'
OURS = frozenset({os.geteuid()})


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    """A host that accepts any image and has no registries.conf."""
    made = HostPaths.scratch(tmp_path)
    made.containers.policy.parent.mkdir(parents=True)
    policy(made, ANYTHING)
    return made


def policy(paths: HostPaths, *default: object, **scopes: object) -> None:
    paths.containers.policy.write_text(json.dumps({"default": default, "transports": {"docker": scopes}}))


def trust(paths: HostPaths, reference: str = "docker://registry.example/os:1") -> Trust:
    return source_trust(ImageReference.parse(reference), paths, owners=OURS)


def test_a_registry_with_verified_tls_is_trusted(paths: HostPaths) -> None:
    assert trust(paths) == Trust(True, "the registry is authenticated by TLS")


def test_an_insecure_registry_is_not(paths: HostPaths) -> None:
    paths.containers.registries.write_text(INSECURE)
    assert trust(paths) == Trust(
        False, "registries.conf allows the registry, or a mirror of it, without verified TLS"
    )
    assert trust(paths, "docker://other.example/os").trusted


def test_a_drop_in_counts(paths: HostPaths) -> None:
    drop_ins = paths.containers.registries.with_name("registries.conf.d")
    drop_ins.mkdir()
    (drop_ins / "local.conf").write_text(INSECURE)
    assert not trust(paths).trusted


def test_the_vendors_file_can_take_trust_and_not_give_it(paths: HostPaths) -> None:
    vendor = paths.usr / "share/containers"
    vendor.mkdir(parents=True)
    (vendor / "registries.conf").write_text(INSECURE)
    assert not trust(paths).trusted
    # Only a version that reads the vendor's file would take the more special entry in it.
    (vendor / "registries.conf").write_text('[[registry]]\nlocation = "registry.example/os"\n')
    paths.containers.registries.write_text(INSECURE)
    assert not trust(paths).trusted


def test_a_signature_makes_up_for_tls(paths: HostPaths) -> None:
    paths.containers.registries.write_text(INSECURE)
    policy(paths, ANYTHING, **{"registry.example": [SIGNED]})
    assert trust(paths) == Trust(True, "the image has to be signed")
    policy(paths, ANYTHING, **{"registry.example": [ANYTHING, SIGNED]})
    assert trust(paths).trusted
    policy(paths, SIGNED, **{"registry.example/os": [ANYTHING]})
    assert not trust(paths).trusted


@pytest.mark.parametrize("requirements", [[{"type": "reject"}], [SIGNED, {"type": "reject"}]])
def test_an_image_that_the_policy_rejects_is_not_trusted(
    paths: HostPaths, requirements: list[object]
) -> None:
    policy(paths, *requirements)
    assert trust(paths) == Trust(False, "the signature policy rejects the image")


def test_a_requirement_that_is_not_known_gives_no_trust(paths: HostPaths) -> None:
    paths.containers.registries.write_text(INSECURE)
    policy(paths, {"type": "somethingNew"})
    assert not trust(paths).trusted


def test_damaged_configuration_gives_no_trust_and_says_why(paths: HostPaths) -> None:
    paths.containers.registries.write_text("[[registry]]\n")
    assert not trust(paths).trusted
    assert str(paths.containers.registries) in trust(paths).reason
    paths.containers.registries.unlink()
    paths.containers.policy.write_text("{}")
    assert not trust(paths).trusted
    assert str(paths.containers.policy) in trust(paths).reason
    paths.containers.policy.unlink()
    assert not trust(paths).trusted


@pytest.mark.parametrize("reference", ["containers-storage:localhost/os:1", "docker-daemon:os:1"])
def test_stores_whose_writers_are_not_known_are_not_trusted(paths: HostPaths, reference: str) -> None:
    policy(paths, SIGNED)
    assert not trust(paths, reference).trusted


@pytest.mark.parametrize("transport", ["oci", "dir", "oci-archive", "docker-archive"])
def test_local_files_in_a_directory_of_everybody_are_not_trusted(paths: HostPaths, transport: str) -> None:
    """The way to them is checked from "/" on, and temporary directories are everybody's."""
    shared = paths.etc / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    image = shared / "image"
    image.mkdir()
    for name in ("index.json", "manifest.json"):
        (image / name).write_text("{}")
    found = source_trust(ImageReference.parse(f"{transport}:{image}"), paths, owners=frozenset({0}) | OURS)
    assert not found.trusted
    assert "can be written by others than root" in found.reason


def test_a_file_of_the_system_is_trusted(paths: HostPaths) -> None:
    """As the real rule is used: root's, from "/" on."""
    program = os.path.realpath("/bin/sh")
    found = source_trust(ImageReference.parse(f"oci-archive:{program}"), paths)
    assert found == Trust(True, "only root can write to the image")


def test_an_image_that_is_not_there_is_not_trusted(paths: HostPaths) -> None:
    found = source_trust(ImageReference.parse("oci:/usr:1"), paths)
    assert not found.trusted
    assert found.reason == "/usr/index.json cannot be examined: No such file or directory"


class TestComponents:
    """The walk along a path, below a root of the test's own."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "srv/images/os").mkdir(parents=True)
        (tmp_path / "srv/images/os/index.json").write_text("{}")
        for directory in (tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())):
            directory.chmod(0o755)
        (tmp_path / "srv/images/os/index.json").chmod(0o644)
        return tmp_path

    def weak(self, root: Path, path: str = "/srv/images/os/index.json", owners: frozenset[int] = OURS) -> str:
        return weak_component(path, owners, root) or ""

    def test_a_path_of_ours_alone_is_strong(self, root: Path) -> None:
        assert self.weak(root) == ""

    @pytest.mark.parametrize(
        "component", ["", "srv", "srv/images", "srv/images/os", "srv/images/os/index.json"]
    )
    @pytest.mark.parametrize("bits", [0o020, 0o002, 0o1002])
    def test_every_component_counts(self, root: Path, component: str, bits: int) -> None:
        weak = root / component
        weak.chmod(weak.stat().st_mode | bits)
        assert self.weak(root) == f"/{component} can be written by others than root"

    def test_the_owner_counts(self, root: Path) -> None:
        assert self.weak(root, owners=frozenset({os.geteuid() + 1})) == "/ does not belong to root"

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    @pytest.mark.parametrize("component", ["srv", "srv/images/os/index.json"])
    def test_the_owner_of_every_component_counts(self, root: Path, component: str) -> None:
        os.chown(root / component, 65534, -1)
        assert self.weak(root) == f"/{component} does not belong to root"

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_the_owner_of_a_link_counts(self, root: Path) -> None:
        (root / "link").symlink_to("srv/images/os/index.json")
        os.chown(root / "link", 65534, -1, follow_symlinks=False)
        assert self.weak(root, "/link") == "/link does not belong to root"

    @pytest.mark.parametrize("target", ["images/os", "/srv/images/os", "../srv/./images//os/", "images/os/."])
    def test_links_are_followed_and_what_they_lead_through_counts(self, root: Path, target: str) -> None:
        (root / "srv/current").symlink_to(target)
        assert self.weak(root, "/srv/current/index.json") == ""
        (root / "srv/images").chmod(0o777)
        assert self.weak(root, "/srv/current/index.json") == "/srv/images can be written by others than root"

    def test_a_loop_of_links_ends(self, root: Path) -> None:
        (root / "a").symlink_to("b")
        (root / "b").symlink_to("a")
        assert "too many symbolic links" in self.weak(root, "/a/index.json")

    def test_what_is_not_there_raises(self, root: Path) -> None:
        with pytest.raises(FileNotFoundError):
            self.weak(root, "/srv/none/index.json")
        with pytest.raises(NotADirectoryError):
            self.weak(root, "/srv/images/os/index.json/more")

"""How skopeo is started and what follows from its version, against a double that records what it is given."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.host import scratch_host
from hostimaged.errors import (
    DigestMismatch,
    ProgramMissing,
    SignatureRejected,
    StorageError,
    UnsupportedImage,
)
from hostimaged.oci.models import Descriptor
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.skopeo import SkopeoSource, copy_to_directory, open_image
from hostimaged.oci.source import ImageSource, open_source
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

DOUBLE = """#!{python}
import json, os, socket, sys
here = os.path.dirname(os.path.abspath(__file__))
plan = json.load(open(here + "/plan.json"))
with open(here + "/calls.jsonl", "a") as log:
    log.write(json.dumps({{"argv": sys.argv[1:], "environment": dict(os.environ)}}) + "\\n")
if "copy" in sys.argv:
    if "fatal" in plan:
        print('time="x" level=fatal msg="%s"' % plan["fatal"], file=sys.stderr)
        sys.exit(1)
    open(sys.argv[-1].removeprefix("dir:") + "/manifest.json", "w").write("copied")
    sys.exit(0)
peer = socket.socket(fileno=int(sys.argv[sys.argv.index("--sockfd") + 1]))
writers = {{}}
while packet := peer.recv(65536):
    request = json.loads(packet)
    method = request["method"]
    if method == "Shutdown" or method == plan.get("die"):
        print(plan.get("last words", ""), file=sys.stderr)
        break
    answer = plan.get(method, {{}})
    message = {{"success": "error" not in answer, "value": answer.get("value"), "pipeid": 0}}
    message["error"] = answer.get("error", "")
    if "data" in answer:
        reader, writer = os.pipe()
        message["pipeid"] = writer
        socket.send_fds(peer, [json.dumps(message).encode()], [reader])
        os.close(reader)
        os.write(writer, answer["data"].encode())
        continue
    if method == "OpenImage":
        with open(here + "/opened", "w") as log:
            log.write(request["args"][0])
    if method == "FinishPipe":
        os.close(request["args"][0])
    peer.send(json.dumps(message).encode())
"""
REFERENCE = ImageReference.parse("docker://registry.example:5000/os:v1")
SIGNED = '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/key"}]}'


class Double:
    """The stand-in for skopeo on PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program = directory / "skopeo"
        program.write_text(DOUBLE.format(python=sys.executable))
        program.chmod(0o755)
        self.plan(Initialize={"value": "0.2.3"}, OpenImage={"value": 1})

    def plan(self, **answers: Any) -> None:
        answers = {"Initialize": {"value": "0.2.3"}, "OpenImage": {"value": 1}} | answers
        (self.directory / "plan.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "calls.jsonl").read_text().splitlines()]

    @property
    def opened(self) -> str:
        return (self.directory / "opened").read_text()


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return Double(directory)


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "host")


def opened(paths: HostPaths, work_dir: Path, *, verify: bool = False) -> SkopeoSource:
    return open_image(REFERENCE, paths.containers, work_dir, Silent(), verify=verify, silence=20)


def test_environment_and_options(
    double: Double, paths: HostPaths, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/root/auth.json")
    monkeypatch.setenv("SECRET", "x")
    with opened(paths, work_dir):
        pass
    call = double.calls[0]
    environment = call["environment"]
    assert environment.pop("PATH").startswith(str(double.directory))
    assert environment.pop("https_proxy") == "http://proxy.example"
    assert environment.pop("LC_ALL") == "C.UTF-8"
    assert environment.pop("HOME") == environment.pop("TMPDIR") == str(work_dir)
    assert set(environment) <= {"LC_CTYPE"}, "nothing else is passed on"
    argv = call["argv"]
    at = argv.index("experimental-image-proxy")
    assert argv[:at] == [
        "--policy", str(paths.containers.policy), "--registries-conf", str(paths.containers.registries),
    ]  # fmt: skip
    assert argv[at + 1] == "--sockfd"
    assert argv[at + 3 :] == ["--no-creds"]
    assert double.opened == str(REFERENCE)


def test_configuration_of_a_scratch_root(double: Double, paths: HostPaths, work_dir: Path) -> None:
    auth = paths.containers.auth_files[1]
    auth.parent.mkdir(parents=True)
    auth.write_text("{}")
    paths.containers.registries.unlink()
    certificates = paths.containers.certs_dir / "registry.example:5000"
    certificates.mkdir(parents=True)
    with opened(paths, work_dir):
        pass
    argv = double.calls[0]["argv"]
    assert argv[argv.index("--registries-conf") + 1] == os.devnull
    assert argv[argv.index("--authfile") + 1] == str(auth)
    assert argv[argv.index("--cert-dir") + 1] == str(certificates)
    assert "--no-creds" not in argv


def test_live_host_leaves_the_search_to_skopeo(double: Double, work_dir: Path) -> None:
    containers = HostPaths.live().containers
    with open_image(REFERENCE, containers, work_dir, Silent(), verify=False):
        pass
    argv = double.calls[0]["argv"]
    assert argv[:2] == ["--policy", "/etc/containers/policy.json"]
    assert not {"--registries-conf", "--no-creds", "--cert-dir"} & set(argv)


def test_old_proxy_never_opens_what_needs_a_signature(
    double: Double, paths: HostPaths, work_dir: Path
) -> None:
    with opened(paths, work_dir, verify=True):
        assert double.opened == f"dir:{work_dir}/copy"
    copy = double.calls[1]["argv"]
    at = copy.index("copy")
    assert copy[:2] == ["--policy", str(paths.containers.policy)]
    assert copy[at + 1 :] == [
        "--quiet", "--preserve-digests", "--src-no-creds", str(REFERENCE), f"dir:{work_dir}/copy",
    ]  # fmt: skip


def test_enforcing_proxy_opens_the_image_itself(double: Double, paths: HostPaths, work_dir: Path) -> None:
    for version in ("0.2.6", "0.2.8", "0.2.10"):
        double.plan(Initialize={"value": version})
        with opened(paths, work_dir, verify=True):
            assert double.opened == str(REFERENCE)
    assert not (work_dir / "copy").exists()


@pytest.mark.parametrize("version", ["0.2.2", "0.1.9", "1.0.0", "0.3.0", "", "x", None, {}])
def test_version_that_will_not_do(double: Double, paths: HostPaths, work_dir: Path, version: Any) -> None:
    double.plan(Initialize={"value": version})
    with pytest.raises(StorageError, match="this version of skopeo"):
        opened(paths, work_dir)


def test_refused_copy_leaves_nothing(double: Double, paths: HostPaths, work_dir: Path) -> None:
    double.plan(fatal="Source image rejected: A signature was required, but no signature exists")
    with pytest.raises(SignatureRejected, match="A signature was required"):
        copy_to_directory(REFERENCE, paths.containers, work_dir, Silent())
    assert list(work_dir.iterdir()) == []


def test_policy_decides_before_anything_is_started(double: Double, tmp_path: Path, work_dir: Path) -> None:
    paths = scratch_host(tmp_path / "strict", policy='{"default": [{"type": "reject"}]}')
    with pytest.raises(SignatureRejected, match="rejects docker://"):
        open_source(REFERENCE, paths, work_dir, Silent())
    paths.containers.policy.unlink()
    with pytest.raises(SignatureRejected, match="there is no signature policy"):
        open_source(REFERENCE, paths, work_dir, Silent())
    assert not (double.directory / "calls.jsonl").exists()


@pytest.mark.parametrize("look", [False, True])
def test_a_policy_that_demands_no_signature_is_not_enough_for_who_does(
    double: Double, paths: HostPaths, tmp_path: Path, work_dir: Path, look: bool
) -> None:
    for reference in (REFERENCE, ImageReference.parse("oci:/srv/nothing:v1")):
        with pytest.raises(SignatureRejected, match=f"{reference} demands signatures, but .*policy.json"):
            open_source(reference, paths, work_dir, Silent(), look=look, signed=True)
    assert not (double.directory / "calls.jsonl").exists()
    strict = scratch_host(tmp_path / "strict", policy=SIGNED)
    with open_source(REFERENCE, strict, work_dir, Silent(), look=look, signed=True):
        assert double.opened


def test_layout_is_read_directly_only_without_a_signature_requirement(
    double: Double, tmp_path: Path, work_dir: Path
) -> None:
    paths = scratch_host(tmp_path / "strict", policy=SIGNED)
    with open_source(ImageReference.parse("oci:/srv/nothing:v1"), paths, work_dir, Silent()):
        assert double.opened == f"dir:{work_dir}/copy"


def test_death_is_reported_with_the_last_words(double: Double, paths: HostPaths, work_dir: Path) -> None:
    double.plan(die="OpenImage", **{"last words": f'level=fatal msg="cannot write {work_dir}/x"'})
    with pytest.raises(StorageError) as caught:
        open_image(
            ImageReference.parse("dir:/x"), paths.containers, work_dir, Silent(), verify=False, silence=20
        ).close()
    assert caught.value.message == "dir:/x: cannot write …/x"
    double.plan(die="Initialize")
    with pytest.raises(Exception, match="skopeo ended unexpectedly"):
        opened(paths, work_dir)


def test_missing_skopeo(
    tmp_path: Path, paths: HostPaths, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ProgramMissing, match="skopeo is needed and not installed"):
        opened(paths, work_dir)


def config_descriptor(content: str, size: int | None = None) -> Descriptor:
    digest = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
    return Descriptor.model_validate(
        {"mediaType": "x", "digest": digest, "size": len(content) if size is None else size}
    )


def manifest_answer(*, converted: bool) -> dict[str, str]:
    return {"value": "sha256:" + (hashlib.sha256(b"manifest").hexdigest() if not converted else "a" * 64),
            "data": "manifest"}  # fmt: skip


def fetch_config(source: ImageSource, descriptor: Descriptor) -> bytes:
    with source:
        source.manifest()
        return source.config(descriptor)


def test_config_is_the_blob_unless_converted(double: Double, paths: HostPaths, work_dir: Path) -> None:
    blob, full = {"value": 4, "data": "blob"}, {"data": "full"}
    double.plan(GetManifest=manifest_answer(converted=False), GetBlob=blob, GetFullConfig=full)
    assert fetch_config(opened(paths, work_dir), config_descriptor("blob")) == b"blob"
    with pytest.raises(DigestMismatch):
        fetch_config(opened(paths, work_dir), config_descriptor("full"))
    double.plan(GetManifest=manifest_answer(converted=True), GetBlob=blob, GetFullConfig=full)
    assert fetch_config(opened(paths, work_dir), config_descriptor("full")) == b"full"
    assert fetch_config(opened(paths, work_dir), config_descriptor("blob")) == b"blob"
    with pytest.raises(DigestMismatch):
        fetch_config(opened(paths, work_dir), config_descriptor("else"))


def test_config_is_bounded(double: Double, paths: HostPaths, work_dir: Path) -> None:
    double.plan(GetManifest=manifest_answer(converted=False))
    with pytest.raises(UnsupportedImage, match="larger than"):
        fetch_config(opened(paths, work_dir), config_descriptor("x", 5 << 20))


def test_manifest_digest_must_be_sha256(double: Double, paths: HostPaths, work_dir: Path) -> None:
    double.plan(GetManifest={"value": "sha512:" + "a" * 128, "data": "manifest"})
    with pytest.raises(UnsupportedImage, match="not sha256"), opened(paths, work_dir) as source:
        source.manifest()

"""Labels of the store, from the policy of what runs."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hostimage_testing.host import scratch_host
from hostimaged.errors import UnsupportedImage
from hostimaged.host.storelabels import labeller
from hostimaged.system.paths import HostPaths

CONTEXTS = """\
/var/lib/containers(/.*)?  system_u:object_r:container_var_lib_t:s0
/var/lib/containers/storage/overlay(/.*)?  system_u:object_r:container_ro_file_t:s0
/var/lib/containers/storage/.*\\.lock -- system_u:object_r:lock_t:s0
"""


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    paths = scratch_host(tmp_path)
    assert paths.selinux_enforce is not None
    paths.selinux_enforce.parent.mkdir(parents=True)
    paths.selinux_enforce.write_text("1")
    files = paths.etc / "selinux/targeted/contexts/files"
    files.mkdir(parents=True)
    (paths.etc / "selinux/config").write_text("SELINUX=enforcing\nSELINUXTYPE=targeted\n")
    (files / "file_contexts").write_text(CONTEXTS)
    return paths


def test_by_path_and_kind(host: HostPaths) -> None:
    label = labeller(host)
    assert label is not None
    storage = b"/var/lib/containers/storage"
    assert label(storage, stat.S_IFDIR | 0o755) == b"system_u:object_r:container_var_lib_t:s0"
    assert label(storage + b"/overlay/l", stat.S_IFDIR) == b"system_u:object_r:container_ro_file_t:s0"
    assert label(storage + b"/storage.lock", stat.S_IFREG) == b"system_u:object_r:lock_t:s0"
    assert label(storage + b"/storage.lock", stat.S_IFDIR) == b"system_u:object_r:container_var_lib_t:s0"
    assert label(b"/elsewhere", stat.S_IFREG) is None


def test_none_without_selinux_or_policy(host: HostPaths) -> None:
    (host.etc / "selinux/config").write_text("SELINUX=enforcing\n")
    assert labeller(host) is None
    assert host.selinux_enforce is not None
    host.selinux_enforce.unlink()
    assert labeller(host) is None


def test_a_policy_that_is_not_whole(host: HostPaths) -> None:
    (host.etc / "selinux/targeted/contexts/files/file_contexts").unlink()
    with pytest.raises(UnsupportedImage, match="missing"):
        labeller(host)

"""Labels: the files of a policy, which rule decides, and what becomes of hard links."""

from __future__ import annotations

import time

import pytest

from hostimage_testing import selinux_policy
from hostimaged.boot import selinux
from hostimaged.boot.selinux import Policy, Rule, parse_contexts, parse_substitutions, relabel
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Directory,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Sparse,
    Stat,
    Symlink,
    lookup,
    walk,
)
from hostimaged.errors import UnsupportedImage

STAT = Stat(0o755, 0, 0, 0, 0, {})
CONTEXTS = "/etc/selinux/targeted/contexts/files/file_contexts"
CONFIG = {"/etc/selinux/config": b"SELINUX=disabled\nSELINUXTYPE=targeted\n"}
SPECIFIED = b"""
/(/.*)?    system_u:object_r:root_t:s0
/usr(/.*)?  system_u:object_r:usr_t:s0
/etc(/.*)?\tsystem_u:object_r:etc_t:s0
/boot(/.*)? system_u:object_r:boot_t:s0
/var(/.*)? system_u:object_r:var_t:s0
"""


class Files(dict[str, bytes]):
    """The files of an image by path."""

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        assert not follow
        data = self.get(path)
        assert data is None or len(data) <= limit
        return data

    def names(self, path: str) -> list[bytes]:
        raise NotImplementedError

    def open(self, path: str) -> int | None:
        raise NotImplementedError


def policy(contexts: bytes, substitutions: bytes = b"") -> Policy:
    return Policy(list(parse_contexts(contexts, "c")), parse_substitutions(substitutions, "s"))


def tree(*paths: str, **leaves: Leaf) -> Directory:
    """Files, with the directories that they need; a keyword is a name in the root."""
    root = Directory(STAT, {})
    for path in paths:
        directory = root
        *above, name = path.encode().split(b"/")
        for part in above:
            found = directory.entries.setdefault(part, Directory(STAT, {}))
            assert isinstance(found, Directory)
            directory = found
        if name:
            directory.entries[name] = Leaf(STAT, Inline(b""))
    root.entries |= {name.encode(): leaf for name, leaf in leaves.items()}
    return root


def labels(root: Directory) -> dict[str, str | None]:
    """The label of each path, cut to its type."""
    found = {}
    for path, node in walk(root):
        label = node.stat.xattrs.get(selinux.XATTR)
        found[path.decode()] = None if label is None else label.decode()
    return found


def test_the_rules_of_composefs_rs() -> None:
    root = tree("usr/bin/x", "boot/", "etc/hosts")
    relabel(root, policy(SPECIFIED))
    found = labels(root)
    assert found["/"] == "system_u:object_r:root_t:s0"
    assert found["/usr/bin/x"] == "system_u:object_r:usr_t:s0"
    assert found["/boot"] == "system_u:object_r:boot_t:s0"


def test_the_last_rule_decides_however_specific() -> None:
    root = tree("usr/bin/x", "usr/y")
    relabel(root, policy(b"/usr/bin/x exact\n/usr(/.*)? usr\n/usr/y <<none>>\n"))
    assert labels(root) == {"/": None, "/usr": "usr", "/usr/bin": "usr", "/usr/bin/x": "usr", "/usr/y": None}


def test_types() -> None:
    root = tree(
        "d/",
        b=Leaf(STAT, BlockDevice(5)),
        c=Leaf(STAT, CharDevice(5)),
        p=Leaf(STAT, Fifo()),
        l=Leaf(STAT, Symlink(b"x")),
        s=Leaf(STAT, Socket()),
        i=Leaf(STAT, Inline(b"")),
        z=Leaf(STAT, Sparse(5)),
    )
    rules = b"".join(b"/.* -%c is-%c\n" % (kind, kind) for kind in b"bcdpls-")
    relabel(root, policy(rules))
    found = labels(root)
    assert {path: label for path, label in found.items() if path not in ("/i", "/z")} == {
        "/" if kind == "" else f"/{kind}": f"is-{kind or 'd'}" for kind in ["", *"bcdpls"]
    }
    assert found["/i"] == found["/z"] == "is--"


def test_old_labels_go_and_other_attributes_stay() -> None:
    stat = STAT._replace(xattrs={selinux.XATTR: b"old", b"user.a": b"b"})
    root = tree(a=Leaf(stat, Inline(b"")), b=Leaf(stat, Inline(b"")))
    relabel(root, policy(b"/a new\n"))
    assert root.entries[b"a"].stat.xattrs == {selinux.XATTR: b"new", b"user.a": b"b"}
    assert root.entries[b"b"].stat.xattrs == {b"user.a": b"b"}
    assert stat.xattrs == {selinux.XATTR: b"old", b"user.a": b"b"}
    relabel(root, None)
    assert root.entries[b"a"].stat.xattrs == {b"user.a": b"b"}


def test_hard_links() -> None:
    """Names in the order of their bytes: the first counts, each other label costs a copy of its own."""
    shared = Leaf(STAT, Inline(b"content"))
    root = tree("bin/")
    for directory, name in ((b"bin", b"a"), (b"lib", b"b"), (b"lib", b"c"), (b"sbin", b"d"), (b"x", b"e")):
        found = root.entries.setdefault(directory, Directory(STAT, {}))
        assert isinstance(found, Directory)
        found.entries[name] = shared
    relabel(root, policy(b"/(s)?bin/.* bin\n/lib/.* lib\n"))
    found_labels = labels(root)
    assert [found_labels[p] for p in ("/bin/a", "/lib/b", "/lib/c", "/sbin/d", "/x/e")] == [
        "bin", "lib", "lib", "bin", None,
    ]  # fmt: skip
    assert lookup(root, b"/bin/a") is lookup(root, b"/sbin/d") is shared
    assert len({id(lookup(root, path)) for path in (b"/bin/a", b"/lib/b", b"/lib/c", b"/x/e")}) == 4


def test_substitutions() -> None:
    """A directory's path is what it stands for, below it too; only whole paths count, once."""
    root = tree("usr/lib64/a", "usr/lib64x/a", "run/lock/b/c", "var/run/d", "root", "opt/x")
    contexts = b"/usr/lib(/.*)? lib\n/var/lock/b/c lock\n/run/d run\n/elsewhere new\n/var/run/d wrong\n"
    substitutions = (
        b"# x\n/usr/lib64 /usr/lib\n/run/lock /var/lock\n/var/run /wrong\n/var/run /run/\n/root /elsewhere\n"
        b"/elsewhere /nowhere\n/opt /usr/lib64\n"
    )
    relabel(root, policy(contexts, substitutions))
    found = labels(root)
    assert found["/usr/lib64"] == found["/usr/lib64/a"] == "lib"
    assert found["/usr/lib64x/a"] is None
    assert found["/run/lock/b/c"] == "lock"
    assert found["/var/run/d"] == "run"
    assert found["/root"] == "new"
    assert found["/opt/x"] is None


def test_look_around_sees_the_type() -> None:
    found = policy(b"/a(?!.*d)x? ahead\n/b(?=-)-? <<none>>\n/c.*(?<!y) behind\n")
    assert found.label(b"/ax", ord("-")) == b"ahead"
    assert found.label(b"/ax", ord("d")) is None
    assert found.label(b"/cx", ord("-")) == b"behind"
    assert found.label(b"/cy", ord("-")) is None
    # Looked at again with another type, and by a rule in front of it.
    assert found.label(b"/ax", ord("-")) == b"ahead"


def test_loading() -> None:
    files = Files(
        CONFIG
        | {
            CONTEXTS: b"/a first\n/b first\n/c first\n",
            CONTEXTS + ".local": b"/b local\n/c local\n",
            CONTEXTS + ".homedirs": b"/c homedirs\n",
            CONTEXTS + ".bin": b"\xff",
            CONTEXTS + ".subs": b"/x /a\n/y /a\n",
            CONTEXTS + ".subs_dist": b"/y /b\n",
        }
    )
    loaded = Policy.load(files)
    assert loaded is not None
    assert [loaded.label(path, ord("-")) for path in (b"/a", b"/b", b"/c", b"/d")] == [
        b"first", b"local", b"homedirs", None,
    ]  # fmt: skip
    assert loaded.aliases == {b"/x": b"/a", b"/y": b"/b"}


@pytest.mark.parametrize(
    "config",
    [None, b"", b"SELINUX=enforcing\n# SELINUXTYPE=targeted\n", b"XSELINUXTYPE=targeted\nSELINUXTYPE\n"],
)
def test_no_policy_is_named(config: bytes | None) -> None:
    files = Files({CONTEXTS: b"/a x\n"} | ({"/etc/selinux/config": config} if config is not None else {}))
    assert Policy.load(files) is None


@pytest.mark.parametrize(
    "config",
    [
        b"SELINUXTYPE=targeted",
        b" selinuxtype\t=  targeted \r\nSELINUXTYPE=other\n",
        "\u2003SELINUXTYPE=\u00a0targeted\u3000\n".encode(),
        b"SELINUXTYPE=targeted\n\xff\n",
    ],
)
def test_configurations(config: bytes) -> None:
    assert Policy.load(Files({"/etc/selinux/config": config, CONTEXTS: b"/a x\n"})) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONTEXTS: None}, "file_contexts of the image is missing"),
        ({"/etc/selinux/config": b"SELINUXTYPE=../x\n"}, "config of the image, line 1: no name"),
        ({"/etc/selinux/config": b"\n\xff\nSELINUXTYPE=targeted"}, "config of the image, line 2: not UTF-8"),
        ({CONTEXTS: b"# ok\n\n/a\n"}, "file_contexts of the image, line 3: a rule is"),
        ({CONTEXTS: b"/a -d\n"}, "line 1: a rule is"),
        ({CONTEXTS: b"/a -x y\n"}, "line 1: an unknown type"),
        ({CONTEXTS: b"/a -- y z\n"}, "line 1: a rule is"),
        ({CONTEXTS: b"/\xff y\n"}, "line 1: not UTF-8"),
        ({CONTEXTS: b"/(a y\n"}, r"expression /\(a of the SELinux policy: "),
        ({CONTEXTS + ".local": b"/a b c\n"}, "file_contexts.local of the image, line 1"),
        ({CONTEXTS + ".subs": b"/a\n"}, "file_contexts.subs of the image, line 1: a substitution is"),
        ({CONTEXTS + ".subs": b"/a /b /c\n"}, "a substitution is two paths"),
    ],
)
def test_malformed(change: dict[str, bytes | None], message: str) -> None:
    files = CONFIG | {CONTEXTS: b"/a x\n"}
    kept = {path: data for path, data in (files | change).items() if data is not None}
    with pytest.raises(UnsupportedImage, match=message):
        Policy.load(Files(kept))


def test_white_space_is_that_of_unicode() -> None:
    """Python splits at four control characters more."""
    rules = list(parse_contexts("/a\x1cb\u2003x\r\n/c\x85--\u3000y\n #\u00e9\n".encode(), "c"))
    assert rules == [Rule("/a\x1cb", None, b"x"), Rule("/c", ord("-"), b"y")]


def test_too_many_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "MAX_RULES", 2)
    with pytest.raises(UnsupportedImage, match="more than 2 rules"):
        Policy.load(Files(CONFIG | {CONTEXTS: b"/a x\n/a x\n", CONTEXTS + ".local": b"/a x\n"}))
    with pytest.raises(UnsupportedImage, match="too many"):
        parse_substitutions(b"/a b\n/b c\n/c d\n", "subs")


def test_an_image_of_100_000_files_and_6000_rules() -> None:
    """Within a few seconds of processor time: about one on a machine of 2024."""
    root = Directory(STAT, {})
    for path, kind in selinux_policy.paths(100_000).items():
        directory = root
        *above, name = path.encode().split(b"/")
        for part in above:
            found = directory.entries[part]
            assert isinstance(found, Directory)
            directory = found
        directory.entries[name] = Directory(STAT, {}) if kind == "d" else Leaf(STAT, Inline(b""))
    data = selinux_policy.file_contexts(6000)
    began = time.process_time()
    made = policy(data, selinux_policy.SUBSTITUTIONS.encode())
    relabel(root, made)
    taken = time.process_time() - began
    assert len(set(labels(root).values())) > 100
    assert taken < 6

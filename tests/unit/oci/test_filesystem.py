"""Layers to trees: the order of entries, whiteouts, merging, the changes at the end, recorded image ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimaged.composefs import dumpfile, erofs, tree
from hostimaged.composefs.erofs import Format
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import Directory, Inline, Leaf, Stat, Symlink
from hostimaged.errors import CorruptRepository, UnsupportedImage
from hostimaged.ids import DiffId, ObjectId
from hostimaged.oci import filesystem
from hostimaged.oci.entries import Entry, HardLink, Item
from hostimaged.oci.filesystem import TreeBuilder, XattrMode, build_tree, transform_for_oci
from hostimaged.oci.layer_import import import_layer
from hostimaged.oci.paths import split_path
from hostimaged.progress import Silent

DIR, FILE, CAPABILITY = Stat(0o755, 0, 0, 0, 0, {}), Stat(0o644, 0, 0, 0, 0, {}), b"security.capability"


class Layers:
    """Applies entries given as text: ``a/`` is a directory, ``a`` a file, ``a=b`` a hard link to ``b``."""

    def __init__(self, *texts: str) -> None:
        self.builder = TreeBuilder()
        self.apply(*texts)

    def apply(self, *texts: str) -> None:
        for text in texts:
            path, _, target = text.partition("=")
            item: Item = Inline(text.encode())
            if target:
                item = HardLink(tuple(split_path(target.encode())))
            elif text.endswith("/"):
                item = None
            self.add(path, item)

    def add(self, path: str, item: Item, stat: Stat | None = None) -> None:
        names = tuple(split_path(path.encode()))
        self.builder.apply(Entry(names, stat or (DIR if item is None else FILE), item))

    @property
    def root(self) -> Directory:
        return self.builder._root

    @property
    def names(self) -> list[str]:
        return [path.decode() for path, _ in tree.walk(self.root)][1:]

    def leaf(self, path: str) -> Leaf:
        node = tree.lookup(self.root, path.encode())
        assert isinstance(node, Leaf)
        return node


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        # Recorded: the unit tests of composefs-rs 0.9.
        (
            "/a/ b/ c/ /a/b /a/c /b/a /b/c /c/a /c/c .wh.a /b/.wh..wh..opq /c/.wh.c",
            "/b /c /c/a",
        ),
        ("/etc/ /etc/hosts /etc/passwd /etc/.wh.hosts", "/etc /etc/passwd"),
        ("/etc/ /etc/hosts /etc/.wh.nosuchfile", "/etc /etc/hosts"),
        ("/usr/ /usr/local/ /usr/local/bin /etc/ /usr/.wh.local", "/etc /usr"),
        ("/mydir/ /toplevel /.wh.toplevel .wh.mydir", ""),
        ("/a/ /a/b/ /a/b/c/ /a/b/c/deep /a/b/c/.wh.deep", "/a /a/b /a/b/c"),
        ("etc/ etc/x etc/y etc/.wh..wh..opq etc/new etc/other", "/etc /etc/new /etc/other"),
        # An opaque marker hides what its own layer added before it, too, and below.
        ("etc/ etc/d/ etc/d/x etc/.wh..wh..opq", "/etc"),
        (".wh..wh..opq a/ .wh..wh..opq b/", "/b"),
        # Merging.
        ("d/ d/x d/", "/d /d/x"),
        ("d/ d/x d", "/d"),
        ("d d/ d/x", "/d /d/x"),
        ("d/ d/e/ d/e/x d/e d/e/ d/e/y", "/d /d/e /d/e/y"),
        # A whiteout of nothing, and one that names nothing.
        ("a .wh. .wh.b", "/a"),
        ("a b=a .wh.a", "/b"),
    ],
)
def test_entries_in_order(entries: str, names: str) -> None:
    assert Layers(*entries.split()).names == names.split()


def test_a_directory_gets_the_metadata_of_the_later_entry() -> None:
    layers = Layers("d/", "d/x")
    layers.add("d", None, Stat(0o700, 1, 2, 3, 4, {}))
    assert layers.names == ["/d", "/d/x"]
    assert layers.root.entries[b"d"].stat == Stat(0o700, 1, 2, 3, 4, {})


def test_the_directory_found_last_is_forgotten_when_it_may_be_gone() -> None:
    layers = Layers("d/", "d/e/", "d/e/old", ".wh.d", "d/", "d/e/", "d/e/new")
    assert layers.names == ["/d", "/d/e", "/d/e/new"]
    layers = Layers("d/", "d/e/", "d/e/old", "d", "d/", "d/e/", "d/e/new")
    assert layers.names == ["/d", "/d/e", "/d/e/new"]
    layers = Layers("d/", "d/e/", "d/e/old", "d")
    with pytest.raises(UnsupportedImage):
        layers.apply("d/e/new")


def test_hard_links_share_the_leaf_present_at_that_point() -> None:
    layers = Layers("a", "d/", "d/b=a", "c=/d/./b")
    first = layers.leaf("a")
    layers.apply("a", "e=a")
    assert layers.leaf("d/b") is layers.leaf("c") is first
    assert layers.leaf("e") is layers.leaf("a") is not first
    layers.add("link", HardLink((b"a",)), Stat(0, 9, 9, 9, 9, {}))
    assert layers.leaf("link").stat == FILE


@pytest.mark.parametrize("entry", ["x=missing", "x=d", "x=d/missing", "x=a/b", "x=s/f", ".wh.x=missing"])
def test_hard_links_to_nothing_are_refused(entry: str) -> None:
    layers = Layers("a", "d/", "d/f")
    layers.add("s", Symlink(b"d"))
    with pytest.raises(UnsupportedImage, match="hard link"):
        layers.apply(entry)


@pytest.mark.parametrize(
    "path", ["missing/x", "a/x", "s/x", "d/missing/x", "missing/.wh.x", "s/.wh..wh..opq"]
)
def test_parents_must_be_real_directories(path: str) -> None:
    layers = Layers("a", "d/")
    layers.add("s", Symlink(b"d"))
    with pytest.raises(UnsupportedImage, match=f"/{path}: its (directory is missing|parent is no directory)"):
        layers.apply(path)
    assert layers.names == ["/a", "/d", "/s"]


def test_the_root_entry() -> None:
    layers = Layers()
    layers.add("./", None, Stat(0o700, 1, 1, 1, 1, {}))
    assert layers.root.stat == Stat(0o700, 1, 1, 1, 1, {})
    with pytest.raises(UnsupportedImage, match="root"):
        layers.add("/", Inline(b""))


def test_names_in_errors_are_printable_and_bounded() -> None:
    with pytest.raises(UnsupportedImage) as raised:
        TreeBuilder().apply(Entry((b"\xff\n" * 1000, b"x"), FILE, Inline(b"")))
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 2000


def test_attributes_are_filtered() -> None:
    xattrs = {CAPABILITY: b"1", b"user.a": b"2", b"security.selinux": b"3", b"trusted.x": b"4", b"user": b"5"}
    for mode, kept in (
        (XattrMode.ALLOWLIST_ONLY, {CAPABILITY: b"1"}),
        (XattrMode.KEEP_USER_XATTRS, {CAPABILITY: b"1", b"user.a": b"2"}),
    ):
        builder = TreeBuilder(mode)
        builder.apply(Entry((b"usr",), DIR._replace(xattrs=xattrs), None))
        builder.apply(Entry((b"f",), FILE._replace(xattrs=xattrs), Inline(b"")))
        root = builder.finish()
        assert [node.stat.xattrs for _, node in tree.walk(root)] == [kept, kept, kept]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MAX_ENTRIES", 3)
    layers = Layers("a", "b", "c")
    with pytest.raises(UnsupportedImage, match="held in memory"):
        layers.apply("d")
    monkeypatch.setattr(filesystem, "MAX_METADATA", 1000)
    layers = Layers()
    layers.add("x" * 200, Symlink(b"t" * 200))
    with pytest.raises(UnsupportedImage, match="held in memory"):
        layers.add("y", None, DIR._replace(xattrs={b"user.dropped": b"v" * 600}))


def test_transform() -> None:
    usr, run = Stat(0o750, 1, 2, 1000, 5, {CAPABILITY: b"x"}), Stat(0o1777, 3, 4, 9, 9, {b"user.x": b"y"})
    root = Directory(
        DIR, {b"usr": Directory(usr, {}), b"run": Directory(run, {b"lock": Leaf(FILE, Inline(b""))})}
    )
    transform_for_oci(root)
    assert root.stat == usr
    assert root.entries[b"run"].stat == Stat(0o1777, 3, 4, 1000, 5, {b"user.x": b"y"})
    assert [path for path, _ in tree.walk(root)] == [b"/", b"/run", b"/usr"]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {b"usr": Leaf(FILE, Symlink(b"x"))},
        {b"usr": Directory(DIR, {}), b"run": Leaf(FILE, Symlink(b"var/run"))},
    ],
)
def test_trees_that_cannot_become_images(entries: dict[bytes, Directory | Leaf]) -> None:
    with pytest.raises(UnsupportedImage, match=r"/usr|/run"):
        transform_for_oci(Directory(DIR, entries))


# --- recorded images ---


@pytest.fixture
def sha256(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(tmp_path / "256", algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)[
        0
    ] as made:
        yield made


@pytest.fixture
def sha512(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(tmp_path / "512", algorithm=Algorithm.SHA512, verity=Verity.OPPORTUNISTIC)[
        0
    ] as made:
        yield made


def layer(repository: Repository, data: bytes) -> ObjectId:
    diff_id = DiffId.of_hash(hashlib.sha256(data).hexdigest())
    return import_layer(repository, [data], diff_id, Silent()).stream_id


def image_id(repository: Repository, root: Directory, format_: Format) -> str:
    return digest(repository.algorithm, erofs.build(root, format_, repository.algorithm)).hex()


def test_the_image_of_the_integration_tests_of_composefs_rs(sha512: Repository) -> None:
    fields = {"magic": tars.GNU, "mtime": 1234567890}
    data = (
        tars.directory(b"usr/", **fields)
        + tars.file(b"hello.txt", b"hello from test layer\n", **fields)
        + tars.header(b"hello-link.txt", 0, b"1", link=b"hello.txt", mode=0, **fields)  # type: ignore[arg-type]
        + tars.END
    )
    root = build_tree(sha512, [layer(sha512, data)])
    assert image_id(sha512, root, Format.V2) == (
        "f7684c21050615c02cec250e0c7d4118fb0ff6340af5039e06f2f372a7614fff"
        "25dfd38cf7f28ad67d8b86e86371b7deafa9ae4bf543630322aee6196417de92"
    )
    assert image_id(sha512, root, Format.V1) == (
        "d06f1f6a73f62ed48e05ce9442ff045cdf2a9f5ba1ec623795de3d6177a253d9"
        "1076459795d94f55d8c3d71dab458bb3fc0071255a50c0a4896d86ffdc870b9a"
    )


LAYER_1 = (
    b"".join(
        [
            tars.directory(b"usr/", mtime=1000),
            tars.directory(b"usr/bin/", mtime=1000),
            tars.file(b"usr/bin/tool", b"a" * 70, mode=0o755, mtime=1000),
            tars.header(b"usr/bin/tool2", 0, b"1", link=b"usr/bin/tool", mtime=1000),
            tars.directory(b"etc/", mtime=1000),
            tars.file(b"etc/old", b"x", mtime=1000),
            tars.file(b"etc/keep", b"keep", mtime=1000),
            tars.directory(b"run/", mtime=1000),
            tars.file(b"run/lock", b"l", mtime=1000),
        ]
    )
    + tars.END
)
LAYER_2 = (
    b"".join(
        [
            tars.file(b"etc/.wh.old", b""),
            tars.file(b"etc/new", b"new", mtime=1000),
            tars.pax(
                (b"mtime", b"2000.5"),
                (b"SCHILY.xattr.security.selinux", b"foo"),
                (b"SCHILY.xattr.user.a", b"b"),
                (b"SCHILY.xattr.security.capability", b"\x01"),
            ),
            tars.directory(b"usr/"),
        ]
    )
    + tars.END
)
TOOL = "f746f2d564f25c6198134c7177dda5a575882a46b167fb2d15fdd83b4b7df5d7"
DUMP = f"""\
/ 0 40755 5 0 0 0 2000.500000000 - - - security.capability=\\x01
/etc 0 40755 2 0 0 0 1000.0 - - -
/etc/keep 4 100644 1 0 0 0 1000.0 - keep -
/etc/new 3 100644 1 0 0 0 1000.0 - new -
/run 0 40755 2 0 0 0 2000.500000000 - - -
/usr 0 40755 3 0 0 0 2000.500000000 - - - security.capability=\\x01
/usr/bin 0 40755 2 0 0 0 1000.0 - - -
/usr/bin/tool 70 100755 2 0 0 0 1000.0 {TOOL[:2]}/{TOOL[2:]} - {TOOL}
/usr/bin/tool2 0 @120000 - - - - 0.0 /usr/bin/tool - -
"""


@pytest.mark.parametrize(
    ("mode", "v1", "v2"),
    [
        (
            XattrMode.ALLOWLIST_ONLY,
            "3493787907fd8fb0bccae6fe953c3e280f32b34fbfc93ef1e949ea4685c63186",
            "619495a2205fc3a047a387c6424e6b24507370e79427c9e3d976b44b42da6715",
        ),
        (
            XattrMode.KEEP_USER_XATTRS,
            "adc44240c4940fdeffb04a9fc6344de79a54f0a866683a67c9eeea416588748d",
            "d9ea5290238352abfa308d8e117b20d29e1797859f4fb9b071ed0ac2a713b5b0",
        ),
    ],
)
def test_an_image_of_two_layers(sha256: Repository, mode: XattrMode, v1: str, v2: str) -> None:
    root = build_tree(sha256, [layer(sha256, LAYER_1), layer(sha256, LAYER_2)], mode)
    dump = b"\n".join(line.rstrip(b"\n") for line in dumpfile.write(root)) + b"\n"
    with_user = DUMP.replace("security.capability=\\x01", "security.capability=\\x01 user.a=b")
    assert dump.decode() == (DUMP if mode is XattrMode.ALLOWLIST_ONLY else with_user)
    assert image_id(sha256, root, Format.V1) == v1
    assert image_id(sha256, root, Format.V2) == v2


def test_a_stream_of_another_kind_is_no_layer(sha256: Repository) -> None:
    with sha256.new_stream(ContentType.BLOB) as writer:
        id_ = sha256.write_stream("oci-layer-blob", writer)
    with pytest.raises(CorruptRepository):
        build_tree(sha256, [id_])

"""Boot images: the ids that cfsctl computes, in repositories that either of us writes and the other reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing import labelled_images, tars
from hostimage_testing.debian import Debian
from hostimage_testing.judge import Judge
from hostimage_testing.labelled_images import CONTEXTS, DIRECTORIES, fedora_like, kernel, layer
from hostimage_testing.layout import Layer, Layout
from hostimage_testing.tools import run
from hostimage_testing.uki import uki
from hostimaged.boot.files import open_content
from hostimaged.boot.resources import Kernel, UnifiedKernel
from hostimaged.boot.selinux import XATTR
from hostimaged.composefs.erofs import Image, build
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import lookup, walk
from hostimaged.errors import CorruptRepository, ImageNotFound, UnsupportedImage
from hostimaged.host.bootimage import FAULT_POINTS, BootImage, find_matching, generate, remove
from hostimaged.ids import ConfigDigest, ManifestDigest, ObjectId
from hostimaged.oci import images
from hostimaged.oci.boot_refs import boot_ref, boot_refs, settle
from hostimaged.oci.commit import Commit, Contents
from hostimaged.oci.filesystem import XattrMode
from hostimaged.progress import Silent

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

V1, V2 = Format.V1, Format.V2
BOTH = FormatSet(V1, (V2,))
NAME = "os"
MINIMAL = layer({**kernel(), "usr/lib/os-release": b"ID=test\nVERSION_ID=7\n"}, DIRECTORIES)


@dataclass
class Place:
    """A repository with the image ``os``, which cfsctl pulled."""

    path: Path
    judge: Judge
    digest: ManifestDigest
    cfsctl: str
    source: str

    @contextlib.contextmanager
    def open(self) -> Iterator[Repository]:
        with Repository.open(self.path, insecure=True) as repository:
            yield repository

    def generate(self, mode: XattrMode = XattrMode.ALLOWLIST_ONLY) -> BootImage:
        with self.open() as repository:
            return generate(repository, self.digest, Silent(), mode=mode)

    def computed(self, version: Format, mode: XattrMode = XattrMode.ALLOWLIST_ONLY) -> str:
        """The id of the boot image by cfsctl."""
        argv = ("oci", "compute-id", "--bootable", "--xattrs", mode.value, NAME)
        return self.judge(*argv, version=version).strip()

    def refs(self) -> dict[str, ObjectId]:
        with self.open() as repository:
            return boot_refs(images.open_image(repository, self.digest).config_refs)

    def pull(self, *options: str) -> str:
        return self.judge("oci", "pull", *options, self.source, NAME)

    def files(self) -> dict[str, str]:
        """All names in the repository, with where links lead."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            found[str(path)] = os.readlink(path) if path.is_symlink() else str(path.stat().st_size)
        return found


MakePlace = Callable[..., Place]


@pytest.fixture
def place(tmp_path: Path, cfsctl: str) -> MakePlace:
    """Makes a repository of an image with these layers."""

    def made(
        *layers: bytes | Layer, formats: FormatSet = BOTH, algorithm: Algorithm = Algorithm.SHA512
    ) -> Place:
        root = tmp_path / f"place{len(list(tmp_path.iterdir()))}"
        layout = Layout(root / "layout")
        stored = [layout.layer(each, "none") if isinstance(each, bytes) else each for each in layers]
        for each in stored:
            blob = layout.blob_path(each.descriptor["digest"])
            if not blob.exists():
                os.link(tmp_path / "shared" / blob.name, blob)
        descriptor = layout.image("v1", stored)
        path = root / "repository"
        Repository.init(path, algorithm=algorithm, formats=formats, verity=Verity.OPPORTUNISTIC)[0].close()
        judge = Judge(cfsctl, path)
        found = Place(path, judge, ManifestDigest(descriptor["digest"]), cfsctl, f"oci:{layout.path}:v1")
        found.pull()
        return found

    return made


def image_tree(place: Place, object_id: ObjectId) -> dict[str, tuple[bytes | None, object]]:
    """Label and kind of each path of an image in the repository."""
    with place.open() as repository:
        data = repository.read_object(object_id, 1 << 30)
        tree = Image(data, repository.algorithm).tree()
    return {os.fsdecode(path): (node.stat.xattrs.get(XATTR), node.stat) for path, node in walk(tree)}


def check_ids(place: Place, mode: XattrMode) -> BootImage:
    """Ours are cfsctl's in both formats, stored, and named where it looks; it finds nothing wrong."""
    made = place.generate(mode)
    assert made.format is V1
    refs = place.refs()
    assert refs[boot_ref(V1, mode)] == made.object_id
    for version in (V1, V2):
        assert refs[boot_ref(version, mode)].hex() == place.computed(version, mode)
        assert (place.path / "images" / place.computed(version, mode)).exists()
    return made


@pytest.mark.parametrize("mode", list(XattrMode))
def test_an_image_like_fedora(place: MakePlace, mode: XattrMode) -> None:
    there = place(*fedora_like(20_000, 6000))
    made = check_ids(there, mode)
    there.judge.check(images=1)
    assert str(made.id) == there.computed(V1, mode)
    assert isinstance(made.resources, Kernel)
    labels = {path: label for path, (label, _) in image_tree(there, made.object_id).items()}
    assert len(set(labels.values())) > 40
    assert labels["/usr/bin/local"] == b"system_u:object_r:local_t:s0"
    assert labels["/boot"] != labels["/usr"]
    assert "/boot/grub2" not in labels
    assert "/sysroot/ostree" not in labels


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(XattrMode))
@pytest.mark.parametrize("policy", [False, True], ids=["plain", "policy"])
def test_debian(place: MakePlace, debian: Debian, tmp_path: Path, mode: XattrMode, policy: bool) -> None:
    """A real root with a kernel added; and with a policy, as nobody ships it."""
    with debian.tar.open("rb") as tar:
        digest = hashlib.file_digest(tar, "sha256").hexdigest()
    base = Layer(
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": f"sha256:{digest}",
            "size": debian.tar.stat().st_size,
        },
        f"sha256:{digest}",
    )
    (tmp_path / "shared").mkdir()
    shutil.copyfile(debian.tar, tmp_path / "shared" / digest)
    added = kernel() | (labelled_images.policy_files(3000) if policy else {})
    above = {path.rsplit("/", depth)[0] for path in added for depth in range(1, path.count("/") + 1)}
    # Not over what Debian has: those are links there, or have other modes.
    new = sorted(above - {"usr", "usr/lib", "etc"})
    parts = [tars.directory(name.encode()) for name in ["sysroot", *new]]
    parts += [tars.file(name.encode(), data) for name, data in added.items()]
    there = place(base, b"".join([*parts, tars.END]))
    check_ids(there, mode)
    there.judge.check(images=1)


#: Expressions in every corner of both dialects, and paths of which each takes some.
EXPRESSIONS = (
    "a(/.*)?", r"a\.so(\.[^/]*)*", "(s)?bin", "[^/]{2,3}", "a{2}b{1,}", "a**+", "a++b", "(a|b|)c", "é",
    "é+", "[é]", r"\xe9", r"\x{e9}", "[[:alnum:]_]+", "[[:^alpha:]]", "[a-z&&[^b]]", "[a-c--b]",
    "[ab~~bc]", "[a[bc]]", "[]a-]+", "[--a]", "(?i:ab)c", "a(?i)b|C", "[^k](?i)[^k]", "(?P<n>a)(?<m>b)",
    r"\d\w\S", ".*$", r"\bx\b", r"x\B", "(?!keep).*", "(?=k).*", ".*(?<!a)b", ".*(?<=a)b", "(?!x).",
    r"\h\N", "a{", "a{,2}b", "(?!x)[a[]+", r"\+\_\@", "a?b{0}c", "(?s:.)+b", "(?-i)a", "(?U)a+", "a+?",
    "[a&&]|b", r"[\d\-]+", r"[^\s/]", "]", "}", "(?!.*d)a.?",
)  # fmt: skip
TRIED = (
    "a", "b", "c", "ab", "aab", "abc", "aB", "ABc", "aac", "abab", "bin", "sbin", "a.so", "a.so.1",
    "axso", "é", "éé", "keep", "keeper", "k", "K", "x", "xK", "Kx", "1", "1a-", "12", "-", "--", "]",
    "[", "[a", "}", "a{", "&", "~", "_", "+_@", "a b", "\n", "a\nb", " ", "bb", "ac", "aaab", "\u2003",
    "ax", "xa", "a]", "d", "b-",
)  # fmt: skip


def test_expressions(place: MakePlace) -> None:
    """Each rule in a directory of its own: as cfsctl, path by path."""
    rules = [f"/r{n}/({text}) label{n}" for n, text in enumerate(EXPRESSIONS)]
    rules += [f"/t{n}/{text} -d dir{n}\n/t{n}/{text} -- file{n}" for n, text in enumerate(EXPRESSIONS)]
    files = {f"{kind}{n}/{name}": b"" for n in range(len(EXPRESSIONS)) for name in TRIED for kind in "rt"}
    files |= {"etc/selinux/config": b"SELINUXTYPE=targeted\n", CONTEXTS: "\n".join(rules).encode()}
    raw = [
        (f"r{n}/".encode() + name) for n in range(len(EXPRESSIONS)) for name in (b"\xe9", b"\xc3", b"\xa0a")
    ]
    more = b"".join(tars.file(name, b"") for name in raw) + tars.END
    there = place(layer(files | kernel(), DIRECTORIES), more)
    there.pull("--bootable")
    theirs = image_tree(there, there.refs()[boot_ref(V1, XattrMode.ALLOWLIST_ONLY)])
    there.judge("oci", "untag", NAME)
    there.judge("gc")
    there.pull()
    made = there.generate()
    ours = image_tree(there, made.object_id)
    assert {path: label for path, (label, _) in ours.items()} == {
        path: label for path, (label, _) in theirs.items()
    }
    assert str(made.id) == there.computed(V1)
    assert len({label for label, _ in ours.values()}) > len(EXPRESSIONS)


@pytest.mark.parametrize("formats", [FormatSet(V1), FormatSet(V2), BOTH], ids=str)
@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
def test_what_cfsctl_made_is_recognised(place: MakePlace, formats: FormatSet, algorithm: Algorithm) -> None:
    there = place(MINIMAL, formats=formats, algorithm=algorithm)
    there.pull("--bootable")
    before, refs = there.files(), there.refs()
    made = there.generate()
    assert made.object_id == refs[boot_ref(formats.default, XattrMode.ALLOWLIST_ONLY)]
    assert made.format is formats.default
    assert there.files() == before


@pytest.mark.parametrize("formats", [FormatSet(V1), FormatSet(V2), BOTH], ids=str)
@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
def test_what_we_made_is_recognised(place: MakePlace, formats: FormatSet, algorithm: Algorithm) -> None:
    there = place(MINIMAL, formats=formats, algorithm=algorithm)
    made = there.generate()
    again = there.generate()
    assert made.object_id == again.object_id
    assert set(there.refs()) == {boot_ref(each, XattrMode.ALLOWLIST_ONLY) for each in formats.in_order()}
    stored = {path.name for path in (there.path / "images").iterdir()}
    assert made.object_id.hex() in there.pull("--bootable")
    assert {path.name for path in (there.path / "images").iterdir()} == stored
    there.judge.check(images=1)
    linked = there.judge("oci", "linked-erofs-images", made.object_id.hex())
    assert made.object_id.hex() in linked


#: Without it boot image and plain image are the same.
IN_BOOT = layer({"boot/README": b"kernels are elsewhere\n"})


def test_all_of_an_image_is_kept_as_long_as_its_tag(place: MakePlace) -> None:
    there = place(MINIMAL, IN_BOOT)
    made = {mode: there.generate(mode).object_id for mode in XattrMode}
    # Without user attributes to keep both are the same image.
    assert len(set(made.values())) == 1
    assert len(there.refs()) == 4
    there.judge("gc")
    assert there.generate().object_id == made[XattrMode.ALLOWLIST_ONLY]
    there.judge.check(images=1)
    with there.open() as repository:
        assert remove(repository, there.digest, Silent())
        assert not remove(repository, there.digest, Silent())
    assert there.refs() == {}
    there.judge("gc")
    assert not (there.path / "images" / made[XattrMode.ALLOWLIST_ONLY].hex()).exists()
    there.judge.check(images=1)
    with there.open() as repository:
        assert images.open_image(repository, there.digest).image_ids.keys() == {V1, V2}


WITH_USER_XATTRS = tars.pax((b"SCHILY.xattr.user.a", b"b")) + tars.file(b"usr/kept", b"x") + tars.END


@pytest.mark.parametrize("mode", list(XattrMode))
@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("formats", [FormatSet(V1), FormatSet(V2)], ids=str)
def test_r29_an_expected_image_is_found(
    place: MakePlace, mode: XattrMode, version: Format, formats: FormatSet
) -> None:
    there = place(MINIMAL, WITH_USER_XATTRS, formats=formats)
    expected = ObjectId(bytes.fromhex(there.computed(version, mode)))
    with there.open() as repository:
        made = find_matching(repository, there.digest, expected, Silent())
        assert (made.object_id, made.mode, made.format) == (expected, mode, version)
    assert there.refs() == {boot_ref(version, mode): expected}
    before = there.files()
    with there.open() as repository:
        assert find_matching(repository, there.digest, expected, Silent()).object_id == expected
    assert there.files() == before
    assert expected.hex() in there.pull("--bootable", "--expected-digest", expected.hex())
    there.judge.check(images=1)


def test_r29_an_expected_image_of_an_older_version_is_found(place: MakePlace) -> None:
    """The emptied directories kept their fractions of a second in composefs-rs 0.9.0."""
    older = layer({}, ["boot"], mtime="5.75")
    there = place(MINIMAL, older)
    with there.open() as repository:
        made = generate(repository, there.digest, Silent())
        tree = Image(repository.read_object(made.object_id, 1 << 20), repository.algorithm).tree()
        boot = lookup(tree, b"boot")
        assert boot is not None
        assert boot.stat.nsec == 250_000_000
        boot.stat = boot.stat._replace(nsec=750_000_000)
        expected = repository.store_object(build(tree, V1, repository.algorithm)).id
        found = find_matching(repository, there.digest, expected, Silent())
    assert (found.object_id, found.format) == (expected, V1)
    assert expected != made.object_id
    there.judge.check(images=1)


def test_an_unexpected_image(place: MakePlace) -> None:
    there = place(MINIMAL)
    before = there.files()
    with there.open() as repository, pytest.raises(UnsupportedImage, match="gives no boot image 000000"):
        find_matching(repository, there.digest, ObjectId(bytes(64)), Silent())
    assert there.files() == before


@pytest.mark.parametrize("mark", ["", "?"])
@pytest.mark.parametrize("version", [V1, V2])
def test_r29_a_unified_kernel_names_its_image(place: MakePlace, version: Format, mark: str) -> None:
    base = layer({"usr/lib/os-release": b"ID=test\n"}, DIRECTORIES)
    bare = place(base)
    expected = bare.computed(version)
    binary = uki(
        linux=b"linux" * 100,
        initrd=b"initrd" * 99,
        cmdline=f"rw composefs={mark}{expected}",
        osrel="ID=own\n",
    )
    there = place(base, layer({"boot/EFI/Linux/6.efi": binary}))
    made = there.generate()
    assert str(made.id) == expected == there.computed(version)
    assert made.format is version
    assert isinstance(made.resources, UnifiedKernel)
    assert made.resources.name == "6.efi"
    assert made.uki.boot_digest.hex == hashlib.sha256(b"linux" * 100 + b"initrd" * 99).hexdigest()
    assert made.os_release.id == "own"
    with there.open() as repository, os.fdopen(open_content(made.resources.leaf, repository), "rb") as file:
        assert file.read() == binary
    there.judge.check(images=1)
    wrong = uki(linux=b"l", initrd=b"i", cmdline="composefs=" + "0" * 128, osrel="")
    other = place(base, layer({"boot/EFI/Linux/6.efi": wrong}))
    with pytest.raises(UnsupportedImage, match="gives no boot image 000000"):
        other.generate()
    silent = place(
        base, layer({"boot/EFI/Linux/6.efi": uki(linux=b"l", initrd=b"i", cmdline="rw", osrel="")})
    )
    with pytest.raises(UnsupportedImage, match="names no deployment"):
        silent.generate()


def test_what_an_image_brings(place: MakePlace) -> None:
    there = place(MINIMAL)
    with there.open() as repository:
        made = generate(repository, there.digest, Silent())
        assert made.architecture == "amd64"
        assert (made.os_release.id, made.os_release.version_id) == ("test", "7")
        assert isinstance(made.resources, Kernel)
        assert made.resources.version == "6.12.0-1.fc44.x86_64"
        for leaf, content in (
            (made.resources.vmlinuz, labelled_images.KERNEL),
            (made.resources.initrd, labelled_images.INITRD),
        ):
            with os.fdopen(open_content(leaf, repository), "rb") as file:
                assert file.read() == content
        assert made.files.read("/usr/lib/os-release", 100) == b"ID=test\nVERSION_ID=7\n"
    with pytest.raises(UnsupportedImage, match="no unified kernel image"):
        _ = made.uki


TARGETED = b"SELINUXTYPE=targeted\n"
CONFIG = "etc/selinux/config"


@pytest.mark.parametrize(
    ("layers", "message", "refused_by_cfsctl"),
    [
        ([layer(kernel(), [d for d in DIRECTORIES if d != "sysroot"])], "no directory /sysroot", True),
        ([layer(kernel(), [d for d in DIRECTORIES if d != "boot"])], "no directory /boot", True),
        ([layer({}, DIRECTORIES)], "no kernel", False),
        ([layer({"boot/loader/entries/a.conf": b"linux /x\n"}, DIRECTORIES)], "entries of its own", True),
        ([MINIMAL, layer({CONFIG: b"SELINUXTYPE=a\n"})], "file_contexts of the image is missing", True),
        ([MINIMAL, layer({CONFIG: TARGETED, CONTEXTS: b"/(a b\n"})], "SELinux", True),
        ([MINIMAL, layer({CONFIG: TARGETED, CONTEXTS: b"/a\n"})], "line 1", True),
        ([MINIMAL, layer({CONFIG: TARGETED, CONTEXTS: b"/\xff a\n"})], "line 1: not UTF-8", True),
        ([MINIMAL, layer({"etc/selinux": b"x"})], "a file in place of a directory", True),
        (
            [
                MINIMAL,
                layer({}, ["etc/selinux"]),
                tars.header(CONFIG.encode(), kind=b"2", link=b"x") + tars.END,
            ],
            "config of the image: a symbolic link",
            True,
        ),
    ],
)
def test_refused(place: MakePlace, layers: list[bytes], message: str, refused_by_cfsctl: bool) -> None:
    """Nothing is changed; where cfsctl takes the image nevertheless, it is one that does not boot."""
    there = place(*layers)
    before = there.files()
    with pytest.raises(UnsupportedImage, match=message):
        there.generate()
    assert there.files() == before
    argv = ("--repo", there.path, "--insecure", "oci", "compute-id", "--bootable", NAME)
    assert (run(there.cfsctl, *argv, check=False).code != 0) is refused_by_cfsctl


def test_no_image(place: MakePlace) -> None:
    there = place(MINIMAL)
    with there.open() as repository, pytest.raises(ImageNotFound):
        generate(repository, ManifestDigest("sha256:" + "0" * 64), Silent())


def test_what_is_damaged_is_made_anew(place: MakePlace) -> None:
    there = place(MINIMAL)
    made = there.generate()
    (there.path / "images" / made.object_id.hex()).unlink()
    assert there.generate().object_id == made.object_id
    assert (there.path / "images" / made.object_id.hex()).exists()
    there.judge.check(images=1)
    with there.open() as repository:
        layer_id = next(iter(images.open_image(repository, there.digest).layers.values()))
    (there.path / "objects" / layer_id.pathname).unlink()
    with pytest.raises(CorruptRepository):
        there.generate()


class Stop(Exception):
    """Where a test ends the work."""


class StopAt(Silent):
    """Raises at a named point, and notes all."""

    def __init__(self, point: str = "") -> None:
        self.point = point
        self.seen: list[str] = []

    def at(self, point: str) -> None:
        self.seen.append(point)
        if point == self.point:
            raise Stop


@pytest.mark.parametrize("point", [point for point in FAULT_POINTS if point != "shared.stored"])
def test_interrupted(place: MakePlace, point: str) -> None:
    """Wherever it ends: cfsctl finds nothing wrong and collects nothing of use; a second try completes it."""
    there = place(MINIMAL, IN_BOOT)
    with there.open() as repository, pytest.raises(Stop):
        generate(repository, there.digest, StopAt(point))
    there.judge.check(images=1)
    there.judge("gc")
    there.judge.check(images=1)
    made = check_ids(there, XattrMode.ALLOWLIST_ONLY)
    assert (there.path / "images" / made.object_id.hex()).exists()
    there.judge.check(images=1)
    with there.open() as repository:
        assert [*repository.stream_refs()] == [f"oci/{NAME}"]


def test_an_interrupted_one_is_settled(place: MakePlace) -> None:
    """Without making it again: the manifests refer to the new configuration, before its reference goes."""
    there = place(MINIMAL, IN_BOOT)
    layout = Layout(Path(there.source.split(":")[1]))
    stored = [layout.layer(MINIMAL, "none"), layout.layer(IN_BOOT, "none")]
    other = layout.image("v2", stored, manifest_extra={"annotations": {"a": "b"}})
    there.judge("oci", "pull", there.source.replace(":v1", ":v2"), "other")
    with there.open() as repository, pytest.raises(Stop):
        generate(repository, there.digest, StopAt("config.stored"))
    with there.open() as repository:
        settle(repository, there.digest, Silent())
        assert sorted(repository.stream_refs()) == [f"oci/{NAME}", "oci/other"]
    check_kept(there, there.digest, images_there=2)
    there.judge("oci", "untag", NAME)
    check_kept(there, ManifestDigest(other["digest"]), images_there=1)


def check_kept(place: Place, digest: ManifestDigest, *, images_there: int) -> None:
    """The collector leaves all images of one, boot images in both formats among them."""
    place.judge("gc")
    place.judge.check(images=images_there)
    with place.open() as repository:
        image = images.open_image(repository, digest)
        boot = boot_refs(image.config_refs)
        assert set(boot) == {boot_ref(each, XattrMode.ALLOWLIST_ONLY) for each in BOTH.in_order()}
        for id_ in (*image.image_ids.values(), *boot.values()):
            os.close(repository.open_image(id_.hex()))


def test_a_configuration_under_another_name_is_written_again(place: MakePlace) -> None:
    """Its name leads to another stream than the manifest refers to: what is not changed is written, too."""
    there = place(MINIMAL, IN_BOOT)
    with there.open() as repository:
        image = images.open_image(repository, there.digest)
        name = images.config_stream(image.config_digest)
        with repository.new_stream(ContentType.CONFIG) as writer:
            writer.external(repository.store_object(image.stored_config.raw).id, len(image.stored_config.raw))
            repository.write_stream(name, writer)
        assert remove(repository, there.digest, Silent())
        assert repository.has_stream(name) == image.stored_config.stream_id
    there.judge("gc")
    there.judge.check(images=1)


def test_points(place: MakePlace) -> None:
    there = place(MINIMAL)
    reporter = StopAt()
    with there.open() as repository:
        generate(repository, there.digest, reporter)
    assert set(reporter.seen) == set(FAULT_POINTS) - {"shared.stored"}


def test_a_shared_configuration(place: MakePlace, tmp_path: Path) -> None:
    """Every tagged manifest with the configuration knows the boot image then, and keeps it."""
    there = place(MINIMAL)
    layout = Layout(Path(there.source.split(":")[1]))
    other = layout.image("v2", [layout.layer(MINIMAL, "none")], manifest_extra={"annotations": {"a": "b"}})
    assert other["digest"] != str(there.digest)
    there.judge("oci", "pull", there.source.replace(":v1", ":v2"), "other")
    made = there.generate()
    there.judge("oci", "untag", NAME)
    there.judge("gc")
    with there.open() as repository:
        refs = images.open_image(repository, ManifestDigest(other["digest"])).config_refs
        assert refs[boot_ref(V1, XattrMode.ALLOWLIST_ONLY)] == made.object_id
        os.close(repository.open_image(made.object_id.hex()))
    there.judge.check(images=1)


@pytest.mark.slow
def test_time(place: MakePlace) -> None:
    """Of 100,000 files and 6,000 rules; a second time for nothing but looking at the tree."""
    there = place(*fedora_like(100_000, 6000), formats=FormatSet(V1))
    began = time.process_time()
    made = there.generate()
    assert time.process_time() - began < 30
    assert str(made.id) == there.computed(V1)


def test_artifacts(place: MakePlace) -> None:
    there = place(MINIMAL)
    layout = Layout(there.path.parent / "artifact")
    config = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    digest = ManifestDigest(layout.image(None, [], manifest_extra={"config": config, "layers": []})["digest"])
    raw = layout.blob_path(str(digest)).read_bytes()
    contents = Contents(digest, raw, ConfigDigest(config["digest"]), b"{}", (), artifact=True)
    with there.open() as repository:
        Commit(repository, contents, Silent()).run()
        with pytest.raises(UnsupportedImage, match="an artifact"):
            generate(repository, digest, Silent())
        with pytest.raises(UnsupportedImage, match="no container image"):
            remove(repository, digest, Silent())

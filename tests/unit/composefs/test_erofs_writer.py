"""EROFS images against recorded digests, which composefs-rs and C composefs agree on."""

from __future__ import annotations

import hashlib
import lzma
from functools import cache
from pathlib import Path

import pytest

from hostimaged.composefs import dumpfile
from hostimaged.composefs.dumpfile import parse
from hostimaged.composefs.erofs import Format, Image, UnsupportedTree, build
from hostimaged.composefs.erofs.xattrs import split_name
from hostimaged.composefs.erofs.xxh32 import xxh32
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Content,
    Directory,
    External,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Stat,
    Symlink,
)
from hostimaged.ids import ObjectId

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512
V0, V1, V2 = Format
DATA = Path(__file__).parents[2] / "data/composefs"


def leaf(content: Content, stat: Stat | None = None) -> Leaf:
    return Leaf(stat or Stat(0, 0, 0, 0, 0, {}), content)


def empty() -> Directory:
    return Directory(Stat(0o755, 0, 0, 0, 0, {}), {})


def simple(algorithm: Algorithm) -> Directory:
    root = empty()
    root.entries.update(
        {
            b"blkdev": leaf(BlockDevice(123)),
            b"chrdev": leaf(CharDevice(123)),
            b"fifo": leaf(Fifo()),
            b"regular-external": leaf(External(ObjectId(b"\x5a" * algorithm.digest_size), 1234)),
            b"regular-inline": leaf(Inline(b"hihi")),
            b"socket": leaf(Socket()),
            b"symlink": leaf(Symlink(b"/target")),
        }
    )
    return root


def image_id(root: Directory, image_format: Format, algorithm: Algorithm = SHA256) -> str:
    return digest(algorithm, build(root, image_format, algorithm)).hex()


# Pinned in the tests of composefs-rs 0.9.
@pytest.mark.parametrize(
    ("image_format", "size", "of_empty", "of_simple"),
    [
        (
            V0,
            16384,
            "8f589e8f57ecb88823736b0d857ddca1e1068a23e264fad164b28f7038eb3682",
            "9f3f5620ee0c54708516467d0d58741e7963047c7106b245d94c298259d0fa01",
        ),
        (
            V1,
            16384,
            "14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63",
            "ad6db6427568a1e4fdc772cbab7b6063f5eb4b33cb62982a740ba9213e5962b5",
        ),
        (
            V2,
            4096,
            "086b702a519b57d6ef5aea6f8b3f2be24355cd1fb835cd80fb4e3d388b24d5a5",
            "a8fcd41f8b313bede69f462f2af0a38d64b99a6333f5df884ea9ab4037fac722",
        ),
    ],
    ids=["v0", "v1", "v2"],
)
def test_pinned_sha256(image_format: Format, size: int, of_empty: str, of_simple: str) -> None:
    assert len(build(empty(), image_format, SHA256)) == size
    assert len(build(simple(SHA256), image_format, SHA256)) == size
    assert image_id(empty(), image_format) == of_empty
    assert image_id(simple(SHA256), image_format) == of_simple


# From an independent draft of the writer.
@pytest.mark.parametrize(
    ("image_format", "of_empty", "of_simple"),
    [
        (
            V1,
            (
                "ee192e5a91c70428c8f2ca7abf8274b695494c70a9ffb277598ffbacf46e2ceb"
                "d7de172c6d44a84c20f3f13cc97e7691ccce4974937fe866c2f6c83ddccd3f72"
            ),
            (
                "9cd1950bab43a9c65fb151272061e7c41234234043860e5da698485f2503a087"
                "9c7f127de85f599580abc9fa5868c4b7d1fb727c64af05285b896ccde9546bdc"
            ),
        ),
        (
            V2,
            (
                "334472adb2a093bfb4d9bd138d921d76025387ac67813945a297a6391a20518d"
                "93efe5cd374cd7584a25c4df83dbfc1e3d4b5b3838ecc50e441d944ca0c11cf7"
            ),
            (
                "d0d18413b6b0df8deafa93353cc48357d0c87fb0ad5d098d9cf639e57dd0684b"
                "049c7ef618531931b20c2bee68e908b4e757d8059218d372640849b9ff045866"
            ),
        ),
    ],
    ids=["v1", "v2"],
)
def test_recorded_sha512(image_format: Format, of_empty: str, of_simple: str) -> None:
    assert image_id(empty(), image_format, SHA512) == of_empty
    assert image_id(simple(SHA512), image_format, SHA512) == of_simple


HARD_LINK = rb"""/ 0 40755 3 0 0 0 1234567890.0 - - -
/hello-link.txt 22 100644 2 0 0 0 1234567890.0 - hello\x20from\x20test\x20layer\n -
/hello.txt 0 @120000 - - - - 0.0 /hello-link.txt - -
/usr 0 40755 2 0 0 0 1234567890.0 - - -
"""


@pytest.mark.parametrize(
    ("image_format", "expected"),
    [
        (
            V2,
            (
                "f7684c21050615c02cec250e0c7d4118fb0ff6340af5039e06f2f372a7614fff"
                "25dfd38cf7f28ad67d8b86e86371b7deafa9ae4bf543630322aee6196417de92"
            ),
        ),
        (
            V1,
            (
                "d06f1f6a73f62ed48e05ce9442ff045cdf2a9f5ba1ec623795de3d6177a253d9"
                "1076459795d94f55d8c3d71dab458bb3fc0071255a50c0a4896d86ffdc870b9a"
            ),
        ),
    ],
    ids=["v2", "v1"],
)
def test_pinned_hard_link(image_format: Format, expected: str) -> None:
    assert image_id(parse(HARD_LINK, SHA512), image_format, SHA512) == expected


# The test file of composefs-rs: whiteouts, escaped names.
SPECIAL_V1 = rb"""/ 4096 40555 2 0 0 0 1633950376.0 - - - trusted.foo1=bar-1 user.foo2=bar-2
/blockdev 0 60777 1 0 0 107690 1633950376.0 - - - trusted.bar=bar-2
/chardev 0 20777 1 0 0 10769 1633950376.0 - - - trusted.foo=bar-2
/escaped-xattr 0 100777 1 0 0 0 1633950376.0 - - - trusted.overlay.redirect=/foo\n user.overlay.redirect=/foo\n user.foo=bar-2
/fifo 0 10777 1 0 0 0 1633950376.0 - - - trusted.bar=bar-2
/inline 15 100777 1 0 0 0 1633950376.0 - FOOBAR\nINAFILE\n - user.foo=bar-2
/whiteout 0 20777 1 0 0 0 1633950376.0 - - - trusted.foo=bar-2
"""  # noqa: E501

_AB, _CD = "ab" * 31, "cd" * 31
# Hard links in several directories, user whiteouts, ACL, lustre, sparse, no-verity, a long symlink.
DUMP_A = f"""/ 0 40755 5 0 0 0 100.7 - - - security.selinux=system_u:object_r:root_t:s0 user.k=v
/a 0 40755 3 0 0 0 50.0 - - - security.selinux=system_u:object_r:usr_t:s0
/a/deep 0 40700 2 1000 70000 0 50.0 - - -
/a/deep/first 3 100644 3 0 0 0 50.0 - abc - user.k=v
/a/ext 5000 100755 1 0 0 0 200.5 ab/{_AB} - ab{_AB} security.selinux=system_u:object_r:usr_t:s0 trusted.overlay.foo=bar
/a/nov 70 100644 1 0 0 0 50.0 cd/{_CD} - -
/a/sparse 1048577 100644 1 0 0 0 50.0 - - -
/b 0 40755 2 0 0 0 50.0 - - - system.posix_acl_access=\\x02\\x00 lustre.x=1
/b/hard 0 @120000 - - - - 0.0 /a/deep/first - -
/b/wh 0 20644 1 0 0 0 50.0 - - -
/dup1 4 120777 1 0 0 0 50.0 dest - - user.k=v
/hard0 0 @120000 - - - - 0.0 /a/deep/first - -
/null 0 20666 1 0 0 259 50.0 - - -
/07 0 20644 1 5 5 0 50.0 - - -
/long 1000 120777 1 0 0 0 50.0 {"x" * 1000} - -
/zero 0 100644 1 0 0 0 50.0 - - -
""".encode()  # noqa: E501

# A directory of several blocks.
DUMP_B = b"".join(
    [b"/ 0 40755 3 0 0 0 1.0 - - -\n/d 0 40755 2 0 0 0 1.0 - - -\n"]
    + [b"/d/file-%03d 0 10644 1 0 0 0 1.0 - - -\n" % i for i in range(400)]
)

# Padding rules.
DUMP_C = b"".join(
    [b"/ 0 40755 2 0 0 0 1.0 - - -\n"]
    + [
        b"/f%02d %d 100644 1 0 0 0 1.0 - %b - user.a=%b\n" % (i, 300 + i, b"y" * (300 + i), b"z" * i)
        for i in range(60)
    ]
    + [b"/s%d %d 120777 1 0 0 0 %d.0 %b - -\n" % (i, 700 + i, i, b"t" * (700 + i)) for i in range(10)]
)

# The base image of the repository tests of composefs-rs.
BASE_IMAGE = rb"""/ 0 40755 6 0 0 0 0.0 - - -
/etc 0 40755 2 0 0 0 0.0 - - -
/etc/hostname 9 100644 1 0 0 0 0.0 - test-host -
/etc/os-release 23 100644 1 0 0 0 0.0 - ID=test\nVERSION_ID=1.0\n -
/etc/passwd 100 100644 1 0 0 0 0.0 f2/c4fd5735bd46db3b18d402ae87c5086c97c0e1321901cfd30f320b73ef25aa - f2c4fd5735bd46db3b18d402ae87c5086c97c0e1321901cfd30f320b73ef25aa
/tmp 0 40755 2 0 0 0 0.0 - - -
/usr 0 40755 5 0 0 0 0.0 - - -
/usr/bin 0 40755 2 0 0 0 0.0 - - -
/usr/bin/busybox 4096 100755 1 0 0 0 0.0 f0/f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1 - f0f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1
/usr/bin/cat 7 120777 1 0 0 0 0.0 busybox - -
/usr/bin/cp 7 120777 1 0 0 0 0.0 busybox - -
/usr/bin/ls 7 120777 1 0 0 0 0.0 busybox - -
/usr/bin/mv 7 120777 1 0 0 0 0.0 busybox - -
/usr/bin/ping 7 120777 1 0 0 0 0.0 busybox - - security.capability=\x02\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00
/usr/bin/rm 7 120777 1 0 0 0 0.0 busybox - -
/usr/bin/sh 7 120777 1 0 0 0 0.0 busybox - -
/usr/lib 0 40755 2 0 0 0 0.0 - - -
/usr/share 0 40755 3 0 0 0 0.0 - - -
/usr/share/doc 0 40755 2 0 0 0 0.0 - - -
/usr/share/doc/README 512 100644 1 0 0 0 0.0 51/44b8f80be57c3518f410d930e18c4e405387c82e4993c18265a1ba4a80263b - 5144b8f80be57c3518f410d930e18c4e405387c82e4993c18265a1ba4a80263b
/var 0 40755 3 0 0 0 0.0 - - -
/var/data 0 40755 2 0 0 0 0.0 - - -
/var/data/app.json 256 100644 1 0 0 0 0.0 c9/21965b74ac1780bc437cec640b27186d85317b9afdb3dbb68626aed5ecd2b6 - c921965b74ac1780bc437cec640b27186d85317b9afdb3dbb68626aed5ecd2b6
"""  # noqa: E501

# The tree of two layers with pax times and xattrs; C composefs makes the same V1 image.
TWO_LAYERS = rb"""/ 0 40755 5 0 0 0 2000.500000000 - - - security.capability=\x01
/etc 0 40755 2 0 0 0 1000.0 - - -
/etc/keep 4 100644 1 0 0 0 1000.0 - keep -
/etc/new 3 100644 1 0 0 0 1000.0 - new -
/run 0 40755 2 0 0 0 2000.500000000 - - -
/usr 0 40755 3 0 0 0 2000.500000000 - - - security.capability=\x01
/usr/bin 0 40755 2 0 0 0 1000.0 - - -
/usr/bin/tool 70 100755 2 0 0 0 1000.0 f7/46f2d564f25c6198134c7177dda5a575882a46b167fb2d15fdd83b4b7df5d7 - f746f2d564f25c6198134c7177dda5a575882a46b167fb2d15fdd83b4b7df5d7
/usr/bin/tool2 0 @120000 - - - - 0.0 /usr/bin/tool - -
"""  # noqa: E501


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            BASE_IMAGE,
            {
                V0: "4ce8cdfc02c93f57b5ad6372111bf03e9d9385ea0c18ae309defc8613dd56d73",
                V1: "617bf3168c5bed49693358601751cd3c5467526b70d78ee0cc501bcea7918433",
                V2: "c2450eb4a411b0fe92fdc1c52fb52233dd40c3de10e320f80052d66c4766e060",
            },
        ),
        (
            TWO_LAYERS,
            {
                V1: "3493787907fd8fb0bccae6fe953c3e280f32b34fbfc93ef1e949ea4685c63186",
                V2: "619495a2205fc3a047a387c6424e6b24507370e79427c9e3d976b44b42da6715",
            },
        ),
    ],
    ids=["base", "two layers"],
)
def test_recorded_trees_of_layers(text: bytes, expected: dict[Format, str]) -> None:
    root = parse(text, SHA256)
    assert {image_format: image_id(root, image_format) for image_format in expected} == expected


@pytest.mark.parametrize(
    ("text", "text_sha256", "expected", "sizes"),
    [
        (
            SPECIAL_V1,
            None,
            (
                "ca8f91c7a310308bb5737cf1ab1d06395f83a2d9266423bfe5fe2b5f2c4e4218",
                "b1c78c25db8638be5b9b483472d32ee9624d8d32ded626a91cd536116e8df97c",
                "1fdf4ddd0a17123449feb902b32594f30fa121b81735c4540db0d556c9af8c8c",
            ),
            (16384, 16384, 4096),
        ),
        (
            DUMP_A,
            "bb840a1f8d0c0631a34b5ecc9f5bfa12b1f69b9859fd2f4f681eca4fe1374076",
            (
                "e95d4b61dc149014e8c74803d69753c4d41e1436b890a3012e047069431986ab",
                "bc00e42246a4469b307805dd423507017c647b32bf11181950332dd83e07d176",
                "c34cae1c95a9ffb2ab0bd6353ec294129d203cccf940535f12c89d9e179507ba",
            ),
            (32768, 32768, 4096),
        ),
        (
            DUMP_B,
            "5e35686b7944ac8b97be9ea25198ae89f8a817bc0a1c4e5f56b8f18944ca0f57",
            (
                "6f1499de9b0a85a2fad3faf3a852316c1e37e917c07187a8e9c0164d8ad39089",
                "c01f7287ee4cd8f404f2c7b8cd347066e4d7d56939a106f9c1af31e265c17d92",
                "3d65634f4098d92b07d0b91e82cb927b231c25c8a1c0c334b9671116b37bd0b9",
            ),
            (36864, 36864, 36864),
        ),
        (
            DUMP_C,
            "1b2718645097a63bb12a2f1452c535a8fae561b6f187fce4ad160c6e7b629449",
            (
                "c59bc87f1818db1e0a6d60239a881f88e4ba86587c47a8b451b132c7dd9c2a18",
                "11bde5db35d11eea4ae2bc1f4d7bde2e2651bb033df38de7acb04945e80a9451",
                "6391a0e4bbd0bfe4cec8fb30978a6b1e8e8cb6a4a4e58cfed76b4c2a3dcb04b4",
            ),
            (61440, 61440, 40960),
        ),
    ],
    ids=["special_v1", "A", "B", "C"],
)
def test_recorded_dumps(
    text: bytes, text_sha256: str | None, expected: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    if text_sha256:
        assert hashlib.sha256(text).hexdigest() == text_sha256, "the test's own text is damaged"
    root = parse(text, SHA256)
    images = [build(root, image_format, SHA256) for image_format in Format]
    assert tuple(digest(SHA256, image).hex() for image in images) == expected
    assert tuple(map(len, images)) == sizes


# fs-verity digests of the images that C composefs makes of its test files, in V0 and V1.
C_ASSETS = {
    "no-newline": (
        "4aa51e1805ee1c2d3bd8d9ba2f2740948c2ee4de7c3cbfcef863982e456f46fe",
        "3285623de4ad5d7405606073eb239bc741717256c35f8f8d4c4dbc48135cf0be",
    ),
    "special": (
        "6fae72a66167ef8d5830fa15647263ef1b535681aa91fdf195fa3d6f5e3ae15e",
        "1d268f8bc7609b4f8f8467e98565f45300f9e192c0e6ef2d05820d3ea41d4515",
    ),
    "longlink": (
        "32f1351322d32ebed1bde5fd72e2d218435c4aada13a359f1b1d1f1e126815a6",
        "3de2a4b626ec0466196945cdbe75d98e0bed484c3a995d607d7a9eeb42dd80c7",
    ),
    "bigfile": (
        "160c71227628d810604ad305e5d4a912e01a5964866b9bec9f8fddc55e352bfb",
        "fa70c287ec4bdb389f29c24bb49569d503ff0de4436be0551deea861e95ecc5c",
    ),
    "bigfile-xattr": (
        "96477776a78abab3bf28c57b16dd0c47ed41a05774a2352ecf15c3ac15108b3f",
        "b4e638ab18419c4a6a5bae91f0e2055873cf21331f7b745a061bd37abb84c61c",
    ),
    "honggfuzz-bigfile-with-acl": (
        "062b7c9e88806d8fe267287a35ba7abfa8faf70460b2dd8294781d6f26d64912",
        "102bd6a8debd3d3973edec57b83ab5019867921c4de798ae6d31b693f8f6eac2",
    ),
    "honggfuzz-long-symlink": (
        "d7894fc7641b935efec393392e36dfab0ffbcc20d29a4c684aebde71b8c38005",
        "37d3827127f6e461cbbb42d8c94344183cba73d4ad75a532002e1a5d30a204e5",
    ),
    "config": (
        "26cbaf47c39d0b5ed47bd959595e4d84f01c8eb8196d861d9f00bf527c244ad2",
        "c7dc4cff47b44d92c61ecdddf06cc62e6332fbc1a4528d38ed6df23baeb5f857",
    ),
    "config-with-hard-link": (
        "a7afa3886a072e11ac8dae09d46da54ea43ca0cfe34d170b1cdc9287cceca6a1",
        "c52eede667bffac2f3a3fbabc29abcee42aa1ea5d6a35d00d70a921b1a75532c",
    ),
}


@cache
def asset(name: str) -> bytes:
    if name == "config-with-hard-link":
        return lzma.decompress((DATA / f"{name}.dump.xz").read_bytes())
    if name == "config":
        lines = asset("config-with-hard-link").splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(b"/usr/bin/ls-hardlink ")]
        assert len(kept) == len(lines) - 1
        return b"".join(
            line.replace(b" 100145 2 ", b" 100755 1 ") if line.startswith(b"/usr/bin/ls ") else line
            for line in kept
        )
    text = (DATA / f"{name}.dump").read_bytes()
    # The parser has the strictness of composefs-rs: no device number but on devices.
    lines = [line.split(b" ") for line in text.splitlines()]
    for fields in lines:
        if int(fields[2].rpartition(b"@")[2], 8) >> 12 not in (0o2, 0o6):
            fields[6] = b"0"
    return b"".join(b" ".join(fields) + b"\n" for fields in lines)


@pytest.mark.parametrize("name", C_ASSETS)
def test_assets_of_c_composefs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limits of C composefs, which are those of the image.
    monkeypatch.setattr(dumpfile, "MAX_INLINE_CONTENT", 5000)
    monkeypatch.setattr(dumpfile, "MAX_SYMLINK", 4095)
    root = parse(asset(name), SHA256)
    assert (image_id(root, V0), image_id(root, V1)) == C_ASSETS[name]


def words(image: bytearray, rows: str) -> None:
    """Compare with lines of a hex dump: offset, then words."""
    for row in rows.split("\n"):
        if row.strip():
            offset, *expected = row.split()
            at = int(offset, 16)
            raw = bytes.fromhex("".join(expected))
            assert image[at : at + len(raw)].hex() == raw.hex(), f"at {offset}"


def test_bytes_of_the_empty_v2_image() -> None:
    image = build(empty(), V2, SHA256)
    rows = """
        0000  9a6278d0 01000000 00000000 02000000
        0400  e2e1f5e0 00000000 06000000 0c002400
        0410  01000000 00000000 00000000 00000000
        0420  00000000 01000000 00000000 00000000
        0480  05000000 ed410000 1b000000 00000000
        0490  00000000 24000000 00000000 00000000
        04a0  00000000 00000000 00000000 02000000
        04c0  24000000 00000000 18000200 24000000
        04d0  00000000 19000200 2e2e2e00 00000000"""
    words(image, rows)
    shown = sum(word != "00000000" for row in rows.split("\n") for word in row.split()[1:])
    assert sum(image[at : at + 4] != bytes(4) for at in range(0, len(image), 4)) == shown


def test_start_of_the_empty_v1_image() -> None:
    words(
        build(empty(), V1, SHA256),
        """
        0000  9a6278d0 01000000 00000000 01000000
        0400  e2e1f5e0 00000000 06000000 0c002400
        0410  01010000 00000000 00000000 00000000
        0420  00000000 04000000 00000000 02000000
        0480  00000600 ed410200 00100000 00000000
        0490  03000000 00000000 00000000 00000000
        04a0  ffffefff 00000000 00000000 0e040100
        04b0  6f766572 6c61792e 6f706171 75657900
        04c0  00000000 a4210100 00000000 00000000
        04d0  00000000 01000000""",
    )


def test_xxh32() -> None:
    assert xxh32(b"", 0) == 0x02CC5D05
    assert xxh32(b"abc", 0) == 0x32D153FF
    assert xxh32(b"0123456789abcdef0123", 1) == 0xFA9D2144


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        (b"security.selinux", 11),
        (b"security.capability", 29),
        (b"trusted.overlay.metacopy", 31),
        (b"trusted.overlay.redirect", 17),
        (b"trusted.overlay.opaque", 20),
        (b"trusted.overlay.overlay.whiteout", 4),
        (b"user.overlay.whiteout", 9),
        (b"system.posix_acl_access", 30),
    ],
)
def test_name_filter(name: bytes, bit: int) -> None:
    assert split_name(name, lustre=False)[2] == 1 << bit


def test_prefixes() -> None:
    assert split_name(b"system.posix_acl_accessX", lustre=False)[:2] == (2, b"X")
    assert split_name(b"lustre.a", lustre=True)[:2] == (5, b"a")
    assert split_name(b"lustre.a", lustre=False)[:2] == (0, b"lustre.a")
    assert split_name(b"odd", lustre=False)[:2] == (0, b"odd")


def test_tree_is_not_changed() -> None:
    root = parse(DUMP_A, SHA256)
    before = b"".join(dumpfile.write(root))
    for image_format in Format:
        build(root, image_format, SHA256)
    assert b"".join(dumpfile.write(root)) == before


def test_equal_xattrs_need_not_be_one_object() -> None:
    root = empty()
    for name in (b"a", b"b", b"c"):
        root.entries[name] = leaf(Fifo(), Stat(0, 0, 0, 0, 0, {b"user.a": b"x" * 100}))
    shared = {b"user.a": b"x" * 100}
    other = empty()
    for name in (b"a", b"b", b"c"):
        other.entries[name] = leaf(Fifo(), Stat(0, 0, 0, 0, 0, shared))
    for image_format in Format:
        image = build(root, image_format, SHA256)
        assert image == build(other, image_format, SHA256)
        assert image.count(b"x" * 100) == 1


def stat(**changes: int) -> Stat:
    return Stat(0, 0, 0, 0, 0, {})._replace(**changes)


def with_xattrs(xattrs: dict[bytes, bytes]) -> Leaf:
    return leaf(Fifo(), Stat(0, 0, 0, 0, 0, xattrs))


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
@pytest.mark.parametrize(
    ("name", "node", "reason"),
    [
        (b"n" * 256, leaf(Fifo()), "longer than 255"),
        (b"x", leaf(CharDevice(1 << 32)), "out of range"),
        (b"x", leaf(Fifo(), stat(uid=1 << 32)), "out of range"),
        (b"x", leaf(Fifo(), stat(gid=-1)), "out of range"),
        (b"x", leaf(Fifo(), stat(mtime=1 << 63)), "out of range"),
        (b"x", leaf(Fifo(), stat(nsec=1_000_000_000)), "out of range"),
        (b"x", leaf(External(ObjectId(bytes(32)), 1 << 64)), "out of range"),
        (b"x", leaf(Symlink(b"")), "symbolic link"),
        (b"x", leaf(Symlink(b"t" * 4097)), "symbolic link"),
        (b"x", with_xattrs({b"user." + b"k" * 256: b""}), "too long"),
        (b"x", with_xattrs({b"user.k": bytes(65536)}), "too long"),
        (b"x", with_xattrs({b"user.k%d" % i: bytes(60000) for i in range(5)}), "too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_image_cannot_hold(image_format: Format, name: bytes, node: Leaf, reason: str) -> None:
    root = empty()
    root.entries[name] = node
    with pytest.raises(UnsupportedTree, match=reason):
        build(root, image_format, SHA256)


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
def test_more_shared_xattrs_than_fit(image_format: Format) -> None:
    root = empty()
    xattrs = {b"user.%d" % i: b"" for i in range(256)}
    root.entries.update({b"a": with_xattrs(xattrs), b"b": with_xattrs(xattrs)})
    with pytest.raises(UnsupportedTree, match="too many"):
        build(root, image_format, SHA256)


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
def test_whiteout_with_hard_links(image_format: Format) -> None:
    root = empty()
    whiteout = leaf(CharDevice(0))
    root.entries.update({b"a": whiteout, b"b": whiteout})
    with pytest.raises(UnsupportedTree, match="whiteout"):
        build(root, image_format, SHA256)


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
def test_depth(image_format: Format) -> None:
    root = at = empty()
    for _ in range(2047):
        below = empty()
        at.entries[b"d"] = below
        at = below
    image = build(root, image_format, SHA256)
    assert sum(1 for _ in dumpfile.write(Image(image, SHA256).tree())) == 2048
    at.entries[b"d"] = empty()
    with pytest.raises(UnsupportedTree, match="deeper"):
        build(root, image_format, SHA256)


def test_v2_holds_only_what_its_reader_takes() -> None:
    root = empty()
    root.entries[b"x"] = leaf(Inline(bytes(513)))
    build(root, V1, SHA256)
    with pytest.raises(UnsupportedTree):
        build(root, V2, SHA256)
    root.entries[b"x"] = leaf(Symlink(b"t" * 1025))
    build(root, V1, SHA256)
    with pytest.raises(UnsupportedTree):
        build(root, V2, SHA256)

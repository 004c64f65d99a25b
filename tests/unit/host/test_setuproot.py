"""The configuration of the initramfs: modes, aliases, defaults, and what stops a boot."""

from __future__ import annotations

import pytest

from hostimaged.errors import UnsupportedImage
from hostimaged.host.setuproot import MAX_SIZE, PATH, MountMode, SetupRoot, SetupRootError

BIND, NONE, OVERLAY, TRANSIENT = MountMode.BIND, MountMode.NONE, MountMode.OVERLAY, MountMode.TRANSIENT


class Files:
    def __init__(self, content: dict[str, bytes]) -> None:
        self._content = content

    def read(self, path: str, limit: int) -> bytes | None:
        assert limit == MAX_SIZE
        return self._content.get(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SetupRoot()),
        ("# nothing\n", SetupRoot(False, BIND, BIND)),
        ("[etc]\n", SetupRoot()),
        ("[etc]\nmount = 'none'\n", SetupRoot(etc=NONE)),
        ("[etc]\nmount = 'root'\n", SetupRoot(etc=NONE)),
        ("[etc]\nmount = 'bind'\n", SetupRoot(etc=BIND)),
        ("[etc]\nmount = 'overlay'\n", SetupRoot(etc=OVERLAY)),
        ("[etc]\nmount = 'transient'\n", SetupRoot(etc=TRANSIENT)),
        ("[etc]\nmount = 'volatile'\n", SetupRoot(etc=TRANSIENT)),
        ("[etc]\ntransient = true\n", SetupRoot(etc=TRANSIENT)),
        ("[etc]\ntransient = false\n", SetupRoot()),
        ("[etc]\ntransient = true\nmount = 'bind'\n", SetupRoot(etc=BIND)),
        ("etc = { mount = 'overlay' }\n", SetupRoot(etc=OVERLAY)),
        ("etc.mount = 'overlay'\n", SetupRoot(etc=OVERLAY)),
        ("[var]\nmount = 'none'\n", SetupRoot(var=NONE, var_given=True)),
        ("[var]\nmount = 'bind'\n", SetupRoot(var_given=True)),
        ("[var]\ntransient = false\n", SetupRoot()),
        ("[var]\n", SetupRoot()),
        ("[root]\ntransient = true\n", SetupRoot(transient_root=True)),
        ("[root]\nmount = 3\n[new]\nx = 1\n[etc]\nodd = []\n", SetupRoot()),
    ],
)
def test_what_it_says(text: str, expected: SetupRoot) -> None:
    assert SetupRoot.parse(text.encode()) == expected
    assert SetupRoot.load(Files({PATH: text.encode()})) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"[etc]\nmount = 'Bind'\n",
        b"[etc]\nmount = 'tmpfs'\n",
        b"[etc]\nmount = ''\n",
        b"[etc]\nmount = true\n",
        b"[etc]\nmount = []\n",
        b"[etc]\ntransient = 'yes'\n",
        b"[etc]\ntransient = 1\n",
        b"[etc]\nmount = 'bind'\ntransient = 1\n",
        b"[root]\ntransient = 0\n",
        b"etc = 'bind'\n",
        b"[[etc]]\nmount = 'bind'\n",
        b"[etc]\nmount = 'bind'\nmount = 'bind'\n",
        b"[etc",
        b"\xff\xfe",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 6000,
        b"#" * (MAX_SIZE + 1),
    ],
)
def test_what_stops_a_boot_is_refused(data: bytes) -> None:
    with pytest.raises(SetupRootError, match=r"^/usr/lib/composefs/setup-root-conf\.toml: ") as caught:
        SetupRoot.parse(data)
    assert isinstance(caught.value, UnsupportedImage)
    assert caught.value.message.isprintable()


def test_an_image_without_one() -> None:
    assert SetupRoot.load(Files({})) == SetupRoot()


def test_what_outlives_the_boot() -> None:
    assert [mode for mode in MountMode if mode.persistent] == [BIND, OVERLAY]

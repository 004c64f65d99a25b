"""Known inputs of the targets in ``boot_targets.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hostimage_testing import selinux_policy
from hostimage_testing.uki import Section, pe, uki
from hostimaged.boot.bls import Entry
from hostimaged.boot.grubcfg import MenuEntry, serialise_efiuuid, serialise_user_cfg
from hostimaged.ids import DeploymentId

A = DeploymentId("a" * 128)
CMDLINE = f"root=UUID=1 rw composefs=?{A}"
OS_RELEASE = b"""NAME="Fedora Linux"
VERSION='44 (x)'
# comment
ID=fedora-coreos
VERSION_ID=44.1+2
PRETTY_NAME="Fedora \\"CoreOS\\" 44"
"""


def entry_seeds() -> Iterator[bytes]:
    kernel = Entry(
        title="Fedora Linux 44",
        version="44",
        linux=f"/boot/bootc_composefs-{A}/vmlinuz",
        initrd=(f"/boot/bootc_composefs-{A}/initrd", "/ucode"),
        options=CMDLINE,
        machine_id="0123",
        sort_key="bootc-fedora-0",
        extra=(("grub_users", "$x"),),
    )
    yield kernel.serialise()
    yield replace(kernel, options=f"composefs.digest=v1-sha512-12:{A}").serialise()
    for key in (b"efi", b"uki"):
        yield b"# x\nversion\t1\n" + key + f" /EFI/Linux/bootc/bootc_composefs-{A}.efi\n".encode()
    yield b"linux /vmlinuz\r\ninitrd /a\ntitle \xff\n"


def menu_seeds() -> Iterator[bytes]:
    made = MenuEntry.new('Fedora "44" $x', A)
    yield serialise_user_cfg([made, replace(made, extra=(("boot", "{ x }"),))])
    yield serialise_efiuuid("7B77-95E7")
    yield b"set timeout=1\n"
    yield b'menuentry\n "a \\" b" \n{\n# {\n}\nset x=1\ninsmod a\n search b\nchainloader /c.efi }'


def uki_seeds() -> Iterator[bytes]:
    yield uki(linux=b"kernel", initrd=b"initrd", cmdline=CMDLINE + "\n\0", osrel=OS_RELEASE.decode())
    yield pe(
        [Section(b".linux", b"kernel", virtual_size=8), Section(b".initrd", b""), Section(b".linux", b"x")]
    )
    yield pe([Section(b".linux", b"k"), Section(b".initrd", b"i", offset=0x7FFFFFFF)], count=40)


def drop_in_seeds() -> Iterator[bytes]:
    yield b'kargs = ["quiet", "a=1  b=\\"x y\\""]\nmatch-architectures = ["x86_64", "aarch64"]\n'
    yield b"kargs = ['''a\nb''',]\n[match-architectures]\nx.y.z = 1979-05-27T07:32:00Z\n"
    yield b"kargs = [[{a = 1}], 0x5, inf]"


def os_release_seeds() -> Iterator[bytes]:
    yield OS_RELEASE
    yield b'ID=\'a\'"b"c\\d\nVERSION="$x \\` \\\nNAME=\xff\n'


def cmdline_seeds() -> Iterator[bytes]:
    yield CMDLINE.encode()
    yield f'a="b c" "composefs=x" composefs.digest=?v2-sha512-12:{A} dyndbg="file x +p; y" a-b a_b'.encode()
    yield f"composefs.digest=v1-sha256-12:{'c' * 64} composefs={A} quiet quiet\n".encode()
    yield b"x=$y {z} it's \\ \xc2\xa0 \""


def file_contexts_seeds() -> Iterator[bytes]:
    yield selinux_policy.BROAD.encode()
    yield selinux_policy.SUBSTITUTIONS.encode()
    yield b"\n".join(selinux_policy.file_contexts(60).splitlines()[-20:])
    yield (
        b"# a\n/usr/lib(64)?/[^/]{2,4}\\.so(\\.[0-9]+)* -- a:b:c:s0\n"
        b"/[[:alpha:]_&&[^b]]+ <<none>>\n/(?i:A)x* -l y\n"
    )
    yield (
        b"/(?<!a)b(?=c).*\\h$ a\n^/\\bx\\B$ -d b\n/[]a-]{,3}(a|b|)** c\n"
        b"/usr/lib /lib\n/\\x61\\x{e9}\xc3\xa9 d\n"
    )


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "entry": entry_seeds,
    "menu": menu_seeds,
    "uki": uki_seeds,
    "drop_in": drop_in_seeds,
    "os_release": os_release_seeds,
    "cmdline": cmdline_seeds,
    "file_contexts": file_contexts_seeds,
}

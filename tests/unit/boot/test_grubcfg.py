"""Menus of classic GRUB."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hostimaged.boot import grubcfg
from hostimaged.boot.grubcfg import (
    NOTHING_ELSE,
    MenuEntry,
    Surroundings,
    parse_surroundings,
    parse_user_cfg,
    serialise_user_cfg,
)
from hostimaged.errors import BootLoaderError
from hostimaged.ids import DeploymentId

A = DeploymentId("a" * 128)
B = DeploymentId("b" * 128)


def test_bytes() -> None:
    text = f"""
if [ -f ${{config_directory}}/efiuuid.cfg ]; then
        source ${{config_directory}}/efiuuid.cfg
fi
menuentry "Fedora 44: ({A})" {{
insmod fat
insmod chain
search --no-floppy --set=root --fs-uuid "${{EFI_PART_UUID}}"
chainloader /EFI/Linux/bootc/bootc_composefs-{A}.efi
}}
menuentry "Old: ({B})" {{
insmod fat
insmod chain
search --no-floppy --set=root --fs-uuid "${{EFI_PART_UUID}}"
chainloader /EFI/Linux/bootc/bootc_composefs-{B}.efi
extra a  {{ b }}
}}
"""
    entries = [
        MenuEntry.new("Fedora 44", A),
        replace(MenuEntry.new("Old", B), extra=(("extra", "a  { b }"),)),
    ]
    assert serialise_user_cfg(entries) == text.encode()
    assert parse_user_cfg(text.encode()) == entries
    assert [entry.deployment_id() for entry in entries] == [A, B]
    assert [entry.artifact() for entry in entries] == [str(A), str(B)]
    assert [entry.label for entry in entries] == ["Fedora 44", "Old"]


def test_labels_are_plain_text() -> None:
    label = 'A "quoted" \\ $price `x` é: (b)'
    entry = MenuEntry.new(label, A)
    assert entry.title.startswith(r"A \"quoted\" \\ \$price \`x\` é: (b): (")
    assert entry.label == label
    assert parse_user_cfg(serialise_user_cfg([entry])) == [entry]
    assert MenuEntry("no id").label == "no id"


def test_reading_is_as_loose_as_bootc() -> None:
    data = rb"""
        if [ -f x ]; then
        fi
        menuentry   "One \"1\"" {
            # a comment { with } braces
            set timeout=5
            insmod  ext2
            chainloader /EFI/Linux/x.efi
            if [ -f ${config_directory}/x ]; then
            boot
        }
        menuentry
        "Two"
        { search a
          chainloader /b.efi }  junk
        submenu "x" { }
    """
    one, two = parse_user_cfg(data)
    assert one == MenuEntry(
        r"One \"1\"",
        "/EFI/Linux/x.efi",
        insmod=("ext2",),
        extra=(("if", "[ -f ${config_directory}/x ]; then"),),
    )
    assert (one.label, one.deployment_id(), one.artifact(), one.has_prefix) == ('One "1"', None, "x", False)
    assert two == MenuEntry("Two", "/b.efi", search="a")
    # They are of other systems, and are written as they stand.
    written = serialise_user_cfg([one, two])
    assert all(line in written for line in (b"comment { with }", b"set timeout=5", b"boot\n", b"{ search a"))
    assert b"junk" not in written
    assert parse_user_cfg(written) == [one, two]


def test_older_images_have_no_prefix() -> None:
    entry = MenuEntry("x", f"/EFI/Linux/bootc/{A}.efi")
    assert (entry.deployment_id(), entry.has_prefix) == (A, False)


@pytest.mark.parametrize("data", [b"", b"set timeout=5\n", b"\n\n"])
def test_no_entries(data: bytes) -> None:
    assert parse_user_cfg(data) == []


@pytest.mark.parametrize(
    "data",
    [
        b"menuentry",
        b"menuentry x {\n}",
        b'menuentry "x {\n}',
        b'menuentry "" {\n}',
        b'menuentry "x" {',
        b'menuentry "x" {\na { b\n}',
        b'menuentry "x" {\n\\}',
        b'menuentry "x" {\n}\n menuentry_id_option',
        b'menuentry "x" {\n}\n' * (grubcfg.MAX_ENTRIES + 1),
        b"#" * (grubcfg.MAX_SIZE + 1),
    ],
)
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(BootLoaderError, match=r"user\.cfg\.staged"):
        parse_user_cfg(data, "user.cfg.staged")


@pytest.mark.parametrize(
    "entry",
    [
        MenuEntry("", "/a"),
        MenuEntry('a"b', "/a"),
        MenuEntry("a\\", "/a"),
        MenuEntry("a\nb", "/a"),
        MenuEntry("a", ""),
        MenuEntry("a", "/a", search="x", extra=(("a b", "c"),)),
        MenuEntry("a", "/a", search="x", extra=(("#", "c"),)),
        MenuEntry("a", "/a}\nreboot", search="x"),
        MenuEntry("a", "/a }{", search="x"),
    ],
)
def test_what_is_never_written(entry: MenuEntry) -> None:
    with pytest.raises(BootLoaderError):
        serialise_user_cfg([entry])


def test_uuid_of_the_esp() -> None:
    assert grubcfg.serialise_efiuuid("7B77-95E7") == b'set EFI_PART_UUID="7B77-95E7"'
    assert grubcfg.parse_efiuuid(b'set EFI_PART_UUID="7B77-95E7"') == "7B77-95E7"
    assert grubcfg.parse_efiuuid(b"# x\nset EFI_PART_UUID=a-b\nset x=1\n") == "a-b"
    assert grubcfg.parse_efiuuid(b'set EFI_PART_UUID="$(x)"') is None
    for bad in ("", 'a"b', "a\nb", "a b"):
        with pytest.raises(BootLoaderError):
            grubcfg.serialise_efiuuid(bad)


HEAD = "# mine\nset superusers=root\npassword_pbkdf2 root grub.pbkdf2.x\n"
TAIL = "\nif [ -f x ]; then\n  source ${prefix}/x\nfi\n# the end {"


def test_what_is_around_entries_is_kept() -> None:
    entries = [MenuEntry.new("Two", B), MenuEntry.new("One", A)]
    plain = serialise_user_cfg(entries).decode()
    assert parse_surroundings(plain.encode()) == NOTHING_ELSE
    at = plain.index("menuentry")
    foreign = plain[:at] + HEAD + plain[at:] + TAIL
    around = parse_surroundings(foreign.encode())
    assert around == Surroundings(HEAD, "", TAIL)
    assert parse_user_cfg(foreign.encode()) == entries
    assert serialise_user_cfg(entries, around) == foreign.encode()
    # Whatever entries there are then.
    changed = serialise_user_cfg(entries[::-1], around)
    assert parse_surroundings(changed) == around
    assert parse_user_cfg(changed) == entries[::-1]


@pytest.mark.parametrize(
    ("text", "around"),
    [
        (b"set a=b", Surroundings("set a=b\n")),
        (b" \n\t", NOTHING_ELSE),
        (b"\xff\n", Surroundings("\udcff\n")),
    ],
)
def test_text_without_entries(text: bytes, around: Surroundings) -> None:
    assert parse_surroundings(text) == around
    written = serialise_user_cfg([MenuEntry.new("T", A)], around)
    assert parse_surroundings(written) == around


def test_text_before_the_header_comes_after_it() -> None:
    plain = serialise_user_cfg([MenuEntry.new("T", A)]).decode()
    around = parse_surroundings(b"set a=b\n" + plain.encode())
    assert around == Surroundings("set a=b\n")
    assert parse_surroundings(serialise_user_cfg([MenuEntry.new("T", A)], around)) == around


def test_comments_between_entries_move_to_the_end_and_commands_there_are_not_lost() -> None:
    one, two = (MenuEntry.new(name, id_).serialise() for name, id_ in (("One", A), ("Two", B)))
    around = parse_surroundings(f"{one}\n  # about two\n{two}set x=y\n".encode())
    assert around == Surroundings("", "", "  # about two\nset x=y\n")
    around = parse_surroundings(f"{one}# about two\nset timeout=3\n{two}".encode())
    assert around.between == "set timeout=3"
    with pytest.raises(BootLoaderError, match="between its entries would be lost: 'set timeout=3'"):
        serialise_user_cfg([MenuEntry.new("One", A)], around)


def test_a_menu_within_another_is_not_torn_apart() -> None:
    entry = MenuEntry.new("One", A).serialise()
    around = parse_surroundings(f'submenu "more" {{\n{entry}}}\n'.encode())
    with pytest.raises(BootLoaderError, match="its entries are within another command"):
        serialise_user_cfg([MenuEntry.new("One", A)], around)

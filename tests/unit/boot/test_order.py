"""Order of boot menus, and names that are sorted the same by everybody."""

from __future__ import annotations

import random

import pytest

from hostimaged.boot.bls import Entry, file_name, sort_key
from hostimaged.boot.loader import Bootloader
from hostimaged.boot.order import (
    boot_counter,
    choose_names,
    menu_order,
    same_for_all,
)

SYSTEMD, GRUB, GRUB_CC = Bootloader.SYSTEMD, Bootloader.GRUB, Bootloader.GRUB_CC


def order(loader: Bootloader, *expected: tuple[str, Entry]) -> None:
    for seed in range(10):
        shuffled = list(expected)
        random.Random(seed).shuffle(shuffled)
        assert [name for name, _ in menu_order(loader, shuffled)] == [name for name, _ in expected]


def test_systemd_boot_sorts_by_key_then_version() -> None:
    order(
        SYSTEMD,
        ("x.conf", Entry(sort_key="a", version="1")),
        ("a.conf", Entry(sort_key="b", version="10")),
        ("b.conf", Entry(sort_key="b", version="9")),
        ("c2.conf", Entry(sort_key="b", version="9~rc1")),
        ("c1.conf", Entry(sort_key="b", version="9~rc1")),
        ("d.conf", Entry(sort_key="b", version="10", machine_id="1")),
        ("e.conf", Entry(sort_key="c", version="99")),
    )


def test_systemd_boot_puts_entries_without_key_last_and_sorts_them_by_name() -> None:
    order(
        SYSTEMD,
        ("a.conf", Entry(sort_key="z")),
        ("f-10.conf", Entry()),
        ("f-9.conf", Entry(version="99")),
    )


def test_systemd_boot_puts_entries_without_tries_last() -> None:
    order(
        SYSTEMD,
        ("b+2-1.conf", Entry(sort_key="b")),
        ("c.conf", Entry(sort_key="c")),
        ("d.conf", Entry()),
        ("a+0-3.conf", Entry(sort_key="a")),
    )
    assert boot_counter("A-1+3.conf") == ("a-1", False)
    assert boot_counter("a-1+x.conf") == ("a-1+x", False)
    assert boot_counter("a+00-7.conf") == ("a", True)


@pytest.mark.parametrize("loader", [GRUB, GRUB_CC])
def test_grub_sorts_by_name_alone(loader: Bootloader) -> None:
    order(
        loader,
        ("bootc_fedora-9.10-0.conf", Entry(sort_key="z", version="1")),
        ("bootc_fedora-9.9-1.conf", Entry(sort_key="a", version="5")),
        ("bootc_fedora-9.9-0.conf", Entry(sort_key="a", version="9")),
        ("bootc_bootc-99-1.conf", Entry()),
    )


def test_grub_names_that_are_the_same_to_it() -> None:
    order(GRUB, ("a-1_0-0.conf", Entry()), ("a-1.0-0.conf", Entry()))


def test_who_disagrees() -> None:
    assert same_for_all([])
    assert same_for_all(["x.conf"])
    assert same_for_all(["bootc_x-44-1.conf", "bootc_x-44-0.conf"])
    assert same_for_all(["bootc_x-9.9-1.conf", "bootc_x-9.8-0.conf"])
    assert not same_for_all(["bootc_x-9.10-1.conf", "bootc_x-9.9-0.conf"]), "plain strings"
    assert not same_for_all(["bootc_x-9.9-1.conf", "bootc_x-9.10-0.conf"]), "GRUB"
    assert not same_for_all(["bootc_x-1_0-1.conf", "bootc_x-1.0-1.conf"]), "the same to GRUB"
    assert not same_for_all(["bootc_x-1-1.5.conf", "bootc_x-1-1.conf"]), "plain strings, suffix included"
    assert not same_for_all(["bootc_x-1a-1.conf", "bootc_x-1-1.conf", "bootc_x-2-1.conf"])


def test_names_are_those_of_bootc_where_they_can_be() -> None:
    assert choose_names([("fedora", "44")] * 2) == ["bootc_fedora-44-1.conf", "bootc_fedora-44-0.conf"]
    names = choose_names([("fedora", "45"), ("fedora", "44")])
    assert names == [file_name("fedora", "45", 1), file_name("fedora", "44", 0)]


@pytest.mark.parametrize(
    "systems",
    [
        [("fedora", "9.10"), ("fedora", "9.9")],
        [("fedora", "9.9"), ("fedora", "9.10")],
        [("bootc", "1"), ("fedora", "1")],
        [("a", "1_0"), ("a", "1.0"), ("a", "1~0")],
        [("a", "")] * 3,
        [("x", str(n)) for n in range(9, 25)],
    ],
)
def test_otherwise_nothing_but_the_priority_decides(systems: list[tuple[str, str]]) -> None:
    names = choose_names(systems)
    assert len(set(names)) == len(systems)
    assert same_for_all(names)
    # Keys are numbers too: as text, "10" is before "9".
    entries = [(name, Entry(sort_key=sort_key(systems[0][0], at))) for at, name in enumerate(names[:10])]
    for loader in Bootloader:
        order(loader, *entries)

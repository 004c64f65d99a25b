"""registries.conf as containers-image reads it, and stricter where it is in doubt."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimaged.oci.reference import parse_named
from hostimaged.oci.registries import MAX_DROP_INS, MAX_FILE, Registries, RegistriesError


def verifies(tmp_path: Path, text: str, image: str = "registry.example/team/os:1") -> bool:
    file = tmp_path / "registries.conf"
    file.write_text(text)
    return Registries.load(file, tmp_path / "registries.conf.d").verifies(parse_named(image))


def table(prefix: str = "", location: str = "", insecure: bool | None = None, mirrors: str = "") -> str:
    lines = ["[[registry]]"]
    lines += [f'prefix = "{prefix}"'] if prefix else []
    lines += [f'location = "{location}"'] if location else []
    lines += [] if insecure is None else [f"insecure = {str(insecure).lower()}"]
    return "\n".join([*lines, mirrors, ""])


def mirror(location: str, insecure: bool) -> str:
    return f'[[registry.mirror]]\nlocation = "{location}"\ninsecure = {str(insecure).lower()}\n'


def test_no_configuration_means_verified_tls(tmp_path: Path) -> None:
    loaded = Registries.load(tmp_path / "none", tmp_path / "none.d")
    assert loaded.verifies(parse_named("registry.example/os"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ('unqualified-search-registries = ["docker.io"]\nshort-name-mode = "enforcing"\n', True),
        (table(location="registry.example", insecure=True), False),
        (table(location="registry.example/", insecure=True), False),
        (table(location="registry.example", insecure=False), True),
        (table(location="registry.example"), True),
        (table(location="other.example", insecure=True), True),
        (table(location="registry.example/tea", insecure=True), True),
        (table(location="registry.example/team", insecure=True), False),
        (table(location="registry.example/team/os", insecure=True), False),
        (table(location="registry.example/team/os/more", insecure=True), True),
        # The prefix is what is matched; the location only says where to go.
        (table("registry.example/team", "elsewhere.example", insecure=True), False),
        (table("elsewhere.example", "registry.example", insecure=True), True),
        # The longest prefix counts, whatever the order.
        (table(location="registry.example", insecure=True) + table(location="registry.example/team"), True),
        (table(location="registry.example/team") + table(location="registry.example", insecure=True), True),
        (table(location="registry.example") + table(location="registry.example/team", insecure=True), False),
        (table("*.example", insecure=True), False),
        (table("*.example", insecure=True) + table(location="registry.example"), True),
        (table("*.registry.example", insecure=True), True),
        # Mirrors are tried first, so each of them counts.
        (table(location="registry.example", mirrors=mirror("m.example", True)), False),
        (table(location="registry.example", mirrors=mirror("m.example", False)), True),
        (
            table(
                location="registry.example", mirrors=mirror("m.example", False) + mirror("n.example", True)
            ),
            False,
        ),
        # Two tables of one prefix: versions differ in which of them counts.
        (table(location="registry.example") + table(location="registry.example", insecure=True), False),
        # The decoder of containers-image takes keys in any case.
        ('[[Registry]]\nLocation = "registry.example"\nINSECURE = true\n', False),
        ('[[registry]]\nlocation = "registry.example"\n"in\u017fecure" = true\n', False),
        # A tag in a prefix, which some versions match.
        (table(location="registry.example/team/os:1", insecure=True), False),
        (table(location="registry.example/team/os:2", insecure=True), True),
    ],
)
def test_the_table_that_counts(tmp_path: Path, text: str, expected: bool) -> None:
    assert verifies(tmp_path, text) is expected


@pytest.mark.parametrize(
    ("prefix", "image", "matches"),
    [
        ("example.com", "example.com:5000/os", True),  # a port belongs to the rest, as in containers-image
        ("example.com:5000", "example.com:5000/os", True),
        ("example.com:5000", "example.com/os", False),
        ("example.com:50", "example.com:5000/os", False),
        ("*.example.com", "a.b.example.com/os", True),
        ("*.example.com", "example.com/os", False),
        ("*.example.com", "a.example.com.evil/os", False),
        ("*.example.com", "evil.io/x.example.com/os", False),
        ("*.example.com", "a.example.com:5000/os", True),
    ],
)
def test_prefixes(tmp_path: Path, prefix: str, image: str, matches: bool) -> None:
    assert verifies(tmp_path, table(prefix, "there.example", insecure=True), image) is not matches


def test_drop_ins_replace_tables_in_the_order_of_their_names(tmp_path: Path) -> None:
    drop_ins = tmp_path / "registries.conf.d"
    drop_ins.mkdir()
    main = table(location="registry.example", insecure=True)
    (drop_ins / "20-b.conf").write_text(table(location="registry.example"))
    (drop_ins / "10-a.conf").write_text(table(location="registry.example", insecure=True))
    (drop_ins / "30-c.conf.bak").write_text(table(location="registry.example", insecure=True))
    (drop_ins / "40-d.conf").mkdir()
    assert verifies(tmp_path, main)
    (drop_ins / "30-c.conf").write_text(table("registry.example", "m.example", insecure=True))
    assert not verifies(tmp_path, main)


@pytest.mark.parametrize(
    "text",
    [
        "[registries.insecure]\nregistries = []\n",
        '[registries.search]\nregistries = ["docker.io"]\n',
        '[registry]\nlocation = "registry.example"\n',
        'registry = ["registry.example"]\n',
        "[[registry]]\ninsecure = true\n",
        '[[registry]]\nprefix = "registry.example"\n',
        '[[registry]]\nprefix = "*.example/os"\nlocation = "x.example"\n',
        '[[registry]]\nlocation = "https://registry.example"\n',
        "[[registry]]\nlocation = 5\n",
        '[[registry]]\nlocation = "registry.example"\ninsecure = "true"\n',
        '[[registry]]\nlocation = "registry.example"\ninsecure = 1\n',
        '[[registry]]\nlocation = "registry.example"\ntls-verify = false\n',
        '[[registry]]\nlocation = "a.example"\ninsecure = false\nInsecure = true\n',
        '[[registry]]\nlocation = "a.example"\n[registry.mirror]\nlocation = "b.example"\n',
        '[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\ninsecure = false\n',
        '[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\nlocation = "b.example"\nodd = 1\n',
        "not toml",
        "x = " + "[" * 5000,
        "# " + "x" * MAX_FILE,
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(RegistriesError, match=r"registries\.conf: ."):
        verifies(tmp_path, text)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "registries.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(RegistriesError):
        Registries.load(tmp_path / "registries.conf", tmp_path / "none")
    with pytest.raises(RegistriesError, match="directory"):
        Registries.load(tmp_path, tmp_path / "none")
    with pytest.raises(RegistriesError, match="irectory"):
        Registries.load(tmp_path / "none", tmp_path / "registries.conf")
    drop_ins = tmp_path / "many"
    drop_ins.mkdir()
    for number in range(MAX_DROP_INS + 1):
        os.symlink("/dev/null", drop_ins / f"{number}.conf")
    with pytest.raises(RegistriesError, match="more than"):
        Registries.load(tmp_path / "none", drop_ins)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "registries.conf"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(RegistriesError):
        Registries.load(file, tmp_path / "none").verifies(parse_named("registry.example/os"))

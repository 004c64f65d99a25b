"""Kernel command lines."""

from __future__ import annotations

import pytest

from hostimaged.boot.cmdline import (
    DIGEST_KEY,
    KEY,
    MAX_ARGUMENTS,
    MAX_LENGTH,
    Cmdline,
    ComposefsArgument,
    Parameter,
    split,
    validate_arguments,
)
from hostimaged.errors import BootLoaderError, InvalidArgs
from hostimaged.ids import DeploymentId

A = DeploymentId("a" * 128)
B = DeploymentId("b" * 128)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("", []),
        (" \t\n", []),
        ("a b=c", ["a", "b=c"]),
        ("  a\t\tb\n", ["a", "b"]),
        ('a="b c" d', ['a="b c"', "d"]),
        ('"a=b c"  d', ['"a=b c"', "d"]),
        ('a"b c"d e', ['a"b c"d', "e"]),
        ('a="not closed b', ['a="not closed b']),
        ("a\x0bb", ["a\x0bb"]),
    ],
)
def test_split(text: str, parameters: list[str]) -> None:
    assert list(split(text)) == parameters
    assert str(Cmdline.parse(text)) == " ".join(parameters)


def test_parameters() -> None:
    assert (Parameter("a=b=c").key, Parameter("a=b=c").value) == ("a", "b=c")
    assert (Parameter("a").key, Parameter("a").value) == ("a", None)
    assert Parameter("a=").value == ""
    assert (Parameter('"a=b c"').key, Parameter('"a=b c"').value) == ("a", "b c")
    assert Parameter('a="b c"').value == "b c"
    assert Parameter("a-b_c=x-y") == Parameter("a_b-c=x-y")
    assert hash(Parameter("a-b=x")) == hash(Parameter("a_b=x"))
    assert Parameter("a=x-y") != Parameter("a=x_y")
    assert Parameter("a") != Parameter("a=")
    assert Parameter('a="x"') == Parameter("a=x")
    assert Parameter("a") != "a"


def test_the_first_of_a_key_is_found() -> None:
    line = Cmdline.parse("root=x quiet rd_x=1 rd-x=2")
    found = line.get("rd-x")
    assert found is not None
    assert found.raw == "rd_x=1"
    assert line.get("roo") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quiet", None),
        ("composefs", None),
        ("xcomposefs=1 composefs.other=2", None),
        (f"quiet composefs={A} rw", ComposefsArgument(A, False, KEY)),
        (f"composefs=?{A}", ComposefsArgument(A, True, KEY)),
        (f"composefs={A} composefs={B}", ComposefsArgument(A, False, KEY)),
        (f"composefs={str(A).upper()}", ComposefsArgument(A, False, KEY)),
        (f"composefs={A} composefs.digest=v1-sha512-12:{B}", ComposefsArgument(B, False, DIGEST_KEY)),
        (f"composefs.digest=?v2-sha512-12:{B}", ComposefsArgument(B, True, DIGEST_KEY)),
        (f"composefs.digest=v1-sha256-12:{'c' * 64} composefs={A}", ComposefsArgument(A, False, KEY)),
        (
            f"composefs.digest=v1-sha256-12:x composefs.digest=v1-sha512-12:{B}",
            ComposefsArgument(B, False, DIGEST_KEY),
        ),
    ],
)
def test_the_deployment_is_found_as_the_initramfs_finds_it(
    text: str, expected: ComposefsArgument | None
) -> None:
    assert Cmdline.parse(text).composefs() == expected


@pytest.mark.parametrize(
    "text",
    [
        "composefs=",
        f"composefs={'a' * 64}",
        f"composefs=??{A}",
        f'composefs="{A}"',
        f"composefs={A}x",
        f"composefs.digest={A}",
        f"composefs.digest=v3-sha512-12:{A}",
        f"composefs.digest=v1-md5-12:{A}",
        "composefs.digest=v1-sha512-12:abc",
    ],
)
def test_what_the_initramfs_refuses(text: str) -> None:
    with pytest.raises(BootLoaderError, match="composefs"):
        Cmdline.parse(text).composefs()


@pytest.mark.parametrize(
    ("before", "optional", "after"),
    [
        ("root=x", False, f"root=x composefs={B}"),
        (f"a composefs={A} b", True, f"a composefs=?{B} b"),
        (f"a composefs=?{A} b composefs.digest=v1-sha512-12:{A} composefs", False, f"a composefs={B} b"),
        (f'"composefs={A}" b', False, f"composefs={B} b"),
    ],
)
def test_exactly_one_argument_names_the_deployment(before: str, optional: bool, after: str) -> None:
    assert str(Cmdline.parse(before).with_composefs(B, optional=optional)) == after


def test_adding_and_removing() -> None:
    line = Cmdline.parse('a=1 b a=1 c-d=2 "e=x y"')
    assert str(line.removing([Parameter("a=1"), Parameter("c_d=2")])) == 'b "e=x y"'
    assert str(line.removing([Parameter("a")])) == str(line)
    assert str(line.adding(map(Parameter, ["b", "c_d=2", "f", "f", 'e="x y"', "a=2"]))) == f"{line} f a=2"


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (f"a b composefs={A}", f"b a composefs={B}", True),
        (f"a-b composefs={A}", f"composefs={B} a_b", True),
        (f"a composefs={A}", f"a b composefs={B}", False),
        (f"a composefs={A}", f"b composefs={B}", False),
        (f"a composefs={A}", f"a composefs=?{B}", False),
        (f"a a b composefs={A}", f"a b b composefs={B}", False),
    ],
)
def test_what_a_soft_reboot_may_differ_in(one: str, two: str, same: bool) -> None:
    assert Cmdline.parse(one).same_parameters(Cmdline.parse(two)) is same
    assert Cmdline.parse(two).same_parameters(Cmdline.parse(one)) is same


def test_bounds() -> None:
    Cmdline.parse("x" * MAX_LENGTH)
    with pytest.raises(BootLoaderError, match="longer"):
        Cmdline.parse("x" * (MAX_LENGTH + 1))


def test_arguments_of_callers() -> None:
    given = ["quiet", 'dyndbg="file a +p; file b +p"', "console=ttyS0,115200n8", "a="]
    assert [p.raw for p in validate_arguments(given, grub=True)] == given
    assert [p.raw for p in validate_arguments(["memmap=4G$8G"])] == ["memmap=4G$8G"]


@pytest.mark.parametrize(
    "argument",
    [
        "",
        " ",
        "a b",
        " a",
        "a ",
        "a\nlinux /x",
        "a\u00a0b",
        "é",
        "\x7f",
        'a="b',
        'a="b c" d',
        "=x",
        f"composefs={A}",
        "composefs",
        '"composefs=x"',
        "composefs.digest=x",
        "x" * MAX_ARGUMENTS,
    ],
)
def test_arguments_of_callers_that_are_refused(argument: str) -> None:
    with pytest.raises(InvalidArgs):
        validate_arguments([argument])


@pytest.mark.parametrize(
    "argument", ["a=$b", 'a="$b"', "a;b", "a|b", "a=<b>", "{a}", "it's", "a\\b", 'a="\\n"', "#a", "a&b"]
)
def test_what_grub_takes_apart(argument: str) -> None:
    assert validate_arguments([argument])
    with pytest.raises(InvalidArgs, match="GRUB"):
        validate_arguments([argument], grub=True)

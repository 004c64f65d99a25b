"""What the boot formats promise for any input: what is written is read back, what is read stays the same."""

from __future__ import annotations

import contextlib
from functools import cmp_to_key

from hypothesis import example, given
from hypothesis import strategies as st

from hostimaged.boot import bls, grubcfg, kargs, osrelease
from hostimaged.boot.bls import Entry
from hostimaged.boot.cmdline import Cmdline, Parameter, validate_arguments
from hostimaged.boot.loader import Bootloader
from hostimaged.boot.order import choose_names, menu_order, same_for_all
from hostimaged.boot.versions import filevercmp, grub_compare, rpmvercmp, uapi_compare
from hostimaged.errors import BootLoaderError, InvalidArgs, UnsupportedImage
from hostimaged.ids import DeploymentId

IDS = st.sampled_from([DeploymentId(c * 128) for c in "0af"])
VERSIONS = st.text("0019aZ.-~^+_ é", max_size=8)
#: One line that begins and ends with something.
LINES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30).filter(
    lambda text: bool(text) and text == text.strip()
)
WORDS = st.text("abc-_=.\"'$é5 ", max_size=12)
COMMAND_LINES = st.lists(
    WORDS
    | st.sampled_from(["composefs=x", "composefs", f"composefs=?{'a' * 128}", "composefs.digest=v1-x:y"]),
    max_size=8,
).map(" ".join)
TOKENS = (
    b"title linux efi uki options initrd version /a/b menuentry chainloader insmod set ID NAME VERSION_ID"
).split() + [bytes([byte]) for byte in b" \t\n\r#x\xff\"{}\\='$"]
BYTES = st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join)


def sign(number: int) -> int:
    return (number > 0) - (number < 0)


@given(VERSIONS, VERSIONS, VERSIONS)
def test_comparisons_are_orders(a: str, b: str, c: str) -> None:
    for compare in (rpmvercmp, uapi_compare, grub_compare, filevercmp):
        assert compare(a, a) == 0
        assert sign(compare(a, b)) == -sign(compare(b, a)), compare
    one, two, three = sorted([a, b, c], key=cmp_to_key(filevercmp))
    assert filevercmp(one, two) <= 0 >= filevercmp(two, three)
    assert filevercmp(one, three) <= 0
    one, two, three = sorted([a, b, c], key=cmp_to_key(grub_compare))
    assert grub_compare(one, three) <= 0


@given(st.lists(st.tuples(VERSIONS, VERSIONS), min_size=1, max_size=13))
def test_chosen_names_are_sorted_the_same_by_everybody(systems: list[tuple[str, str]]) -> None:
    names = choose_names(systems)
    assert same_for_all(names)
    assert sorted(names, reverse=True) == names
    assert all(len(name) < 255 for name in names)
    entries = [(name, Entry().with_order(systems[0][0], at)) for at, name in enumerate(names[:10])]
    for loader in Bootloader:
        assert menu_order(loader, entries[::-1]) == entries


@given(COMMAND_LINES, IDS, st.booleans())
def test_a_command_line_names_one_deployment(text: str, deployment: DeploymentId, optional: bool) -> None:
    line = Cmdline.parse(text)
    assert Cmdline.parse(str(line)) == line
    if text.count('"') % 2 == 0:
        found = Cmdline.parse(str(line.with_composefs(deployment, optional=optional)))
        argument = found.composefs()
        assert argument is not None
        assert (argument.id, argument.optional) == (deployment, optional)
        assert len([p for p in found.parameters if p.names_deployment]) == 1
        kept = [p.raw for p in line.parameters if not p.names_deployment]
        assert [p.raw for p in found.parameters if not p.names_deployment] == kept


@given(COMMAND_LINES, st.lists(WORDS), st.lists(WORDS))
def test_an_update_of_arguments_can_be_undone(text: str, old: list[str], new: list[str]) -> None:
    line = Cmdline.parse(text)
    after = kargs.apply(line, old, new)
    assert kargs.apply(line, old, old) == line
    for raw in new:
        if Parameter(raw) not in map(Parameter, old):
            assert Parameter(raw) in after.parameters
    for raw in old:
        if Parameter(raw) not in map(Parameter, new):
            assert Parameter(raw) not in after.parameters


@given(st.lists(WORDS, max_size=4))
def test_accepted_arguments_stay_what_they_are(arguments: list[str]) -> None:
    try:
        accepted = validate_arguments(arguments)
    except InvalidArgs:
        return
    line = Cmdline.parse("quiet").adding(accepted)
    assert Cmdline.parse(str(line)) == line
    assert line.composefs() is None


@given(
    st.builds(
        Entry,
        title=st.just("") | LINES,
        version=LINES,
        linux=LINES,
        initrd=st.lists(LINES, max_size=3).map(tuple),
        options=st.none() | LINES,
        machine_id=st.just("") | LINES,
        sort_key=st.just("") | LINES,
        extra=st.dictionaries(st.sampled_from(["x-a", "grub_arg", "é"]), LINES, max_size=2).map(
            lambda values: tuple(values.items())
        ),
    )
)
def test_written_entries_are_read_back(entry: Entry) -> None:
    try:
        data = entry.serialise()
    except BootLoaderError:
        assert any(key == "é" for key, _ in entry.extra)
        return
    assert bls.parse(data, "x") == entry


@given(BYTES)
@example(b"linux /x\noptions a\x0bb\n")
@example("linux /x\ntitle a\u2028b\n".encode())
def test_entries_that_are_read_can_be_written(data: bytes) -> None:
    try:
        entry = bls.parse(data, "x")
    except BootLoaderError:
        return
    with contextlib.suppress(BootLoaderError):
        assert bls.parse(entry.serialise(), "x") == entry


@given(st.lists(st.tuples(LINES, IDS), max_size=4))
def test_written_menus_are_read_back(labels: list[tuple[str, DeploymentId]]) -> None:
    entries = [grubcfg.MenuEntry.new(label, deployment) for label, deployment in labels]
    found = grubcfg.parse_user_cfg(grubcfg.serialise_user_cfg(entries))
    assert found == entries
    assert [(entry.label, entry.deployment_id()) for entry in found] == labels


@given(BYTES)
def test_menus_that_are_read_can_be_written(data: bytes) -> None:
    try:
        entries = grubcfg.parse_user_cfg(data)
    except BootLoaderError:
        return
    with contextlib.suppress(BootLoaderError):
        assert grubcfg.parse_user_cfg(grubcfg.serialise_user_cfg(entries)) == entries


@given(BYTES)
def test_os_release_gives_lines_of_text(data: bytes) -> None:
    found = osrelease.parse(data)
    for value in (found.id, found.title("x"), found.entry_version("x"), found.boot_label("x")):
        assert value
        assert value.isprintable()
        assert value == value.strip()
    assert bls.file_name(found.id, found.entry_version("x"), 1).isascii()


@given(BYTES | st.text("kargs=[]\"'\n{}.a5").map(str.encode))
def test_drop_ins_give_parameters(data: bytes) -> None:
    with contextlib.suppress(UnsupportedImage):
        for parameter in kargs.parse_file(data, "x", "x86_64"):
            assert Cmdline.parse(parameter.raw).parameters == (parameter,)

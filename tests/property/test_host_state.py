"""What is read of a host: files come back as they were written, and roles are given once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostimaged.boot.bls import Entry
from hostimaged.errors import DamagedState, InvalidArgs, InvalidReference
from hostimaged.host.booted import Booted
from hostimaged.host.entries import SetEntry
from hostimaged.host.imgref import OriginReference, Scheme
from hostimaged.host.marker import Marker
from hostimaged.host.model import Deployment, Problem, ProblemId, Role
from hostimaged.host.origin import BootType, Origin
from hostimaged.host.read import _in_order, _with_roles
from hostimaged.ids import BootDigest, DeploymentId, ManifestDigest
from hostimaged.oci.reference import Transport
from hostimaged.oci.times import microseconds, utc_text

HEX = st.sampled_from("0123456789abcdef")
IDS = [DeploymentId(digit * 128) for digit in "0123456"]
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=30)
REFERENCES = st.builds(
    OriginReference,
    st.sampled_from([Scheme.UNVERIFIED, Scheme.SIGNED]),
    st.sampled_from(Transport),
    NAMES,
)
DIGESTS = st.text(HEX, min_size=64, max_size=64)


@given(REFERENCES)
def test_references_come_back(reference: OriginReference) -> None:
    assert OriginReference.parse(str(reference)) == reference


@given(st.text(max_size=100))
def test_what_is_read_of_a_reference_comes_back(text: str) -> None:
    try:
        found = OriginReference.parse(text)
    except InvalidReference:
        return
    assert OriginReference.parse(str(found)) == found


@given(REFERENCES, st.sampled_from(BootType), DIGESTS, DIGESTS, st.dictionaries(st.just("k"), NAMES))
def test_origins_come_back(
    reference: OriginReference, kind: BootType, boot: str, manifest: str, own: dict[str, str]
) -> None:
    digests = BootDigest(boot), ManifestDigest.of_hash(manifest)
    try:
        origin = Origin.new(reference, kind, *digests, own)
    except InvalidArgs:
        # What bootc's reader would cut off.
        assert any(c in str(reference) + "".join(own.values()) for c in ";#")
        return
    found = Origin.parse(origin.serialise(), "x.origin")
    assert (found.boot_type, found.boot_digest, found.manifest_digest) == (kind, *digests)
    # White space at the ends is nobody's, for bootc either.
    assert found.reference is None or str(found.reference) == str(reference).strip()
    assert found.own.get("k", "") == own.get("k", "").strip()


@given(st.binary(max_size=300))
def test_an_origin_that_is_read_is_written_so_that_it_is_read_the_same(data: bytes) -> None:
    try:
        once = Origin.parse(data, "x.origin")
    except DamagedState:
        return
    again = Origin.parse(once.serialise(), "x.origin")
    assert again.sections == {name: values for name, values in once.sections.items() if name or values}
    assert again.serialise() == once.serialise()


@given(st.sampled_from(IDS), st.booleans())
def test_markers_come_back(id_: DeploymentId, locked: bool) -> None:
    marker = Marker(id_, locked)
    assert Marker.parse(marker.serialise()) == marker


@given(st.datetimes(), st.integers(-14 * 60, 14 * 60), st.integers(0, 9))
def test_times_mean_the_same_in_utc(time: object, offset: int, digits: int) -> None:
    zone = f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02d}:{abs(offset) % 60:02d}"
    fraction = "." + "123456789"[:digits] if digits else ""
    text = f"{time.replace(microsecond=0).isoformat()}{fraction}{zone}"  # type: ignore[attr-defined]
    normal = utc_text(text)
    if normal is not None:
        assert normal.endswith("Z")
        assert utc_text(normal) == normal
        assert microseconds(normal) == microseconds(text)


def _row(id_: DeploymentId, live: bool, staged: bool, pinned: bool, whole: bool, origin: bool) -> Deployment:
    entry = SetEntry("x.conf", Entry(linux="/x"), id_, str(id_))
    return Deployment(
        id_,
        Role.HIDDEN,
        live=entry if live else None,
        staged=entry if staged else None,
        pinned=pinned,
        origin=Origin.parse(b"", "x.origin") if origin else None,
        problems=() if whole else (Problem(ProblemId.IMAGE_MISSING, "x"),),
    )


@st.composite
def hosts(draw: st.DrawFn) -> tuple[list[Deployment], tuple[DeploymentId, ...]]:
    flags = [draw(st.tuples(*[st.booleans()] * 5)) for _ in IDS]
    rows = [_row(id_, *flag) for id_, flag in zip(IDS, flags, strict=True)]
    menu = draw(st.permutations([row.id for row in rows if row.live is not None]))
    return rows, tuple(menu)


@given(
    hosts(),
    st.none() | st.sampled_from(IDS).map(Booted),
    st.none() | st.builds(Marker, st.sampled_from(IDS), st.booleans()),
)
def test_each_role_is_given_once_and_nothing_that_starts_is_hidden(
    host: tuple[list[Deployment], tuple[DeploymentId, ...]], booted: Booted | None, marker: Marker | None
) -> None:
    rows, menu = host
    found = _in_order(_with_roles(rows, menu, booted, marker), menu)
    assert {row.id for row in found} == set(IDS)
    by_role = {role: [row for row in found if row.role is role] for role in Role}
    assert all(len(by_role[role]) <= 1 for role in (Role.BOOTED, Role.STAGED, Role.ROLLBACK))
    assert bool(by_role[Role.BOOTED]) == (booted is not None)
    assert not any(row.live or row.pinned for row in by_role[Role.HIDDEN])
    assert [row.id for row in found if row.default] == list(menu[:1])
    for row in by_role[Role.STAGED]:
        assert marker is not None
        assert row.locked == marker.finalization_locked
    # What rolling back boots is the first of the menu that is neither of the two others and starts.
    others = [
        row for id_ in menu for row in found if row.id == id_ and row.role in (Role.OTHER, Role.ROLLBACK)
    ]
    assert [row for row in others if row.bootable][:1] == by_role[Role.ROLLBACK]
    places = [menu.index(row.id) for row in found if row.live and row.role is not Role.STAGED]
    assert places == sorted(places)
    assert [row.role for row in found if row.role is Role.HIDDEN] == [row.role for row in found][
        len(found) - len(by_role[Role.HIDDEN]) :
    ]

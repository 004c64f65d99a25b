"""What a collection of garbage will do to a host: the one plan of a real one, of a dry run and of questions.

All of it is read from the host and the repository before anything is removed; nothing here writes. Facts:
operations.md 7.5.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError, InvalidReference
from hostimaged.host.cleanup import DeadArtifact, dead_artifacts
from hostimaged.host.collectroots import Roots, counted_entries, find_roots
from hostimaged.host.entries import NOTHING
from hostimaged.host.storeplan import NO_STORE, StorePlan
from hostimaged.host.tags import (
    BOOTC_TAG,
    IMAGES,
    PIN_TAG,
    MadeTags,
    bootc_tag,
    guest_tag,
    image_ref,
    stream_ref,
)
from hostimaged.ids import DeploymentId
from hostimaged.oci import pulls
from hostimaged.oci.images import PULL_TAG, manifest_stream, tags
from hostimaged.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.model import HostState
    from hostimaged.ids import ManifestDigest
    from hostimaged.oci.pulls import PullRow
    from hostimaged.system.paths import HostPaths

#: Seconds that a tag of a deployment stays without one, if bootc may have made it: it tags before it deploys.
BOOTC_GRACE: Final = 24 * 3600
_DAY: Final = 24 * 3600
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings say of images that are pulled, and not deployed.

    ``tracked``: the reference that updates follow, where no deployment tells. ``keep_pulled``: days that the
    newest image of any other reference stays. ``minimum_free``: MiB; where less is free it goes before.
    ``store``: whether bootc's containers-storage is collected too.
    """

    tracked: str = ""
    keep_pulled: int = 30
    minimum_free: int = 0
    store: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done; see ``Roots`` for what concerns deployments.

    ``missing_tags`` and ``missing_refs`` are made, before all else, for what stays: tags by manifest, and
    references to images by deployment. ``tags``, and ``refs`` to images, are those of ours that go.
    ``store``: what becomes of bootc's containers-storage.
    """

    roots: Roots
    missing_tags: tuple[ManifestDigest, ...]
    missing_refs: tuple[DeploymentId, ...]
    orphan_entries: tuple[DeploymentId, ...] = ()
    tags: tuple[str, ...] = ()
    refs: tuple[DeploymentId, ...] = ()
    artifacts: tuple[DeadArtifact, ...] = ()
    store: StorePlan = NO_STORE

    @property
    def root_names(self) -> frozenset[str]:
        """Names in the repository that stay, whatever leads to them."""
        manifests = {root.manifest for root in self.roots.roots if root.manifest is not None}
        return frozenset(map(str, self.roots.ids)) | frozenset(map(manifest_stream, manifests))

    @property
    def without_refs(self) -> frozenset[str]:
        """Paths in the repository of the references that go."""
        tags_ = {f"streams/refs/{stream_ref(tag)}" for tag in self.tags}
        return frozenset(tags_ | {f"images/refs/{image_ref(id_)}" for id_ in self.refs})


def make_plan(
    paths: HostPaths,
    repository: Repository,
    state: HostState,
    rules: Rules,
    *,
    now: int,
    without: DeploymentId | None = None,
) -> Plan:
    """The plan for the host that ``state`` is of, at ``now`` seconds since the epoch.

    With doubts nothing but what is missing is in it. ``without``: what it would be if that deployment were
    deleted. Never raises for damage.
    """
    roots = find_roots(paths, repository, state)
    if without is not None:
        roots = _without(roots, without)
    try:
        known = tags(repository)
        refs = frozenset(repository.image_refs(IMAGES))
        names = frozenset(repository.images())
    except HostimageError as error:
        return Plan(replace(roots, doubts=(*roots.doubts, error.message)), (), ())
    missing_refs = {root.id for root in roots.roots if not root.kept_by_it and root.id.value in names}
    manifests = {root.manifest for root in roots.roots if root.manifest is not None}
    plan = Plan(
        roots,
        tuple(sorted(digest for digest in manifests if not _is_tagged(known, digest, guest=roots.guest))),
        tuple(sorted(id_ for id_ in missing_refs if id_.value not in refs)),
    )
    if roots.doubts:
        return plan
    orphans = _removable(state, roots)
    staying = [entry for entry in counted_entries(state) if entry.id not in orphans and entry.id != without]
    dead = tuple(_DeadTags(paths, repository, state, rules, now).find(known, manifests))
    store = NO_STORE
    if rules.store:
        from hostimaged.host.storekeep import StoreSearch

        kept = {name: digest for name, digest in known.items() if _is_own(name) and name not in dead}
        store = StoreSearch(paths, repository, state, roots, kept, now).plan()
    return replace(
        plan,
        orphan_entries=orphans,
        tags=dead,
        refs=tuple(_own_refs(refs - {id_.value for id_ in missing_refs})),
        artifacts=tuple(dead_artifacts(state, staying)),
        store=store,
    )


def _is_own(tag: str) -> bool:
    """Whether it keeps what was pulled or pinned here, or what bootc is about to deploy."""
    return tag.startswith((BOOTC_TAG, PULL_TAG, PIN_TAG))


def _is_tagged(known: dict[str, ManifestDigest], digest: ManifestDigest, *, guest: bool) -> bool:
    names = [bootc_tag(digest), *([guest_tag(digest)] if guest else [])]
    return all(known.get(name) == digest for name in names)


def _without(roots: Roots, id_: DeploymentId) -> Roots:
    left = tuple(root for root in roots.roots if root.id != id_)
    return replace(roots, roots=left)


def _removable(state: HostState, roots: Roots) -> tuple[DeploymentId, ...]:
    """The orphans whose entries go; none if nothing would be left in the menu."""
    live = (state.sets.live or NOTHING).ids
    return roots.orphan_entries if set(live) - set(roots.orphan_entries) else ()


def _own_refs(names: frozenset[str]) -> Iterator[DeploymentId]:
    for name in sorted(names):
        try:
            yield DeploymentId(name)
        except HostimageError:
            # Not of the form that we make.
            continue


class _DeadTags:
    """Finds those of our tags that keep nothing that is wanted."""

    def __init__(
        self, paths: HostPaths, repository: Repository, state: HostState, rules: Rules, now: int
    ) -> None:
        self._repository = repository
        self._now = now
        self._rules = rules
        self._made = MadeTags(paths)
        self._rows = _rows(paths)
        self._tracked = _tracked(state, rules)
        self._days = 0 if _is_full(repository, rules) else rules.keep_pulled

    def find(self, known: dict[str, ManifestDigest], manifests: set[ManifestDigest]) -> Iterator[str]:
        """The names of those of ``known`` that go; ``manifests`` are those of deployments."""
        for name, digest in known.items():
            if name.startswith(BOOTC_TAG):
                if digest not in manifests and self._is_old(name):
                    yield name
            elif name.startswith(PULL_TAG) and self._is_superseded(name, digest):
                yield name

    def _is_old(self, name: str) -> bool:
        """Whether no bootc is about to make a deployment for the tag."""
        modified = self._modified(name)
        return self._made.has(name, modified) or self._age(modified) > BOOTC_GRACE

    def _is_superseded(self, name: str, digest: ManifestDigest) -> bool:
        if self._rows is None:
            return False
        newest = {row.reference: row for row in self._rows}
        mine = [row for row in newest.values() if row.manifest_digest == digest]
        if any(row.reference in self._tracked for row in mine):
            return False
        times: list[float | None] = [row.time for row in mine]
        if not any(row.manifest_digest == digest for row in self._rows):
            times.append(self._modified(name))
        return all(self._age(time) > self._days * _DAY for time in times)

    def _modified(self, name: str) -> float | None:
        try:
            return self._repository.stream_modified(stream_ref(name))
        except HostimageError:
            return None

    def _age(self, time: float | None) -> float:
        """Seconds; of what cannot be told, none."""
        return 0 if time is None else self._now - time


def _rows(paths: HostPaths) -> list[PullRow] | None:
    """What was pulled; None if that cannot be read, and so nothing can be called superseded."""
    try:
        return pulls.load(paths.pulls)
    except HostimageError:
        return None


def _tracked(state: HostState, rules: Rules) -> frozenset[str]:
    """The references, in normal form, that updates may follow."""
    found = set()
    for row in (state.staged_deployment, state.booted_deployment, state.default_deployment):
        image = (
            None
            if row is None or row.origin is None or row.origin.reference is None
            else (row.origin.reference.image)
        )
        if image is not None:
            found.add(str(image))
    with suppress(InvalidReference):
        found.add(str(ImageReference.parse(rules.tracked)))
    return frozenset(found)


def _is_full(repository: Repository, rules: Rules) -> bool:
    if not rules.minimum_free:
        return False
    status = os.fstatvfs(repository.fileno())
    return status.f_bavail * status.f_frsize < rules.minimum_free * _MIB

"""What a check of the repository found, and what each finding breaks: images and deployments.

A finding is about an object, a stream or an image, which mean nothing to people; what is kept by the tag of
an image, or by the boot image of a deployment, does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.fsck_report import Kind
from hostimaged.composefs.repository.repair import holder_of, object_of
from hostimaged.composefs.repository.why import dependants
from hostimaged.errors import printable
from hostimaged.host.read import read_host
from hostimaged.oci import images

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from hostimaged.composefs.fsck_report import Finding
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.model import Deployment
    from hostimaged.ids import ManifestDigest, ObjectId
    from hostimaged.oci.fsck import ImagesReport
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

_TAGS: Final = f"streams/refs/{images.TAGS}/"
_IMAGES: Final = "images/"
#: Findings in the result of a job; a disk that lost a directory has thousands, which nobody reads.
MAX_TOLD: Final = 200
#: Characters of an id that tell deployments apart for people.
_SHORT: Final = 12
_WORDS: Final[Mapping[str, str]] = {
    Kind.OBJECT_DIGEST_MISMATCH: "its content is not what its name says",
    Kind.OBJECT_VERITY_MISSING: "it lacks fs-verity, which this repository requires",
    Kind.OBJECT_VERITY_FAILED: "it cannot be read",
    Kind.OBJECT_OPEN_FAILED: "it cannot be opened",
    Kind.OBJECT_INVALID_NAME: "it does not belong here",
    Kind.BROKEN_SYMLINK: "it leads nowhere",
    Kind.MISSING_OBJECT_REF: "an object it needs is missing",
    Kind.MISSING_NAMED_REF: "a stream or image it needs is missing",
    Kind.IMAGE_MISSING_OBJECT: "an object it needs is missing",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """What a damaged object breaks; all empty if nothing needs it."""

    #: Tags of images.
    images: tuple[str, ...] = ()
    #: Ids of deployments.
    deployments: tuple[str, ...] = ()
    #: Other references, as paths in the repository.
    others: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether nothing needs it."""
        return not (self.images or self.deployments or self.others)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "images": list(self.images),
            "deployments": list(self.deployments),
            "references": list(self.others),
        }

    def joined(self, other: Broken) -> Broken:
        """What both break together."""
        return Broken(
            tuple(sorted({*self.images, *other.images})),
            tuple(sorted({*self.deployments, *other.deployments})),
            tuple(sorted({*self.others, *other.others})),
        )


class Breakage:
    """Tells what damaged objects break, on the host as it is when this is made."""

    def __init__(self, paths: HostPaths, repository: Repository) -> None:
        self._repository = repository
        self._deployments: Mapping[str, Deployment] = {
            str(row.id): row for row in read_host(paths, repository).deployments
        }
        self._tags: dict[str, ManifestDigest] = images.tags(repository)

    def of_objects(self, ids: Collection[ObjectId], reporter: Reporter) -> dict[ObjectId, Broken]:
        """What each of ``ids`` breaks. Points of ``reporter``: see ``why.dependants``."""
        if not ids:
            return {}
        found = dependants(self._repository, ids, roots=self._deployments.keys(), reporter=reporter)
        return {id_: self.of_paths(paths) for id_, paths in found.items()}

    def of_paths(self, paths: Iterable[str]) -> Broken:
        """What breaks with these references, as paths in the repository."""
        tags, others, deployments = set(), set(), set()
        for path in paths:
            if path.startswith(_TAGS):
                tags.add(images.decode_tag(path.removeprefix(_TAGS)))
            elif (name := path.removeprefix(_IMAGES)) in self._deployments:
                deployments.add(name)
            else:
                others.add(path)
        digests = {self._tags[tag] for tag in tags if tag in self._tags}
        deployments |= {id_ for id_, row in self._deployments.items() if row.manifest_digest in digests}
        return Broken(
            tuple(sorted(map(printable, tags))),
            tuple(sorted(deployments)),
            tuple(sorted(map(printable, others))),
        )

    def called(self, deployment: str) -> str:
        """A deployment for people: its version, if it has one, and the beginning of its id."""
        row = self._deployments.get(deployment)
        version = row.image.version if row is not None and row.image is not None else ""
        return f"{printable(version)} ({deployment[:_SHORT]})" if version else deployment[:_SHORT]

    def text(self, broken: Broken) -> str:
        """What breaks, for people."""
        parts = [f"deployment {self.called(id_)}" for id_ in broken.deployments]
        parts += [f"image {tag}" for tag in broken.images]
        parts += broken.others
        return ", ".join(parts) or "nothing: the next collection of garbage removes it"


@dataclass(frozen=True, slots=True)
class Row:
    """A finding, and what it breaks."""

    kind: str
    path: str
    detail: str
    breaks: Broken

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"kind": self.kind, "path": self.path, "detail": self.detail, "breaks": self.breaks.as_dict()}


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome of a check: the report, and the first ``MAX_TOLD`` findings with what they break."""

    report: ImagesReport
    rows: tuple[Row, ...]
    breakage: Breakage

    @property
    def count(self) -> int:
        """Findings, told or not."""
        return self.report.repository.errors.count + self.report.errors.count

    @property
    def breaks(self) -> Broken:
        """What all findings that are told break."""
        broken = Broken()
        for row in self.rows:
            broken = broken.joined(row.breaks)
        return broken

    def lines(self) -> list[str]:
        """For people: what was looked at, what is damaged, what that breaks, and what to do."""
        repository = self.report.repository
        looked = (
            f"looked at {repository.objects_checked} objects, {repository.streams_checked} streams, "
            f"{repository.images_checked} EROFS images and {self.report.images_checked} tags"
        )
        if not self.count:
            return [looked, "nothing is damaged"]
        lines = [looked]
        lines.append(f"{self.count} {'thing is' if self.count == 1 else 'things are'} damaged:")
        for row in self.rows:
            words = _WORDS.get(row.kind, row.kind)
            lines.append(f"  {row.path}: {words}" + (f" ({row.detail})" if row.detail else ""))
            lines.append(f"    breaks {self.breakage.text(row.breaks)}")
        if more := self.count - len(self.rows):
            lines.append(f"  and {more} more")
        return [*lines, "'hostimagectl repair' gets again what can be had"]

    def as_dict(self) -> dict[str, Any]:
        """For the bus: strings, booleans, numbers and lists of strings; ``findings`` is JSON."""
        repository, broken = self.report.repository, self.breaks
        return {
            "ok": self.report.ok,
            "damaged": self.count,
            "broken-deployments": list(broken.deployments),
            "broken-images": list(broken.images),
            "objects-checked": repository.objects_checked,
            "objects-corrupted": repository.objects_corrupted,
            "streams-checked": repository.streams_checked,
            "streams-corrupted": repository.streams_corrupted,
            "images-checked": repository.images_checked,
            "images-corrupted": repository.images_corrupted,
            "broken-links": repository.broken_links,
            "missing-objects": repository.missing_objects,
            "tags-checked": self.report.images_checked,
            "tags-corrupted": self.report.images_corrupted,
            "findings": json.dumps([row.as_dict() for row in self.rows]),
            "text": "\n".join(self.lines()),
        }


def verification_of(
    paths: HostPaths, repository: Repository, report: ImagesReport, reporter: Reporter
) -> Verification:
    """What the findings in ``report``, a check of ``repository``, break."""
    breakage = Breakage(paths, repository)
    told = list(report.repository.errors)[:MAX_TOLD]
    objects = [_objects_of(repository, finding) for finding in told]
    broken = breakage.of_objects({id_ for ids in objects for id_ in ids}, reporter)
    rows = []
    for finding, ids in zip(told, objects, strict=True):
        breaks = breakage.of_paths([finding.path] if "/refs/" in finding.path else [])
        for id_ in ids:
            breaks = breaks.joined(broken[id_])
        rows.append(Row(str(finding.kind), printable(finding.path), printable(finding.detail), breaks))
    for finding in list(report.errors)[: MAX_TOLD - len(rows)]:
        breaks = breakage.of_paths([_TAGS + images.encode_tag(finding.path)])
        rows.append(Row(str(finding.kind), printable(finding.path), printable(finding.detail), breaks))
    return Verification(report, tuple(rows), breakage)


def _objects_of(repository: Repository, finding: Finding) -> set[ObjectId]:
    """The objects that a finding is about: the one that is damaged, and that of the stream or image."""
    ids = {object_of(repository, finding), holder_of(repository, finding)}
    return {id_ for id_ in ids if id_ is not None}

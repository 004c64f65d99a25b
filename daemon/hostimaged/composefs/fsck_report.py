"""What a check of a repository found: findings, counts, and the two forms in which they are told.

Names, counts and both forms are those of ``cfsctl fsck`` (composefs-rs 0.9.4). Nothing is checked here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Findings kept of each phase; more are only counted. A disk that lost a directory can have a million, which
#: nobody reads, and which must not fill the memory.
MAX_FINDINGS: Final = 10_000


class Kind(StrEnum):
    """The findings about a repository."""

    OBJECT_INVALID_NAME = "object-invalid-name"
    OBJECT_OPEN_FAILED = "object-open-failed"
    OBJECT_DIGEST_MISMATCH = "object-digest-mismatch"
    OBJECT_VERITY_FAILED = "object-verity-failed"
    OBJECT_VERITY_MISSING = "object-verity-missing"
    ENTRY_NOT_SYMLINK = "entry-not-symlink"
    BROKEN_SYMLINK = "broken-symlink"
    STAT_FAILED = "stat-failed"
    UNEXPECTED_FILE_TYPE = "unexpected-file-type"
    STREAM_OPEN_FAILED = "stream-open-failed"
    MISSING_OBJECT_REF = "missing-object-ref"
    MISSING_NAMED_REF = "missing-named-ref"
    OBJECT_CHECK_FAILED = "object-check-failed"
    IMAGE_OPEN_FAILED = "image-open-failed"
    IMAGE_READ_FAILED = "image-read-failed"
    IMAGE_INVALID = "image-invalid"
    IMAGE_MISSING_OBJECT = "image-missing-object"
    METADATA_PARSE_FAILED = "metadata-parse-failed"
    METADATA_ALGORITHM_MISMATCH = "metadata-algorithm-mismatch"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: which kind, where, and what more there is to say."""

    kind: str
    path: str
    detail: str = ""

    def __str__(self) -> str:
        return f"fsck: {self.kind}: {self.path}" + (f": {self.detail}" if self.detail else "")


class Findings:
    """Findings in the order they were made: all are counted, the first ``MAX_FINDINGS`` kept."""

    __slots__ = ("count", "kept")

    def __init__(self, kept: Iterable[Finding] = (), count: int = 0) -> None:
        self.kept = list(kept)
        self.count = count

    def add(self, kind: str, path: str, detail: object = "") -> None:
        """Note one."""
        self.count += 1
        if len(self.kept) < MAX_FINDINGS:
            self.kept.append(Finding(kind, path, str(detail)))

    def extend(self, other: Findings) -> None:
        """Note those of ``other``."""
        self.count += other.count
        self.kept += other.kept[: MAX_FINDINGS - len(self.kept)]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.kept)


@dataclass(slots=True)
class Report:
    """Result of a check; filled in while it runs."""

    #: Whether meta.json could be read.
    has_metadata: bool = False
    objects_checked: int = 0
    objects_corrupted: int = 0
    streams_checked: int = 0
    streams_corrupted: int = 0
    images_checked: int = 0
    images_corrupted: int = 0
    #: Links that lead nowhere, references among them.
    broken_links: int = 0
    #: Missing objects, each as often as it is referred to. They make no stream or image count as corrupted.
    missing_objects: int = 0
    errors: Findings = field(default_factory=Findings)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.errors.count

    def text(self) -> str:
        """The report for people, several lines."""
        metadata = "ok" if self.has_metadata else "absent"
        if any(finding.kind.startswith("metadata-") for finding in self.errors):
            metadata = "error"
        lines = [f"meta.json: {metadata}"]
        for what in ("objects", "streams", "images"):
            checked: int = getattr(self, f"{what}_checked")
            corrupted: int = getattr(self, f"{what}_corrupted")
            lines.append(f"{what}: {max(checked - corrupted, 0)}/{checked} ok")
        if self.broken_links:
            lines.append(f"broken symlinks: {self.broken_links}")
        if self.missing_objects:
            lines.append(f"missing objects: {self.missing_objects}")
        lines.append("status: ok" if self.ok else f"status: {self.errors.count} error(s)")
        return "\n".join([*lines, *listed(self.errors)]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The report for programs, with the keys of ``cfsctl fsck --json``."""
        return {
            "ok": self.ok,
            "has_metadata": self.has_metadata,
            "objects_checked": self.objects_checked,
            "objects_corrupted": self.objects_corrupted,
            "streams_checked": self.streams_checked,
            "streams_corrupted": self.streams_corrupted,
            "images_checked": self.images_checked,
            "images_corrupted": self.images_corrupted,
            "broken_links": self.broken_links,
            "missing_objects": self.missing_objects,
            "errors": told(self.errors),
        }


def listed(findings: Findings) -> list[str]:
    """Findings as lines of text, safe for a terminal: file names may hold anything."""
    return [f"  - {_escaped(text)}" for text in told(findings)]


def told(findings: Findings) -> list[str]:
    """Findings as strings; the last says how many were not kept."""
    texts = [str(finding) for finding in findings]
    if more := findings.count - len(texts):
        texts.append(f"fsck: {more} more")
    return texts


def shown(name: str | bytes) -> str:
    """A file name as text, with what is not UTF-8 replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )

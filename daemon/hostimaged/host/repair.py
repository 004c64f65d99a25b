"""Repairs the repository of a host: finds what is damaged, gets it again, and tells what is left.

Done under the repository's shared lock: it keeps collectors away, and a damaged file is replaced in one step,
so that readers find the one or the other. Images and layers are the business of ``hostimaged.oci.repair``;
here are what belongs to deployments: where their images came from, and the images that they boot.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs import fsck
from hostimaged.composefs.repository.repair import Harm, harm_of, protect_again, restored
from hostimaged.errors import Cancelled, HostimageError, NoSpace, ReadOnly, printable
from hostimaged.host import bootimage
from hostimaged.host.copies import restore_from_files
from hostimaged.host.damage import MAX_TOLD, Breakage
from hostimaged.host.read import read_host
from hostimaged.oci import images, pulls
from hostimaged.oci.boot_refs import boot_refs, set_boot_refs
from hostimaged.oci.local_layers import LocalLayers
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.repair import ImageRepair, ImageRepairer, references_of, with_digest
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.damage import Broken
    from hostimaged.ids import ManifestDigest, ObjectId
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at`` here; those of the steps come between them.
FAULT_POINTS: Final = ("repair.check", "repair.found", "repair.protected", "repair.images", "repair.done")
_FATAL: Final = (Cancelled, NoSpace, ReadOnly)


@dataclass(frozen=True, slots=True)
class Left:
    """Something that is damaged still, or in a dry run could not be repaired."""

    what: str
    breaks: Broken
    text: str


@dataclass(frozen=True, slots=True)
class Repair:
    """The outcome of a repair, or of a dry run."""

    dry_run: bool
    found: Harm
    #: Objects that are right again.
    restored: int
    images: tuple[ImageRepair, ...]
    left: tuple[Left, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that anything needs is damaged any more, or would be after a repair."""
        return all(left.breaks.nothing for left in self.left)

    @property
    def size(self) -> int:
        """Bytes fetched, or to be fetched, as transferred."""
        return sum(image.size for image in self.images)

    def lines(self) -> list[str]:
        """For people."""
        damaged = len(self.found.objects) + len(self.found.others)
        if not damaged:
            return ["nothing is damaged"]
        lines = [f"damaged or missing: {len(self.found.objects)} objects"]
        lines += [_image_line(image, dry_run=self.dry_run) for image in self.images]
        if not self.dry_run:
            lines.append(f"repaired: {self.restored} objects")
        if self.left:
            lines.append("cannot be repaired:" if self.dry_run else "still damaged:")
            lines += [f"  {left.what}: {left.text}" for left in self.left[:MAX_TOLD]]
        if self.found.truncated:
            lines.append("there may be more: repair again")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For the bus: strings, booleans, numbers; ``images`` and ``left`` are JSON."""
        return {
            "ok": self.ok,
            "dry-run": self.dry_run,
            "damaged": len(self.found.objects) + len(self.found.others),
            "repaired": self.restored,
            "damaged-still": sum(not left.breaks.nothing for left in self.left),
            "broken-deployments": sorted({id_ for left in self.left for id_ in left.breaks.deployments}),
            "broken-images": sorted({tag for left in self.left for tag in left.breaks.images}),
            "bytes-fetched": 0 if self.dry_run else self.size,
            "bytes-to-fetch": self.size if self.dry_run else 0,
            "images": json.dumps(
                [
                    {
                        "manifest-digest": str(image.manifest_digest),
                        "source": image.source,
                        "layers": image.layers,
                        "bytes": image.size,
                        "local": image.local,
                        "problem": image.problem,
                    }
                    for image in self.images[:MAX_TOLD]
                ]
            ),
            "left": json.dumps(
                [
                    {"what": left.what, "text": left.text, "breaks": left.breaks.as_dict()}
                    for left in self.left[:MAX_TOLD]
                ]
            ),
            "text": "\n".join(self.lines()),
        }


def _image_line(image: ImageRepair, *, dry_run: bool) -> str:
    name = str(image.manifest_digest)
    if image.problem:
        return f"  image {name}: {image.problem}"
    if not image.source:
        where = ", ".join(["what is stored", *image.local])
        return f"  image {name}: {'to be ' if dry_run else ''}completed from {where}"
    what = f"{len(image.layers)} layers, {image.size} bytes, " if image.layers else ""
    if dry_run and what:
        what = f"at most {what}"
    return f"  image {name}: {what}{'to be fetched' if dry_run else 'fetched'} from {image.source}"


def repair(
    paths: HostPaths,
    repository: Repository,
    reporter: Reporter,
    *,
    dry_run: bool = False,
    breaks: fsck.Breaks | None = None,
) -> Repair:
    """Check everything, get again what is damaged or missing, and say what is left.

    The caller holds the job lock, and the shared lock of ``repository``; in a dry run ``breaks`` may give
    that up now and then, and ``reporter`` at its points. What can be had is on the device when this returns;
    stopped anywhere, nothing is worse than before, and repairing again goes on. Never raises for what cannot
    be repaired. Raises ``Cancelled``, ``NoSpace`` and ``ReadOnly``.
    """
    if not dry_run:
        repository.check_writable()
    return _Repairing(paths, repository, reporter, breaks, dry_run=dry_run).run()


class _Repairing:
    """A repair under way."""

    def __init__(
        self,
        paths: HostPaths,
        repository: Repository,
        reporter: Reporter,
        breaks: fsck.Breaks | None,
        *,
        dry_run: bool,
    ) -> None:
        self._breaks = breaks
        self._paths = paths
        self._repository = repository
        self._reporter = reporter
        self._dry_run = dry_run
        self._state = read_host(paths, repository)
        self._deployments = self._state.deployments
        try:
            self._pulls = pulls.load(paths.pulls)
        except HostimageError as error:
            reporter.message(error.message)
            self._pulls = []

    def run(self) -> Repair:
        reporter, repository = self._reporter, self._repository
        reporter.phase(Phase.VERIFYING)
        harm = self._check(metadata_only=False)
        repository.distrust(harm.damaged)
        reporter.at("repair.found")
        if not harm.objects and not harm.others:
            return Repair(self._dry_run, harm, 0, (), ())
        if not self._dry_run:
            for id_ in sorted(harm.damaged):
                protect_again(repository, id_)
                reporter.at("repair.protected")
            copied = restore_from_files(self._paths, repository, self._state, harm.objects, reporter)
            if copied:
                reporter.message(f"{copied} objects were found in files of deployments")
        configs = self._configurations()
        with LocalLayers(self._known_references(), [self._paths.containers.storage], reporter) as local:
            done = ImageRepairer(
                self._paths, repository, self._references, local, reporter, dry_run=self._dry_run
            ).run()
        reporter.at("repair.images")
        problems: dict[str, str] = {}
        if self._dry_run:
            return Repair(True, harm, 0, tuple(done), tuple(self._hopeless(harm, done)))
        self._repair_boot_images(configs, problems)
        repository.sync()
        reporter.phase(Phase.VERIFYING)
        left = self._check(metadata_only=True)
        again = {id_ for id_ in harm.objects if restored(repository, id_)}
        ids = (harm.objects - again) | left.missing | repository.distrusted
        reporter.at("repair.done")
        return Repair(False, harm, len(again), tuple(done), tuple(self._left(ids, left, done, problems)))

    def _check(self, *, metadata_only: bool) -> Harm:
        report = fsck.check(
            self._repository,
            metadata_only=metadata_only,
            give_up=None if self._breaks is not None else lambda: self._reporter.at("repair.check"),
            breaks=self._breaks,
        )
        return harm_of(self._repository, report)

    def _references(self, digest: ManifestDigest) -> Sequence[ImageReference]:
        """Where an image came from: by the list of pulls, then by the origins of deployments."""
        found = dict.fromkeys(references_of(self._pulls, digest))
        for row in self._deployments:
            origin = None if row.origin is None else row.origin.reference
            if row.manifest_digest != digest or origin is None:
                continue
            try:
                reference = ImageReference.parse(origin.image_text)
            except HostimageError:
                continue
            found |= dict.fromkeys(with_digest(reference, str(digest)))
        return list(found)

    def _known_references(self) -> Sequence[ImageReference]:
        """Where any image came from, the newest first."""
        texts = [row.reference for row in reversed(self._pulls)]
        origins = [row.origin.reference for row in self._deployments if row.origin is not None]
        texts += [origin.image_text for origin in origins if origin is not None]
        found: dict[ImageReference, None] = {}
        for text in texts:
            with suppress(HostimageError):
                found[ImageReference.parse(text)] = None
        return list(found)

    def _configurations(self) -> dict[str, ObjectId]:
        """The object of each configuration, by stream name, there or not."""
        repository = self._repository
        found = {}
        for name in repository.streams():
            if name.startswith(images.CONFIG):
                with suppress(HostimageError):
                    if (id_ := repository.has_stream(name)) is not None:
                        found[name] = id_
        return found

    def _repair_boot_images(self, configs: dict[str, ObjectId], problems: dict[str, str]) -> None:
        """Make again the boot images that are missing, and let configurations that were lost name theirs.

        ``configs`` is what the configurations were before: which boot images one named is nowhere else.
        """
        repository = self._repository
        for digest in sorted(set(images.tags(repository).values())):
            try:
                image = images.open_image(repository, digest)
            except HostimageError:
                continue  # told of the image
            named = set(boot_refs(image.config_refs).values())
            wanted = {row.id.object_id for row in self._deployments if row.manifest_digest == digest}
            for id_ in sorted(named | wanted):
                if id_ not in named or not images.has_image(repository, id_):
                    self._make_boot_image(digest, id_, problems)
            before = configs.get(images.config_stream(image.config_digest))
            if before is not None and not repository.has_object(before):
                self._restore_boot_refs(digest, before)

    def _restore_boot_refs(self, digest: ManifestDigest, before: ObjectId) -> None:
        """Make the boot image of an image if it had one: then its configuration is ``before`` again."""
        refs = boot_refs(images.open_image(self._repository, digest).config_refs)
        try:
            bootimage.generate(self._repository, digest, self._reporter)
        except _FATAL:
            raise
        except HostimageError:
            return  # it is no operating system
        if not self._repository.has_object(before):
            set_boot_refs(self._repository, digest, refs, self._reporter)

    def _make_boot_image(self, digest: ManifestDigest, id_: ObjectId, problems: dict[str, str]) -> None:
        try:
            bootimage.find_matching(self._repository, digest, id_, self._reporter)
        except _FATAL:
            raise
        except HostimageError as error:
            problems[id_.hex()] = error.message

    def _left(
        self,
        ids: set[ObjectId] | frozenset[ObjectId],
        harm: Harm,
        done: list[ImageRepair],
        problems: dict[str, str],
    ) -> list[Left]:
        breakage = Breakage(self._paths, self._repository)
        broken = breakage.of_objects(ids, self._reporter)
        whys = {str(image.manifest_digest): image.problem for image in done if image.problem}
        tags = {name: str(digest) for name, digest in images.tags(self._repository).items()}
        left = []
        for id_ in sorted(ids):
            breaks = broken[id_]
            why = problems.get(id_.hex()) or next(
                (whys[tags[tag]] for tag in breaks.images if tags.get(tag) in whys), ""
            )
            text = f"breaks {breakage.text(breaks)}" + (f": {why}" if why else "")
            left.append(Left(f"object {id_.hex()}", breaks, text))
        for finding in harm.others:
            breaks = breakage.of_paths([finding.path] if "/refs/" in finding.path else [])
            left.append(Left(printable(finding.path), breaks, f"{finding.kind} {printable(finding.detail)}"))
        return left

    def _hopeless(self, harm: Harm, done: list[ImageRepair]) -> list[Left]:
        """What a repair would leave, as far as that can be told without asking the sources."""
        breakage = Breakage(self._paths, self._repository)
        broken = breakage.of_objects(harm.objects, self._reporter)
        tags = {name: str(digest) for name, digest in images.tags(self._repository).items()}
        hopeless = {str(image.manifest_digest): image.problem for image in done if image.problem}
        left = []
        for id_, breaks in sorted(broken.items()):
            digests = {tags[tag] for tag in breaks.images if tag in tags}
            if breaks.nothing or (digests and not digests <= hopeless.keys()):
                continue
            why = next(iter(hopeless[digest] for digest in sorted(digests)), "no image has it")
            left.append(Left(f"object {id_.hex()}", breaks, f"breaks {breakage.text(breaks)}: {why}"))
        return left

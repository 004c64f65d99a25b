"""What a call asks for, checked: everything that can be said of it without asking anybody.

A request is made from the arguments and from what is known of the host now. Making it again later and
comparing tells whether what was authorised is still what would be done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from hostimaged.boot.cmdline import validate_arguments
from hostimaged.bus.authorization import Member
from hostimaged.bus.options import check_string, parse_options
from hostimaged.errors import ImageNotFound, InvalidArgs, InvalidReference
from hostimaged.host.updatepolicy import UpdatePolicy
from hostimaged.ids import ManifestDigest
from hostimaged.oci.reference import MAX_LENGTH, ImageReference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hostimaged.bus.findings import ImageRow

POLICIES: Final = tuple(str(policy) for policy in UpdatePolicy)
#: Kernel arguments: the kernel's own command line has 2048 characters (COMMAND_LINE_SIZE on x86).
_MAX_ARGUMENT: Final = 2048
_MAX_ARGUMENTS: Final = 64
_MAX_REASON: Final = 256

#: Names of operations for polkit: the kind of the job, or what the member does.
OPERATIONS: Final[Mapping[Member, str]] = {
    Member.CHECK: "check",
    Member.UPGRADE: "upgrade",
    Member.PULL: "pull",
    Member.STAGE: "stage",
    Member.SWITCH: "switch",
    Member.ROLLBACK: "rollback",
    Member.CANCEL_ROLLBACK: "rollback",
    Member.MAKE_DEFAULT: "rollback",
    Member.UNSTAGE: "unstage",
    Member.COLLECT_GARBAGE: "collect",
    Member.VERIFY_REPOSITORY: "verify",
    Member.REPAIR: "repair",
    Member.EXPLAIN: "explain",
    Member.SET_KERNEL_ARGUMENTS: "kargs",
    Member.SET_UNIFIED: "unify",
    Member.SET_PINNED: "pin",
    Member.DELETE: "delete",
    Member.DIFF: "diff",
    Member.SET_UPDATE_POLICY: "policy",
    Member.HOLD_UPDATES: "hold",
    Member.RELOAD: "reload",
    Member.CANCEL: "cancel",
}


class World(Protocol):
    """What a request depends on besides its arguments."""

    @property
    def tracked_image(self) -> str:
        """The image that updates follow, "" if none."""

    @property
    def images(self) -> Sequence[ImageRow]:
        """The images in the repository."""

    @property
    def deployed(self) -> Mapping[str, str]:
        """Names of the images of deployments, by manifest digest."""

    def deployment_at(self, path: str) -> str:
        """Id of the deployment at an object path, "" if there is none."""


@dataclass(frozen=True, slots=True)
class Request:
    """A checked call.

    ``image``: what the caller named, "" for the tracked image; ``reference``: the image that is meant, in
    its normal form; ``digest``: its digest, if the caller gave it or the image is local; ``newest``: it is
    the newest that was pulled of the tracked image. ``deployment``: the id of the one that is meant.
    ``arguments``: whatever else there is.
    """

    member: Member
    options: Mapping[str, Any] = field(default_factory=dict)
    image: str = ""
    reference: str = ""
    digest: str = ""
    newest: bool = False
    deployment: str = ""
    arguments: tuple[Any, ...] = ()

    @property
    def details(self) -> dict[str, str]:
        """What rules and dialogs of polkit may be told."""
        known = {"image": self.reference, "image-digest": self.digest, "deployment": self.deployment}
        return {"operation": OPERATIONS[self.member]} | {key: text for key, text in known.items() if text}


def make_request(member: Member, body: Sequence[Any], world: World, deployment: str = "") -> Request:
    """Check the arguments ``body`` of a call; ``deployment`` is the id of the object that is called.

    Raises ``InvalidArgs``, ``InvalidReference``, ``ImageNotFound``.
    """
    if member is Member.RELOAD:
        return Request(member)
    *arguments, given = body
    options = parse_options(member, given)
    digest = options.get("expect-digest", "")
    match member:
        case Member.CHECK | Member.PULL:
            (image,) = arguments
            return Request(member, options, image, _reference(image, world), digest)
        case Member.UPGRADE:
            return Request(member, options, "", _reference("", world), digest)
        case Member.SWITCH:
            (image,) = arguments
            return Request(member, options, image, str(ImageReference.parse(image)), digest)
        case Member.STAGE:
            return _stage(options, arguments[0], world)
        case Member.SET_UNIFIED:
            (unified,) = arguments
            # What ends need not be named.
            named = _reference("", world) if unified else tracked_reference(world.tracked_image)
            return Request(member, options, "", named, arguments=(unified,))
        case Member.DIFF:
            return Request(member, options, deployment=deployment, arguments=(_other(arguments[0], world),))
        case _:
            _check_arguments(member, arguments)
            return Request(member, options, deployment=deployment, arguments=_frozen(arguments))


def _reference(image: str, world: World) -> str:
    if not image and not world.tracked_image:
        raise InvalidArgs("no image is named, no deployment tells of one, and tracked-image is not set")
    return str(ImageReference.parse(image or world.tracked_image))


def tracked_reference(image: str) -> str:
    """The image of the settings in its normal form, "" for none or one that is no image reference."""
    try:
        return str(ImageReference.parse(image)) if image else ""
    except InvalidReference:
        return ""


def newest_of(reference: str, images: Sequence[ImageRow]) -> ImageRow | None:
    """The image that was last pulled from ``reference``; None for the empty reference."""
    if not reference:
        return None
    rows = [row for row in images if row.reference == reference and not row.artifact]
    return max(rows, key=lambda row: row.pulled or 0, default=None)


def _stage(options: Mapping[str, Any], image: str, world: World) -> Request:
    row = _local(image, world.images)
    digest = row.manifest_digest or ""
    expected = options.get("expect-digest", digest)
    if expected not in (digest, row.source_digest):
        raise InvalidArgs(f"the image is {digest}, not the expected {expected}")
    reference = row.reference or _deployed_reference(digest, world)
    if not reference:
        raise InvalidArgs("the image is in the repository, but not known by a name that updates could follow")
    newest = newest_of(tracked_reference(world.tracked_image), world.images)
    is_newest = newest is not None and newest.manifest_digest == digest
    return Request(Member.STAGE, options, image, reference, digest, newest=is_newest)


def _deployed_reference(digest: str, world: World) -> str:
    """The name of an image that was not pulled by us, if a deployment of it has one."""
    return tracked_reference(world.deployed.get(digest, ""))


def _local(image: str, images: Sequence[ImageRow]) -> ImageRow:
    """The image in the repository with this digest or tag, or last pulled from this reference."""
    check_string("the image", image, MAX_LENGTH)
    named = [row for row in images if image and image in (row.manifest_digest, row.tag)]
    if not named:
        try:
            ManifestDigest(image)
        except InvalidArgs:
            newest = newest_of(str(ImageReference.parse(image)), images)
            named = [newest] if newest else []
    if not named or not named[0].manifest_digest:
        raise ImageNotFound(f"{image} is not in the repository")
    # Of several tags on one manifest that of a pull tells where it came from.
    return next((row for row in named if row.reference), named[0])


def _other(path: str, world: World) -> str:
    """Id of the deployment that is compared with."""
    found = world.deployment_at(path)
    if not found:
        raise InvalidArgs("there is no such deployment to compare with")
    return found


def _check_arguments(member: Member, arguments: Sequence[Any]) -> None:
    match member:
        case Member.EXPLAIN:
            check_string("what is to be explained", arguments[0], MAX_LENGTH)
            if not arguments[0]:
                raise InvalidArgs("nothing is named that is to be explained")
        case Member.SET_KERNEL_ARGUMENTS:
            _check_kernel_arguments([*arguments[0], *arguments[1]])
        case Member.SET_UPDATE_POLICY:
            if arguments[0] not in POLICIES:
                raise InvalidArgs(f"an update policy is one of {', '.join(POLICIES)}")
        case Member.HOLD_UPDATES:
            check_string("the reason", arguments[1], _MAX_REASON)


def _check_kernel_arguments(arguments: Sequence[str]) -> None:
    if not 0 < len(arguments) <= _MAX_ARGUMENTS:
        raise InvalidArgs(f"between 1 and {_MAX_ARGUMENTS} kernel arguments are changed at once")
    for argument in arguments:
        check_string("a kernel argument", argument, _MAX_ARGUMENT)
    validate_arguments(arguments)


def _frozen(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in arguments)

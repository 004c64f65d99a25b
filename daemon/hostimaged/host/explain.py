"""Why something is on the host: what keeps an object, image or stream; what a deployment costs.

The plan of the next collection decides, as it does for that. Nothing here changes anything or raises for
damage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import gc
from hostimaged.composefs.repository.why import Why, why
from hostimaged.errors import HostimageError, ImageNotFound
from hostimaged.host import storekeep
from hostimaged.host.collectplan import Plan, make_plan
from hostimaged.host.model import Role
from hostimaged.host.tags import BOOTC_TAG, GUEST_TAG, PIN_TAG
from hostimaged.oci import pulls
from hostimaged.oci.images import PULL_TAG, TAGS, decode_tag, manifest_stream, tags
from hostimaged.oci.reference import ImageReference

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.repository.gc import GcResult
    from hostimaged.host.collectplan import Rules
    from hostimaged.host.model import HostState
    from hostimaged.ids import DeploymentId
    from hostimaged.oci.storage.store import StoredImage
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Digits of an id in a text; hosts have a few deployments.
_SHORT: Final = 12
#: Ways that are told: a layer may be part of hundreds of images.
_MAX_CHAINS: Final = 100
_TAG_PATH: Final = f"streams/refs/{TAGS}/"
#: What a digest may be that of.
_KINDS: Final = ("oci-manifest-", "oci-config-", "oci-layer-", "oci-blob-")
_ALIASES: Final = {"booted": Role.BOOTED, "staged": Role.STAGED, "rollback": Role.ROLLBACK}


@dataclass(frozen=True, slots=True)
class Question:
    """Where and about what is asked: ``what`` is a deployment (its id, the start of it, or booted, staged,
    rollback), an image (tag, manifest digest, or reference as pulled), a stream's name, or an object's id.
    """

    paths: HostPaths
    repository: Repository
    state: HostState
    rules: Rules
    what: str
    now: int

    def plan(self, without: DeploymentId | None = None) -> Plan:
        """The plan of a collection now."""
        return make_plan(self.paths, self.repository, self.state, self.rules, now=self.now, without=without)


def explain(question: Question, reporter: Reporter) -> dict[str, Any]:
    """The answer: ``kept`` (whether the next collection keeps it), ``chains`` (each the way from what keeps
    it to it), and ``text`` with all of it for people. Of a deployment also what its deletion would free. An
    image may be in the repository, in bootc's containers-storage, or in both.

    Raises ``ImageNotFound`` if there is nothing that ``what`` names.
    """
    plan = question.plan()
    id_ = _deployment(question.state, question.what)
    if id_ is not None:
        return _explain_deployment(question, plan, id_, reporter)
    found = why(question.repository, _name(question), roots=plan.root_names, reporter=reporter)
    stored = _stored(question, plan)
    if not found.found and stored is None:
        raise ImageNotFound(f"there is no deployment, image, stream or object {question.what!r}")
    lines = [f"{question.what}:"]
    if not found.found:
        return _of_store(plan, stored, {"what": question.what, "kept": False, "chains": []}, lines)
    answer = _answer(question, plan, _chains(plan, found), found, lines)
    return answer if stored is None else _of_store(plan, stored, answer, [answer["text"]])


def _deployment(state: HostState, what: str) -> DeploymentId | None:
    if what in _ALIASES:
        row = next((row for row in state.deployments if row.role is _ALIASES[what]), None)
        if row is None:
            raise ImageNotFound(f"there is no {what} deployment")
        return row.id
    found = [row.id for row in state.deployments if row.id.value.startswith(what)]
    return found[0] if len(found) == 1 else None


def _name(question: Question) -> str:
    """Name in the repository of what is asked about."""
    what, repository = question.what, question.repository
    digest = tags(repository).get(what)
    if digest is not None:
        return manifest_stream(digest)
    if what.startswith("sha256:"):
        names = set(repository.streams())
        return next((kind + what for kind in _KINDS if kind + what in names), what)
    try:
        reference = str(ImageReference.parse(what))
        rows = pulls.load(question.paths.pulls)
    except HostimageError:
        return what
    row = next((row for row in reversed(rows) if row.reference == reference), None)
    return what if row is None else manifest_stream(row.manifest_digest)


# --- bootc's store -----------------------------------------------------------------------------------------


def _stored(question: Question, plan: Plan) -> StoredImage | None:
    """The image of the store that is asked about, if there is one."""
    try:
        return storekeep.find(plan.store, question.what)
    except ImageNotFound:
        return None


def _of_store(
    plan: Plan, image: StoredImage | None, answer: dict[str, Any], lines: list[str]
) -> dict[str, Any]:
    """``answer`` with what keeps ``image`` in the store."""
    assert image is not None
    where = f"image {image.called} of bootc's containers-storage"
    reasons = next((found for other, found in plan.store.stay if other.id == image.id), ())
    lines += [f"  {where}: kept, {reason}" for reason in reasons[:_MAX_CHAINS]]
    if not reasons and not plan.store.doubts:
        lines.append(f"  {where}: nothing keeps it, the next collection of garbage removes it")
    lines += [f"  nothing is collected there at present: {doubt}" for doubt in plan.store.doubts]
    return answer | {
        "kept": answer["kept"] or bool(reasons) or bool(plan.store.doubts),
        "chains": [*answer["chains"], *(f"{where}: {reason}" for reason in reasons)][:_MAX_CHAINS],
        "text": "\n".join(lines),
    }


# --- what keeps it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chain:
    """A way to the thing, for people; ``stays``: the next collection leaves it."""

    steps: tuple[str, ...]
    stays: bool

    def __str__(self) -> str:
        return " > ".join(self.steps)


def _chains(plan: Plan, found: Why) -> list[_Chain]:
    return [
        _Chain((_head(plan, chain[0]), *map(_step, chain[1:])), chain[0] not in plan.without_refs)
        for chain in found.chains
    ]


def _step(path: str) -> str:
    """A step for people: an object by its id."""
    kind, _, name = path.partition("/")
    return f"object {name.replace('/', '')}" if kind == "objects" else path


def _head(plan: Plan, path: str) -> str:
    """Where a way begins: a reference, or a name that a deployment of this host needs."""
    going = ", which the next collection removes" if path in plan.without_refs else ""
    if path.startswith(_TAG_PATH):
        tag = decode_tag(path.removeprefix(_TAG_PATH))
        return f"tag {tag} ({_owner(plan, tag)}{going})"
    if "/refs/" in path:
        return f"reference {path}{' (it goes with the next collection)' if going else ''}"
    name = path.partition("/")[2]
    users = [root for root in plan.roots.roots if name in (str(root.id), _manifest_name(root.manifest))]
    return f"{path} ({', '.join(_called(root.id) + ': ' + ', '.join(root.reasons) for root in users)})"


def _manifest_name(digest: Any) -> str:
    return "" if digest is None else manifest_stream(digest)


def _owner(plan: Plan, tag: str) -> str:
    if tag.startswith(BOOTC_TAG):
        digest = tag.removeprefix(BOOTC_TAG)
        users = [root for root in plan.roots.roots if str(root.manifest) == digest]
        named = [f"{_called(root.id)}: {', '.join(root.reasons)}" for root in users]
        return "; ".join(named) or "of no deployment"
    kinds = {PIN_TAG: "somebody pinned it", PULL_TAG: "it was pulled", GUEST_TAG: "another host's"}
    return next((text for prefix, text in kinds.items() if tag.startswith(prefix)), "not ours to remove")


def _called(id_: DeploymentId) -> str:
    return f"deployment {id_.value[:_SHORT]}"


def _answer(
    question: Question, plan: Plan, chains: list[_Chain], found: Why, lines: list[str]
) -> dict[str, Any]:
    staying = [chain for chain in chains if chain.stays]
    kept = bool(staying) or bool(plan.roots.doubts)
    if staying:
        lines += [f"  kept by {chain}" for chain in staying[:_MAX_CHAINS]]
    lines += [f"  no longer kept by {chain}" for chain in chains if not chain.stays][:_MAX_CHAINS]
    if not staying:
        lines.append("  nothing keeps it: the next collection of garbage removes it")
    lines += [f"  unknown, as it cannot be read: {path}" for path in found.unreadable[:_MAX_CHAINS]]
    lines += [f"  nothing is collected at present: {reason}" for reason in plan.roots.doubts[:_MAX_CHAINS]]
    return {
        "what": question.what,
        "kept": kept,
        "chains": [str(chain) for chain in staying[:_MAX_CHAINS]],
        "text": "\n".join(lines),
    }


# --- deployments -------------------------------------------------------------------------------------------


def _explain_deployment(
    question: Question, plan: Plan, id_: DeploymentId, reporter: Reporter
) -> dict[str, Any]:
    root = next((root for root in plan.roots.roots if root.id == id_), None)
    reasons = () if root is None else root.reasons
    lines = [f"deployment {id_}:", *(f"  kept as {reason}" for reason in reasons)]
    found = why(question.repository, str(id_), roots=plan.root_names, reporter=reporter)
    chains = _chains(plan, found)
    answer = _answer(question, plan, chains, found, lines)
    answer |= {"deployment": str(id_), "kept": bool(reasons) or bool(plan.roots.doubts)}
    freed = _freed(question, plan, id_, reporter)
    if freed is None:
        return answer
    swept, boot, store = freed
    text = (
        f"  deleting it, and collecting garbage, frees {swept.objects_bytes} bytes in "
        f"{swept.objects_removed} objects, and {boot} bytes where the host boots from"
    )
    if store:
        text += f", and {store} bytes of bootc's containers-storage"
    return answer | {
        "objects-freed": swept.objects_removed,
        "bytes-freed": swept.objects_bytes,
        "boot-bytes-freed": boot,
        "store-bytes-freed": store,
        "text": f"{answer['text']}\n{text}",
    }


def _freed(
    question: Question, plan: Plan, id_: DeploymentId, reporter: Reporter
) -> tuple[GcResult, int, int] | None:
    """What a collection would remove beyond that of now if the deployment were gone; None: nobody knows."""
    after = question.plan(without=id_)
    swept = []
    for each in (plan, after):
        marked = gc.mark(
            question.repository, roots=each.root_names, without_refs=each.without_refs, reporter=reporter
        )
        if each.roots.doubts or marked.damage:
            return None
        swept.append(gc.sweep(question.repository, marked, dry_run=True, reporter=reporter))
    before, more = swept
    boot = sum(each.size for each in after.artifacts) - sum(each.size for each in plan.artifacts)
    return (
        gc.GcResult(
            more.objects_removed - before.objects_removed,
            more.objects_bytes - before.objects_bytes,
            more.images_pruned - before.images_pruned,
            more.streams_pruned - before.streams_pruned,
        ),
        boot,
        after.store.freed - plan.store.freed,
    )

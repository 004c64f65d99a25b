"""The table of commands: what each is called, takes and means on the bus.

The parser, the completions and the manual page are made from it or compared with it. Nothing here is imported
from the transport, so that ``--help`` stays fast.
"""

from __future__ import annotations

from typing import Final

from hostimagectl.arguments import deployment_name, job_id, one_of, span_or_time, words
from hostimagectl.command import Argument, Command, JobCommand, Option, Parameter
from hostimagectl.texts import (
    CANCEL_JSON,
    IMAGES_JSON,
    JOBS_JSON,
    LOG_JSON,
    MONITOR_JSON,
    PATHS,
    POLICY_JSON,
    SHOW_JSON,
    STATUS_JSON,
    UPDATE_JSON,
)

#: Headings of the list of commands, in its order.
GROUPS: Final = ("look", "update", "deploy", "keep house", "decide", "jobs and service")


_BACKGROUND: Final = Option(
    "--background", "background", "obey holds and give way to others, as for a timer's job"
)
_METERED: Final = Option("--allow-metered", "allow-metered", "go on though the network is metered")
_BATTERY: Final = Option("--allow-on-battery", "allow-on-battery", "go on though the host runs on battery")
_DIGEST: Final = Option(
    "--expect-digest",
    "expect-digest",
    "fail unless the source's manifest has this sha256:… digest",
    None,
    {"metavar": "DIGEST"},
)
_RETRY: Final = Option("--retry-failed", "retry-failed", "try an image again whose start failed before")
_SHARING: Final = Option(
    "--sharing",
    "sharing",
    "how files of containers-storage are stored: auto (default) copies only what can neither be cloned nor "
    "linked, copy copies all, require fails where something had to be copied",
    None,
    {"metavar": "HOW", "choices": ("copy", "auto", "require")},
)
_UNIFIED: Final = Option("--unified", "unified", "store it in the storage shared with containers as well")
_DOWNLOAD_ONLY: Final = Option(
    "--download-only", "download-only", "stage it locked: it is not started until it is unlocked"
)
_DOWNLOADED: Final = Option(
    "--from-downloaded", "from-downloaded", "use what was downloaded before; ask no registry"
)
_APPLY: Final = Option(
    "--apply",
    "apply",
    "then restart into it: none (default), reboot or soft-reboot",
    None,
    {"metavar": "HOW", "choices": ("none", "reboot", "soft-reboot")},
)
_DOWNGRADE: Final = Option(
    "--allow-downgrade", "allow-downgrade", "accept an image older than the present one"
)
_DRY_RUN: Final = Option("--dry-run", "dry-run", "say what would be done, and do nothing")
#: Options of every method that starts a job.
JOB_OPTIONS: Final = (
    Option("--no-queue", "queue", "fail instead of waiting while another job runs", value=False),
    Option("--no-join", "no-join", "do not join an equal job, have one of its own"),
)
#: What every job of an update policy takes.
UPDATE_OPTIONS: Final = (_BACKGROUND, _METERED, _BATTERY)
_FETCH: Final = (*UPDATE_OPTIONS, _DIGEST, _RETRY, _SHARING, _UNIFIED)

_TRACKED: Final = Argument(
    ("image",), {"metavar": "IMAGE", "nargs": "?", "default": "", "help": "default: the tracked image"}
)
_IMAGE: Final = Argument(("image",), {"metavar": "IMAGE", "help": "transport:name"})
_DEPLOYMENT: Final = Argument(
    ("deployment",),
    {
        "metavar": "DEPLOYMENT",
        "type": deployment_name,
        "help": "booted, staged, rollback, or the start of an id that no other has",
    },
)
_SENDS_IMAGE: Final = (Parameter("s", "image", means="image"),)

_LOOK: Final = (
    Command(
        name="status",
        group="look",
        module="status",
        summary="show deployments, images, jobs, problems and last results",
        arguments=(
            Argument(
                ("--format",),
                {
                    "metavar": "FORMAT",
                    "choices": ("native", "bootc-v1"),
                    "default": "native",
                    "help": "bootc-v1: the JSON document of 'bootc status --format-version=1', as it is",
                },
            ),
        ),
        epilog=STATUS_JSON,
    ),
    Command(
        name="images",
        group="look",
        module="images",
        summary="list the images in the repository",
        epilog=IMAGES_JSON,
    ),
    Command(
        name="show",
        group="look",
        module="show",
        summary="show a deployment",
        arguments=(_DEPLOYMENT,),
        epilog=SHOW_JSON,
    ),
    JobCommand(
        name="diff",
        group="look",
        member="Diff",
        on="deployment",
        summary="tell how two deployments differ",
        arguments=(
            _DEPLOYMENT,
            Argument(("other",), {"metavar": "OTHER", "type": deployment_name, "help": "as DEPLOYMENT"}),
        ),
        parameters=(Parameter("o", "other", means="deployment"),),
    ),
    JobCommand(
        name="why",
        group="look",
        member="Explain",
        summary="tell why a deployment, image, stream or object is kept",
        arguments=(
            Argument(
                ("what",),
                {"metavar": "WHAT", "help": "a deployment, an image, a stream's name, an object's id"},
            ),
        ),
        parameters=(Parameter("s", "what"),),
    ),
)
_UPDATE: Final = (
    JobCommand(
        name="check",
        group="update",
        member="Check",
        summary="look for a newer image, without downloading it",
        description="Ask the source for the newest version of IMAGE. Nothing is stored.\n\n" + PATHS,
        arguments=(_TRACKED,),
        parameters=_SENDS_IMAGE,
        options=UPDATE_OPTIONS,
        quiet="manifest-digest",
    ),
    JobCommand(
        name="upgrade",
        group="update",
        member="Upgrade",
        summary="pull and stage the newest of the tracked image",
        options=(*_FETCH, _DOWNLOAD_ONLY, _DOWNLOADED, _APPLY, _DOWNGRADE),
        quiet="manifest-digest",
    ),
    JobCommand(
        name="pull",
        group="update",
        member="Pull",
        summary="pull an image into the repository",
        description=(
            "Have the daemon fetch IMAGE (transport:name) into the repository, and watch it. "
            "Nothing is deployed.\n\n" + PATHS
        ),
        arguments=(_TRACKED,),
        parameters=_SENDS_IMAGE,
        options=_FETCH,
        quiet="manifest-digest",
    ),
    JobCommand(
        name="stage",
        group="update",
        member="Stage",
        summary="deploy an image of the repository at the next boot",
        arguments=(
            Argument(
                ("image",),
                {"metavar": "IMAGE", "help": "a manifest digest, a tag, or transport:name as it was pulled"},
            ),
        ),
        parameters=_SENDS_IMAGE,
        options=(_DIGEST, _RETRY, _DOWNLOAD_ONLY, _APPLY, _DOWNGRADE),
    ),
    JobCommand(
        name="switch",
        group="update",
        member="Switch",
        summary="track another image from now on; pull and stage it",
        description="Pull and stage IMAGE, and track it from now on.\n\n" + PATHS,
        arguments=(_IMAGE,),
        parameters=_SENDS_IMAGE,
        options=(*_FETCH, _DOWNLOAD_ONLY, _APPLY, _DOWNGRADE),
        quiet="manifest-digest",
    ),
)
_BY_POLICY: Final = Command(
    name="update",
    group="update",
    module="update",
    summary="do what the update policy says",
    description=(
        "Do what the update policy (command policy) says is to be done without being asked, as "
        "hostimaged-update.service does: nothing, look for a newer image, pull it, or stage it as well."
    ),
    arguments=tuple(option.argument for option in (*UPDATE_OPTIONS, *JOB_OPTIONS)),
    epilog=UPDATE_JSON,
)
_DEPLOY: Final = (
    JobCommand(
        name="rollback",
        group="deploy",
        member="Rollback",
        summary="make the rollback deployment the next to boot",
        options=(_APPLY,),
    ),
    JobCommand(
        name="cancel-rollback",
        group="deploy",
        member="CancelRollback",
        summary="take a rollback back that was not booted yet",
    ),
    JobCommand(
        name="unstage", group="deploy", member="Unstage", summary="drop what is staged for the next boot"
    ),
    JobCommand(
        name="make-default",
        group="deploy",
        member="MakeDefault",
        on="deployment",
        summary="make a deployment the next to boot",
        arguments=(_DEPLOYMENT,),
        options=(_APPLY,),
    ),
    JobCommand(
        name="pin",
        group="deploy",
        member="SetPinned",
        on="deployment",
        summary="keep a deployment until it is unpinned",
        arguments=(_DEPLOYMENT,),
        parameters=(Parameter("b", fixed=True),),
    ),
    JobCommand(
        name="unpin",
        group="deploy",
        member="SetPinned",
        on="deployment",
        summary="no longer keep a deployment for its own sake",
        arguments=(_DEPLOYMENT,),
        parameters=(Parameter("b", fixed=False),),
    ),
    JobCommand(
        name="delete",
        group="deploy",
        member="Delete",
        on="deployment",
        summary="delete a deployment",
        arguments=(_DEPLOYMENT,),
    ),
    JobCommand(
        name="kargs",
        group="deploy",
        member="SetKernelArguments",
        summary="add and remove kernel arguments, from the next boot on",
        arguments=(
            Argument(
                ("--append",),
                {
                    "metavar": "ARGUMENT",
                    "action": "append",
                    "default": [],
                    "help": "add it, such as --append=quiet; may be given several times",
                },
            ),
            Argument(
                ("--delete",),
                {
                    "metavar": "ARGUMENT",
                    "action": "append",
                    "default": [],
                    "help": "remove it, such as --delete=quiet; may be given several times",
                },
            ),
        ),
        parameters=(Parameter("as", "append"), Parameter("as", "delete")),
        options=(_APPLY,),
    ),
)
_KEEP: Final = (
    JobCommand(
        name="gc",
        group="keep house",
        member="CollectGarbage",
        summary="delete what no deployment and no image needs",
        options=(_BACKGROUND, _DRY_RUN),
    ),
    JobCommand(
        name="verify",
        group="keep house",
        member="VerifyRepository",
        summary="read the repository and compare it with its digests",
        options=(_BACKGROUND,),
    ),
    JobCommand(
        name="repair",
        group="keep house",
        member="Repair",
        summary="fetch what is damaged in the repository again",
        options=(_DRY_RUN,),
    ),
    JobCommand(
        name="set-unified",
        group="keep house",
        member="SetUnified",
        summary="keep images in containers-storage as well, or no longer",
        arguments=(
            Argument(("state",), {"metavar": "STATE", "type": one_of("on", "off"), "help": "on or off"}),
        ),
        parameters=(Parameter("b", "state"),),
    ),
)
_POLICIES: Final = ("none", "check", "download", "stage")
_DECIDE: Final = (
    Command(
        name="policy",
        group="decide",
        module="policy",
        summary="show or set what is done without being asked",
        arguments=(
            Argument(
                ("policy",),
                {
                    "metavar": "POLICY",
                    "nargs": "?",
                    "choices": _POLICIES,
                    "help": f"{words(_POLICIES)}; default: show it",
                },
            ),
        ),
        epilog=POLICY_JSON,
    ),
    Command(
        name="hold",
        group="decide",
        module="hold",
        summary="hold background updates for a while",
        description="Hold updates in the background until WHEN, at most until the host restarts.",
        arguments=(
            Argument(
                ("until",),
                {
                    "metavar": "WHEN",
                    "type": span_or_time,
                    "help": "a span such as 90min, 2h, 3d or 1w, or a local time such as 2030-12-31T08:00",
                },
            ),
            Argument(
                ("--reason",), {"metavar": "TEXT", "default": "", "help": "shown to those who wonder why"}
            ),
        ),
    ),
    Command(name="release", group="decide", module="hold", summary="end the hold of 'hold'"),
    Command(
        name="reload", group="decide", module="reload", summary="have the daemon read its settings again"
    ),
)
_LEVELS: Final = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
_JOBS: Final = (
    Command(
        name="jobs",
        group="jobs and service",
        module="jobs",
        summary="list jobs that wait or run",
        epilog=JOBS_JSON,
    ),
    Command(
        name="cancel",
        group="jobs and service",
        module="cancel",
        summary="cancel a job and wait for its end",
        arguments=(Argument(("id",), {"metavar": "ID", "type": job_id, "help": "number of the job"}),),
        epilog=CANCEL_JSON,
    ),
    Command(
        name="monitor",
        group="jobs and service",
        module="monitor",
        summary="print changes as they come, until interrupted",
        epilog=MONITOR_JSON,
    ),
    Command(
        name="log-level",
        group="jobs and service",
        module="log",
        summary="show or set how much the daemon logs",
        arguments=(
            Argument(
                ("level",),
                {
                    "metavar": "LEVEL",
                    "nargs": "?",
                    "choices": _LEVELS,
                    "help": f"{words(_LEVELS)}; default: show it",
                },
            ),
        ),
        epilog=LOG_JSON,
    ),
    Command(
        name="completion",
        group="jobs and service",
        module="completion",
        summary="print the completion script of a shell",
        arguments=(
            Argument(
                ("shell",),
                {"metavar": "SHELL", "choices": ("bash", "zsh", "fish"), "help": "bash, zsh or fish"},
            ),
        ),
        epilog="",
    ),
)

COMMANDS: Final[tuple[Command, ...]] = (*_LOOK, *_UPDATE, _BY_POLICY, *_DEPLOY, *_KEEP, *_DECIDE, *_JOBS)
#: Commands that follow a job: they may be told not to wait.
WAITING: Final = frozenset(
    command.name
    for command in COMMANDS
    if isinstance(command, JobCommand) or command.name in ("cancel", "update")
)


def find(name: str) -> Command:
    """The command called ``name``, which exists."""
    return next(command for command in COMMANDS if command.name == name)

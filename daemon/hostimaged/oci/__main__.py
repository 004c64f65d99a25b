"""Low-level tool for people and tests: the images of a repository as a whole.

``python -m hostimaged.oci COMMAND``. Needs no daemon. ``fsck`` is ``cfsctl oci fsck``; ``upgrade`` does what
``cfsctl`` does whenever it opens a repository of the old format, and completes the images after it. What
needs no knowledge of OCI is in ``python -m hostimaged.composefs``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_FAILURE, EXIT_OK
from hostimaged.composefs.repository import DEFAULT_LOCK_TIMEOUT, Repository, Verity
from hostimaged.errors import CorruptRepository, HostimageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code, that of ``hostimagectl`` for the same error."""
    args = _parser().parse_args(argv)
    try:
        _COMMANDS[args.command](args)
        sys.stdout.flush()
    except HostimageError as error:
        hint = f" ({error.hint})" if error.hint else ""
        print(f"{args.command}: {error.message}{hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader had enough. Nothing more may be written, not even by the interpreter at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hostimaged.oci", description="Check and upgrade the images of a repository."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("fsck", help="check a repository and the images in it")
    command.add_argument("repository", metavar="REPO")
    command.add_argument("tag", metavar="TAG", nargs="?", help="check only this image of them")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_timeout(command)

    command = commands.add_parser(
        "upgrade", help="make a repository of the old format one of today's, and make missing EROFS images"
    )
    command.add_argument("repository", metavar="REPO")
    command.add_argument(
        "--verity",
        choices=[str(verity) for verity in Verity],
        help="'require': the repository must become a secure one; 'opportunistic': it may become insecure "
        "where only some of its objects have fs-verity (default: that is refused)",
    )
    _add_timeout(command)
    return parser


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock-timeout",
        type=float,
        default=DEFAULT_LOCK_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the lock of the repository (default: %(default)g)",
    )


def _fsck(args: argparse.Namespace) -> None:
    from hostimaged.oci import fsck

    with Repository.open(args.repository, lock_timeout=args.lock_timeout) as repository:
        report = fsck.check(repository, tag=args.tag)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.text().rstrip("\n"))
    if not report.ok:
        raise CorruptRepository(f"the check of {args.repository} failed")


def _upgrade(args: argparse.Namespace) -> None:
    from hostimaged.oci.upgrade import upgrade_images
    from hostimaged.progress import Silent

    verity = None if args.verity is None else Verity(args.verity)
    repository, upgraded = Repository.upgrade(args.repository, verity=verity, lock_timeout=args.lock_timeout)
    with repository:
        print(f"repository: {'upgraded' if upgraded else 'current'} ({repository.metadata})")
        result = upgrade_images(repository, Silent())
    print(f"images: {result.upgraded} upgraded, {result.current} current, {result.artifacts} artifacts")
    for digest, problem in result.problems.items():
        print(f"  - {digest}: {problem}")
    if result.problems:
        raise CorruptRepository(f"{len(result.problems)} images were left as they are")


_COMMANDS: Final = {"fsck": _fsck, "upgrade": _upgrade}

if __name__ == "__main__":
    sys.exit(main())

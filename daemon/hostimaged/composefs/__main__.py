"""Low-level tool for people and tests: fs-verity digests, dump files, images, streams.

``python -m hostimaged.composefs COMMAND``. Needs no daemon; only ``gc`` changes a repository. Gives what
the tools of composefs-rs give: ``digest`` is ``composefs-info measure-file``, ``mkfs`` is ``mkcomposefs
--from-file --print-digest``, ``dump`` and ``objects`` are those of ``composefs-info``, ``cat-stream`` is
``cfsctl cat``, ``fsck`` is ``cfsctl fsck``, ``gc`` is ``cfsctl gc``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from hostimage_dbus.errors import EXIT_FAILURE, EXIT_OK
from hostimaged.composefs.erofs.format import MAX_IMAGE, Format
from hostimaged.composefs.fsverity import Algorithm, Hasher, digest
from hostimaged.errors import CorruptRepository, HostimageError, InvalidArgs, from_os_error, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hostimaged.composefs.erofs import Image
    from hostimaged.ids import ObjectId

_PIECE: Final = 1 << 18


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code, that of ``hostimagectl`` for the same error."""
    args = _parser().parse_args(argv)
    try:
        _COMMANDS[args.command](args)
        sys.stdout.flush()
    except HostimageError as error:
        print(f"{args.command}: {error.message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader had enough. Nothing more may be written, not even by the interpreter at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hostimaged.composefs",
        description="Work with fs-verity digests, composefs images and streams.",
        epilog="A file named - is the standard input or output.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("digest", help="print the fs-verity digest of a file")
    command.add_argument("file", metavar="FILE")
    _add_algorithm(command, Algorithm.SHA256)

    command = commands.add_parser(
        "mkfs", help="make an image of a dump file, and print its id on the last line"
    )
    command.add_argument("dumpfile", metavar="DUMPFILE")
    command.add_argument("out", metavar="OUT", help="the image; with - its id is printed to standard error")
    command.add_argument(
        "--format",
        choices=[image_format.label for image_format in Format],
        default=Format.V1.label,
        help="format of the image (default: %(default)s, that of new repositories)",
    )
    _add_algorithm(command, Algorithm.SHA256)

    for name, text in (
        ("dump", "print the dump file of an image"),
        ("objects", "print the path of every object that an image needs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("image", metavar="IMAGE")
        _add_algorithm(command, None)

    command = commands.add_parser("cat-stream", help="put a split stream together and write it out")
    command.add_argument(
        "stream", metavar="NAME", help="a stream of the repository, or refs/ and a reference; else a file"
    )
    command.add_argument(
        "--repo", metavar="DIR", help="the repository; without it NAME is a file whose content is all inline"
    )
    _add_algorithm(command, Algorithm.SHA256)

    command = commands.add_parser("fsck", help="check a repository; exit code 0 if nothing is wrong")
    command.add_argument("repository", metavar="REPO")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument(
        "--metadata-only", action="store_true", help="do not look at the content of objects, which is faster"
    )

    command = commands.add_parser("gc", help="remove from a repository what no reference leads to")
    command.add_argument("repository", metavar="REPO")
    command.add_argument("--dry-run", "-n", action="store_true", help="only say what would be removed")
    command.add_argument(
        "--root",
        "-r",
        action="append",
        default=[],
        metavar="NAME",
        help="keep this image or stream, too; may be repeated",
    )
    return parser


def _add_algorithm(parser: argparse.ArgumentParser, default: Algorithm | None) -> None:
    shown = "what the image has" if default is None else default.label
    parser.add_argument(
        "--algorithm",
        choices=[algorithm.label for algorithm in Algorithm],
        default=None if default is None else default.label,
        help=f"hash of the fs-verity digests (default: {shown})",
    )


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """A file to read; ``-`` is standard input. Failed system calls become errors that name the file."""
    try:
        if name == "-":
            yield sys.stdin.buffer
        else:
            with open(name, "rb") as file:
                yield file
    except OSError as error:
        raise from_os_error(error, f"cannot read {name}") from error


@contextmanager
def _created(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        if sys.stdout.isatty():
            raise InvalidArgs("an image is not written to a terminal")
        yield sys.stdout.buffer
        return
    try:
        with open(name, "wb") as file:
            yield file
    except OSError as error:
        raise from_os_error(error, f"cannot write {name}") from error


def _digest(args: argparse.Namespace) -> None:
    hasher = Hasher(Algorithm.from_label(args.algorithm))
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with _opened(args.file) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined] # a buffered binary file has it
            hasher.update(view[:count])
    print(hasher.finish().hex())


def _mkfs(args: argparse.Namespace) -> None:
    from hostimaged.composefs import dumpfile
    from hostimaged.composefs.erofs import build

    algorithm = Algorithm.from_label(args.algorithm)
    with _opened(args.dumpfile) as file:
        root = dumpfile.parse(file, algorithm, name=_shown(args.dumpfile))
    image = build(root, next(f for f in Format if f.label == args.format), algorithm)
    with _created(args.out) as file:
        file.write(image)
    print(digest(algorithm, image).hex(), file=sys.stderr if args.out == "-" else sys.stdout)


def _read_image(args: argparse.Namespace) -> Image:
    from hostimaged.composefs.erofs import Image

    with _opened(args.image) as file:
        # One byte more than allowed, so that the reader sees that it is too large.
        data = file.read(MAX_IMAGE + 1)
    if args.algorithm is None:
        return Image.detect(data, name=_shown(args.image))
    return Image(data, Algorithm.from_label(args.algorithm), name=_shown(args.image))


def _dump(args: argparse.Namespace) -> None:
    from hostimaged.composefs import dumpfile

    sys.stdout.buffer.writelines(dumpfile.write(_read_image(args).tree()))
    sys.stdout.buffer.flush()


def _objects(args: argparse.Namespace) -> None:
    for object_id in sorted(_read_image(args).objects()):
        print(object_id.pathname)


def _cat_stream(args: argparse.Namespace) -> None:
    from hostimaged.composefs.splitstream import SplitStream, cat

    out = sys.stdout.buffer
    if args.repo is not None:
        from hostimaged.composefs.repository import Repository

        with Repository.open(args.repo) as repository, repository.open_stream(args.stream) as stream:
            cat(stream, repository, out.write)
    else:
        fd = _stream_file(args.stream)
        with SplitStream(fd, Algorithm.from_label(args.algorithm), name=_shown(args.stream)) as stream:
            cat(stream, _NoObjects(), out.write)
    out.flush()


def _stream_file(name: str) -> int:
    try:
        if name != "-":
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        # A stream is not read from front to back, and standard input may be a pipe.
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, _PIECE)
            copy.flush()
            return os.dup(copy.fileno())
    except OSError as error:
        raise from_os_error(error, f"cannot read {name}") from error


class _NoObjects:
    """Stands for the repository when there is none."""

    def open_object(self, id_: ObjectId, /) -> int:
        """There is no object."""
        raise InvalidArgs(f"the stream needs object {id_.pathname}: name its repository with --repo")


def _fsck(args: argparse.Namespace) -> None:
    from hostimaged.composefs import fsck
    from hostimaged.composefs.repository import Repository

    with Repository.open(args.repository) as repository:
        report = fsck.check(repository, metadata_only=args.metadata_only)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.text().rstrip("\n"))
    if not report.ok:
        raise CorruptRepository(f"the check of {args.repository} failed")


def _gc(args: argparse.Namespace) -> None:
    from hostimaged.composefs.repository import Repository, gc
    from hostimaged.progress import Silent

    reporter = Silent()
    with Repository.open(args.repository, exclusive=not args.dry_run) as repository:
        marked = gc.mark(repository, roots=args.root, reporter=reporter)
        for damage in marked.damage:
            print(f"{args.command}: {damage.text}", file=sys.stderr)
        result = gc.sweep(repository, marked, dry_run=args.dry_run, reporter=reporter)
    for reference in marked.dangling:
        print(f"{args.command}: {printable(reference)} leads nowhere", file=sys.stderr)
    if args.dry_run:
        print("Dry run (no files deleted):")
    print(f"Objects: {result.objects_removed} removed ({result.objects_bytes} bytes)")
    if result.images_pruned or result.streams_pruned:
        print(f"Pruned symlinks: {result.images_pruned} images, {result.streams_pruned} streams")


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


_COMMANDS: Final = {
    "digest": _digest,
    "mkfs": _mkfs,
    "dump": _dump,
    "objects": _objects,
    "cat-stream": _cat_stream,
    "fsck": _fsck,
    "gc": _gc,
}

if __name__ == "__main__":
    sys.exit(main())

"""podman on the store of the host, run as bootc runs it, so that both may use one store in turn.

Facts: bootc (``podstorage``). podman writes into its database where its store and its run directory are, and
refuses another place later; so it is always told ``--root /run/bootc/storage --runroot /proc/self/fd/3``, in
mounts of its own in which the store is there, and with the run directory open under that number. Credentials
are an inherited file.

Its mounts also hide what podman keeps of other stores in /run and /dev/shm, and for a host below a directory
the containers configuration and the cache of the machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from typing import IO, TYPE_CHECKING, Final, Self

from hostimaged.errors import HostimageError, NotSupported, StorageError, Unavailable, from_os_error
from hostimaged.oci.skopeo_errors import cleaned, fatal_message, mapped
from hostimaged.system import privatemounts
from hostimaged.system.paths import (
    CONTAINERS_CONFIGURATION,
    CONTAINERS_HOME,
    RESOLVER,
    SHARED_PLACE,
    STORE_ALIAS,
    VOLATILE,
)
from hostimaged.system.privatemounts import PrivateMounts
from hostimaged.system.process import bytes_moved, cleaned_environment, find_program, spawn, stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from hostimaged.oci.reference import ImageReference
    from hostimaged.system.paths import ContainersConfig, HostPaths

#: What podman is told of its run directory (bootc).
RUNROOT: Final = "/proc/self/fd/3"
#: The store in skopeo's and podman's notation, to be followed by the name of an image.
LOCATION: Final = f"containers-storage:[overlay@{STORE_ALIAS}+{RUNROOT}]"
#: Bytes of what podman writes: a list of images has a KiB for each.
MAX_OUTPUT: Final = 16 << 20
#: A podman that moves no bytes for so long, in seconds, is given up.
SILENCE: Final = 120.0
#: Less than this, in bytes read and written, within ``SILENCE`` is nothing.
_SIGN_OF_LIFE: Final = 128 << 10
#: Images removed by one command (bootc).
_AT_ONCE: Final = 100
_SLICE: Final = 0.1
_PATIENCE: Final = 5.0
_TAIL: Final = 8192
_ENDED: Final = "podman ended unexpectedly"
#: The shell opens the run directory, $0, under its number and becomes podman.
_OPEN_RUNROOT: Final = 'exec 3<"$0" && exec "$@"'
#: Not from the host's storage.conf, whose options are for its own store. Layers that are fetched in part, by
#: their table of contents, have no digest of their tar, and cannot be imported.
_STORAGE_CONF: Final = f"""\
[storage]
driver = "overlay"
graphroot = "{STORE_ALIAS}"
runroot = "{RUNROOT}"
[storage.options]
pull_options = {{enable_partial_images = "false"}}
"""
#: The store, for podman. Events are for none: what would take them, the journal's socket, is hidden in /run.
_WHERE: Final = (
    *("--root", str(STORE_ALIAS), "--runroot", RUNROOT, "--storage-driver", "overlay"),
    *("--events-backend", "none"),
)
_VERSION: Final = re.compile(rb"(\d+)\.(\d+)")
_CONTAINERS_CONF: Final = '[engine]\nevents_logger = "none"\n'


class Podman:
    """podman on the store at ``store``, a directory that exists (``owned`` makes it).

    ``work_dir`` is an existing private directory for temporary files, which the caller removes. ``check`` is
    called while podman is waited for, and may raise. ``source``: a file or directory that is read from, which
    may be where others are hidden; it has no links in it. Needs what ``Profile.STORE`` keeps. Programs end
    with ``close``, or with this process. One thread at a time. A context manager.

    Raises ``ProgramMissing``, ``NotSupported`` and ``StorageError``.
    """

    def __init__(
        self,
        paths: HostPaths,
        store: Path,
        work_dir: Path,
        check: Callable[[], None],
        source: Path | None = None,
    ) -> None:
        find_program("podman")
        self.work_dir = work_dir
        #: Where podman finds ``work_dir``, too.
        self.shared_place = SHARED_PLACE
        self.check = check
        self._paths = paths
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            runs = _run_directory(paths.store_runs)
            stack.callback(os.close, runs)
            self._auth = _credentials(paths.containers)
            stack.callback(os.close, self._auth)
            self._runs = runs
            self._environment = self._configured()
            try:
                self._mounts = PrivateMounts(lambda: _arrange(paths, store, work_dir, source))
            except OSError as error:
                raise from_os_error(error, "cannot give podman mounts of its own") from error
            stack.callback(self._mounts.close)
            self._closing = stack.pop_all()

    def _configured(self) -> dict[str, str]:
        files = {"CONTAINERS_STORAGE_CONF": _STORAGE_CONF}
        if self._paths.containers.explicit:
            files["CONTAINERS_CONF"] = _CONTAINERS_CONF
        extra = {"REGISTRY_AUTH_FILE": f"/proc/self/fd/{self._auth}"}
        try:
            for name, text in files.items():
                path = self.work_dir / f"{name.lower()}.toml"
                path.write_text(text)
                extra[name] = str(path)
        except OSError as error:
            raise from_os_error(error, "cannot write the configuration of podman") from error
        return cleaned_environment(self.work_dir, extra)

    def close(self) -> None:
        """End it. Twice is harmless."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what is done with the store -----------------------------------------------------------------------

    def initialize(self) -> None:
        """Make what a store has in an empty directory."""
        self.run(["images", "--quiet"])

    def version(self) -> tuple[int, int]:
        """Of podman: the first two numbers."""
        found = _VERSION.search(self.run(["--version"]))
        if found is None:
            raise StorageError("podman does not tell its version")
        return int(found[1]), int(found[2])

    def remove(self, images: Iterable[str]) -> None:
        """Remove images by id or name, with the layers that no other image has. A name goes alone if the
        image has others. What is not there is fine. Parents without a name stay: others may want them.
        """
        wanted = list(images)
        for at in range(0, len(wanted), _AT_ONCE):
            self.run(["image", "rm", "--ignore", "--no-prune", "--", *wanted[at : at + _AT_ONCE]])

    def tag(self, image_id: str, *names: str) -> None:
        """Give an image more names."""
        if names:
            self.run(["tag", image_id, *names])

    def untag(self, image_id: str, *names: str) -> None:
        """Take names away from an image, which stays."""
        if names:
            self.run(["untag", image_id, *names])

    # --- running it ----------------------------------------------------------------------------------------

    def run(
        self,
        arguments: Sequence[str],
        *,
        reference: ImageReference | None = None,
        said: Callable[[str], None] | None = None,
        looked: Callable[[], None] | None = None,
        program: str = "podman",
    ) -> bytes:
        """Run ``podman ARGUMENTS`` on the store to its end; gives what it writes to its standard output.

        ``said`` gets the lines it writes to its standard error, ``looked`` is called now and then.
        ``reference``: the image that is fetched, for errors. Another ``program`` is run in the same way, but
        not told of the store: it knows it as ``LOCATION``.

        Raises the errors of sources of images where ``reference`` is given, else ``StorageError``; and
        ``NoSpace``, ``Unavailable`` for silence, and what ``check`` raises.
        """
        with private_file(self.work_dir) as out, private_file(self.work_dir) as log:
            process = self.start(arguments, stdout=out, stderr=log, program=program)
            try:
                lines = _Lines(log, said)
                self._watch(process, [out, log], lines, looked)
            finally:
                stop(process, _PATIENCE)
            if process.returncode < 0:
                raise StorageError(_ENDED)
            if process.returncode != 0:
                raise self.failure(tail(log) or _ENDED, reference)
            return os.pread(out.fileno(), MAX_OUTPUT, 0)

    def start(
        self, arguments: Sequence[str], *, stdout: IO[bytes], stderr: IO[bytes], program: str = "podman"
    ) -> subprocess.Popen[bytes]:
        """Start ``podman ARGUMENTS`` and give the process, which the caller stops."""
        where: tuple[str, ...] = _WHERE
        environment = self._environment
        if program != "podman":
            where, environment = (), _without(environment, "CONTAINERS_STORAGE_CONF")
        command = ["sh", "-c", _OPEN_RUNROOT, f"/proc/self/fd/{self._runs}", find_program(program)]
        return self._mounts.call(
            lambda: spawn(
                [*command, *where, *arguments],
                environment=environment,
                pass_fds=[self._runs, self._auth],
                stdout=stdout,
                stderr=stderr,
            )
        )

    def failure(self, text: str, reference: ImageReference | None) -> HostimageError:
        """The error for what podman said."""
        text = text.removeprefix("Error: ")
        private = [self.work_dir]
        if reference is not None:
            return mapped(text, reference, private)
        return StorageError(f"podman: {cleaned(text, private)}")

    def _watch(
        self,
        process: subprocess.Popen[bytes],
        written: Sequence[IO[bytes]],
        lines: _Lines,
        looked: Callable[[], None] | None,
    ) -> None:
        life = LifeSigns(process.pid)
        ended = False
        while not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SLICE)
                ended = True
            lines.take()
            if looked is not None:
                looked()
            if any(os.fstat(file.fileno()).st_size > MAX_OUTPUT for file in written):
                raise StorageError(f"podman wrote more than {MAX_OUTPUT} bytes")
            if not ended:
                self.check()
                life.require()


class LifeSigns:
    """Whether a program moves bytes; ``require`` raises ``Unavailable`` if it did not for ``SILENCE``."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._moved = -_SIGN_OF_LIFE
        self._at = time.monotonic()

    def require(self) -> None:
        """Look at it."""
        moved = bytes_moved(self._pid)
        if moved is None or moved - self._moved >= _SIGN_OF_LIFE:
            self._moved, self._at = moved or 0, time.monotonic()
        elif time.monotonic() - self._at >= SILENCE:
            raise Unavailable(f"podman did nothing for {SILENCE:.0f} s")


class _Lines:
    """Gives the whole lines of a growing file to ``said``."""

    def __init__(self, file: IO[bytes], said: Callable[[str], None] | None) -> None:
        self._file = file
        self._said = said
        self._at = 0

    def take(self) -> None:
        """Those that are new."""
        if self._said is None:
            return
        while data := os.pread(self._file.fileno(), _TAIL, self._at):
            whole = data.rfind(b"\n") + 1
            # A line of more than that is none that means anything to us.
            if not whole and len(data) < _TAIL:
                return
            whole = whole or len(data)
            self._at += whole
            for line in data[:whole].decode("utf-8", "replace").splitlines():
                self._said(line)


def tail(log: IO[bytes]) -> str:
    """What podman says at the end of ``log``."""
    size = os.fstat(log.fileno()).st_size
    return fatal_message(os.pread(log.fileno(), _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace"))


def private_file(directory: Path) -> IO[bytes]:
    """A file without a name, on the file system of ``directory``."""
    try:
        return tempfile.TemporaryFile(dir=directory)
    except OSError as error:
        raise from_os_error(error, "making a temporary file") from None


def _run_directory(path: Path) -> int:
    """The run directory, made if it is missing, open."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"cannot make {path} for podman") from error


def _credentials(containers: ContainersConfig) -> int:
    """The auth file in memory; without one nobody is anybody (bootc): no other file is looked for then."""
    path = next((path for path in containers.auth_files if path.exists()), None)
    try:
        data = b"{}" if path is None else path.read_bytes()
        fd = os.memfd_create("auth", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
    except OSError as error:
        raise from_os_error(error, "cannot read the credentials of registries") from error
    return fd


def _arrange(paths: HostPaths, store: Path, work_dir: Path, source: Path | None) -> None:
    """Mounts as podman needs them; see the module. Files are opened before anything hides them."""
    kept: dict[Path, Path] = {}
    if source is not None and _is_volatile(source):
        # With what is beside it, where layouts may have their blobs; at its place, for the signature policy.
        shown = source if source.parent in VOLATILE else source.parent
        if not shown.is_dir():
            raise NotSupported(f"{source} is where nothing is seen by podman: put it into a directory")
        kept[shown] = shown
    kept |= {STORE_ALIAS: store, SHARED_PLACE: work_dir}
    resolver = RESOLVER.resolve()
    if _is_volatile(resolver):
        kept[resolver.parent] = resolver.parent
    below = paths.scratch_root
    if below is not None:
        if _is_volatile(below.resolve()):
            raise NotSupported("a host in a directory of /run cannot have a store")
        home = below / CONTAINERS_HOME.relative_to("/")
        home.mkdir(parents=True, exist_ok=True)
        kept |= {CONTAINERS_CONFIGURATION: paths.containers.policy.parent, CONTAINERS_HOME: home}
    opened = {place: privatemounts.open_directory(path) for place, path in kept.items()}
    for place in VOLATILE:
        privatemounts.cover(place)
    for place, directory in opened.items():
        if not place.is_dir() and not _is_volatile(place):
            # Nothing is made on the machine.
            privatemounts.cover(place.parent)
        place.mkdir(parents=True, exist_ok=True)
        privatemounts.bind(directory, place)


def _is_volatile(path: Path) -> bool:
    return any(path.is_relative_to(place) for place in VOLATILE)


def _without(environment: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}

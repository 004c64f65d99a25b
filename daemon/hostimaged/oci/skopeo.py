"""Images fetched by skopeo: every transport, with the containers configuration of the host.

The image proxy serves manifest, configuration and blobs; ``skopeo copy`` stands in for it where the signature
policy asks for something and the proxy is too old to enforce it. Both see only what ``ContainersConfig``
names and a private directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final, Self

from hostimaged.errors import InvalidArgs, StorageError, Unavailable, UnsupportedImage, from_os_error
from hostimaged.ids import SourceDigest
from hostimaged.oci.models import MAX_CONFIG, MAX_MANIFEST, Descriptor
from hostimaged.oci.proxy import SILENCE, ImageProxy, ProxyError, ProxyGone
from hostimaged.oci.reference import ImageReference, Transport
from hostimaged.oci.skopeo_errors import ENDED, fatal_message, mapped
from hostimaged.oci.source import FetchedManifest, verified
from hostimaged.system.process import cleaned_environment, spawn, stop
from hostimaged.system.workdir import used_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path
    from types import TracebackType

    from hostimaged.progress import Reporter
    from hostimaged.system.paths import ContainersConfig

#: Named point of ``Reporter.at`` while skopeo is waited for: nothing of ours is half done there.
WAITING: Final = "source.waiting"
#: From this protocol version on the proxy enforces policy.json when it opens an image.
ENFORCING: Final = (0, 2, 6)
#: The oldest protocol with every request used here (GetFullConfig).
OLDEST: Final = (0, 2, 3)
#: Opening an archive unpacks it first; containers-storage may have to wait for its lock.
_OPEN_LOCAL: Final = 1800.0
_SLICE: Final = 0.5
_PATIENCE: Final = 5.0
_LOG_TAIL: Final = 8192


def open_image(
    reference: ImageReference,
    containers: ContainersConfig,
    work_dir: Path,
    reporter: Reporter,
    *,
    verify: bool,
    look: bool = False,
    silence: float = SILENCE,
) -> SkopeoSource:
    """Open ``reference`` through skopeo; with ``verify`` a signature policy has to be enforced on it.

    With ``look`` nothing is copied (``source.open_source``).
    ``work_dir``, ``reporter`` and the errors raised are those of ``source.open_source``; ``silence`` is the
    number of seconds without any sign of life after which ``Unavailable`` is raised.
    """
    source = SkopeoSource(reference, containers, work_dir, reporter, silence=silence)
    try:
        enforced = not verify or source.version >= ENFORCING
        stored = reference.transport is Transport.CONTAINERS_STORAGE
        if enforced or look:
            source.open(str(reference))
        if not look and (stored or not enforced):
            # A store has its layers unpacked, under other digests than its manifests say: only copying makes
            # an image of it again.
            digest = source.manifest().source_digest if enforced else None
            copied = copy_to_directory(reference, containers, work_dir, reporter, silence=silence)
            source.open(f"dir:{copied}", known_as=digest)
    except BaseException:
        source.close()
        raise
    return source


class SkopeoSource:
    """An image served by a proxy of its own, as an ``ImageSource``; ``open`` comes before everything else.

    The proxy dies with the thread that made this object (``process.spawn``). ``usable`` turns False when it
    has died, or hangs: then all else that is asked of this object fails, or may wait as long.
    """

    def __init__(
        self,
        reference: ImageReference,
        containers: ContainersConfig,
        work_dir: Path,
        reporter: Reporter,
        *,
        silence: float = SILENCE,
    ) -> None:
        self._reference = reference
        self._work_dir = work_dir
        self._image = 0
        self._converted = True
        self._known_as: SourceDigest | None = None
        self.usable = True
        self._log = _private_log(work_dir)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            argv = ["skopeo", *_global_options(containers), "experimental-image-proxy"]
            argv += ["--sockfd", str(theirs.fileno()), *_image_options(containers, reference)]
            self._process = spawn(
                argv,
                environment=_environment(reference, work_dir),
                pass_fds=[theirs.fileno()],
                stderr=self._log,
            )
        except BaseException:
            ours.close()
            self._log.close()
            raise
        finally:
            theirs.close()
        self._proxy = ImageProxy(ours, lambda: reporter.at(WAITING), silence=silence)
        try:
            self.version = self._initialize()
        except BaseException:
            self.close()
            raise

    def open(self, name: str, *, known_as: SourceDigest | None = None) -> None:
        """Open the image ``name``, in skopeo's notation, in place of the one opened before.

        ``known_as`` is the digest of its manifest at the source, where ``name`` is but a copy.
        """
        self._known_as = known_as
        limit = None if self._reference.transport is Transport.DOCKER else _OPEN_LOCAL
        with self._translated():
            reply = self._proxy.call("OpenImage", name, limit=limit)
            reply.close()
            if not isinstance(reply.value, int):
                raise ProxyGone
            self._image = reply.value

    def manifest(self) -> FetchedManifest:
        """The manifest for this machine, converted to OCI where it is docker's."""
        with self._translated(), self._proxy.open_pipe("GetManifest", self._image, size=None) as pipe:
            source_digest = self._source_digest(pipe.value)
            raw = pipe.read(MAX_MANIFEST, "manifest")
        self._converted = hashlib.sha256(raw).hexdigest() != source_digest.hex
        return FetchedManifest(raw, self._known_as or source_digest)

    def config(self, descriptor: Descriptor) -> bytes:
        """The configuration, verified."""
        if descriptor.size > MAX_CONFIG:
            raise UnsupportedImage(f"image configuration is larger than {MAX_CONFIG} bytes")
        if self._converted:
            # The configuration of a converted image is made by skopeo and is no blob of the source. For all
            # others this request gives a new serialisation, which does not have the digest.
            with self._translated(), self._proxy.open_pipe("GetFullConfig", self._image, size=None) as pipe:
                raw = pipe.read(MAX_CONFIG, "image configuration")
            if "sha256:" + hashlib.sha256(raw).hexdigest() == descriptor.digest:
                return raw
        return b"".join(verified(self.transfer(descriptor), descriptor, "image configuration"))

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob, verified by the end of the iteration."""
        chunks = self.transfer(descriptor)
        try:
            yield verified(chunks, descriptor, "layer")
        finally:
            chunks.close()

    def transfer(self, descriptor: Descriptor) -> Generator[bytes, None, None]:
        """The bytes of a blob as they come, for a caller that verifies them itself."""
        arguments = self._image, descriptor.digest, descriptor.size
        with (
            self._translated(),
            self._proxy.open_pipe("GetBlob", *arguments, size=descriptor.size) as pipe,
        ):
            yield from pipe.chunks()

    def abandon(self) -> None:
        """Kill the proxy: whoever waits for it in another thread gets an error at once."""
        self.usable = False
        self._process.kill()

    def close(self) -> None:
        """End the proxy."""
        if self._proxy.close():
            # It removes its own temporary files now; one that is stuck in a request does not hear of the end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
        stop(self._process, _PATIENCE)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _initialize(self) -> tuple[int, ...]:
        with self._translated():
            reply = self._proxy.call("Initialize")
            reply.close()
        try:
            version = tuple(int(part) for part in str(reply.value).split("."))
        except ValueError:
            version = ()
        if version < OLDEST or version[:2] != OLDEST[:2]:
            raise StorageError("this version of skopeo does not have the image proxy that is needed")
        return version

    def _source_digest(self, value: object) -> SourceDigest:
        try:
            return SourceDigest(str(value))
        except InvalidArgs:
            raise UnsupportedImage(f"{self._reference}: the manifest's digest is not sha256") from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except ProxyError as error:
            raise mapped(error.text, self._reference, [self._work_dir]) from None
        except Unavailable as error:
            # It fell silent. A transfer that hangs keeps the proxy from serving anything else.
            self.usable = False
            raise Unavailable(f"{self._reference}: {error.message}") from None
        except ProxyGone:
            self.usable = False
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
            said = fatal_message(_tail(self._log)) or ENDED
            raise mapped(said, self._reference, [self._work_dir]) from None


def copy_to_directory(
    reference: ImageReference,
    containers: ContainersConfig,
    work_dir: Path,
    reporter: Reporter,
    *,
    silence: float = SILENCE,
) -> Path:
    """Copy the image to a new directory beneath ``work_dir``, in the layout of ``dir:``; gives that
    directory.

    skopeo enforces the signature policy on the way. The copy has manifest and blobs bit for bit. It is
    removed when it fails, and by the caller otherwise.
    """
    target = work_dir / "copy"
    # One that was made before, and could not be used to the end.
    shutil.rmtree(target, ignore_errors=True)
    argv = ["skopeo", *_global_options(containers), "copy", "--quiet"]
    if reference.transport is not Transport.CONTAINERS_STORAGE:
        argv.append("--preserve-digests")
    argv += _image_options(containers, reference, "src-")
    argv += [str(reference), f"dir:{target}"]
    reporter.message("copying the image first, so that skopeo checks its signatures")
    try:
        target.mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(error, "making a directory for the copy of the image") from None
    try:
        with _private_log(work_dir) as log:
            process = spawn(argv, environment=_environment(reference, work_dir), stderr=log)
            try:
                _watch(process, reference, work_dir, reporter, silence)
            finally:
                stop(process, _PATIENCE)
            if process.returncode != 0:
                raise mapped(fatal_message(_tail(log)) or ENDED, reference, [work_dir])
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _watch(
    process: subprocess.Popen[bytes],
    reference: ImageReference,
    work_dir: Path,
    reporter: Reporter,
    silence: float,
) -> None:
    """Wait for the end of ``process``, as long as what it writes beneath ``work_dir`` grows."""
    size, last = -1, time.monotonic()
    while True:
        try:
            process.wait(_SLICE)
        except subprocess.TimeoutExpired:
            reporter.at(WAITING)
            now = used_bytes(work_dir)
            if now != size:
                size, last = now, time.monotonic()
            elif time.monotonic() - last >= silence:
                raise Unavailable(f"{reference}: no data came for {silence:.0f} s") from None
        else:
            return


def _global_options(containers: ContainersConfig) -> list[str]:
    """Options before the subcommand: always the policy that was looked at, never another one."""
    options = ["--policy", str(containers.policy)]
    if containers.explicit:
        # Without the option skopeo would take the running host's file.
        registries = str(containers.registries) if containers.registries.exists() else os.devnull
        options += ["--registries-conf", registries]
    return options


def _image_options(containers: ContainersConfig, reference: ImageReference, prefix: str = "") -> list[str]:
    """Options of a subcommand that say how to get at the image; ``prefix`` as in ``--src-cert-dir``."""
    options: list[str] = []
    auth_file = next((path for path in containers.auth_files if path.exists()), None)
    if auth_file is not None:
        options += [f"--{prefix}authfile", str(auth_file)]
    elif containers.explicit:
        options.append(f"--{prefix}no-creds")
    named = reference.named
    if containers.explicit and reference.transport is Transport.DOCKER and named is not None:
        # The option names one host's directory; containers-image has none for the directory of all hosts.
        certificates = containers.certs_dir / named.repository.partition("/")[0]
        if certificates.is_dir():
            options += [f"--{prefix}cert-dir", str(certificates)]
    return options


def _environment(reference: ImageReference, work_dir: Path) -> dict[str, str]:
    extra = {}
    if reference.transport is Transport.CONTAINERS_STORAGE and os.geteuid() != 0:
        # A user's own storage is found through these; root's is where storage.conf says.
        extra = {
            name: os.environ[name]
            for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME")
            if name in os.environ
        }
    return cleaned_environment(work_dir, extra)


def _private_log(work_dir: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=work_dir)
    except OSError as error:
        raise from_os_error(error, "making a temporary file") from None


def _tail(log: IO[bytes]) -> str:
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")

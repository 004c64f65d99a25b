"""Asking a registry again where that may help: bounded, with growing pauses, and told to the user.

Tried again is what raises ``Unavailable``: a registry that cannot be reached, hangs up, falls silent, or
answers that it is busy; and a skopeo that died. Everything else is final: what is not there, not allowed, not
what its digest says, or not understood. A transfer that broke off is begun anew, since the proxy cannot ask
for the rest of a blob, and what was passed on already is skipped; so no work done with it
is lost.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeVar

from hostimaged.errors import Unavailable
from hostimaged.oci.source import verified

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import TracebackType

    from hostimaged.oci.models import Descriptor
    from hostimaged.oci.source import FetchedManifest, Patience
    from hostimaged.progress import Reporter

#: Named point of ``Reporter.at`` while a pause lasts.
PAUSING: Final = "source.pausing"
#: How often a waiting thread looks whether it is still wanted.
_SLICE: Final = 0.2
#: A transfer that brought so many new bytes makes headway: its failures are counted anew. Less could be had
#: from a registry that breaks off after every few bytes.
_HEADWAY: Final = 1 << 20

_T = TypeVar("_T")


class Reopenable(Protocol):
    """What a ``RetryingSource`` asks; ``skopeo.SkopeoSource``."""

    usable: bool

    def manifest(self) -> FetchedManifest:
        """See ``ImageSource``."""

    def config(self, descriptor: Descriptor) -> bytes:
        """See ``ImageSource``."""

    def transfer(self, descriptor: Descriptor) -> Generator[bytes, None, None]:
        """The bytes of a blob as they come, not verified."""

    def abandon(self) -> None:
        """Let everybody who waits fail with ``Unavailable``; called while others use it."""

    def close(self) -> None:
        """Give up everything held."""


class RetryingSource:
    """An ``ImageSource`` out of one that may fail, and be opened again; as many threads may use it.

    ``opened`` opens the image; it is called in a thread of this object's own, which lives until ``close``,
    because helper processes die with the thread that starts them. Raises what ``opened`` raises.
    """

    def __init__(self, opened: Callable[[], Reopenable], reporter: Reporter, patience: Patience) -> None:
        self._open = opened
        self._reporter = reporter
        self._budget = _Budget(patience)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="image-source")
        self._lock = threading.Lock()
        self._sources: list[Reopenable] = []
        try:
            self._asked(lambda _source: None)
        except BaseException:
            self.close()
            raise

    def manifest(self) -> FetchedManifest:
        """The image's manifest."""
        return self._asked(lambda source: source.manifest())

    def config(self, descriptor: Descriptor) -> bytes:
        """The configuration, verified."""
        return self._asked(lambda source: source.config(descriptor))

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob, verified by the end of the iteration.

        They may come from several transfers, so it is here that they are verified.
        """
        chunks = self._transfers(descriptor)
        try:
            yield verified(chunks, descriptor, "layer")
        finally:
            chunks.close()

    def close(self) -> None:
        """End whatever was opened."""
        for source in self._sources:
            source.close()
        self._opener.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, work: Callable[[Reopenable], _T]) -> _T:
        tries = _Tries(self._budget, self._reporter)
        while True:
            try:
                answer = work(self._usable())
            except Unavailable as error:
                tries.failed(error)
            else:
                tries.answered()
                return answer

    def _transfers(self, descriptor: Descriptor) -> Generator[bytes, None, None]:
        tries = _Tries(self._budget, self._reporter)
        received = 0
        while True:
            try:
                for chunk in _without(self._usable().transfer(descriptor), received):
                    received += len(chunk)
                    tries.received(len(chunk))
                    yield chunk
            except Unavailable as error:
                if received == descriptor.size:
                    # It broke down after the last byte; whether they are right is known without it.
                    return
                tries.failed(error)
            else:
                return

    def _usable(self) -> Reopenable:
        """The source to ask: opened anew where the last one is no good any more."""
        with self._lock:
            if self._sources and self._sources[-1].usable:
                return self._sources[-1]
            if self._sources:
                self._sources[-1].abandon()
            self._sources.append(self._opener.submit(self._open).result())
            return self._sources[-1]


class _Budget:
    """What is left of the retries of a pull, for all its threads."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._left = patience.retries

    def take(self) -> bool:
        """Whether there is one more."""
        with self._lock:
            self._left -= 1
            return self._left >= 0


class _Tries:
    """Counts the failures of one request, and pauses after each."""

    def __init__(self, budget: _Budget, reporter: Reporter) -> None:
        self._budget = budget
        self._reporter = reporter
        self._failures = 0
        self._fresh = 0
        self._told = False

    def answered(self) -> None:
        """The last try did not fail: what was told of it is over."""
        if self._told:
            self._told = False
            self._reporter.message("the registry answers again")

    def received(self, count: int) -> None:
        """The request brought so many new bytes."""
        self.answered()
        self._fresh += count
        if self._fresh >= _HEADWAY:
            self._fresh = self._failures = 0

    def failed(self, error: Unavailable) -> None:
        """Pause before the next try, or raise ``error`` when there were enough."""
        patience = self._budget.patience
        self._failures += 1
        if self._failures >= patience.tries or not self._budget.take():
            raise error
        pause = patience.pause * patience.growth ** (self._failures - 1)
        # No secret is made of it: any spread will do.
        pause *= random.uniform(0.5, 1.5)  # noqa: S311
        self._reporter.message(
            f"{error.message}; trying again in {pause:.0f} s ({self._failures} of {patience.tries - 1})"
        )
        self._told = True
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            self._reporter.at(PAUSING)
            time.sleep(min(left, _SLICE))


def _without(chunks: Generator[bytes, None, None], count: int) -> Generator[bytes, None, None]:
    """``chunks`` without their first ``count`` bytes, which were had before."""
    try:
        for chunk in chunks:
            if len(chunk) <= count:
                count -= len(chunk)
            elif count:
                yield chunk[count:]
                count = 0
            else:
                yield chunk
    finally:
        chunks.close()

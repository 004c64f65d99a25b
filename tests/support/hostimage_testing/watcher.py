"""Looks at a repository all the time while others change it: whatever has a name must be whole.

A process of its own, started by ``watching``. It takes no lock. Every name in ``streams/`` and ``images/`` is
resolved again and again; what it leads to is read and checked against its digest when it is first seen, and
every object that it needs must be there each time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostimage_testing.processes import python_environment
from hostimaged.composefs.erofs import Image
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.errors import HostimageError
from hostimaged.ids import ObjectId

#: Between two looks; the watched ones need the processors, too.
_PAUSE = 0.01
#: What it says when it has looked at everything.
_ROUND = "looked\n"
#: References that are there only while a configuration is written anew; tags and names stay.
_PASSING = "streams/refs/hostimaged/"


@dataclass
class Report:
    """What was seen: ``rounds`` looks, at ``names`` different targets of names; ``findings`` are bad.

    While it is watched, ``rounds`` are those that are finished so far; all else comes at the end.
    """

    rounds: int = 0
    names: int = 0
    findings: list[str] = field(default_factory=list)
    _looked: threading.Condition = field(default_factory=threading.Condition, repr=False, compare=False)

    def wait(self, rounds: int = 2) -> None:
        """Until so many more rounds are finished: of two, one has begun after the call."""
        with self._looked:
            until = self.rounds + rounds
            assert self._looked.wait_for(lambda: self.rounds >= until, 60), "the watcher does not look"

    def take(self, lines: Iterable[str]) -> None:
        """What the watcher tells: a line for each round, and last its report."""
        for line in lines:
            with self._looked:
                if line == _ROUND:
                    self.rounds += 1
                    self._looked.notify_all()
                else:
                    found = json.loads(line)
                    self.rounds, self.names = found["rounds"], found["names"]
                    self.findings = found["findings"]

    def serialise(self) -> str:
        """For ``take``."""
        return json.dumps({"rounds": self.rounds, "names": self.names, "findings": self.findings})


@contextmanager
def watching(repository: Path) -> Iterator[Report]:
    """Watch ``repository``, which need not be there yet; the report is filled in at the end."""
    report = Report()
    with subprocess.Popen(
        [sys.executable, __file__, str(repository)],
        env=python_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        taking = threading.Thread(target=report.take, args=(process.stdout,))
        taking.start()
        try:
            yield report
        finally:
            process.terminate()
            process.wait(timeout=60)
            taking.join()
    assert process.returncode == 0, "the watcher itself broke down"


class _Watcher:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.report = Report()
        # What each target of a name needs, by the path of the target.
        self._needs: dict[str, frozenset[ObjectId]] = {}
        self._verified: set[ObjectId] = set()

    def look(self) -> None:
        try:
            with Repository.open_unlocked(self._path) as repository:
                for name in self._names():
                    self._check(repository, name)
        except RepositoryMissing:
            pass
        self.report.rounds += 1
        print(_ROUND, end="", flush=True)

    def _names(self) -> list[str]:
        found = []
        for kind in ("streams", "images"):
            for parent, directories, files in os.walk(self._path / kind):
                # Links to directories would be listed there; there are none of our making.
                names = [*files, *directories]
                links = [name for name in names if not name.startswith(".")]
                found += [os.path.join(parent, name) for name in links]
        return [name for name in found if os.path.islink(name)]

    def _check(self, repository: Repository, link: str) -> None:
        # A name may be pointed anew meanwhile, never away: what it was is whole as well.
        target = os.path.realpath(link)
        name = os.path.relpath(link, self._path)
        try:
            if target not in self._needs:
                self._needs[target] = self._read(repository, Path(target), name)
                self.report.names += 1
            missing = [id_ for id_ in self._needs[target] if not repository.has_object(id_)]
        except (HostimageError, OSError, AssertionError, ValueError) as error:
            if name.startswith(_PASSING) and not os.path.lexists(link):
                return
            self._find(f"{name}: {type(error).__name__}: {error}")
            return
        if missing:
            self._find(f"{name}: {len(missing)} objects are missing")

    def _read(self, repository: Repository, target: Path, name: str) -> frozenset[ObjectId]:
        """Check what the name leads to, as far as it goes; gives the objects that it needs."""
        assert target.parent.parent == self._path.resolve() / "objects", f"it leads to {target}"
        own = ObjectId.fromhex(target.parent.name + target.name)
        self._verify(repository, own)
        if name.startswith("images/"):
            needs = Image(repository.read_object(own, MAX_IMAGE), repository.algorithm).objects()
        else:
            # By its id: the name may be another's by now.
            with repository.open_stream("", own) as stream:
                needs = {*stream.object_refs, *stream.stream_refs, *stream.named_refs.values()}
        for id_ in needs:
            self._verify(repository, id_)
        return frozenset({own, *needs})

    def _verify(self, repository: Repository, id_: ObjectId) -> None:
        """Check once that an object is what its digest says."""
        if id_ not in self._verified:
            repository.read_object(id_, MAX_IMAGE)
            self._verified.add(id_)

    def _find(self, finding: str) -> None:
        if finding not in self.report.findings and len(self.report.findings) < 100:
            self.report.findings.append(finding)


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print("ready", flush=True)
    watcher = _Watcher(Path(sys.argv[1]).resolve())
    while not stop.is_set():
        watcher.look()
        time.sleep(_PAUSE)
    watcher.look()
    print(watcher.report.serialise())


if __name__ == "__main__":
    main()

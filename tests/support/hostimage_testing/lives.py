"""States in the ordinary life of a host, put together by ``RecordedHost``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hostimage_testing.hosts import Deployment, Era, Kind, RecordedHost
from hostimage_testing.os_images import Recipe


@dataclass(frozen=True)
class Life:
    """The deployments of a host made by ``installed``, ``upgraded`` or ``staged``."""

    host: RecordedHost
    booted: Deployment
    rollback: Deployment | None = None
    staged: Deployment | None = None


def installed(host: RecordedHost) -> Life:
    """One deployment, booted."""
    first = host.deploy(host.image(Recipe(version="1")))
    host.live(first)
    host.booted(first)
    return Life(host, first)


def upgraded(host: RecordedHost) -> Life:
    """Two deployments: the newer one booted."""
    old = host.deploy(host.image(Recipe(version="1")))
    new = host.deploy(host.image(Recipe(version="2", kernel=b"kernel two ")))
    host.live(new, old)
    host.booted(new)
    return Life(host, new, rollback=old)


def staged(host: RecordedHost, *, locked: bool = False) -> Life:
    """Three deployments: one booted, one before it, one that the next shutdown makes the first."""
    before = upgraded(host)
    next_one = host.deploy(host.image(Recipe(version="3", kernel=b"kernel three ")))
    host.staged(next_one, before.booted)
    host.mark(next_one, locked=locked)
    return replace(before, staged=next_one)


MakeLife = Callable[[RecordedHost], Life]


@dataclass
class Records:
    """Lives made once, below ``place``, and handed out as copies."""

    place: Path
    cfsctl: str
    _made: dict[tuple[object, ...], Life] = field(default_factory=dict)

    def copy(self, make: MakeLife, root: Path, kind: Kind, era: Era = Era.CURRENT, **options: bool) -> Life:
        """The life that ``make`` makes of an empty host, at ``root``."""
        key = (make, kind, era, *sorted(options.items()))
        if key not in self._made:
            place = self.place / str(len(self._made))
            host = RecordedHost(place, self.cfsctl, kind=kind, era=era, **options)
            self._made[key] = make(host)
        life = self._made[key]
        return replace(life, host=life.host.copy(root))


def locked(host: RecordedHost) -> Life:
    """As ``staged``, and locked: downloaded only."""
    return staged(host, locked=True)

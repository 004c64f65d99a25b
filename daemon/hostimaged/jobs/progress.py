"""Progress of a job from the events of its worker: what is shown, and when it is worth announcing."""

from __future__ import annotations

import math
from typing import Final

#: Share of the bytes in ``fraction``; making the EROFS images is the rest. Fixed, so that the bar does not
#: jump: building the images of a Debian root (14,000 entries) takes about a tenth of its pull.
BYTES_WEIGHT: Final = 0.9
IMAGES_WEIGHT: Final = 1.0 - BYTES_WEIGHT
#: Share of bringing what was fetched into containers-storage into the repository, where that comes between;
#: it is taken from that of the bytes. Without copying it takes about a third of what fetching takes.
IMPORT_WEIGHT: Final = 0.25

#: Time constant of the smoothed rate, in seconds.
_SMOOTHING: Final = 3.0
#: Announcements: at most five per second, in steps of 1 %; bytes and rate once per second in a long step.
INTERVAL: Final = 0.2
_STEP: Final = 0.01
_LONGEST_INTERVAL: Final = 1.0


class Progress:
    """Numbers of one running job; ``now`` is a monotonic time in seconds.

    ``fraction`` (0 to 1, -1 unknown) and the bytes never run backwards, whatever a worker reports.
    ``rate`` is bytes per second, ``eta`` microseconds until all bytes are read; 0 while unknown.
    """

    def __init__(self, now: float) -> None:
        self.fraction = -1.0
        self.done = 0
        self.total = 0
        self.cached = 0
        self.rate = 0
        self.eta = 0
        self._known = False
        self._images = 0.0
        self._imports = False
        self._imported = 0.0
        self._sum = 0.0
        self._weight = 0.0
        self._measured_at = now
        self._measured_bytes = 0
        self._announced_at = -math.inf
        self._announced = (0.0, 0)

    def set_totals(self, total: int, cached: int) -> None:
        """The totals are known; the first call counts."""
        if not self._known:
            self._known = True
            self.total = total
            self.cached = min(cached, total)
            self._refresh()

    def set_bytes(self, done: int) -> None:
        """``done`` bytes were read so far."""
        self.done = max(self.done, done)
        self._refresh()

    def set_imported(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes that were fetched are in the repository too."""
        # What was shown before the totals were known does not change.
        self._imports |= not self._known
        self._imported = max(self._imported, min(done / total, 1.0) if total > 0 else 0.0)
        self._refresh()

    def set_generated(self, done: int, total: int) -> None:
        """``done`` of ``total`` images are made."""
        if total > 0:
            self._images = max(self._images, min(done / total, 1.0))
            self._refresh()

    def finish(self) -> None:
        """The job is done."""
        self.fraction = 1.0
        self.rate = self.eta = 0

    def measure(self, now: float) -> None:
        """Update rate and eta from the bytes read since the last call."""
        elapsed = now - self._measured_at
        if elapsed <= 0:
            return
        if self.done == 0:
            self._measured_at = now
            return
        current = (self.done - self._measured_bytes) / elapsed
        decay = math.exp(-elapsed / _SMOOTHING)
        self._sum = self._sum * decay + current * (1.0 - decay)
        self._weight = self._weight * decay + (1.0 - decay)
        self._measured_at, self._measured_bytes = now, self.done
        # Divided by the weight seen so far, the average of the first moments is theirs alone: without it, the
        # few bytes of a configuration that come first would hold the rate near nothing for seconds.
        smoothed = self._sum / self._weight
        missing = max(self.total - self.cached - self.done, 0)
        self.rate = int(smoothed) if missing else 0
        self.eta = int(missing / smoothed * 1e6) if missing and smoothed >= 1 else 0

    def due(self, now: float) -> bool:
        """Whether to announce now; if so, it counts as announced."""
        fraction, done = self._announced
        waited = now - self._announced_at
        step = self.fraction - fraction >= _STEP
        if waited < INTERVAL or not (step or (self.done != done and waited >= _LONGEST_INTERVAL)):
            return False
        self._announced_at = now
        self._announced = (self.fraction, self.done)
        return True

    def _refresh(self) -> None:
        if not self._known:
            return
        share = min((self.cached + self.done) / self.total, 1.0) if self.total else 1.0
        fraction = BYTES_WEIGHT * share + IMAGES_WEIGHT * self._images
        if self._imports:
            fraction -= IMPORT_WEIGHT * (share - self._imported)
        # Whole steps of 1 %, and 1 only when the job is done.
        self.fraction = max(self.fraction, min(math.floor(fraction * 100 + 1e-9) / 100, 0.99))

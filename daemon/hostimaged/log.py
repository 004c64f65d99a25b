"""Logging of daemon and workers: structlog to standard error, with priorities if the journal reads it.

Events are named ``noun.verb`` and carry fields; there are no secrets in fields.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let ``module`` seem not to be installed, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# For its output to terminals, which nobody here sees, structlog imports rich if the machine has it: 5 MB of
# memory and half of the time that logging takes to import.
with _hidden("rich"):
    import structlog

#: Priorities of syslog(3), as the journal reads them from ``<N>`` at the start of a line.
_PRIORITY: Final = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3, "critical": 2}
_NOTICE: Final = 25


def configure(level: str, *, stream: IO[str] | None = None) -> None:
    """Send events of ``level`` and above to ``stream`` (standard error), those of stdlib logging too."""
    stream = stream or sys.stderr
    logging.addLevelName(_NOTICE, "NOTICE")
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(stream)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger ``name``, for events."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def set_level(level: str) -> None:
    """From now on log events of ``level`` and above."""
    number = {"notice": _NOTICE}.get(level) or getattr(logging, level.upper())
    logging.getLogger().setLevel(number)


def to_journal() -> bool:
    """Whether events go to the journal."""
    return _is_journal(sys.stderr, os.environ)


def _renderer(stream: IO[str]) -> Any:
    render = structlog.processors.LogfmtRenderer(bool_as_flag=False)
    prefixed = _is_journal(stream, os.environ)

    def line(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        level = str(event.pop("level", "info"))
        trace = str(event.pop("exception", ""))
        prefix = f"<{_PRIORITY.get(level, 6)}>" if prefixed else f"{level}: "
        what = _flat(event.pop("event", ""))
        fields = str(render(logger, name, {key: _flat(value) for key, value in event.items()}))
        text = f"{what} {fields}".rstrip()
        # Every line of a traceback gets the priority, or the journal would take it for information.
        return "\n".join(prefix + part for part in [text, *trace.splitlines()])

    return line


def _flat(value: Any) -> Any:
    """``value`` without line ends: a field must not begin a line of its own in the journal."""
    return " ".join(value.splitlines()) if isinstance(value, str) else value


def _is_journal(stream: IO[str], environment: Mapping[str, str]) -> bool:
    """Whether ``stream`` is connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

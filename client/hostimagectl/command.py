"""What describes a command of the command line: its arguments, its options, and the method it calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hostimagectl.texts import JOB_JSON, SILENT_JSON


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument as argparse takes it: names and settings."""

    names: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Option:
    """A switch of the command line that becomes an entry of a method's options.

    ``value`` is what a bare switch sends; None: the argument's own text is sent, as type ``s``.
    """

    name: str
    key: str
    help: str
    value: bool | None = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def attribute(self) -> str:
        """Where argparse puts it."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def signature(self) -> str:
        """D-Bus type of the entry."""
        return "s" if self.value is None else "b"

    @property
    def argument(self) -> Argument:
        """As argparse takes it."""
        action = {} if self.value is None else {"action": "store_true"}
        return Argument((self.name,), {"help": self.help} | action | self.settings)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method, before its options: D-Bus type, and where it comes from, or a fixed value.

    ``means`` says how the argument is understood: an image reference (relative paths are made absolute), or a
    deployment (looked up, its object path is sent).
    """

    signature: str
    argument: str = ""
    fixed: bool | None = None
    means: Literal["", "image", "deployment"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command; ``module`` below ``hostimagectl.commands`` carries it out."""

    name: str
    summary: str
    group: str
    module: str
    arguments: tuple[Argument, ...] = ()
    description: str = ""
    epilog: str = SILENT_JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCommand(Command):
    """A command that calls a method which starts a job, and follows it.

    ``member`` is a method of the Manager, or of the deployment that the argument ``on`` names.
    ``quiet`` is the key of the result that ``--quiet`` prints, "" for none.
    """

    member: str
    module: str = "job"
    parameters: tuple[Parameter, ...] = ()
    options: tuple[Option, ...] = ()
    on: str = ""
    quiet: str = ""
    epilog: str = JOB_JSON

"""All commands that start a job and follow it; what they differ in is in ``hostimagectl.catalog``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hostimage_dbus.transport import Variant
from hostimagectl import service
from hostimagectl.catalog import JOB_OPTIONS, find
from hostimagectl.command import JobCommand
from hostimagectl.failure import Failure
from hostimagectl.image import absolute
from hostimagectl.outcome import carry_out

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from hostimagectl.command import Option, Parameter
    from hostimagectl.output import Console
    from hostimagectl.service import Service


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Start the job of the command and follow it; the result on standard output."""
    command = find(arguments.command)
    assert isinstance(command, JobCommand)
    _check(arguments)
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        return await start(daemon, command, arguments, console)


async def start(daemon: Service, command: JobCommand, arguments: argparse.Namespace, console: Console) -> int:
    """As ``run``, over an open connection; gives the exit code."""
    deployment = await daemon.deployment(getattr(arguments, command.on)) if command.on else None
    body = [await _value(daemon, parameter, arguments) for parameter in command.parameters]
    signature = "".join(parameter.signature for parameter in command.parameters)
    options = options_of(command.options, arguments)
    return await carry_out(
        daemon,
        console,
        lambda: daemon.start_job(command.member, signature, body, options, deployment=deployment),
        wait=arguments.wait,
        quiet_key=command.quiet,
    )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.command == "kargs" and not arguments.append and not arguments.delete:
        raise Failure.usage("nothing to do: neither --append nor --delete is given")


async def _value(daemon: Service, parameter: Parameter, arguments: argparse.Namespace) -> Any:
    if parameter.fixed is not None:
        return parameter.fixed
    value = getattr(arguments, parameter.argument)
    if parameter.means == "image":
        return absolute(value)
    return await daemon.deployment(value) if parameter.means == "deployment" else value


def options_of(known: Iterable[Option], arguments: argparse.Namespace) -> dict[str, Variant]:
    """The options of a job that were given, of ``known`` and those of all jobs, and no others."""
    options = {}
    for option in (*known, *JOB_OPTIONS):
        given = getattr(arguments, option.attribute)
        if given not in (None, False):
            options[option.key] = Variant(option.signature, given if option.value is None else option.value)
    return options

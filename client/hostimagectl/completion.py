"""Completion scripts for bash, zsh and fish, made from the parser.

The scripts are plain tables: they call hostimagectl only for what changes, the numbers of jobs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimagectl.catalog import COMMANDS
from hostimagectl.image import PATH_TRANSPORTS
from hostimagectl.output import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: What is offered for an argument without fixed choices, by its name in the usage.
_WORDS: Final = {
    "IMAGE": (*(f"{name}:" for name in PATH_TRANSPORTS), "docker://", "containers-storage:"),
    "DEPLOYMENT": ("booted", "staged", "rollback"),
    "OTHER": ("booted", "staged", "rollback"),
    "STATE": ("on", "off"),
}
_JOB: Final = "ID"
_JOBS_COMMAND: Final = f"{PROGRAM} --quiet jobs 2>/dev/null"


@dataclass(frozen=True, slots=True)
class _Value:
    """What may stand for an argument: fixed words, the number of a job, or a text nobody can guess."""

    name: str
    words: tuple[str, ...]

    @property
    def is_job(self) -> bool:
        return self.name == _JOB


@dataclass(frozen=True, slots=True)
class _Switch:
    names: tuple[str, ...]
    help: str
    value: _Value | None


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    summary: str
    switches: tuple[_Switch, ...]
    values: tuple[_Value, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``shell`` (bash, zsh or fish) that completes the command line of ``parser``."""
    root, commands = _read(parser)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](root, commands)


def _read(parser: argparse.ArgumentParser) -> tuple[_Command, list[_Command]]:
    summaries = {command.name: command.summary for command in COMMANDS}
    commands = [
        _command(name, summaries[name], sub)
        for action in _actions(parser)
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001 (argparse has no other name for it)
        for name, sub in action.choices.items()
    ]
    return _command(PROGRAM, "", parser), commands


def _command(name: str, summary: str, parser: argparse.ArgumentParser) -> _Command:
    switches, values = [], []
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            continue
        value = None if action.nargs == 0 else _value(action)
        if action.option_strings:
            switches.append(_Switch(tuple(action.option_strings), _line(action.help), value))
        elif value is not None:
            values.append(value)
    return _Command(name, summary, tuple(switches), tuple(values))


def _actions(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    return parser._actions  # noqa: SLF001 (argparse has no public way to list them)


def _value(action: argparse.Action) -> _Value:
    name = str(action.metavar or action.dest)
    words = tuple(map(str, action.choices)) if action.choices else _WORDS.get(name, ())
    return _Value(name, words)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


# bash

_BASH: Final = """\
# bash completion for {program}; made by '{program} completion bash'.

_{program}()
{{
    local -a words
    local i last cur command= position=0 offered= line=${{COMP_LINE:0:COMP_POINT}}
    # Our own words: bash breaks them at ':' and '=', which stand in references and options.
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    last=$((${{#words[@]}} - 1))
    cur=${{words[last]}}

    for ((i = 1; i < last; i++)); do
        if _{program}_takes_value "$command" "${{words[i]}}"; then
            ((i++))
        elif [[ ${{words[i]}} == -* ]]; then
            :
        elif [[ -z $command ]]; then
            command=${{words[i]}}
        else
            ((position++))
        fi
    done

    if ((i > last)); then
        offered=$(_{program}_values "$command" "${{words[last - 1]}}")
    elif [[ $cur == --*=* ]]; then
        local prefix=${{cur%%=*}}=
        offered=$(_{program}_values "$command" "${{cur%%=*}}")
        offered=${{offered:+$prefix${{offered//[[:space:]]/ $prefix}}}}
    elif [[ $cur == -* ]]; then
        offered=$(_{program}_switches "$command")
    elif [[ -z $command ]]; then
        offered="{commands}"
    else
        offered=$(_{program}_arguments "$command" "$position")
    fi

    mapfile -t COMPREPLY < <(compgen -W "$offered" -- "$cur")
    [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[:/=] ]] && compopt -o nospace 2>/dev/null
    # Readline replaces only what stands after the last of its own word breaks.
    [[ $cur == *[:=]* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{cur%"${{cur##*[:=]}}"}}"}}")
    return 0
}}

_{program}_takes_value()
{{
    case "$1 $2" in
{takes_value}
    esac
    return 1
}}

_{program}_values()
{{
    case "$1 $2" in
{option_values}
    esac
}}

_{program}_switches()
{{
    case "$1" in
{switches}
    esac
}}

_{program}_arguments()
{{
    case "$1 $2" in
{arguments}
    esac
}}

complete -F _{program} {program}
"""


def _bash(root: _Command, commands: Sequence[_Command]) -> str:
    everything = [("", root), *((command.name, command) for command in commands)]
    with_value = [(name, switch) for name, of in everything for switch in of.switches if switch.value]
    patterns = [f'"{name} {flag}"' for name, switch in with_value for flag in switch.names]
    option_values = [
        _case("|".join(f'"{name} {flag}"' for flag in switch.names), _bash_words(switch.value))
        for name, switch in with_value
        if switch.value is not None and switch.value.words
    ]
    switches = [
        _case(f'"{name}"', f'echo "{" ".join(flag for switch in of.switches for flag in switch.names)}"')
        for name, of in everything
    ]
    arguments = [
        _case(f'"{command.name} {index}"', _bash_words(value))
        for command in commands
        for index, value in enumerate(command.values)
        if value.words or value.is_job
    ]
    return _BASH.format(
        program=PROGRAM,
        commands=" ".join(command.name for command in commands),
        takes_value=_case("|".join(patterns), "return 0"),
        option_values="\n".join(option_values),
        switches="\n".join(switches),
        arguments="\n".join(arguments),
    )


def _bash_words(value: _Value) -> str:
    return _JOBS_COMMAND if value.is_job else f'echo "{" ".join(value.words)}"'


def _case(pattern: str, command: str) -> str:
    return f"        {pattern}) {command} ;;"


# zsh


def _zsh(root: _Command, commands: Sequence[_Command]) -> str:
    lines = [
        f"#compdef {PROGRAM}",
        f"# zsh completion for {PROGRAM}; made by '{PROGRAM} completion zsh'.",
        "",
        f"_{PROGRAM}_commands() {{",
        "    local -a commands=(",
        *(f"        {_quoted(command.name + ':' + command.summary)}" for command in commands),
        "    )",
        "    _describe command commands",
        "}",
        "",
        f"_{PROGRAM}_jobs() {{",
        f'    local -a jobs=(${{(f)"$({_JOBS_COMMAND})"}})',
        "    compadd -a jobs",
        "}",
        "",
        f"_{PROGRAM}() {{",
        "    local curcontext=$curcontext state line",
        "    local -A opt_args",
        "",
        "    _arguments -C \\",
        *(f"        {spec} \\" for switch in root.switches for spec in _zsh_switch(switch)),
        f"        '1:command:_{PROGRAM}_commands' \\",
        "        '*::argument:->argument'",
        "",
        "    [[ $state == argument ]] || return",
        "    case $line[1] in",
    ]
    for command in commands:
        specs = [spec for switch in command.switches for spec in _zsh_switch(switch)]
        specs += [_quoted(f"{n}:{v.name.lower()}:{_zsh_words(v)}") for n, v in enumerate(command.values, 1)]
        lines += [f"        {command.name})", "            _arguments \\"]
        lines += [f"                {spec} \\" for spec in specs[:-1]]
        lines += [f"                {specs[-1]}", "            ;;"]
    lines += ["    esac", "}", "", f'_{PROGRAM} "$@"']
    return "\n".join(lines) + "\n"


def _zsh_switch(switch: _Switch) -> Iterator[str]:
    told = "".join(f"\\{c}" if c in "[]:\\" else c for c in switch.help)
    for name in switch.names:
        value = f":{switch.value.name.lower()}:{_zsh_words(switch.value)}" if switch.value else ""
        joined = "=" if switch.value and name.startswith("--") else ""
        yield _quoted(f"{name}{joined}[{told}]{value}")


def _zsh_words(value: _Value) -> str:
    if value.is_job:
        return f"_{PROGRAM}_jobs"
    words = " ".join(word.replace(":", "\\:") for word in value.words)
    return f"({words})" if words else " "


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# fish


def _fish(root: _Command, commands: Sequence[_Command]) -> str:
    none_yet = f"not __fish_seen_subcommand_from {' '.join(command.name for command in commands)}"
    lines = [
        f"# fish completion for {PROGRAM}; made by '{PROGRAM} completion fish'.",
        "",
        f"complete -c {PROGRAM} -f",
    ]
    lines += [_fish_switch(switch, "") for switch in root.switches]
    for command in commands:
        summary = _fish_quoted(command.summary)
        lines += ["", f"complete -c {PROGRAM} -n '{none_yet}' -a {command.name} -d {summary}"]
        seen = f"__fish_seen_subcommand_from {command.name}"
        # The options of the whole program are offered already.
        own = [switch for switch in command.switches if switch not in root.switches]
        lines += [_fish_switch(switch, seen) for switch in own]
        words = {
            f"({_JOBS_COMMAND})" if value.is_job else " ".join(value.words)
            for value in command.values
            if value.words or value.is_job
        }
        lines += [f"complete -c {PROGRAM} -n '{seen}' -a {_fish_quoted(word)}" for word in sorted(words)]
    return "\n".join(lines) + "\n"


def _fish_switch(switch: _Switch, condition: str) -> str:
    parts = [f"complete -c {PROGRAM}"]
    if condition:
        parts.append(f"-n '{condition}'")
    parts += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in switch.names]
    if switch.value is not None:
        parts.append("-x")
        if switch.value.words:
            parts.append(f"-a {_fish_quoted(' '.join(switch.value.words))}")
    parts.append(f"-d {_fish_quoted(switch.help)}")
    return " ".join(parts)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

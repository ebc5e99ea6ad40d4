"""`savant completion`: a script with which bash, zsh or fish complete commands, options, settings and shipped files.

The script contains the names themselves, so completing needs no Python. Options are taken from the `--help` of each command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import NamedTuple

from savant_ray.settings.files import shipped_files

PROGRAM = "savant"
INSTALLATION = {
    "bash": 'eval "$(savant completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(savant completion zsh)" in ~/.zshrc, after compinit',
    "fish": "savant completion fish > ~/.config/fish/completions/savant.fish",
}
_OPTION = re.compile(r"^  (?:-\w, )?(--[\w.-]+)(?: (\{[^}]*\}))?", re.MULTILINE)
_POSITIONAL_CHOICES = re.compile(r"^  (\{[^}]*\})", re.MULTILINE)


class CommandHelp(NamedTuple):
    """A command's description in one line, and its `--help`."""

    summary: str
    text: str

    def options(self) -> dict[str, list[str]]:
        """Return the options, each with the values that it accepts; no values if these are not listed."""
        return {name: _choices(value) for name, value in _OPTION.findall(self.text)}

    def arguments(self) -> list[str]:
        """Return the values of a positional argument that accepts only listed values; empty if there is none."""
        return [word for choices in _POSITIONAL_CHOICES.findall(self.text) for word in _choices(choices)]


def completion_script(shell: str, commands: Mapping[str, CommandHelp]) -> str:
    """Return the script for a shell, one of `INSTALLATION`."""
    return f"# {INSTALLATION[shell]}\n{_SCRIPTS[shell](commands)}"


def _choices(value: str) -> list[str]:
    return value.strip("{}").split(",") if value.startswith("{") else []


def _bash(commands: Mapping[str, CommandHelp]) -> str:
    values, options, arguments = [], [], []
    for name, command in commands.items():
        known = command.options()
        options.append(f"        {name}) words={_quoted(known)} ;;")
        values += [f"        {name}\\ {option}) words={_quoted(v)} ;;" for option, v in known.items() if v]
        if allowed := command.arguments():
            arguments.append(f"        {name}) words={_quoted(allowed)} ;;")
    return _BASH.format(
        commands=_quoted(commands),
        configs=_quoted(shipped_files()),
        values="\n".join(values),
        options="\n".join(options),
        arguments="\n".join(arguments),
    )


def _zsh(commands: Mapping[str, CommandHelp]) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: Mapping[str, CommandHelp]) -> str:
    lines = []
    for name, command in commands.items():
        lines.append(f"-n __fish_use_subcommand -f -a {name} -d {_fish_quoted(command.summary)}")
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        for option, values in command.options().items():
            accepted = [*shipped_files(), "(__fish_complete_suffix .yaml)"] if option == "--config" else values
            lines.append(
                f"{condition} -l {option.removeprefix('--')}" + (f" -x -a {_fish_quoted(accepted)}" if accepted else "")
            )
        if allowed := command.arguments():
            lines.append(f"{condition} -f -a {_fish_quoted(allowed)}")
    return "".join(f"complete -c {PROGRAM} {line}\n" for line in lines)


def _quoted(words: Mapping[str, object] | list[str]) -> str:
    return shlex.quote(" ".join(words))


def _fish_quoted(words: str | list[str]) -> str:
    text = words if isinstance(words, str) else " ".join(words)
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[Mapping[str, CommandHelp]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}

# Without `words` the shell completes names of files (`-o default`).
_BASH = """\
_savant() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    if [[ $previous == --config ]]; then
        COMPREPLY=($(compgen -W {configs} -- "$word"))
        local IFS=$'\\n'  # names of files may contain spaces
        COMPREPLY+=($(compgen -f -X '!*.y*ml' -- "$word"))
        compopt -o filenames 2>/dev/null || :  # bash quotes them; zsh has no compopt
        return
    fi
    case "$command $previous" in
{values}
        *) if [[ $word == -* ]]; then case $command in
{options}
        esac; else case $command in
{arguments}
        esac; fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _savant savant
"""

"""Shell completion, made from the parser itself so that it knows every command, option and value there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

_BASH = """_vlm_sidecar() {{
    local words="" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else case "${{COMP_WORDS[1]}}" in
{cases}
    esac; fi
    COMPREPLY=( $(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}") )
}}
complete -o default -F _vlm_sidecar vlm-sidecar
"""
_ZSH = """_vlm_sidecar() {{
    if (( CURRENT == 2 )); then
        local -a commands=({commands})
        _describe command commands
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
{cases}
    esac
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _vlm_sidecar vlm-sidecar
"""


@dataclass(frozen=True, slots=True)
class _Word:
    """An option, or a positional argument, whose `name` is empty."""

    name: str
    about: str
    takes_value: bool
    values: tuple[str, ...]
    """Those that it may have; none: anything, such as a file."""


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    about: str
    words: list[_Word]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Give the script for bash, zsh or fish: `source <(vlm-sidecar completion bash)`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](list(_commands(parser)))


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield _Command(choice.dest, choice.help or "", list(_words(action.choices[choice.dest])))


def _words(command: argparse.ArgumentParser) -> Iterator[_Word]:
    for action in command._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        values = action.choices or (value for value in metavar.split("|") if "|" in metavar and value != "N")
        for name in action.option_strings or ("",):
            about = (action.help or "").replace("%%", "%") % {"default": action.default}
            yield _Word(name, about, action.nargs != 0, tuple(map(str, values)))


def _bash(commands: list[_Command]) -> str:
    def case(command: _Command) -> Iterator[str]:
        yield f'        {command.name}) case "$before" in'
        for word in command.words:
            if word.name and word.values:
                yield f'            {word.name}) words="{" ".join(word.values)}" ;;'
        if anything := [word.name for word in command.words if word.name and word.takes_value and not word.values]:
            yield f"            {'|'.join(anything)}) ;;"
        names = [name for word in command.words for name in ([word.name] if word.name else word.values)]
        yield f'            *) words="{" ".join(names)}" ;;'
        yield "        esac ;;"

    cases = "\n".join(line for command in commands for line in case(command))
    return _BASH.format(cases=cases, commands=" ".join(command.name for command in commands))


def _zsh(commands: list[_Command]) -> str:
    def argument(word: _Word) -> str:
        about = "".join(f"\\{char}" if char in "[]:\\" else char for char in word.about)
        value = f":value:({' '.join(word.values)})" if word.values else ":value:_files" if word.takes_value else ""
        return _quoted(f"{word.name}[{about}]{value}" if word.name else f"1:{about}{value.removeprefix(':value')}")

    cases = "\n".join(
        f"        {command.name}) _arguments {' '.join(map(argument, command.words))} ;;" for command in commands
    )
    names = " ".join(_quoted(f"{command.name}:{command.about}") for command in commands)
    return _ZSH.format(cases=cases, commands=names)


def _fish(commands: list[_Command]) -> str:
    def lines() -> Iterator[str]:
        for command in commands:
            yield f"-n __fish_use_subcommand -f -a {command.name} -d {_quoted(command.about)}"
            for word in command.words:
                name = (
                    f"-l {word.name[2:]}" if word.name.startswith("--") else f"-s {word.name[1:]}" if word.name else ""
                )
                values = f"-f -a {_quoted(' '.join(word.values))}" if word.values else ""
                value = f"{'-r' if word.name and word.takes_value else ''} {values}"
                yield f"-n '__fish_seen_subcommand_from {command.name}' {name} {value} -d {_quoted(word.about)}"

    return "".join(f"complete -c vlm-sidecar {line}\n" for line in lines())


def _quoted(text: str) -> str:
    """The text as one word, in single quotes, as all three shells take it."""
    return "'" + text.replace("'", "'\\''") + "'"

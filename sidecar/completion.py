"""Shell completion, made from the parser itself so that it knows every command and option there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_BASH = """_vlm_sidecar() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{commands}" ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    COMPREPLY=( $(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}") )
    [[ ${{#COMPREPLY[@]}} -gt 0 || "${{COMP_WORDS[COMP_CWORD]}}" == -* ]] || compopt -o default
}}
complete -F _vlm_sidecar vlm-sidecar
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Give the script for bash, zsh (which runs bash's) or fish: `source <(vlm-sidecar completion bash)`."""
    commands = dict(_commands(parser))
    if shell == "fish":
        return "".join(_fish(commands))
    cases = "\n".join(
        f'        {name}) words="{" ".join(option for option, _ in _words(command))}" ;;'
        for name, (command, _) in commands.items()
    )
    bash = _BASH.format(cases=cases, commands=" ".join(commands))
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, tuple[argparse.ArgumentParser, str]]]:
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield name, (command, helps.get(name, ""))


def _words(command: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in command._actions:
        for option in action.option_strings or action.choices or ():
            yield str(option), action.help or ""


def _fish(commands: dict[str, tuple[argparse.ArgumentParser, str]]) -> Iterator[str]:
    for name, (command, text) in commands.items():
        yield f"complete -c vlm-sidecar -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}\n"
        for word, about in _words(command):
            what = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}" if word[0] == "-" else f"-a {word}"
            yield f"complete -c vlm-sidecar -n '__fish_seen_subcommand_from {name}' {what} -d {_quoted(about)}\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("%%", "%").replace("\\", "\\\\").replace("'", "\\'") + "'"

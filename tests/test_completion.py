"""Completion as the real shells do it: what a half-written command line becomes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_parts import PARTS, real_part
from running import BOUND

from sidecar.cli import _parser

ROOT = Path(__file__).parents[1]
#: Half of a last word → the whole of it.
COMPLETED = {
    "ch": "check",
    "top --admin-h": "--admin-host",
    "serve --log-l": "--log-level",
    "serve --log-format h": "human",
    "simulate --outage-s": "--outage-status",
    "completion f": "fish",
    f"serve --config {ROOT}/README.m": f"{ROOT}/README.md",
}
#: So that the shell finds the command, and programs that are only unpacked find their libraries.
ENVIRON = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "LD_LIBRARY_PATH": ":".join(map(str, PARTS.parent.glob("lib/*-linux-gnu"))),
    "TERM": "dumb",
}


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False, env=ENVIRON)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_knows_every_command_and_every_long_option(shell):
    script = run(sys.executable, "-m", "sidecar", "completion", shell)
    commands = next(
        action for action in _parser(["simulate"])._actions if action.dest == "==SUPPRESS==" or action.choices
    )
    for name, command in commands.choices.items():
        assert name in script
        for option in command._option_string_actions:
            if option.startswith("--"):
                assert option.removeprefix("--") in script


@pytest.mark.parametrize("written", [line for line in COMPLETED if "/" not in line])  # files: bash's own, after ours
def test_bash_completes(written):
    words = ["vlm-sidecar", *written.split(" ")]
    ask = (
        f"source <(vlm-sidecar completion bash); COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        'complete -p vlm-sidecar >/dev/null; _vlm_sidecar; echo "${COMPREPLY[@]}"'
    )
    assert run("bash", "-c", ask).split() == [COMPLETED[written]]


@pytest.mark.parametrize("written", COMPLETED)
def test_fish_completes(written):
    functions = PARTS.parent / "share" / "fish" / "functions"
    ask = f"vlm-sidecar completion fish | source; complete -C {shlex.quote('vlm-sidecar ' + written)}"
    if functions.exists():
        ask = f"set fish_function_path {functions}; {ask}"
    assert run(real_part("fish"), "--no-config", "-c", ask).partition("\t")[0].strip() == COMPLETED[written]


def test_zsh_completes(tmp_path):
    """In a terminal, as there is no other way to ask it: each line is written up to the tab."""
    setup = ""
    if (own := PARTS.parent / "share" / "zsh" / "functions").exists():
        modules = next(PARTS.parent.glob("lib/*/zsh/*"))
        setup = f"module_path=({modules}) fpath=({own}/**/*(/)); "
    zsh = real_part("zsh")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(zsh, [zsh, "-f", "-i"], ENVIRON | {"HOME": str(tmp_path), "PS1": "$ "})  # noqa: S606
    try:
        expect(terminal, r"\$ $")
        os.write(terminal, f"{setup}source <(vlm-sidecar completion zsh); print completion-is-there\n".encode())
        expect(terminal, r"\ncompletion-is-there\r\n")
        for written, completed in COMPLETED.items():
            os.write(terminal, f"vlm-sidecar {written}\t".encode())
            expect(terminal, re.escape(f"vlm-sidecar {written.rpartition(' ')[0]}".rstrip() + f" {completed}"))
            os.write(terminal, b"\x15")  # and away with the line
    finally:
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        os.waitpid(child, 0)


def expect(terminal, pattern):
    """Read until the screen shows it, without what only moves the cursor or changes colours."""
    shown, until = "", time.monotonic() + BOUND
    while not re.search(pattern, shown):
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|.\x08", "", os.read(terminal, 65536).decode(errors="replace"))

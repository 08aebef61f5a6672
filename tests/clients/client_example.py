"""Run the examples of one client and print one line of JSON for each.

This file imports only the standard library, because clients have environments of their own.

A file of examples marks each function with `@example("what it shows")` and ends with `run()`. The environment names the
sidecar (`BASE`, up to and including `/v1`), the provider behind it (`PROVIDER`) and a picture (`IMAGE`, a data URL).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import traceback
import urllib.request
from collections.abc import Callable

BASE = os.environ["BASE"]
PROVIDER = os.environ["PROVIDER"]
IMAGE = os.environ["IMAGE"]
#: Whether the simulated provider answers: it knows chat completions and DashScope's own API, and nothing else.
SIMULATED = os.environ["PROVIDER_IS"] == "simulated"

_EXAMPLES: list[tuple[str, Callable[[], object]]] = []


def example(title, simulated=False):
    """Mark an example. `simulated`: it runs in front of the simulated provider too."""

    def mark(function):
        if simulated or not SIMULATED:
            _EXAMPLES.append((title, function))
        return function

    return mark


def calls(model):
    """Return how many requests for this model reached the provider."""
    with urllib.request.urlopen(f"{PROVIDER}/calls/{model}") as answer:
        return int(answer.read())


def raised(kind, function, *given, **named):
    """Return the error of this kind, or of one of these kinds, that the call raises."""
    try:
        function(*given, **named)
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


def run():
    for title, function in _EXAMPLES:
        failure = ""
        try:
            asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
        except Exception as error:  # whatever a client raises is the result of its example
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if "of_" in frame.filename]
            line = lines[-1] if lines else 0
            failure = f"line {line}: {type(error).__name__}: {error}"[:400]
        print(json.dumps({"example": title, "failure": failure}), flush=True)

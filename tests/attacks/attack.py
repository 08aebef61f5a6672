"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """The ports of the process that is attacked."""

    port: int
    admin_port: int


@dataclass(frozen=True, slots=True)
class Attack:
    """`run(target, seconds)` attacks. `row` is its row in faults.md E. `options` are what `serve` needs for it."""

    row: str
    run: Callable[[Target, float], Coroutine[Any, Any, None]]
    options: tuple[str, ...] = ()

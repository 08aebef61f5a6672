"""Counts the pairs of rooms below `sidecar/` with an import between them, and fails if there are too many or a cycle.

    python .ci/rooms.py [FOLDER]      # default: sidecar

A room is a file or a folder directly below FOLDER. An import under `TYPE_CHECKING` counts like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_PAIRS = 30


def imports(file: Path, package: str) -> Iterator[str]:
    """Give the full name of everything that a file imports, relative imports resolved."""
    module = [*file.with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*module[: -node.level], *(node.module or "").split(".")] if node.level else [node.module or ""]
            name = ".".join(part for part in base if part)
            yield from (f"{name}.{alias.name}" if name == package else name for alias in node.names)


def pairs(folder: Path) -> set[tuple[str, str]]:
    """Give each pair (importing room, imported room) once."""
    rooms = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__"}
    found = set()
    for file in folder.rglob("*.py"):
        room = file.relative_to(folder).parts[0].removesuffix(".py")
        for name in imports(file, folder.name):
            parts = name.split(".")
            if parts[0] == folder.name and len(parts) > 1 and parts[1] in rooms and parts[1] != room:
                found.add((room, parts[1]))
    return {pair for pair in found if pair[0] != "__init__"}


def cycle(edges: set[tuple[str, str]]) -> list[str]:
    """Give the rooms that are left when every room that imports no other one is taken away, again and again."""
    left = set(edges)
    while True:
        importing = {one for one, _ in left}
        fewer = {(one, other) for one, other in left if other in importing}
        if fewer == left:
            return sorted(importing)
        left = fewer


def main() -> int:
    """Print each room with what it imports; the exit status is 1 if a bound is broken."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "sidecar")
    edges = pairs(folder)
    for room in sorted({room for pair in edges for room in pair}):
        print(f"{room:12} imports {', '.join(sorted(other for one, other in edges if one == room)) or 'no other room'}")
    circular = cycle(edges)
    print(f"{len(edges)} pairs of rooms (at most {MAX_PAIRS}); rooms in a cycle: {', '.join(circular) or 'none'}")
    return int(len(edges) > MAX_PAIRS or bool(circular))


if __name__ == "__main__":
    sys.exit(main())

"""What tests need of the machine: programs, packages, environments. Every test that needs one calls this file.

Where a part is missing, the test fails in CI (the variable `CI` is set) and is skipped elsewhere. Both print the same
line: what is missing, and how to get it. A fact about the platform, such as "this is not Linux", is no missing part:
nobody can install it, so it skips everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
#: Where `.ci/parts` unpacks what the machine does not have.
PARTS = ROOT / ".parts" / "usr" / "bin"


def missing(part: str, how_to_get_it: str) -> NoReturn:
    """Fail in CI, skip elsewhere; also while a module is imported."""
    line = f"missing: {part}; {how_to_get_it}"
    if os.environ.get("CI"):
        pytest.fail(line, pytrace=False)
    pytest.skip(line, allow_module_level=True)


def real_part(program: str, how_to_get_it: str = "`.ci/parts` brings it on a Debian machine") -> str:
    """Give the program's path."""
    found = shutil.which(program, path=os.pathsep.join([str(PARTS), str(PARTS.with_name("sbin")), os.environ["PATH"]]))
    if found is None:
        missing(f"the program {program}", how_to_get_it)
    return found


def real_library(pattern: str, how_to_get_it: str = "`.ci/parts` brings it on a Debian machine") -> Path:
    """Give the path of a shared library, by its pattern below `/usr/lib`."""
    for folder in (PARTS.parent / "lib", Path("/usr/lib")):
        for found in folder.glob(pattern):
            return found
    missing(f"the library {pattern}", how_to_get_it)


def real_packages(*names: str, how_to_get_them: str) -> None:
    """Require these packages in the environment of the tests."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        missing(f"{'package' if len(absent) == 1 else 'packages'} {', '.join(absent)}", how_to_get_them)


def real_environment(name: str) -> Path:
    """Give the Python of an environment that `make NAME/.ready` creates: packages that must not be in the lock file."""
    python = ROOT / name / "bin" / "python"
    if not python.exists():
        missing(f"the environment {name}", f"`make {name}/.ready` creates it")
    return python


def platform_lacks(fact: str) -> NoReturn:
    """Skip, also in CI: the platform does not have this, and nothing that can be installed changes it."""
    pytest.skip(f"platform: {fact}")


def only_on_linux(why: str) -> pytest.MarkDecorator:
    """Mark a test that means nothing on another system."""
    return pytest.mark.skipif(sys.platform != "linux", reason=f"platform: not Linux; {why}")

"""Programs that tests run for real. `.ci/parts` brings them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Where `.ci/parts` unpacks what the machine does not have.
PARTS = ROOT / ".parts" / "usr" / "bin"


def real_part(program: str, how_to_get_it: str = "run `.ci/parts` on a Debian machine (x86-64)") -> str:
    """Give the program's path. Without it the test fails in CI, and is skipped with a line that says so elsewhere."""
    found = shutil.which(program, path=os.pathsep.join([str(PARTS), str(ROOT / ".parts" / "bin"), os.environ["PATH"]]))
    if found is None:
        missing = f"{program} is not on this machine: {how_to_get_it}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found

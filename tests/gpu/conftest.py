"""Make the helpers of tests/backends/local importable for the checks in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "backends" / "local"))

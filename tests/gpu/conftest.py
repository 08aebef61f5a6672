"""The checks of this folder speak to the backend as its other tests do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "backends" / "local"))

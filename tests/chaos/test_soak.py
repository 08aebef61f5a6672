"""`make soak` in small: twenty seconds under everything at once."""

from __future__ import annotations

import os
import subprocess
import sys

from real_parts import ROOT


def test_twenty_seconds_under_everything_at_once_leave_nothing_and_harm_no_camera():
    ended = subprocess.run(
        [sys.executable, "bench/soak.py", "--seconds", "20"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "tests"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr

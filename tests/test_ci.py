"""The table of `.ci/run` says how long each part took, what failed, and what was not audited, also after a failure."""

from __future__ import annotations

import subprocess

from real_parts import ROOT

PARTS = """
cd "$1"
. .ci/timed.sh
trap table EXIT
part quick 60 true
part slow 1 sleep 2
part broken 60 false
part audit 0 sh -c 'exit 3'
row later "" 120 "not written yet"
needed base 0 false
part after 0 true
"""


def test_the_table_is_printed_after_a_failure_and_the_parts_before_a_needed_one_all_run():
    done = subprocess.run(["bash", "-c", PARTS, "bash", ROOT], capture_output=True, text=True, timeout=60, check=False)
    table = {line.split("  ")[1].strip(): line.split() for line in done.stdout.partition("budget\n")[2].splitlines()}
    assert done.returncode == 1
    assert table["quick"][-1] == "passed"
    assert table["slow"][2:] == ["0:01", "passed,", "OVER", "ITS", "BUDGET"]
    assert table["broken"][-1] == "FAILED"
    assert table["audit"][2:4] == ["NOT", "AUDITED:"]
    assert table["later"][1:] == ["2:00", "not", "written", "yet"]
    assert table["base"][-1] == "FAILED"
    assert "after" not in table
    assert "all of it" in table


def test_the_audit_ends_with_a_status_of_its_own_where_the_list_is_not_reached(tmp_path):
    """A uv that cannot connect stands for the missing network; another error must not look the same."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".uv" / "bin").mkdir(parents=True)
    (tmp_path / ".ci" / "audit").write_text((ROOT / ".ci" / "audit").read_text())
    uv = tmp_path / ".uv" / "bin" / "uv"
    ends = []
    for line in ("echo 'error sending request for url' >&2; exit 2", "echo 'found 1 vulnerability'; exit 1", "exit 0"):
        uv.write_text(f"#!/bin/sh\n{line}\n")
        uv.chmod(0o755)
        command = ["bash", str(tmp_path / ".ci" / "audit")]
        ends.append(subprocess.run(command, capture_output=True, timeout=60, check=False).returncode)
    assert ends == [3, 1, 0]

"""The memory limit that k8s/ ships and the documents name follows from one function."""

from __future__ import annotations

import re

import pytest
from pod_values import shipped
from real_parts import ROOT

from backends.picture_memory import MAX_PICTURE_BYTES
from sidecar.settings import Settings, load
from sidecar.settings.memory import BASE_BYTES, MIB, memory_limit

FORMULA = f"({BASE_BYTES // MIB} MiB + 2 × `SIDECAR_QUEUE_BYTES` + {MAX_PICTURE_BYTES // MIB} MiB) × 16/9"  # noqa: RUF001
KUBERNETES = (ROOT / "docs" / "kubernetes.md").read_text()


def test_k8s_ships_a_limit_that_follows_from_the_queue_bytes_it_ships():
    environ, limit = shipped()
    assert limit == memory_limit(load({}, environ)[0].queue_bytes)


@pytest.mark.parametrize("document", ["README.md", "docs/kubernetes.md", "docs/runbook.md", "docs/security.md"])
def test_the_documents_name_the_same_limit(document):
    assert FORMULA in " ".join((ROOT / document).read_text().split())


def test_the_examples_of_sizes_are_correct_and_contain_what_is_shipped_and_the_default():
    rows = [
        (int(queue), int(limit)) for queue, limit in re.findall(r"^\| (\d+) MiB[^|]*\| (\d+) MiB \|", KUBERNETES, re.M)
    ]
    assert [limit for _, limit in rows] == [memory_limit(queue * MIB) // MIB for queue, _ in rows]
    assert {load({}, shipped()[0])[0].queue_bytes // MIB, Settings().queue_bytes // MIB} <= {queue for queue, _ in rows}

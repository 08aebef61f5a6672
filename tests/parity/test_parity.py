"""The sidecar beside trio-core 1.1.5 as it was recorded: the same, or different as listed and for the reason given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import DETECTOR_ROWS, DIFFERENCES, every
from comparing import Provider, outcomes
from tiny_onnx import yolov10

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture
async def provider():
    async with Provider() as upstream:
        yield upstream


async def test_every_request_is_answered_as_trio_core_does_or_as_listed(serving, provider, tmp_path):
    cases = every()
    assert len(cases) >= 200
    detector = yolov10(tmp_path / "detector.onnx", DETECTOR_ROWS)
    sidecar = await serving(dashscope_url=f"{provider.origin}/v1", detector_model=str(detector))
    ours = await outcomes(sidecar.url, provider, cases)
    wrong = {}
    for case in cases:
        theirs = dict(EXPECTED[case.name])
        assert theirs.pop("digest") == case.digest, f"{case.name} is another request now: make parity records it anew"
        if case.differs and ours[case.name] == theirs:
            wrong[case.name] = f"listed as different ({case.differs}), but is the same"
        elif case.differs and ours[case.name]["status"] != case.status:
            wrong[case.name] = f"status {ours[case.name]['status']}, not {case.status} ({case.differs})"
        elif not case.differs and ours[case.name] != theirs:
            wrong[case.name] = f"trio-core: {theirs}\n sidecar: {ours[case.name]}"
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def test_every_difference_is_in_use_and_in_the_document():
    document = " ".join((HERE.parents[1] / "docs" / "trio-core.md").read_text().split())
    used = {case.differs for case in every()} - {""}
    assert used == DIFFERENCES.keys()
    assert [reason for reason in DIFFERENCES.values() if reason not in document] == []

"""The sidecar's answers are the same as the recorded answers of trio-core 1.1.5, or different as listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import DETECTOR_ROWS, DIFFERENCES, all_cases
from comparing import Provider, outcomes
from tiny_onnx import yolov10

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture
async def provider():
    async with Provider() as upstream:
        yield upstream


async def test_every_answer_is_that_of_trio_core_or_a_listed_difference(serving, provider, tmp_path):
    cases = all_cases()
    assert len(cases) >= 200
    detector = yolov10(tmp_path / "detector.onnx", DETECTOR_ROWS)
    sidecar = await serving(dashscope_url=f"{provider.origin}/v1", detector_model=str(detector))
    actual = await outcomes(sidecar.url, provider, cases)
    wrong = {}
    for case in cases:
        expected = dict(EXPECTED[case.name])
        assert expected.pop("digest") == case.digest, f"{case.name} is another request now: make parity records it anew"
        if case.differs and actual[case.name] == expected:
            wrong[case.name] = f"listed as different ({case.differs}), but is the same"
        elif case.differs and actual[case.name]["status"] != case.status:
            wrong[case.name] = f"status {actual[case.name]['status']}, not {case.status} ({case.differs})"
        elif not case.differs and actual[case.name] != expected:
            wrong[case.name] = f"trio-core: {expected}\n sidecar: {actual[case.name]}"
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())


def test_every_difference_is_used_and_is_in_the_document():
    document = " ".join((HERE.parents[1] / "docs" / "trio-core.md").read_text().split())
    used = {case.differs for case in all_cases()} - {""}
    assert used == DIFFERENCES.keys()
    assert [reason for reason in DIFFERENCES.values() if reason not in document] == []

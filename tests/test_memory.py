"""Learned limits survive a restart; a file that is damaged never keeps a sidecar from starting."""

import time

import orjson
import pytest

from sidecar.admission import Admission
from sidecar.memory import Memory

LEARNED = {"qwen-vl-plus": {"requests": {"limit": 10.0, "burst": 5.0}, "concurrency": {"limit": 8}}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "limits.json"


def write(path, age=0.0, version=1, accounts=None):
    saved = {"version": version, "saved_at": time.time() - age, "accounts": accounts or {"account": LEARNED}}
    path.write_bytes(orjson.dumps(saved))


async def recalled(path):
    admission = Admission()
    Memory(path, {"account": admission}).load()
    return {model: lane.limits.requests.limit for model, lane in admission.lanes.items()}


async def test_what_was_learned_is_recalled_in_part(path):
    admission = Admission()
    admission.recall(LEARNED, 1.0)
    Memory(path, {"account": admission}).save()
    assert await recalled(path) == {"qwen-vl-plus": pytest.approx(8.0)}


async def test_an_older_limit_is_believed_less_and_a_very_old_one_not_at_all(path):
    write(path, age=7200.0)
    assert await recalled(path) == {"qwen-vl-plus": pytest.approx(5.0)}
    write(path, age=100_000.0)
    assert await recalled(path) == {}


async def test_another_account_recalls_nothing(path):
    write(path, accounts={"other": LEARNED})
    assert await recalled(path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"text"', b'{"version": 1}', b'{"version": 1, "saved_at": null, "accounts": {}}',
        b'{"version": 1, "saved_at": 9e99, "accounts": {}}', b"\xff\xfe",
    ],
)  # fmt: skip
async def test_a_damaged_file_is_passed_over(path, content):
    path.write_bytes(content)
    assert await recalled(path) == {}


@pytest.mark.parametrize("limit", [-1, 0, "many", None, 1e300])
async def test_a_limit_that_is_none_is_passed_over_and_told(path, limit, caplog):
    write(path, accounts={"account": {"m": {"requests": {"limit": limit, "burst": 1.0}}}})
    assert await recalled(path) == {}
    assert "is damaged" in caplog.text


async def test_another_version_is_passed_over(path, caplog):
    write(path, version=2)
    assert await recalled(path) == {}
    assert "version" in caplog.text


async def test_nothing_learned_leaves_the_file_alone(path):
    Memory(path, {"account": Admission()}).save()
    assert not path.exists()


async def test_a_folder_that_cannot_be_written_is_told_not_raised(tmp_path, caplog):
    admission = Admission()
    admission.recall(LEARNED, 1.0)
    Memory(tmp_path / "missing" / "limits.json", {"account": admission}).save()
    assert "cannot be written" in caplog.text

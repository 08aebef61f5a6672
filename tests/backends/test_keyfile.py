"""`KeyFile`: a key in a file that is mounted and rotated like a Kubernetes Secret."""

from __future__ import annotations

import pytest

from backends.keyfile import KeyFile


@pytest.fixture
def clock(monkeypatch):
    """The time that `KeyFile` reads: a list with one value in seconds."""
    now = [1000.0]
    monkeypatch.setattr("backends.keyfile.time.monotonic", lambda: now[0])
    return now


def test_a_rotated_secret_is_used_within_a_second(tmp_path, clock):
    for name, value in (("old", "sk-1\n"), ("new", "sk-2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(value)
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "key").symlink_to("..data/key")
    key = KeyFile(tmp_path / "key")
    assert key() == "sk-1"
    (tmp_path / "..data_tmp").symlink_to("new")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    clock[0] += 1.0
    assert key() == "sk-2"


def test_the_key_file_is_checked_at_most_once_per_second(tmp_path, clock):
    path = tmp_path / "key"
    path.write_text("sk-1")
    key = KeyFile(path)
    path.write_text("sk-2-longer")
    clock[0] += 0.9
    assert key() == "sk-1"
    clock[0] += 0.2
    assert key() == "sk-2-longer"


def test_while_the_key_file_is_empty_or_missing_the_last_key_stays_in_use(tmp_path, clock, caplog):
    path = tmp_path / "key"
    path.write_text("sk-1")
    key = KeyFile(path)
    path.write_text("")
    clock[0] += 1
    assert key() == "sk-1"
    path.unlink()
    clock[0] += 1
    assert key() == "sk-1"
    assert str(path) in caplog.text
    assert "sk-1" not in caplog.text
    path.write_text("sk-3")
    clock[0] += 1
    assert key() == "sk-3"


def test_a_key_file_without_a_key_is_refused_at_the_start(tmp_path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="key holds no API key"):
        KeyFile(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"\x80sk-secret\nsk-other")
    with pytest.raises(ValueError, match="key holds no API key") as caught:
        KeyFile(tmp_path / "key")
    assert "sk-" not in str(caught.value)
    with pytest.raises(OSError, match="missing"):
        KeyFile(tmp_path / "missing")

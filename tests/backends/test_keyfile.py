"""`KeyFile`: a key in a file that is mounted and rotated like a Kubernetes Secret."""

from __future__ import annotations

import os

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


def test_only_a_regular_file_of_at_most_64_kb_is_a_key_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("k" * (64 * 1024 + 1))
    (tmp_path / "longest").write_text("k" * 64 * 1024)
    for name, words in (("pipe", "pipe is not a regular file"), ("long", "long is longer than 65536 bytes")):
        with pytest.raises(ValueError, match=words):
            KeyFile(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        KeyFile(tmp_path)
    assert len(KeyFile(tmp_path / "longest")()) == 64 * 1024


def test_a_key_file_that_becomes_a_pipe_or_too_long_keeps_the_old_key_and_is_logged_once(tmp_path, clock, caplog):
    path = tmp_path / "key"
    path.write_text("sk-first")
    key = KeyFile(path)
    path.unlink()
    os.mkfifo(path)
    for _ in range(5):
        clock[0] += 1
        assert key() == "sk-first"
    assert caplog.text.count("the last key stays in use") == 1
    path.unlink()
    path.write_text("k" * 3_000_000)
    clock[0] += 1
    assert key() == "sk-first"
    assert caplog.text.count("the last key stays in use") == 2
    path.write_text("sk-second")
    clock[0] += 1
    assert key() == "sk-second"

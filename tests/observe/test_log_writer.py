"""`LogWriter`: a bounded queue before stderr, and a thread that writes."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from sidecar.observe import log_writer
from sidecar.observe.log_writer import LineHandler, LogWriter


@pytest.fixture
def pipe():
    """A pipe: the descriptor to read from, and the one to write to."""
    read, write = os.pipe()
    yield read, write
    os.close(write)
    os.close(read)


def fill(descriptor):
    """Fill a pipe."""
    os.set_blocking(descriptor, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(descriptor, b".")
    os.set_blocking(descriptor, True)


def test_lines_for_which_there_is_no_room_are_counted_and_the_log_says_so_later(pipe, monkeypatch, caplog):
    monkeypatch.setattr(log_writer, "MAX_LINES", 10)
    read, write = pipe
    fill(write)
    writer = LogWriter(write)
    began = time.monotonic()
    for number in range(30):
        writer.put(f"line {number}")
    assert time.monotonic() - began < 1.0
    assert writer.dropped in (19, 20)  # ten wait, and one may be with the thread
    lost = writer.dropped
    os.read(read, 65536)
    while "are lost" not in caplog.text and time.monotonic() - began < 10.0:
        time.sleep(0.01)  # a writer that is closed earlier has no line left to say it with
    writer.close()
    text = os.read(read, 65536).decode().lstrip(".")
    assert text.splitlines() == [f"line {number}" for number in range(30 - lost)]
    assert caplog.text.count(f"are lost: {lost}") == 1


def test_a_writer_that_is_closed_while_lines_wait_says_how_many_were_lost(pipe, monkeypatch, caplog):
    monkeypatch.setattr(log_writer, "MAX_LINES", 10)
    _, write = pipe
    fill(write)
    writer = LogWriter(write)
    for number in range(30):
        writer.put(f"line {number}")
    lost = writer.dropped
    writer.close()
    assert caplog.text.count(f"are lost: {lost}") == 1
    writer.close()
    assert caplog.text.count("are lost") == 1


def test_a_writer_whose_reader_has_stopped_ends_within_two_seconds(pipe):
    _, write = pipe
    fill(write)
    writer = LogWriter(write)
    writer.put("line")
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 2.0 * log_writer.FLUSH_SECONDS + 0.5


def test_a_descriptor_that_another_process_made_non_blocking_loses_no_line(pipe):
    read, write = pipe
    fill(write)
    os.set_blocking(write, False)
    writer = LogWriter(write)
    writer.put("line")
    threading.Timer(0.1, os.read, (read, 1_000_000)).start()
    time.sleep(0.3)
    writer.close()
    assert writer.dropped == 0
    assert os.read(read, 100) == b"line\n"


def test_a_record_that_cannot_be_formatted_is_counted_and_raises_nothing(monkeypatch, capfd):
    writer = LogWriter(None)
    monkeypatch.setattr(log_writer, "STDERR", writer)
    LineHandler().handle(logging.makeLogRecord({"msg": "%d", "args": ("text",)}))
    assert (writer.dropped, capfd.readouterr().err) == (1, "")


def test_text_that_is_not_unicode_is_escaped(pipe):
    read, write = pipe
    writer = LogWriter(write)
    writer.put("a \udcff b")
    writer.close()
    assert os.read(read, 100) == b"a \\udcff b\n"

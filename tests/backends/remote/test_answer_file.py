"""`vlm-sidecar check --answer FILE`: how an answer would be read and why, and a report without anybody's text."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from backends.remote.answer_file import explain, lines_of
from sidecar.cli.main import main

ANSWERS = [
    (b"HTTP/1.1 429 X\r\nRetry-After: 3\r\n\r\n" + b'{"error": {"code": "limit_requests"}}', "request_rate"),
    (b"HTTP/2 200\r\ncontent-type: x\r\n\r\n" + b'{"choices": [{"message": {"content": "A gate."}}]}', "answer"),
    (b"HTTP/2 200\n\n" + b'{"choices": null, "base_resp": {"status_code": 1008}}', "billing"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 X\r\nRetry-After: 9\r\n\r\n", "capacity"),
    (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"error\": {\"code\": \"Arrearage\"}}\n\n", "billing"),
    (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": [{\"delta\": {\"content\": \"A\"}}]}\n\n", "server"),
    (b"HTTP/1.1 200 OK\r\n\r\n<html>", "nothing"),
    (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "server"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "meaning"), ANSWERS)
def test_an_answer_as_curl_prints_it_is_explained(raw, meaning):
    explanation = explain(raw)
    assert explanation.meaning == meaning
    assert explanation.rule
    assert explanation.consequence


def test_the_report_of_an_unknown_refusal_contains_nobodys_text():
    body = {"error": {"message": "the secret street", "code": "E_NEW", "inner": ["secret", 7]}}
    explanation = explain(b"HTTP/1.1 429 X\r\nX-Secret: secret-value\r\n\r\n" + json.dumps(body).encode())
    report = json.dumps(asdict(explanation))
    assert explanation.meaning == "unknown"
    assert explanation.code == "E_NEW"
    assert "street" not in report
    assert "secret-value" not in report
    assert '"message": "a text of 17 characters"' in report
    assert report.replace(" ", "").replace("\n", "") in "".join(lines_of(explanation)).replace(" ", "").replace(
        "\n", ""
    )


def test_the_command_reads_a_file_and_refuses_one_without_a_status_line(tmp_path, capsys):
    file = tmp_path / "answer"
    file.write_bytes(ANSWERS[0][0])
    with pytest.raises(SystemExit) as done:
        main(["check", "--answer", str(file)])
    printed = capsys.readouterr().out
    assert done.value.code == 0
    assert "request_rate" in printed
    assert "3 s" in printed
    file.write_bytes(b"{}")
    with pytest.raises(SystemExit) as done:
        main(["check", "--answer", str(file)])
    assert done.value.code == 2
    assert "status line" in capsys.readouterr().err

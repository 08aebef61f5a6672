"""`vlm-sidecar check` as a process: against a working provider, and against each kind of failure."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys

import pytest
from tiny_onnx import yolov10

from backends.simulated import Profile, serve

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SIDECAR_", "TRIO_", "DASHSCOPE")) and not name.lower().endswith("_proxy")
}
KEY = "sk-never-to-be-seen"


async def check(*options, **environ):
    """Run `check`; return the exit status and the output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "check", *options, env=CLEAN | environ,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(20):
        printed, _ = await process.communicate()
    return process.returncode, printed.decode()


async def failing(**environ):
    """Run a check that must fail, and return the failed step."""
    status, printed = await check("--json", **environ)
    report = json.loads(printed)
    assert (status, report["ok"]) == (1, False)
    assert KEY not in printed
    [failed] = [step for step in report["steps"] if not step["ok"]]
    assert failed == report["steps"][-1]
    assert failed["advice"]
    return failed


async def test_a_working_provider(provider):
    url, simulated = await provider()
    status, printed = await check(DASHSCOPE_API_KEY=KEY, SIDECAR_DASHSCOPE_URL=url)
    assert status == 0, printed
    lines = [line.split() for line in printed.splitlines() if line]
    assert ["dashscope_url", url, "SIDECAR_DASHSCOPE_URL"] in lines
    assert ["dashscope_api_key", "***", f"({len(KEY)}", "characters)", "DASHSCOPE_API_KEY"] in lines
    assert ["deadline", "60.0", "default"] in lines
    assert KEY not in printed
    assert [line[2] for line in lines if line[0] == "ok"] == ["name", "connection", "start", "models", "request"]
    assert simulated.counts.accepted == 1


async def test_without_configuration_the_simulated_backend_is_tested():
    status, printed = await check("--json")
    report = json.loads(printed)
    assert (status, report["ok"]) == (0, True)
    assert report["settings"]["backend"] == {"value": "simulated", "from": "default"}
    assert [step["name"] for step in report["steps"]] == ["start", "request"]


async def test_no_password_of_a_url_is_printed(provider):
    url, _ = await provider()
    with_password = url.replace("http://", "http://somebody:half@hunter2@")
    _, printed = await check(SIDECAR_DASHSCOPE_URL=with_password)
    assert "hunter2" not in printed
    assert "half" not in printed
    assert url.replace("http://", "http://***@") in printed


async def test_a_name_that_does_not_resolve():
    failed = await failing(SIDECAR_DASHSCOPE_URL="http://nowhere.invalid/v1")
    assert failed["name"] == "name"
    assert "nowhere.invalid" in failed["detail"]


async def test_a_port_without_a_listener():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening, so no other process can use it
        failed = await failing(SIDECAR_DASHSCOPE_URL=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert failed["name"] == "connection"
    assert "refused" in failed["detail"]


async def test_https_to_a_server_without_tls(provider):
    url, _ = await provider()
    failed = await failing(SIDECAR_DASHSCOPE_URL=url.replace("http://", "https://"))
    assert failed["name"] == "TLS"


async def test_a_wrong_key():
    runner = await serve(Profile(), api_key="another")
    try:
        port = runner.addresses[0][1]
        url = f"http://127.0.0.1:{port}/v1"
        failed = await failing(SIDECAR_DASHSCOPE_URL=url, SIDECAR_DASHSCOPE_API_KEY=KEY)
    finally:
        await runner.cleanup()
    assert failed["name"] == "key"
    assert "SIDECAR_DASHSCOPE_API_KEY" in failed["advice"]


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"billing_refused": True}, "no retry helps"),
        ({"error_share": 1.0}, "the trouble is its own"),
        ({"reset_share": 1.0}, "the server closes connections"),
        ({"moderation_share": 1.0}, "takes pictures"),
    ],
)
async def test_a_failed_request_gives_advice(provider, profile, words):
    url, _ = await provider(**profile)
    failed = await failing(SIDECAR_DASHSCOPE_URL=url, SIDECAR_DASHSCOPE_API_KEY=KEY)
    assert failed["name"] == "request"
    assert words in failed["advice"]


async def test_a_throttled_account_passes_the_check(provider):
    url, _ = await provider(requests_per_second=0.001)
    await check("--json", SIDECAR_DASHSCOPE_URL=url)  # uses the only request of the burst
    status, printed = await check("--json", SIDECAR_DASHSCOPE_URL=url)
    assert status == 0
    assert "would wait for its turn" in printed


async def test_unusable_settings_give_exit_status_2():
    status, printed = await check(SIDECAR_DEADLINE="soon")
    assert status == 2
    assert printed.startswith("vlm-sidecar: SIDECAR_DEADLINE")


async def test_the_model_of_the_detector_is_tested(tmp_path):
    good = yolov10(tmp_path / "good.onnx", [(1, 1, 9, 9, 0.9, 0)])
    status, printed = await check(SIDECAR_BACKEND="simulated", SIDECAR_DETECTOR_MODEL=str(good))
    assert status == 0, printed
    assert "detector" in printed
    failed = await failing(SIDECAR_BACKEND="simulated", SIDECAR_DETECTOR_MODEL=str(tmp_path / "missing.onnx"))
    assert (failed["backend"], failed["name"]) == ("detector", "start")
    assert "SIDECAR_DETECTOR_MODEL" in failed["advice"]

"""The start, and failed starts: one line on stderr that names the setting, and exit status 2."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from real_parts import platform_lacks
from running import CHAT, IMAGE_URL, Process, chat

ROOT = Path(__file__).parents[1]
DESCRIBE = "/api/inference/describe"

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR_", "TRIO_", "DASHSCOPE"))}


def serve(*options, environ=None):
    """Run a command that is expected to end by itself; default: `vlm-sidecar serve`."""
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *(options or ("serve",))],
        env=CLEAN | (environ or {}), capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "setting"),
    [
        ({"SIDECAR_PORT": "http"}, "SIDECAR_PORT"),
        ({"SIDECAR_PORT": "70000"}, "SIDECAR_PORT"),
        ({"SIDECAR_DEADLINE": "-1"}, "SIDECAR_DEADLINE"),
        ({"SIDECAR_BACKEND": "openai"}, "SIDECAR_BACKEND"),
        ({"SIDECAR_BACKEND": "local"}, "SIDECAR_LOCAL_MODEL"),
        ({"SIDECAR_DASHSCOPE_URL": "dashscope.aliyuncs.com"}, "SIDECAR_DASHSCOPE_URL"),
        ({"TRIO_REMOTE_VLM_URL": "ftp://x"}, "TRIO_REMOTE_VLM_URL"),
        ({"SIDECAR_DASHSCOPE_API_KEY_FILE": "/nowhere/key"}, "SIDECAR_DASHSCOPE_API_KEY_FILE"),
        ({"SIDECAR_MAX_CONCURRENCY": "0"}, "SIDECAR_MAX_CONCURRENCY"),
        ({"SIDECAR_REQUESTS_PER_MINUTE": "many"}, "SIDECAR_REQUESTS_PER_MINUTE"),
        ({"SIDECAR_QUEUE_SIZE": "1.5"}, "SIDECAR_QUEUE_SIZE"),
        ({"SIDECAR_LOG_LEVEL": "loud"}, "SIDECAR_LOG_LEVEL"),
        ({"SIDECAR_UNIX_SOCKET": "/nowhere/sidecar.sock"}, "SIDECAR_UNIX_SOCKET"),
        ({"SIDECAR_SHARED_URL": "redis://127.0.0.1:6379"}, "SIDECAR_SHARED_URL: this version"),
        ({"SIDECAR_SHARED_URL_FILE": "/nowhere/url"}, "SIDECAR_SHARED_URL_FILE: this version"),
        ({"SIDECAR_SPILL": "2"}, "SIDECAR_SPILL: this version"),
    ],
)
def test_an_unusable_setting(environ, setting):
    ended = serve(environ={"SIDECAR_PORT": "0", "SIDECAR_ADMIN_PORT": "0", "SIDECAR_LOG_LEVEL": "error", **environ})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert setting in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_port_that_is_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = serve("serve", "--port", port, "--admin-port", "0", "--log-level", "error")
    assert ended.returncode == 2
    assert f"SIDECAR_PORT={port}" in ended.stderr
    assert "already in use" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_error_message_contains_no_secret(tmp_path):
    file = tmp_path / "sidecar.toml"
    file.write_text('dashscope_api_key = ["sk-secret"]\n')
    ended = serve("serve", "--config", str(file))
    assert ended.returncode == 2
    assert "SIDECAR_DASHSCOPE_API_KEY" in ended.stderr
    assert "sk-secret" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "words"), [("port = ", "is not TOML"), ("prot = 1", "prot is no setting"), (None, "cannot be read")]
)
def test_an_unusable_file(tmp_path, text, words):
    file = tmp_path / "sidecar.toml"
    if text is not None:
        file.write_text(text)
    ended = serve("serve", "--config", str(file))
    assert ended.returncode == 2
    assert str(file) in ended.stderr
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_invalid_usage_and_help():
    assert serve("server").returncode == 2
    assert serve("serve", "--prot", "1").returncode == 2
    for command in ("--help", "--version"):
        assert serve(command).returncode == 0
    text = serve("serve", "--help").stdout
    assert "--dashscope-url" in text
    assert "--config" in text


async def test_a_defect_is_logged_with_the_ids_of_its_request(serving, monkeypatch, caplog):
    sidecar = await serving()
    monkeypatch.setattr(sidecar.sidecar.parts.backends[0], "send", None)
    headers = {"X-Request-Id": "mine", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    async with sidecar.post(headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (500, "internal_error")
    [line] = [record for record in caplog.records if "a defect" in record.message]
    assert (line.request_id, line.trace_id) == ("mine", "a" * 32)


async def test_without_configuration_answers_are_simulated_and_the_log_says_so():
    async with Process() as process, aiohttp.ClientSession() as client:
        assert "SIMULATED" in process.log
        async with client.post(process.url + CHAT, json=chat()) as response:
            assert (response.status, response.headers["X-Sidecar-Backend"]) == (200, "simulated")
        async with client.get(f"{process.admin_url}/status") as response:
            assert (await response.json())["simulated"] is True


async def test_variables_of_other_programs_are_used_and_logged(provider):
    url, _ = await provider()
    environ = {"TRIO_REMOTE_VLM_URL": url, "DASHSCOPE_API_KEY": "sk-from-elsewhere", "TRIO_API_KEY": "letmein"}
    async with Process(environ=environ) as process, aiohttp.ClientSession() as client:
        assert "DASHSCOPE_API_KEY, TRIO_API_KEY, TRIO_REMOTE_VLM_URL" in process.log
        assert "sk-from-elsewhere" not in process.log
        assert "letmein" not in process.log
        async with client.post(process.url + CHAT, json=chat()) as response:
            assert response.status == 401
        headers = {"Authorization": "Bearer letmein"}
        async with client.post(process.url + CHAT, json=chat(), headers=headers) as response:
            assert (response.status, response.headers["X-Sidecar-Backend"]) == (200, "dashscope")


async def test_the_concurrency_of_trio_core_is_a_ceiling_and_the_log_says_it_is_not_needed(provider):
    url, simulated = await provider(latency_seconds=0.05)
    environ = {"TRIO_REMOTE_VLM_URL": url, "TRIO_VLM_API_CONCURRENCY": "2"}
    async with Process(environ=environ) as process, aiohttp.ClientSession() as client:
        assert re.search(r"at most 2 attempts in flight.*no longer needed", process.log)

        async def ask():
            async with client.post(process.url + CHAT, json=chat()) as response:
                return response.status

        assert await asyncio.gather(*(ask() for _ in range(8))) == [200] * 8
    assert simulated.counts.max_in_flight == 2


async def test_a_unix_socket_serves_requests_and_replaces_a_stale_one(tmp_path):
    path = tmp_path / "sidecar.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with Process("--unix-socket", str(path)) as process:
        assert stat.S_ISSOCK(path.stat().st_mode)
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client,
            client.post(f"http://localhost{CHAT}", json=chat()) as response,
        ):
            assert response.status == 200
        process.signal(15)
        assert await process.ended() == 0
    assert not path.exists()


async def test_a_rotated_key_file_is_used_without_a_restart(tmp_path, scripted):
    upstream = await scripted()
    file = tmp_path / "key"
    file.write_text("sk-old\n")
    async with (
        Process("--dashscope-url", f"{upstream.origin}/v1", "--dashscope-api-key-file", str(file)) as process,
        aiohttp.ClientSession() as client,
    ):
        seen = set()
        for attempt in range(200):
            if attempt == 1:
                replacement = tmp_path / "new"
                replacement.write_text("sk-new\n")
                replacement.rename(file)
            async with client.post(process.url + CHAT, json=chat()) as response:
                assert response.status == 200
            seen.add(upstream.seen[-1].headers["authorization"])
            if "Bearer sk-new" in seen:
                break
            await asyncio.sleep(0.05)  # the sidecar checks the file once a second
        assert seen == {"Bearer sk-old", "Bearer sk-new"}


async def test_a_name_with_a_typing_error_is_a_warning_at_start_with_the_nearest_name():
    environ = {"SIDECAR_BACKEND": "simulated", "SIDECAR_DASHSCOPE_API_KEI": "sk-hidden", "TRIO_HOST": "0.0.0.0"}
    async with Process(environ=environ) as process:
        assert "warning: SIDECAR_DASHSCOPE_API_KEI is no setting" in process.log
        assert "SIDECAR_DASHSCOPE_API_KEY is one" in process.log
        assert "not used by the sidecar: TRIO_HOST" in process.log
        assert "sk-hidden" not in process.log


def test_a_dotenv_file_of_trio_core_stops_the_start_and_is_named(tmp_path):
    (tmp_path / ".env").write_text("TRIO_REMOTE_VLM_URL=http://127.0.0.1:1/v1\n")
    for command in ("serve", "check"):
        ended = subprocess.run(
            [sys.executable, "-m", "sidecar", command], env=CLEAN | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ".env in the working folder sets TRIO_REMOTE_VLM_URL" in ended.stderr


def test_what_reads_the_output_may_end_early(tmp_path):
    """Like `vlm-sidecar check --json | head -1`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed_pipe:
        ended = subprocess.run(
            [sys.executable, "-m", "sidecar", "check", "--json"], env=CLEAN | {"SIDECAR_BACKEND": "simulated"},
            stdout=closed_pipe, stderr=subprocess.PIPE, text=True, timeout=20, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (1, "")


async def test_the_sampling_of_trio_core_is_sent_where_the_request_gives_none(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", default_max_tokens="99", default_temperature="0.3", default_top_p="0.7"
    )
    for given, max_tokens in (({}, 99), ({"max_tokens": 5}, 5)):
        async with sidecar.post({"image_b64": IMAGE_URL.partition(",")[2], **given}, path=DESCRIBE) as response:
            assert response.status == 200
        sent = json.loads(upstream.seen[-1].body)
        assert (sent["max_tokens"], sent["temperature"], sent["top_p"]) == (max_tokens, 0.3, 0.7)


@pytest.mark.parametrize(("kind", "reason"), [("pipe", "not a regular file"), ("3 MB", "longer than 65536 bytes")])
def test_a_key_file_that_holds_no_key_stops_the_start_with_one_line(tmp_path, kind, reason):
    if kind == "pipe":
        os.mkfifo(tmp_path / "key")
    else:
        (tmp_path / "key").write_text("k" * 3_000_000)
    ended = serve(environ={"SIDECAR_DASHSCOPE_API_KEY_FILE": str(tmp_path / "key"), "SIDECAR_LOG_LEVEL": "error"})
    assert ended.returncode == 2
    assert "SIDECAR_DASHSCOPE_API_KEY_FILE" in ended.stderr
    assert reason in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "host"),
    [("SIDECAR_HOST", "192.0.2.7"), ("SIDECAR_HOST", "nowhere.invalid"), ("SIDECAR_ADMIN_HOST", "192.0.2.8")],
)
def test_a_wrong_host_is_not_blamed_on_the_port(setting, host):
    environ = {"SIDECAR_PORT": "0", "SIDECAR_ADMIN_PORT": "0", "SIDECAR_ADMIN_HOST": "127.0.0.1", setting: host}
    ended = serve(environ=environ | {"SIDECAR_LOG_LEVEL": "error", "SIDECAR_BACKEND": "simulated"})
    assert ended.returncode == 2
    assert f"{setting}={host}: this machine has no such address" in ended.stderr
    assert "PORT" not in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_every_address_means_both_families_on_both_listeners(serving, host):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        platform_lacks("no IPv6 on this machine")
    sidecar = await serving(host=host, admin_host=host)
    for address in ("127.0.0.1", "[::1]"):
        async with sidecar.client.get(f"http://{address}:{sidecar.sidecar.data_port}/health") as response:
            assert response.status == 200
        async with sidecar.client.get(f"http://{address}:{sidecar.sidecar.admin_port}/livez") as response:
            assert response.status == 200

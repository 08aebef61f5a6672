"""Settings that change while a process runs: after SIGHUP and when the file changes. Without a file, SIGHUP drains."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from pathlib import Path

import aiohttp
import pytest
from real_parts import only_on_linux
from running import BOUND, CHAT, Process, chat, samples


def ignored_signals(pid):
    """Return the signals that a process ignores, one bit each."""
    found = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)


async def until(process, words):
    """Wait until the process has logged these words."""
    async with asyncio.timeout(BOUND):
        while words not in process.log:  # noqa: ASYNC110  the log of a process has no event
            await asyncio.sleep(0.01)


async def reload_metrics(process, client):
    async with client.get(f"{process.admin_url}/metrics") as response:
        found = samples(await response.text())
    names = ("sidecar_config_reload_success", "sidecar_config_reload_success_timestamp_seconds")
    return tuple(found[name] for name in names)


@pytest.fixture
async def client():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND)) as session:
        yield session


async def status(process, client, body=None, **headers):
    async with client.post(process.url + CHAT, json=body or chat(), headers=headers) as response:
        return response.status


async def test_a_hangup_loads_the_file_again_and_each_bad_file_changes_nothing(tmp_path, client):
    file = tmp_path / "sidecar.toml"
    file.write_text('backend = "simulated"\nmax_body_bytes = "1MB"\n')
    started = time.time()
    async with Process("--config", str(file), "--log-level", "info") as process:
        assert await reload_metrics(process, client) == (1, pytest.approx(started, abs=BOUND))
        assert await status(process, client) == 200

        file.write_text('backend = "simulated"\nmax_body_bytes = 200\napi_key = "sk-first"\nlog_level = "debug"\n')
        process.signal(signal.SIGHUP)
        # The option has precedence over the file, so the level of the log does not change.
        await until(process, "loaded again; changed: SIDECAR_API_KEY, SIDECAR_MAX_BODY_BYTES\n")
        assert "sk-first" not in process.log
        assert await status(process, client) == 401
        assert await status(process, client, Authorization="Bearer sk-first") == 413
        success, loaded_at = await reload_metrics(process, client)
        assert success == 1

        for text, why in (
            ('backend = "simulated"\nmax_body_bytes = "1 furlong"\n', "SIDECAR_MAX_BODY_BYTES (from "),
            ("backend = ", "is not TOML"),
            (f"deadline = 1{'0' * 5000}", "is not TOML"),
            (f"x = {'[' * 2000}", "is not TOML"),
            ("", "SIDECAR_API_KEY is missing now"),
            ('backend = "simulated"\n', "SIDECAR_API_KEY is missing now"),
            (f'backend = "simulated"\nstate_file = "{"a" * 300}"\n', "SIDECAR_STATE_FILE"),
            (
                'backend = "simulated"\napi_key = "sk-first"\nqueue_size = 7\nport = 9\ndeadline = 9\n',
                "SIDECAR_QUEUE_SIZE can change only with",
            ),
        ):
            lines = process.log.count("are not loaded again, and nothing has changed")
            seen = process.log.count(why)
            file.write_text(text)
            process.signal(signal.SIGHUP)
            async with asyncio.timeout(BOUND):
                while process.log.count(why) == seen:  # noqa: ASYNC110  the log of a process has no event
                    await asyncio.sleep(0.01)
            assert process.log.count("are not loaded again, and nothing has changed") == lines + 1
            assert await status(process, client, Authorization="Bearer sk-first") == 413
            assert await reload_metrics(process, client) == (0, loaded_at)

        process.signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_a_changed_file_is_loaded_without_a_signal_also_behind_a_link(tmp_path, client):
    for name, text in (("old", 'backend = "simulated"\n'), ("new", 'backend = "simulated"\napi_key = "sk-2"\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sidecar.toml").write_text(text)
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "sidecar.toml").symlink_to("..data/sidecar.toml")
    async with Process("--config", str(tmp_path / "sidecar.toml")) as process:
        assert await status(process, client) == 200
        (tmp_path / "..data_tmp").symlink_to("new")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        await until(process, "loaded again; changed: SIDECAR_API_KEY")
        assert await status(process, client) == 401
        (tmp_path / "..data").unlink()
        await until(process, "cannot be read: No such file or directory")
        assert await status(process, client) == 401
        assert process.log.count("are not loaded again") == 1


async def test_without_a_file_a_hangup_drains_and_cuts_no_answer(client, provider):
    url, _ = await provider(latency_seconds=0.5)
    async with Process("--dashscope-url", url) as process:
        asked = asyncio.create_task(status(process, client))
        async with asyncio.timeout(BOUND):
            while True:
                async with client.get(f"{process.admin_url}/status") as response:
                    if (await response.json())["backends"][0]["in_flight"]:
                        break
        process.signal(signal.SIGHUP)
        assert await asked == 200
        assert await process.ended() == 0
    assert "draining" in process.log


@only_on_linux("the signals of a process are in /proc")
async def test_a_process_that_ignores_hangups_since_its_start_keeps_ignoring_them(client):
    """`nohup vlm-sidecar serve &`: closing the terminal must not drain it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = Process("--backend", "simulated")
        async with process:
            ignored = ignored_signals(process.process.pid)
            assert ignored & 1 << (signal.SIGHUP - 1)
            process.signal(signal.SIGHUP)
            assert await status(process, client) == 200
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
    finally:
        signal.signal(signal.SIGHUP, before)

"""The provider's key is rotated under load, as kubelet replaces a Secret. No request is sent with a torn or old key."""

from __future__ import annotations

import asyncio
from collections import Counter

import aiohttp
from running import CHAT, Process, chat

KEYS = [f"sk-{number}-" + str(number) * 200 for number in range(4)]
#: Seconds. A changed file is noticed within 1 s; 0.5 s is for a request that was already being sent.
STALE_SECONDS = 1.5


def mount(folder, key):
    """Replace the key as kubelet does: create a new folder, and swap the link to it atomically."""
    data = folder / f"..{key[:5]}"
    data.mkdir()
    (data / "key").write_text(key)
    (folder / "..data_tmp").symlink_to(data.name)
    (folder / "..data_tmp").replace(folder / "..data")
    if not (folder / "key").exists():
        (folder / "key").symlink_to("..data/key")


async def test_keys_that_change_under_load_are_never_torn_or_stale_and_no_request_fails(tmp_path, scripted):
    clock = asyncio.get_running_loop().time
    swapped = {KEYS[0]: clock()}
    seen = []
    statuses = Counter()

    async def script(link, request):
        seen.append((clock(), request.headers["authorization"].removeprefix("Bearer ")))
        await asyncio.sleep(0.01)
        await link.answer({"choices": [{"message": {"role": "assistant", "content": "A gate."}}]})

    async def caller(client, url):
        while True:
            async with client.post(url, json=chat()) as response:
                await response.read()
                statuses[response.status] += 1

    upstream = await scripted(script)
    mount(tmp_path, KEYS[0])
    async with (
        Process(
            "--dashscope-url", f"{upstream.origin}/v1", "--dashscope-api-key-file", str(tmp_path / "key")
        ) as process,
        aiohttp.ClientSession() as client,
    ):
        callers = [asyncio.ensure_future(caller(client, process.url + CHAT)) for _ in range(12)]
        for key in KEYS[1:]:
            mount(tmp_path, key)
            swapped[key] = clock()
            async with asyncio.timeout(STALE_SECONDS):
                while seen[-1:] == [] or seen[-1][1] != key:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        for one in callers:
            one.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    assert {key for _, key in seen} == set(KEYS)
    for at, key in seen:
        newer = KEYS[KEYS.index(key) + 1 :]
        assert not newer or at < swapped[newer[0]] + STALE_SECONDS
    assert set(statuses) == {200}, statuses
    assert len(seen) > 300

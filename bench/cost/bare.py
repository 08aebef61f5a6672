"""A bare pass-through proxy, to which the sidecar is compared: `python -m bench.cost.bare PORT UPSTREAM_PORT`.

It uses aiohttp's low-level server and uvloop, as the sidecar does, and a session with a connection pool. It reads a
request, forwards it and writes the answer. It has no queue, limits or metrics, and does not parse the body.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web


async def bare(port: int, upstream: int) -> None:
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        data = await request.read()
        headers = {"Content-Type": request.headers["Content-Type"]}
        async with session.post(f"http://127.0.0.1:{upstream}{request.raw_path}", data=data, headers=headers) as answer:
            headers = {"Content-Type": answer.headers["Content-Type"]}
            if answer.content_length is not None:
                return web.Response(body=await answer.read(), headers=headers)
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(bare(int(sys.argv[1]), int(sys.argv[2])))

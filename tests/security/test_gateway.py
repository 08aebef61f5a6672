"""The nginx of `docs/security.md` in front of a sidecar: TLS, a key for each user, and a turn for each user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import subprocess

from real_parts import ROOT, real_part
from running import BOUND, CHAT, chat, free_port

from bench.real.nginx_limit import writable_folder

PAGE = (ROOT / "docs" / "security.md").read_text()
USERS = ("yard", "harbour")


@contextlib.asynccontextmanager
async def gateway(folder, sidecar):
    """Run the page's configuration with other ports and files. Yield its port, and the TLS of a client."""
    certificate, key, port = folder / "tls.crt", folder / "tls.key", free_port()
    command = [real_part("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    [block] = re.findall(r"```nginx\n(.*?)```", PAGE, re.DOTALL)
    for documented, tested in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "http://127.0.0.1:8100": sidecar.url,
        "/etc/gateway/tls.crt": str(certificate),
        "/etc/gateway/tls.key": str(key),
    }.items():
        assert documented in block
        block = block.replace(documented, tested)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}; " for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}} "
        f"http {{ {temporary} access_log off; {block} }}"
    )
    arguments = ("-c", f"{folder}/nginx.conf", "-e", f"{folder}/errors")
    process = await asyncio.create_subprocess_exec(real_part("nginx"), *arguments)
    try:
        async with asyncio.timeout(BOUND):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield port, ssl.create_default_context(cafile=str(certificate))
    finally:
        process.terminate()
        await process.wait()


async def test_the_gateway_of_the_page_separates_two_users(serving, scripted):
    async def never(link, _):
        await link.gone()

    upstream = await scripted(never)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", api_key="key-of-the-sidecar", max_concurrency=1)
    admission = sidecar.sidecar.admission
    writers = []
    with writable_folder() as folder:
        async with gateway(folder, sidecar) as (port, tls):

            async def ask(authorization, camera="gate", path=CHAT):
                reader, writer = await asyncio.open_connection("localhost", port, ssl=tls)
                writers.append(writer)
                body = json.dumps(chat()).encode()
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{authorization}"
                head += f"X-Camera-Id: {camera}\r\nX-Request-Priority: high\r\nX-Queue-Policy: latest\r\n\r\n"
                writer.write(head.encode() + body)
                return int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])

            users = [f"Authorization: Bearer key-of-{user}\r\n" for user in USERS]
            for wrong in (
                "",
                users[0].upper(),
                users[0].replace("yard", "nobody"),
                users[0].replace("yard", "the-sidecar"),
            ):
                assert await ask(wrong) == 401
            assert await ask(users[0], path="/status") == 404
            assert upstream.seen == []
            tasks = [asyncio.create_task(ask(user, f"invented-{number}")) for number in range(3) for user in users]
            await sidecar.until(lambda: (admission.in_flight(), admission.waiting()) == (1, 5))
            async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
                [queue] = [one["models"][0]["longest_queues"] for one in (await response.json())["backends"]]
            assert {one["key"] for one in queue} == set(USERS)
            assert sorted(one["requests"] for one in queue) == [2, 3]
            for writer in writers:
                writer.transport.abort()
            await sidecar.until(sidecar.at_rest)
            await asyncio.gather(*tasks, return_exceptions=True)

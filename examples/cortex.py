"""Ten cameras request a description of each frame with the official client, as cortex does.

vlm-sidecar serve &
python examples/cortex.py http://127.0.0.1:8100/v1
"""

import argparse
import asyncio
import base64
import struct
import time
import zlib

import openai


def frame(camera: int, number: int) -> str:
    """Return a 64 x 64 PNG as a data URL, a different image for each camera and number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes((camera * 25 % 256, number * 40 % 256, 128)) * 64) * 64
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


async def watch(client: openai.AsyncOpenAI, camera: int, frames: int) -> None:
    for number in range(frames):
        began = time.monotonic()
        content = [
            {"type": "image_url", "image_url": {"url": frame(camera, number)}},
            {"type": "text", "text": "Describe this frame in one sentence."},
        ]
        try:
            answer = await client.chat.completions.with_raw_response.create(
                model="qwen-vl-plus",
                messages=[{"role": "user", "content": content}],
                # the key for fair sharing between cameras; a newer frame replaces an older one that still waits
                extra_headers={"X-Camera-Id": f"camera-{camera}", "X-Queue-Policy": "latest"},
            )
        except openai.APIStatusError as error:  # 409: superseded; 503: it would be too late, so refused immediately
            print(f"camera {camera}: {error.status_code} {error.code}")
            continue
        text = answer.parse().choices[0].message.content
        print(f"camera {camera}: {time.monotonic() - began:.2f} s ({answer.headers['server-timing']}): {text}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8100/v1")
    parser.add_argument("--cameras", type=int, default=10)
    parser.add_argument("--frames", type=int, default=3)
    args = parser.parse_args()
    # The client does not retry: the sidecar queues and retries.
    async with openai.AsyncOpenAI(base_url=args.url, api_key="unused", max_retries=0) as client:
        await asyncio.gather(*(watch(client, camera, args.frames) for camera in range(args.cameras)))


if __name__ == "__main__":
    asyncio.run(main())

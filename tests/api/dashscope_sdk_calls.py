"""Call the official dashscope SDK and print the results as JSON. test_dashscope_sdk.py runs this in another Python."""

from __future__ import annotations

import asyncio
import json
import sys

import dashscope

IMAGE_URL = sys.argv[1]
QUESTION = {
    "model": "qwen-vl-plus",
    "messages": [{"role": "user", "content": [{"image": IMAGE_URL}, {"text": "What is going on?"}]}],
}


def summary(response):
    """Return status, code, text, output tokens and whether there is a request id, of one response."""
    content = response.output.choices[0].message.content if response.status_code == 200 else []
    text = content[0]["text"] if content else ""
    usage = response.usage.output_tokens if response.usage else None
    return [response.status_code, response.code, text, usage, bool(response.request_id)]


async def asynchronous():
    ask = dashscope.AioMultiModalConversation.call
    found = {"whole": summary(await ask(**QUESTION))}
    for incremental in (False, True):
        stream = await ask(**QUESTION, stream=True, incremental_output=incremental)
        found[f"incremental {incremental}"] = [summary(response) async for response in stream]
    return found


def synchronous():
    ask = dashscope.MultiModalConversation.call
    found = {"whole": summary(ask(**QUESTION))}
    for incremental in (False, True):
        stream = ask(**QUESTION, stream=True, incremental_output=incremental)
        found[f"incremental {incremental}"] = [summary(response) for response in stream]
    return found


print(json.dumps({"sync": synchronous(), "async": asyncio.run(asynchronous())}))  # noqa: T201

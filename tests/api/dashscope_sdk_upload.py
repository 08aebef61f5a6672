"""Ask the official dashscope SDK about a local file. test_uploads.py runs this in another Python."""

from __future__ import annotations

import asyncio
import json
import sys

import dashscope

QUESTION = {
    "model": "qwen-vl-plus",
    "messages": [{"role": "user", "content": [{"image": f"file://{sys.argv[1]}"}, {"text": "What is this?"}]}],
}


def text_of(response):
    """Return status, code and text of a response."""
    output = response.output
    return [response.status_code, response.code, output and output.choices[0].message.content[0]["text"]]


async def asynchronous():
    return text_of(await dashscope.AioMultiModalConversation.call(**QUESTION))


print(json.dumps([text_of(dashscope.MultiModalConversation.call(**QUESTION)), asyncio.run(asynchronous())]))  # noqa: T201

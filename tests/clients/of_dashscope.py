"""The examples of DashScope's documentation for its own SDK: pictures, streams, several turns, errors.

The scripted provider knows only OpenAI's API, so in front of it the sidecar translates.
"""

from __future__ import annotations

import asyncio

import dashscope
from client_example import BASE, IMAGE, SIMULATED, calls, example, run

dashscope.base_http_api_url = BASE.removesuffix("/v1") + "/api/v1"
dashscope.api_key = "of-the-caller"
MODEL = "qwen-vl-plus"
ANSWER = "Ein Tor, 门 und 🚪."


def look(image=IMAGE):
    return [{"role": "user", "content": [{"image": image}, {"text": "What is in the picture?"}]}]


def text_of(response):
    assert response.status_code == 200, (response.code, response.message)
    content = response.output.choices[0].message.content
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content


def is_answer(text):
    assert text == ANSWER or (SIMULATED and len(text) > 5), text


def ask(model=MODEL, messages=None, **more):
    return dashscope.MultiModalConversation.call(model=model, messages=messages or look(), **more)


@example("image by data URL", simulated=True)
def _():
    answer = ask()
    is_answer(text_of(answer))
    assert answer.usage.output_tokens > 0
    assert answer.request_id


@example("image by http URL", simulated=True)
def _():
    is_answer(text_of(ask(messages=look("https://pictures.example/dog_and_girl.jpeg"))))


@example("several images, and a system message", simulated=True)
def _():
    content = [{"image": IMAGE}, {"image": "https://pictures.example/tiger.png"}, {"text": "What are these?"}]
    system = {"role": "system", "content": [{"text": "You are a helpful assistant."}]}
    is_answer(text_of(ask(messages=[system, {"role": "user", "content": content}])))


@example("several turns", simulated=True)
def _():
    messages = look()
    answer = ask(messages=messages)
    messages.append({"role": "assistant", "content": [{"text": text_of(answer)}]})
    messages.append({"role": "user", "content": [{"text": "Write a poem about it."}]})
    is_answer(text_of(ask(messages=messages)))


@example("video by a list of frames", simulated=True)
def _():
    content = [{"video": [IMAGE, IMAGE, IMAGE, IMAGE], "fps": 2}, {"text": "What happens?"}]
    answer = ask(messages=[{"role": "user", "content": content}])
    is_answer(text_of(answer))


@example("stream, incremental", simulated=True)
def _():
    is_answer("".join(text_of(piece) for piece in ask(stream=True, incremental_output=True)))


@example("stream, each piece with all the text", simulated=True)
def _():
    is_answer([text_of(piece) for piece in ask(stream=True)][-1])


@example("stream of an unusual server")
def _():
    is_answer("".join(text_of(piece) for piece in ask("odd", stream=True, incremental_output=True)))


@example("async: call and stream", simulated=True)
async def _():
    call = dashscope.AioMultiModalConversation.call
    is_answer(text_of(await call(model=MODEL, messages=look())))
    stream = await call(model=MODEL, messages=look(), stream=True, incremental_output=True)
    is_answer("".join([text_of(piece) async for piece in stream]))


@example("parameters of the vision models", simulated=True)
def _():
    is_answer(text_of(ask(vl_high_resolution_images=True, max_tokens=100, top_p=0.8, temperature=0.1, seed=7)))


@example("400 has the provider's code, asked for once")
def _():
    answer = ask("bad-request")
    assert (answer.status_code, answer.code) == (400, "invalid_value"), (answer.status_code, answer.code)
    assert calls("bad-request") == 1


@example("a wrong key is a 401", simulated=True)
def _():
    answer = ask(api_key="of-a-stranger")
    assert (answer.status_code, answer.code) == (401, "unauthorized")


@example("400 instead of a stream")
def _():
    answers = list(ask("bad-request", stream=True))
    assert [(answer.status_code, answer.code) for answer in answers] == [(400, "invalid_value")]


@example("a throttling 429 never reaches the client")
def _():
    is_answer(text_of(ask("throttled-once")))
    assert calls("throttled-once") == 2


@example("a final 502 is not repeated by the client")
def _():
    answer = ask("failing")
    assert (answer.status_code, answer.code) == (502, "upstream_error")
    assert calls("failing") == 3


@example("a stream that breaks ends with an error")
def _():
    assert list(ask("breaking", stream=True))[-1].status_code == 502


@example("ten at once", simulated=True)
async def _():
    call = dashscope.AioMultiModalConversation.call
    for answer in await asyncio.gather(*(call(model=MODEL, messages=look()) for _ in range(10))):
        is_answer(text_of(answer))


run()

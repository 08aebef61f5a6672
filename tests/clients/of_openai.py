"""The examples of openai's documentation for Python, and the errors, retries and timeouts that it promises."""

from __future__ import annotations

import io
import time

import openai
from client_example import BASE, IMAGE, SIMULATED, calls, example, raised, run
from pydantic import BaseModel

MODEL = "qwen-vl-plus"
ANSWER = "Ein Tor, 门 und 🚪."
client = openai.OpenAI(base_url=BASE, api_key="of-the-caller")
ask = client.chat.completions.create
HELLO = [{"role": "user", "content": "Say hello."}]
LOOK = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is in this image?"},
            {"type": "image_url", "image_url": {"url": IMAGE}},
        ],
    }
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get current temperature for a given location.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Event(BaseModel):
    name: str
    day: str


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def is_answer(text):
    assert text == ANSWER or (SIMULATED and len(text) > 5), text


@example("chat completion", simulated=True)
def _():
    answer = ask(model=MODEL, messages=HELLO)
    is_answer(answer.choices[0].message.content)
    assert answer.usage.total_tokens > 0
    assert answer._request_id


@example("image by data URL", simulated=True)
def _():
    is_answer(ask(model=MODEL, messages=LOOK, max_tokens=300).choices[0].message.content)


@example("image by http URL", simulated=True)
def _():
    part = {"type": "image_url", "image_url": {"url": "http://pictures.example/gate.jpg", "detail": "high"}}
    is_answer(ask(model=MODEL, messages=[{"role": "user", "content": [part]}]).choices[0].message.content)


@example("stream", simulated=True)
def _():
    is_answer(text_of(ask(model=MODEL, messages=HELLO, stream=True)))


@example("stream with usage", simulated=True)
def _():
    chunks = list(ask(model=MODEL, messages=LOOK, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens > 0
    is_answer(text_of(chunks))


@example("stream left in the middle")
def _():
    with ask(model=MODEL, messages=HELLO, stream=True) as stream:
        next(iter(stream))
    is_answer(ask(model=MODEL, messages=HELLO).choices[0].message.content)


@example("stream helper with events")
def _():
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    is_answer(text)
    assert final.choices[0].message.content == text


@example("stream of an unusual server")
def _():
    is_answer(text_of(ask(model="odd", messages=HELLO, stream=True)))


@example("async: completion and stream", simulated=True)
async def _():
    async with openai.AsyncOpenAI(base_url=BASE, api_key="of-the-caller") as asynchronous:
        answer = await asynchronous.chat.completions.create(model=MODEL, messages=LOOK)
        is_answer(answer.choices[0].message.content)
        stream = await asynchronous.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        is_answer(text_of([chunk async for chunk in stream]))


@example("async on aiohttp", simulated=True)
async def _():
    async with openai.AsyncOpenAI(
        base_url=BASE, api_key="of-the-caller", http_client=openai.DefaultAioHttpClient()
    ) as asynchronous:
        answer = await asynchronous.chat.completions.create(model=MODEL, messages=HELLO)
        is_answer(answer.choices[0].message.content)


@example("tool call, and its result")
def _():
    answer = ask(model=MODEL, messages=HELLO, tools=[WEATHER])
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": "14"}
    more = ask(model=MODEL, messages=[*HELLO, answer.choices[0].message, result], tools=[WEATHER])
    is_answer(more.choices[0].message.content)


@example("tool call, streamed")
def _():
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER]) as stream:
        stream.until_done()
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert (call.id, call.function.parsed_arguments) == ("call_1", {"city": "Paris"})


@example("structured output: parse")
def _():
    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Event)
    assert answer.choices[0].message.parsed == Event(name="Science Fair", day="Friday")


@example("structured output, streamed")
def _():
    with client.chat.completions.stream(model=MODEL, messages=HELLO, response_format=Event) as stream:
        stream.until_done()
    assert stream.get_final_completion().choices[0].message.parsed.day == "Friday"


@example("models.list", simulated=True)
def _():
    assert [model.id for model in client.models.list()]


@example("models.retrieve, of a model that is not there")
def _():
    raised(openai.NotFoundError, client.models.retrieve, "not-there")


@example("responses (passthrough)")
def _():
    assert client.responses.create(model=MODEL, input="Say hello.").output_text == ANSWER


@example("responses with an image, streamed (passthrough)")
def _():
    content = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": IMAGE}]
    question = [{"role": "user", "content": content}]
    stream = client.responses.create(model=MODEL, input=question, stream=True)
    events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed"


@example("embeddings (passthrough)")
def _():
    answer = client.embeddings.create(model="text-embedding-v4", input=["one", "two"])
    assert [entry.embedding for entry in answer.data] == [[0.5, -1.0]] * 2


@example("file upload (passthrough)")
def _():
    file = client.files.create(file=("lines.jsonl", io.BytesIO(b"{}\n" * 1000)), purpose="fine-tune")
    assert file.bytes > 3000


@example("raw response and its headers", simulated=True)
def _():
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    assert raw.headers["X-Sidecar-Attempts"] == "1"
    is_answer(raw.parse().choices[0].message.content)


@example("streaming response, line by line")
def _():
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=HELLO, stream=True) as response:
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


@example("extra headers, query and body fields", simulated=True)
def _():
    answer = ask(
        model=MODEL, messages=HELLO, extra_headers={"X-Camera-Id": "gate", "X-Request-Priority": "high"},
        extra_query={"api-version": "1"}, extra_body={"enable_thinking": False, "vl_high_resolution_images": True},
    )  # fmt: skip
    is_answer(answer.choices[0].message.content)


@example("400 is BadRequestError, asked for once")
def _():
    error = raised(openai.BadRequestError, ask, model="bad-request", messages=HELLO)
    assert (error.code, error.type, error.status_code) == ("invalid_value", "invalid_request_error", 400)
    assert calls("bad-request") == 1


@example("a wrong key is AuthenticationError, and no call", simulated=True)
def _():
    stranger = client.with_options(api_key="of-a-stranger")
    error = raised(openai.AuthenticationError, stranger.chat.completions.create, model="unseen", messages=HELLO)
    assert error.code == "unauthorized"
    assert SIMULATED or calls("unseen") == 0


@example("the provider's 401, about the sidecar's key, is no reason to ask again and again")
def _():
    error = raised(openai.APIStatusError, ask, model="wrong-key", messages=HELLO)
    assert error.status_code in (401, 502)
    assert calls("wrong-key") <= 2


@example("404 is NotFoundError, asked for once")
def _():
    assert raised(openai.NotFoundError, ask, model="no-such-model", messages=HELLO).code == "model_not_found"
    assert calls("no-such-model") == 1


@example("422 is UnprocessableEntityError, asked for once")
def _():
    raised(openai.UnprocessableEntityError, ask, model="not-allowed", messages=HELLO)
    assert calls("not-allowed") == 1


@example("the sidecar's own 400 names the field")
def _():
    error = raised(openai.BadRequestError, ask, model=MODEL, messages="hello")
    assert (error.code, error.param) == ("invalid_request", "messages")


@example("413 is not repeated")
def _():
    started = time.monotonic()
    large = [{"role": "user", "content": "a" * 15_000_000}]
    error = raised(openai.APIStatusError, ask, model="too-large", messages=large)
    assert (error.status_code, error.code) == (413, "payload_too_large")
    assert (calls("too-large"), time.monotonic() - started < 5) == (0, True)


@example("a throttling 429 never reaches the client")
def _():
    raw = client.chat.completions.with_raw_response.create(model="throttled-once", messages=HELLO)
    is_answer(raw.parse().choices[0].message.content)
    assert (raw.headers["X-Sidecar-Attempts"], raw.retries_taken, calls("throttled-once")) == ("2", 0, 2)


@example("one 500 never reaches the client")
def _():
    raw = client.chat.completions.with_raw_response.create(model="failing-once", messages=HELLO)
    assert (raw.retries_taken, calls("failing-once")) == (0, 2)


@example("a final 502 is not repeated by the client")
def _():
    error = raised(openai.InternalServerError, ask, model="failing", messages=HELLO)
    assert (error.status_code, error.response.headers["x-should-retry"]) == (502, "false")
    assert calls("failing") == int(error.response.headers["X-Sidecar-Attempts"])
    assert error.request_id


@example("a stream that breaks is an APIError, not a short answer")
def _():
    error = raised(openai.APIError, lambda: list(ask(model="breaking", messages=HELLO, stream=True)))
    assert error.code == "upstream_error"
    assert calls("breaking") == 1


@example("an error instead of a stream has its status")
def _():
    raised(openai.BadRequestError, ask, model="bad-request", messages=HELLO, stream=True)


@example("the client's timeout, without retries")
def _():
    raised(openai.APITimeoutError, client.with_options(timeout=0.5, max_retries=0).chat.completions.create,
           model="slow", messages=HELLO)  # fmt: skip


@example("X-Request-Timeout: the sidecar's 503 or 504 is not awaited")
def _():
    patient = client.with_options(max_retries=0)
    error = raised(openai.InternalServerError, patient.chat.completions.create, model="slow", messages=HELLO,
                   extra_headers={"X-Request-Timeout": "1"})  # fmt: skip
    assert error.code in ("deadline_exceeded", "deadline_unreachable")


@example("no money is one 502, repeated by nobody")
def _():
    error = raised(openai.InternalServerError, ask, model="no-money", messages=HELLO)
    assert (error.status_code, error.code) == (502, "upstream_billing")
    assert error.response.headers["x-should-retry"] == "false"
    assert calls("no-money") <= 2


if not SIMULATED:

    @example("a path that is not there is NotFoundError")
    def _():
        lost = openai.OpenAI(base_url=BASE.removesuffix("/v1"), api_key="of-the-caller")
        raised(openai.NotFoundError, lost.chat.completions.create, model=MODEL, messages=HELLO)


run()

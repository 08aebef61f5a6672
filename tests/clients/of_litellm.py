"""The examples of LiteLLM's documentation for an OpenAI-compatible endpoint: a model `openai/…`, and `api_base`."""

from __future__ import annotations

import logging

import litellm
from client_example import BASE, IMAGE, SIMULATED, calls, example, raised, run

logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
litellm.suppress_debug_info = True
ANSWER = "Ein Tor, 门 und 🚪."
HELLO = [{"role": "user", "content": "Say hello."}]
LOOK = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": IMAGE}}],
    }
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def options(model, messages=HELLO, **more):
    return {"model": f"openai/{model}", "messages": messages, "api_base": BASE, "api_key": "of-the-caller", **more}


def ask(model="qwen-vl-plus", messages=HELLO, **more):
    return litellm.completion(**options(model, messages, **more))


def is_answer(text):
    assert text == ANSWER or (SIMULATED and len(text) > 5), text


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@example("completion", simulated=True)
def _():
    answer = ask()
    is_answer(answer.choices[0].message.content)
    assert answer.usage.total_tokens > 0


@example("image by data URL", simulated=True)
def _():
    is_answer(ask(messages=LOOK).choices[0].message.content)


@example("stream", simulated=True)
def _():
    is_answer(text_of(ask(stream=True)))


@example("stream with usage, put together by stream_chunk_builder", simulated=True)
def _():
    chunks = list(ask(messages=LOOK, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=LOOK)
    is_answer(whole.choices[0].message.content)
    assert whole.usage.completion_tokens > 0


@example("stream of an unusual server")
def _():
    is_answer(text_of(ask("odd", stream=True)))


@example("async: completion and stream", simulated=True)
async def _():
    answer = await litellm.acompletion(**options("qwen-vl-plus", LOOK))
    is_answer(answer.choices[0].message.content)
    stream = await litellm.acompletion(**options("qwen-vl-plus", stream=True))
    is_answer(text_of([chunk async for chunk in stream]))


@example("tool call")
def _():
    call = ask(tools=[TOOL]).choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')


@example("tool call, streamed")
def _():
    chunks = list(ask(tools=[TOOL], stream=True))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')


@example("JSON mode")
def _():
    answer = ask(response_format={"type": "json_object"})
    assert '"Science Fair"' in answer.choices[0].message.content


@example("embedding (passthrough)")
def _():
    answer = litellm.embedding(
        model="openai/text-embedding-v4", input=["one", "two"], api_base=BASE, api_key="of-the-caller"
    )
    assert [entry["embedding"] for entry in answer.data] == [[0.5, -1.0]] * 2


@example("responses (passthrough)")
def _():
    answer = litellm.responses(model="openai/qwen-vl-plus", input="Say hello.", api_base=BASE, api_key="of-the-caller")
    assert answer.output[0].content[0].text == ANSWER


@example("400 is BadRequestError, asked for once")
def _():
    raised(litellm.BadRequestError, ask, "bad-request")
    assert calls("bad-request") == 1


@example("a wrong key is AuthenticationError")
def _():
    raised(litellm.AuthenticationError, litellm.completion, **{**options("qwen-vl-plus"), "api_key": "of-a-stranger"})


@example("404 is NotFoundError, asked for once")
def _():
    raised(litellm.NotFoundError, ask, "no-such-model")
    assert calls("no-such-model") == 1


@example("a throttling 429 never reaches the client")
def _():
    is_answer(ask("throttled-once").choices[0].message.content)
    assert calls("throttled-once") == 2


@example("a final 502 is not repeated by the client")
def _():
    raised(litellm.exceptions.BadGatewayError, ask, "failing")
    first = calls("failing")
    assert first <= 3
    raised(litellm.exceptions.BadGatewayError, ask, "failing", num_retries=0)
    assert calls("failing") <= 2 * first


@example("a stream that breaks is an error, not a short answer")
def _():
    kinds = (litellm.exceptions.APIError, litellm.exceptions.MidStreamFallbackError)
    raised(kinds, lambda: list(ask("breaking", stream=True)))


@example("the client's timeout")
def _():
    raised(litellm.Timeout, ask, "slow", timeout=0.5, max_retries=0)


@example("Router, with its own retries")
def _():
    router = litellm.Router(
        model_list=[
            {
                "model_name": "frames",
                "litellm_params": {"model": "openai/qwen-vl-plus", "api_base": BASE, "api_key": "of-the-caller"},
            }
        ],
        num_retries=2,
    )
    is_answer(router.completion(model="frames", messages=HELLO).choices[0].message.content)


run()

"""Requests to the local backend: the accepted fields, and the errors that name an invalid field."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

import json

import pytest
from local_calls import ask, chat, data_url, picture

from backends.base import Rejected, Request, Timings
from backends.local.prompts import DEFAULT_MAX_TOKENS, parse

HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: object) -> bytes:
    return json.dumps({"model": "any", "messages": HELLO, **fields}).encode()


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (b"{", "body"),
        (b"[]", "body"),
        (body(messages=None), "messages"),
        (body(messages=[]), "messages"),
        (body(messages=["hello"]), "messages[0]"),
        (body(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
        (body(messages=[*HELLO, {"role": "user"}]), "messages[1].content"),
        (body(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (body(messages=[{"role": "user", "content": [{"type": "video"}]}]), "messages[0].content[0].type"),
        (body(messages=[{"role": "user", "content": ["hello"]}]), "messages[0].content[0].type"),
        (
            body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content[0].image_url.url",
        ),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens=1.5), "max_tokens"),
        (body(max_completion_tokens=-1, max_tokens=5), "max_completion_tokens"),
        (body(temperature=2.1), "temperature"),
        (body(temperature=True), "temperature"),
        (body(top_p="much"), "top_p"),
        (body(seed=0.5), "seed"),
        (body(stop=""), "stop"),
        (body(stop=["a", "b", "c", "d", "e"]), "stop"),
        (body(stop=5), "stop"),
        (body(n=2), "n"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(response_format={"type": "json_object"}), "response_format"),
        (body(stream_options=True), "stream_options"),
    ],
)
def test_an_invalid_request_is_refused_with_the_name_of_the_field(sent, field):
    with pytest.raises(Rejected) as caught:
        parse(sent)
    error = json.loads(caught.value.body)["error"]
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert error["param"] == field
    assert error["code"] == "invalid_request"
    assert error["message"].startswith(f"{field}: ")


def test_missing_fields_have_defaults():
    prompt = parse(body())
    assert (prompt.max_tokens, prompt.temperature, prompt.top_p, prompt.seed) == (DEFAULT_MAX_TOKENS, 0, 1, None)
    assert (prompt.stop, prompt.stream, prompt.include_usage) == ((), False, False)


def test_values_that_use_no_unsupported_feature_are_accepted():
    prompt = parse(body(n=1, tools=[], response_format={"type": "text"}, logprobs=False, stop=None, user="camera 1"))
    assert prompt.messages == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


def test_max_completion_tokens_has_precedence_over_max_tokens():
    assert parse(body(max_completion_tokens=7, max_tokens=9)).max_tokens == 7


async def test_a_prompt_that_fills_the_context_is_refused_and_its_batch_is_answered(serve, tap):
    import asyncio

    from local_calls import until

    backend = await serve()
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=1)))
    await until(lambda: tap.running)
    long, short = (asyncio.create_task(ask(backend, chat("x y " * count))) for count in (4096, 1))
    await until(lambda: len(backend._rows) == 3)
    tap.allow(10**6)
    await first
    with pytest.raises(Rejected, match=r"messages: \d+ LLM tokens, the model takes 4096"):
        await long
    assert (await short).text


async def test_an_answer_ends_when_the_context_is_full(serve):
    backend = await serve()
    backend._engine._model.context_tokens = 60
    answer = await ask(backend, chat(max_tokens=1000))
    assert answer.usage.input_tokens + answer.usage.output_tokens == 60
    assert answer.finish_reason == "length"


async def test_the_models_image_token_in_a_text_is_refused(serve):
    backend = await serve()
    with pytest.raises(Rejected, match=r"messages\[0\].*<image>"):
        await ask(backend, chat("look: <image>"))


async def test_a_request_that_the_chat_template_refuses_is_rejected(serve):
    backend = await serve()
    backend._engine._model._processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Rejected, match="roles must alternate"):
        await ask(backend, chat())


async def test_other_paths_are_refused(serve):
    backend = await serve()
    with pytest.raises(Rejected) as caught:
        await backend.send(Request("openai", "/embeddings", body(), "any"), Timings())
    assert caught.value.status == 404


async def test_the_whole_answer_has_openais_format(serve):
    backend = await serve()
    reply = await backend.send(chat(), Timings())
    answer = json.loads(reply.body)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == backend.model_id == "idefics3"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["total_tokens"] == reply.usage.input_tokens + reply.usage.output_tokens
    assert json.loads(await backend.models())["data"][0]["id"] == "idefics3"


async def test_native_requests_are_answered_in_the_native_format(serve):
    backend = await serve()
    text = {"text": "Describe the street."}
    content = [{"image": data_url(picture())}, text]
    asked = {"input": {"messages": [{"role": "user", "content": content}]}, "parameters": {"max_tokens": 12}}
    path = "/services/aigc/multimodal-generation/generation"
    reply = await backend.send(Request("native", path, json.dumps(asked).encode(), "any"), Timings())
    (choice,) = json.loads(reply.body)["output"]["choices"]
    assert choice["message"]["content"] == [{"text": (await ask(backend, chat())).text}]
    assert json.loads(reply.body)["usage"]["output_tokens"] == 12
    asked["input"]["messages"][0]["content"] = [text, {"image": "file:///etc/passwd"}]
    with pytest.raises(Rejected, match=r"^input\.messages\[0\]\.content\[1\]\.image: "):
        await backend.send(Request("native", path, json.dumps(asked).encode(), "any"), Timings())

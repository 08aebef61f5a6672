"""The examples of LangChain's documentation for `ChatOpenAI` and `OpenAIEmbeddings`."""

from __future__ import annotations

import openai
from client_example import BASE, IMAGE, SIMULATED, calls, example, raised, run
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

ANSWER = "Ein Tor, 门 und 🚪."
LOOK = HumanMessage([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": IMAGE}}])
#: LangChain's own form of a picture.
LOOK_AT_BLOCK = HumanMessage(
    [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "base64": IMAGE.partition(",")[2], "mime_type": "image/png"},
    ]
)


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str = Field(description="The city.")


class Event(BaseModel):
    """An event of a calendar."""

    name: str
    day: str


def model(name="qwen-vl-plus", **more):
    return ChatOpenAI(model=name, base_url=BASE, api_key="of-the-caller", **more)


def is_answer(text):
    assert text == ANSWER or (SIMULATED and len(text) > 5), text


def whole(chunks):
    total = next(chunks)
    for chunk in chunks:
        total = total + chunk
    assert isinstance(total, AIMessageChunk)
    return total


@example("invoke", simulated=True)
def _():
    messages = [("system", "You translate English to French."), ("human", "I love programming.")]
    answer = model(temperature=0).invoke(messages)
    is_answer(answer.content)
    assert answer.usage_metadata["total_tokens"] > 0


@example("image as image_url", simulated=True)
def _():
    is_answer(model().invoke([LOOK]).content)


@example("image as LangChain's block", simulated=True)
def _():
    is_answer(model().invoke([LOOK_AT_BLOCK]).content)


@example("stream", simulated=True)
def _():
    is_answer(whole(model().stream([LOOK])).content)


@example("stream with usage", simulated=True)
def _():
    assert whole(model(stream_usage=True).stream("Say hello.")).usage_metadata["total_tokens"] > 0


@example("stream of an unusual server")
def _():
    is_answer(whole(model("odd").stream("Say hello.")).content)


@example("ainvoke and astream", simulated=True)
async def _():
    is_answer((await model().ainvoke([LOOK])).content)
    is_answer("".join([chunk.content async for chunk in model().astream("Say hello.")]))


@example("batch of six", simulated=True)
def _():
    for answer in model().batch([[LOOK]] * 6):
        is_answer(answer.content)


@example("bind_tools")
def _():
    answer = model().bind_tools([GetWeather]).invoke("What is the weather in Paris?")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("GetWeather", {"city": "Paris"})]


@example("bind_tools, streamed")
def _():
    total = whole(model().bind_tools([GetWeather]).stream("What is the weather in Paris?"))
    assert [(call["name"], call["args"]) for call in total.tool_calls] == [("GetWeather", {"city": "Paris"})]


@example("with_structured_output: json_schema")
def _():
    assert model().with_structured_output(Event).invoke([LOOK]) == Event(name="Science Fair", day="Friday")


@example("with_structured_output: json_mode")
def _():
    asking = model().with_structured_output(Event, method="json_mode")
    assert asking.invoke("An event, in JSON.").day == "Friday"


@example("with_structured_output: function_calling")
def _():
    assert model().with_structured_output(GetWeather, method="function_calling").invoke("Paris?").city == "Paris"


@example("responses API (passthrough)")
def _():
    answer = model(use_responses_api=True).invoke([LOOK])
    assert answer.text == ANSWER


@example("responses API, streamed (passthrough)")
def _():
    assert whole(model(use_responses_api=True).stream("Say hello.")).text == ANSWER


@example("embeddings (passthrough)")
def _():
    embeddings = OpenAIEmbeddings(
        model="text-embedding-v4", base_url=BASE, api_key="of-the-caller", check_embedding_ctx_length=False
    )
    assert embeddings.embed_documents(["one", "two"]) == [[0.5, -1.0]] * 2
    assert embeddings.embed_query("one") == [0.5, -1.0]


@example("400 is BadRequestError, asked for once")
def _():
    raised(openai.BadRequestError, model("bad-request").invoke, "hello")
    assert calls("bad-request") == 1


@example("a throttling 429 never reaches the client")
def _():
    is_answer(model("throttled-once").invoke("hello").content)
    assert calls("throttled-once") == 2


@example("a final 502 is not repeated by the client")
def _():
    error = raised(openai.InternalServerError, model("failing").invoke, "hello")
    assert calls("failing") == int(error.response.headers["X-Sidecar-Attempts"])


@example("a stream that breaks is an error, not a short answer")
def _():
    raised(openai.APIError, lambda: list(model("breaking").stream("hello")))


@example("the client's timeout")
def _():
    raised(openai.APITimeoutError, model("slow", timeout=0.5, max_retries=0).invoke, "hello")


run()

// The examples of openai's documentation for Node, and the errors, retries and timeouts that it promises.
// It prints one line of JSON for each, like client_example.py.
import { createRequire } from "node:module";

// NODE_PATH names the folder of the packages; only `require` reads it.
const require = createRequire(import.meta.url);
const OpenAI = require("openai").default;
const { toFile } = require("openai");
const { zodResponseFormat, zodFunction } = require("openai/helpers/zod");
const { z } = require("zod");
const assert = require("node:assert/strict");

const { BASE, PROVIDER, IMAGE } = process.env;
const SIMULATED = process.env.PROVIDER_IS === "simulated";
const ANSWER = "Ein Tor, 门 und 🚪.";
const MODEL = "qwen-vl-plus";
const HELLO = [{ role: "user", content: "Say hello." }];
const LOOK = [
  {
    role: "user",
    content: [
      { type: "text", text: "What is in this image?" },
      { type: "image_url", image_url: { url: IMAGE } },
    ],
  },
];
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get current temperature for a given location.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const Event = z.object({ name: z.string(), day: z.string() });

const client = new OpenAI({ baseURL: BASE, apiKey: "of-the-caller" });
const ask = (fields, options) => client.chat.completions.create({ model: MODEL, messages: HELLO, ...fields }, options);
const calls = async (model) => Number(await (await fetch(`${PROVIDER}/calls/${model}`)).text());
const isAnswer = (text) => assert(text === ANSWER || (SIMULATED && text.length > 5), text);

async function textOf(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  return text;
}

async function raised(kind, promise) {
  try {
    await promise;
  } catch (error) {
    assert(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    return error;
  }
  throw new Error(`no ${kind.name}`);
}

// Title, function, and whether it runs in front of the simulated provider too.
const EXAMPLES = [
  ["chat completion", async () => isAnswer((await ask()).choices[0].message.content), true],
  ["image by data URL", async () => isAnswer((await ask({ messages: LOOK })).choices[0].message.content), true],
  ["stream", async () => isAnswer(await textOf(await ask({ stream: true }))), true],
  [
    "stream with usage",
    async () => {
      const chunks = [];
      const asked = { messages: LOOK, stream: true, stream_options: { include_usage: true } };
      for await (const chunk of await ask(asked)) chunks.push(chunk);
      assert.deepEqual(chunks.at(-1).choices, []);
      assert(chunks.at(-1).usage.total_tokens > 0);
    },
    true,
  ],
  ["stream of an unusual server", async () => isAnswer(await textOf(await ask({ model: "odd", stream: true })))],
  [
    "stream left in the middle",
    async () => {
      for await (const _ of await ask({ stream: true })) break;
      isAnswer((await ask()).choices[0].message.content);
    },
  ],
  [
    "stream helper with events",
    async () => {
      const runner = client.chat.completions.stream({ model: MODEL, messages: HELLO });
      let text = "";
      runner.on("content", (delta) => (text += delta));
      isAnswer((await runner.finalChatCompletion()).choices[0].message.content);
      isAnswer(text);
    },
  ],
  [
    "stream as a ReadableStream of bytes",
    async () => {
      const reader = (await ask({ stream: true })).toReadableStream().getReader();
      assert((await reader.read()).value.length > 0);
      await reader.cancel();
    },
  ],
  [
    "tool call",
    async () => {
      const { message } = (await ask({ tools: [WEATHER] })).choices[0];
      assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Paris" });
    },
  ],
  [
    "runTools, streamed",
    async () => {
      let city;
      const tool = zodFunction({
        name: "get_weather",
        parameters: z.object({ city: z.string() }),
        function: (given) => ((city = given.city), "14"),
      });
      const runner = client.chat.completions.runTools({ model: MODEL, messages: HELLO, stream: true, tools: [tool] });
      isAnswer(await runner.finalContent());
      assert.equal(city, "Paris");
    },
  ],
  [
    "structured output: parse",
    async () => {
      const asked = { model: MODEL, messages: HELLO, response_format: zodResponseFormat(Event, "event") };
      assert.equal((await client.chat.completions.parse(asked)).choices[0].message.parsed.day, "Friday");
    },
  ],
  [
    "models.list",
    async () => {
      const ids = [];
      for await (const model of client.models.list()) ids.push(model.id);
      assert(ids.length > 0);
    },
    true,
  ],
  [
    "responses (passthrough)",
    async () => assert.equal((await client.responses.create({ model: MODEL, input: "hello" })).output_text, ANSWER),
  ],
  [
    "responses with an image, streamed (passthrough)",
    async () => {
      const content = [
        { type: "input_text", text: "What is it?" },
        { type: "input_image", image_url: IMAGE },
      ];
      const stream = client.responses.stream({ model: MODEL, input: [{ role: "user", content }] });
      assert.equal((await stream.finalResponse()).output_text, ANSWER);
    },
  ],
  [
    "embeddings (passthrough)",
    async () => {
      const answer = await client.embeddings.create({ model: "text-embedding-v4", input: ["one", "two"] });
      assert.deepEqual(answer.data.map((entry) => [...entry.embedding]), [[0.5, -1], [0.5, -1]]);
    },
  ],
  [
    "file upload (passthrough)",
    async () => {
      const file = await toFile(Buffer.from("{}\n".repeat(1000)), "lines.jsonl");
      assert((await client.files.create({ file, purpose: "fine-tune" })).bytes > 3000);
    },
  ],
  [
    "raw response and its headers",
    async () => {
      const { data, response, request_id } = await client.chat.completions
        .create({ model: MODEL, messages: HELLO })
        .withResponse();
      assert.equal(response.headers.get("x-sidecar-attempts"), "1");
      assert(request_id);
      isAnswer(data.choices[0].message.content);
    },
    true,
  ],
  [
    "400 is BadRequestError, asked for once",
    async () => {
      const error = await raised(OpenAI.BadRequestError, ask({ model: "bad-request" }));
      assert.equal(error.code, "invalid_value");
      assert.equal(await calls("bad-request"), 1);
    },
  ],
  [
    "a wrong key is AuthenticationError, and no call",
    async () => {
      const stranger = client.withOptions({ apiKey: "of-a-stranger" });
      const asked = stranger.chat.completions.create({ model: "unseen", messages: HELLO });
      assert.equal((await raised(OpenAI.AuthenticationError, asked)).code, "unauthorized");
    },
    true,
  ],
  [
    "404 is NotFoundError, asked for once",
    async () => {
      await raised(OpenAI.NotFoundError, ask({ model: "no-such-model" }));
      assert.equal(await calls("no-such-model"), 1);
    },
  ],
  [
    "a throttling 429 never reaches the client",
    async () => {
      isAnswer((await ask({ model: "throttled-once" })).choices[0].message.content);
      assert.equal(await calls("throttled-once"), 2);
    },
  ],
  [
    "a final 502 is not repeated by the client",
    async () => {
      const error = await raised(OpenAI.InternalServerError, ask({ model: "failing" }));
      assert.equal(error.headers.get("x-should-retry"), "false");
      assert.equal(await calls("failing"), Number(error.headers.get("x-sidecar-attempts")));
    },
  ],
  [
    "a stream that breaks is an APIError, not a short answer",
    async () => {
      const error = await raised(OpenAI.APIError, ask({ model: "breaking", stream: true }).then(textOf));
      assert.equal(error.code, "upstream_error");
      assert.equal(await calls("breaking"), 1);
    },
  ],
  [
    "the client's timeout",
    async () => raised(OpenAI.APIConnectionTimeoutError, ask({ model: "slow" }, { timeout: 500, maxRetries: 0 })),
  ],
  [
    "the client's abort",
    async () => {
      const abort = new AbortController();
      setTimeout(() => abort.abort(), 300);
      await raised(OpenAI.APIUserAbortError, ask({ model: "slow" }, { signal: abort.signal }));
      isAnswer((await ask()).choices[0].message.content);
    },
  ],
  [
    "ten at once",
    async () => {
      for (const answer of await Promise.all(Array.from({ length: 10 }, () => ask({ messages: LOOK }))))
        isAnswer(answer.choices[0].message.content);
    },
    true,
  ],
];

for (const [example, run, withSimulated] of EXAMPLES) {
  if (SIMULATED && !withSimulated) continue;
  let failure = "";
  try {
    await run();
  } catch (error) {
    failure = `${error.constructor.name}: ${error.message}`.slice(0, 400);
  }
  console.log(JSON.stringify({ example, failure }));
}
process.exit(0); // keep-alive connections would hold the process for some seconds

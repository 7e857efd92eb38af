// The official npm client against the real server. Run by `./x test node`; NODE_PATH leads to the pinned client.
"use strict";

const assert = require("node:assert/strict");
const { spawn, spawnSync } = require("node:child_process");
const fs = require("node:fs");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");
const { after, before, test } = require("node:test");
const OpenAI = require("openai");

const ROOT = path.resolve(__dirname, "../..");
const BINARY = process.env.MURMUR_BIN ?? path.join(process.env.CARGO_TARGET_DIR ?? path.join(ROOT, "target"), "debug/murmur");
const DEMO_MODEL = path.join(ROOT, "models/demo/murmur-demo-q8_0.gguf");
const READY_LIMIT_MS = 120_000;
const STORY = [{ role: "user", content: "Tell me a story about Lily and a kitten." }];
const WHO = [{ role: "user", content: "Who are you?" }];

function freePort() {
  return new Promise((resolve, reject) => {
    const probe = net.createServer();
    probe.on("error", reject);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address();
      probe.close(() => resolve(port));
    });
  });
}

/** Starts `murmur serve MODEL`; resolves to the client, the model's name and a way to stop, once it is ready. */
async function serve(model, ...args) {
  const port = await freePort();
  const data = fs.mkdtempSync(path.join(os.tmpdir(), "murmur-test-"));
  const log = fs.openSync(path.join(data, "server.log"), "w");
  const child = spawn(BINARY, ["serve", model, "--api", `127.0.0.1:${port}`, "--data-dir", data, ...args], {
    stdio: ["ignore", log, log],
  });
  const ended = new Promise((resolve) => child.on("exit", resolve));
  const stop = async () => {
    child.kill("SIGTERM");
    await ended;
    fs.closeSync(log);
    fs.rmSync(data, { recursive: true, force: true });
  };
  const deadline = Date.now() + READY_LIMIT_MS;
  for (;;) {
    const ready = await fetch(`http://127.0.0.1:${port}/health`).then((r) => r.status === 200, () => false);
    if (ready) break;
    if (child.exitCode !== null || Date.now() > deadline) {
      const text = fs.readFileSync(path.join(data, "server.log"), "utf8");
      await stop();
      throw new Error(`the server did not start: ${text}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  const client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "unused", maxRetries: 0 });
  const [first] = (await client.models.list()).data;
  return { client, model: first.id, stop };
}

let server;
before(async () => { server = await serve(DEMO_MODEL, "--stages", "3", "--exact"); });
after(async () => { await server?.stop(); });

const chat = (options) => server.client.chat.completions.create({ model: server.model, temperature: 0, ...options });

test("a question gets an answer with usage", async () => {
  const answer = await chat({ messages: WHO });
  assert.match(answer.choices[0].message.content, /Murmur/);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("the pieces of a stream make the whole answer, and usage comes last", async () => {
  const whole = await chat({ messages: STORY });
  let text = "";
  let usage;
  for await (const chunk of await chat({ messages: STORY, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the client's stream helper puts the message together", async () => {
  const runner = server.client.chat.completions.stream({ model: server.model, messages: WHO, temperature: 0 });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, (await chat({ messages: WHO })).choices[0].message.content);
});

test("a stream can be aborted, and the server goes on", async () => {
  const stream = await chat({ messages: STORY, stream: true });
  for await (const _ of stream) {
    stream.controller.abort();
    break;
  }
  assert.ok((await chat({ messages: WHO, max_tokens: 4 })).choices[0].message.content);
});

const LIGHT = {
  type: "function",
  function: {
    name: "switch_light",
    description: "Switches the light",
    parameters: {
      type: "object",
      properties: { on: { type: "boolean" }, room: { type: "string", enum: ["kitchen", "hall"] } },
      required: ["on", "room"],
      additionalProperties: false,
    },
  },
};

function checkLight(call) {
  assert.equal(call.function.name, "switch_light");
  const { on, room } = JSON.parse(call.function.arguments);
  assert.equal(typeof on, "boolean");
  assert.ok(["kitchen", "hall"].includes(room));
}

test("a required tool is called with arguments that match its schema", async () => {
  const answer = await chat({ messages: WHO, tools: [LIGHT], tool_choice: "required", max_tokens: 200 });
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  checkLight(answer.choices[0].message.tool_calls[0]);
});

test("a streamed tool call is put together by the client", async () => {
  const runner = server.client.chat.completions.stream({
    model: server.model, messages: WHO, tools: [LIGHT], temperature: 0, max_tokens: 200,
    tool_choice: { type: "function", function: { name: "switch_light" } },
  });
  const final = await runner.finalChatCompletion();
  checkLight(final.choices[0].message.tool_calls[0]);
});

test("structured output matches its schema", async () => {
  const schema = {
    type: "object",
    properties: { size: { enum: ["small", "large"] }, count: { type: "integer", minimum: 1, maximum: 5 } },
    required: ["size", "count"],
    additionalProperties: false,
  };
  const response_format = { type: "json_schema", json_schema: { name: "box", strict: true, schema } };
  const answer = await server.client.chat.completions.parse({
    model: server.model, messages: WHO, temperature: 0, max_tokens: 200, response_format,
  });
  const value = JSON.parse(answer.choices[0].message.content);
  assert.ok(["small", "large"].includes(value.size));
  assert.ok(value.count >= 1 && value.count <= 5);
});

test("the same seed gives the same answer", async () => {
  const once = () => chat({ messages: STORY, temperature: 1, seed: 5, max_tokens: 40 });
  assert.equal((await once()).choices[0].message.content, (await once()).choices[0].message.content);
});

test("a text is continued", async () => {
  const answer = await server.client.completions.create({
    model: server.model, prompt: "Once upon a time", max_tokens: 10, temperature: 0,
  });
  assert.equal(answer.usage.completion_tokens, 10);
});

test("embeddings are decoded to numbers", async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "murmur-embed-"));
  const file = path.join(folder, "bert.gguf");
  const made = spawnSync(BINARY, ["models", "synth", "bert", file], { encoding: "utf8" });
  assert.equal(made.status, 0, made.stderr);
  const embedder = await serve(file);
  try {
    const answer = await embedder.client.embeddings.create({ model: embedder.model, input: ["hello", "world"] });
    assert.equal(answer.data.length, 2);
    const length = Math.hypot(...answer.data[0].embedding);
    assert.ok(Math.abs(length - 1) < 1e-3);
  } finally {
    await embedder.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  }
});

test("errors arrive as the client's own classes", async () => {
  await assert.rejects(chat({ messages: WHO, temperature: -1 }), OpenAI.BadRequestError);
  await assert.rejects(chat({ messages: WHO, model: "no-such-model" }), OpenAI.NotFoundError);
  await assert.rejects(chat({ messages: [{ role: "user", content: "word ".repeat(5000) }] }), (error) => {
    assert.equal(error.status, 400);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
});

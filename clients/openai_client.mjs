// OpenAI's JavaScript client against a server: node openai_client.mjs URL IMAGE
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI from "openai";

const [url, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, maxRetries: 0 });
const source = `data:image/png;base64,${fs.readFileSync(image).toString("base64")}`;
const messages = [{ role: "user", content: [
  { type: "image_url", image_url: { url: source } }, { type: "text", text: "What colour is the star?" }] }];
const create = options => client.chat.completions.create({ model: "toy", messages, ...options });

const models = (await client.models.list()).data.map(model => model.id);
assert.deepEqual(models, ["toy", "caption", "toy-base"]);
const whole = await create({ logprobs: true, top_logprobs: 2 });
assert.equal(whole.choices[0].message.content, "the star is red.");
assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 2);
assert.equal((await create({ stop: ["is"] })).choices[0].message.content, "the star");

let said = "", usage;
for await (const chunk of await create({ stream: true, stream_options: { include_usage: true } })) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(said, "the star is red.");
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const warm = { n: 2, seed: 3, temperature: 1.5, max_tokens: 6 };
const texts = async () => (await create(warm)).choices.map(choice => choice.message.content);
assert.deepEqual(await texts(), await texts());

const response = await client.responses.create({ model: "toy", input: "Hello", store: false });
assert.ok(response.output_text.length > 0);
await assert.rejects(create({ tools: [{ type: "function", function: { name: "x" } }] }),
  error => error instanceof OpenAI.BadRequestError && error.param === "tools");
await assert.rejects(create({ model: "none" }), OpenAI.NotFoundError);
console.log("all right");

// node run.mjs ARTIFACT "Once upon a time" [--tokens N] [--ids] [--state FILE]

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { endIds, generate, Session } from "../web/liger.mjs";

process.env.ORT_DISABLE_TELEMETRY ??= "1"; // ONNX Runtime reads it once, when it starts
const ort = await import("onnxruntime-node");

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { tokens: { type: "string", default: "64" }, ids: { type: "boolean" }, state: { type: "string" } },
});
const [artifact, prompt] = positionals;
if (positionals.length !== 2) throw new Error('usage: node run.mjs ARTIFACT "PROMPT" [--tokens N] [--ids] [--state FILE]');

const json = (name) => {
  const file = join(artifact, name);
  return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : {};
};
const manifest = json("manifest.json");
const settings = { ...json("special_tokens_map.json"), ...json("tokenizer_config.json") };
const tokenizer = new Tokenizer(json("tokenizer.json"), settings);
const ends = endIds(tokenizer, settings, json("generation_config.json"), json("config.json"));
const session = new Session(ort, manifest, await ort.InferenceSession.create(join(artifact, manifest.graph.file)), true);
const state = values.state && new Uint8Array(readFileSync(values.state)).buffer;
for await (const { token, text } of generate(session, tokenizer, ends, prompt, Number(values.tokens), state))
  process.stdout.write(values.ids ? `${token} ` : text);
process.stdout.write("\n");

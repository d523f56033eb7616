// node run.mjs ARTIFACT "Once upon a time": writes text with an artifact, see USAGE for the options.

import { existsSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { Chat } from "../web/chat.mjs";
import { endIds, optimisation, Session, Writer } from "../web/liger.mjs";
import { readIds } from "../web/state.mjs";

const USAGE = `usage: node run.mjs ARTIFACT PROMPT [options]
       node run.mjs ARTIFACT --chat [options]     each line of stdin is a question
  --tokens N            largest number of tokens to write, 64
  --ids                 write ids in place of text
  --chat                send the prompt as a question, with the chat template
  --system TEXT         what the chat begins with
  --temperature X       0 takes the most likely token each time; also --top-k N, --top-p X, --min-p X
  --seed N              the same seed writes the same text
  --stop TEXT           end before this text; may be repeated
  --prompt-cache FILE   keep the state after the beginning of the prompt
  --state FILE          continue from a saved state
  --save-state FILE     write the state after the prompt
`;
const WORTH = 32; // tokens for which a prompt cache is worthwhile

class UsageError extends Error {}

function parse() {
  const [text, flag] = [{ type: "string" }, { type: "boolean" }];
  const names = ["tokens", "system", "temperature", "top-k", "top-p", "min-p", "seed"];
  const options = Object.fromEntries([...names, "prompt-cache", "state", "save-state"].map((name) => [name, text]));
  let given;
  try {
    given = parseArgs({
      allowPositionals: true,
      options: { ...options, stop: { ...text, multiple: true }, chat: flag, ids: flag },
    });
  } catch (error) {
    throw new UsageError(error.message);
  }
  const { positionals, values } = given;
  if (positionals.length > 2 || positionals.length < (values.chat ? 1 : 2))
    throw new UsageError("an artifact and one prompt were expected");
  if (values.state && values["prompt-cache"])
    throw new UsageError("a prompt cache is for the beginning of a text: leave out --state or --prompt-cache");
  if (values.system && !values.chat) throw new UsageError("--system needs --chat");
  const number = (name, low, high, whole = false) => {
    if (values[name] === undefined) return undefined;
    const value = values[name].trim() ? Number(values[name]) : NaN;
    if (!(value >= low && value <= high) || (whole && !Number.isSafeInteger(value)))
      throw new UsageError(
        `--${name} needs a ${whole ? "whole " : ""}number from ${low} to ${high}, not '${values[name]}'`,
      );
    return value;
  };
  return {
    ...values,
    artifact: positionals[0],
    prompt: positionals[1],
    tokens: number("tokens", 1, 2 ** 31 - 1, true) ?? 64,
    temperature: number("temperature", 0, 1e6),
    topK: number("top-k", 0, 2 ** 31 - 1, true),
    topP: number("top-p", 1e-9, 1),
    minP: number("min-p", 0, 1),
    seed: number("seed", 0, Number.MAX_SAFE_INTEGER, true),
  };
}

/** Write a file whole or not at all. */
function writeWhole(file, bytes) {
  writeFileSync(`${file}.part`, bytes);
  renameSync(`${file}.part`, file);
}

const bytesOf = (file) => new Uint8Array(readFileSync(file)).buffer;

/** Read a prompt, and keep the state after its beginning in the file of the package's --prompt-cache. */
async function readPrompt(session, ids, file) {
  const last = ids.length - 1; // a state does not include the logits after the last token
  let shared = 0;
  if (existsSync(file)) {
    const saved = await readIds(bytesOf(file));
    if (!saved.ids.length) throw new Error(`${file} is a saved state, not a prompt cache: choose another file`);
    if (saved.model === session.manifest.fingerprint) {
      while (shared < Math.min(last, saved.ids.length) && saved.ids[shared] === ids[shared]) shared++;
      if (shared === saved.ids.length) {
        await session.restore(bytesOf(file));
        return session.advance(ids.slice(shared));
      }
    }
  }
  const keep = shared >= WORTH ? shared : last;
  if (keep < WORTH) return session.advance(ids);
  await session.advance(ids.slice(0, keep));
  writeWhole(file, await session.save(ids.slice(0, keep)));
  return session.advance(ids.slice(keep));
}

async function main() {
  const options = parse();
  const json = (name) => {
    const file = join(options.artifact, name);
    return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : {};
  };
  const manifest = json("manifest.json");
  if (!manifest.graph) throw new Error(`${options.artifact} is not an artifact: there is no manifest.json`);
  const { file } = (manifest.lowering === "native" ? manifest.fallback : manifest.graph) ?? {};
  if (!file)
    throw new Error("onnxruntime-node loads no operators of others: build the artifact with --lowering native,ort");
  process.env.ORT_DISABLE_TELEMETRY ??= "1"; // ONNX Runtime reads it once, when it starts
  const ort = await import("onnxruntime-node");
  const settings = { ...json("special_tokens_map.json"), ...json("tokenizer_config.json") };
  const tokenizer = new Tokenizer(json("tokenizer.json"), settings);
  const ends = endIds(tokenizer, settings, json("generation_config.json"), json("config.json"));
  const graph = await ort.InferenceSession.create(join(options.artifact, file), {
    graphOptimizationLevel: optimisation(manifest),
  });
  const session = new Session(ort, manifest, graph, true);
  const chat = options.chat && new Chat(json("chat.json"));
  const state = options.state && bytesOf(options.state);
  const writer = new Writer(session, tokenizer, ends, { ...options, chat, state });
  const read = async (session, ids) => {
    const cache = options["prompt-cache"];
    const logits = await (cache ? readPrompt(session, ids, cache) : session.advance(ids));
    if (options["save-state"]) writeWhole(options["save-state"], await session.save());
    return logits;
  };
  const questions = options.prompt === undefined ? createInterface({ input: process.stdin }) : [options.prompt];
  for await (const question of questions) {
    for await (const { token, text } of writer.write(question, read))
      process.stdout.write(options.ids ? `${token} ` : text);
    process.stdout.write("\n");
  }
}

try {
  await main();
} catch (error) {
  const usage = error instanceof UsageError;
  process.stderr.write(`error: ${error.message}\n${usage ? USAGE : ""}`);
  process.exitCode = usage ? 2 : 1;
}

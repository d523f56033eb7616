// One sequence on an artifact, in Node and in browsers: `ort` is onnxruntime-node or onnxruntime-web.

import { Sampler, StopStrings } from "./sampler.mjs";
import { ARRAYS, readState, writeState } from "./state.mjs";

const CHUNK = 64; // prompt tokens per call; more are not faster
const FADE = 2 ** 20; // tokens after which sums without a decay are halved
const CONTEXT = 8; // earlier tokens on which a text may depend: more than the bytes of a character

export class Session {
  /**
   * @param ort The module of ONNX Runtime.
   * @param manifest The artifact's manifest.json, parsed.
   * @param session InferenceSession of its graph.
   * @param inPlace Whether this ONNX Runtime writes outputs into given tensors; onnxruntime-node does.
   */
  constructor(ort, manifest, session, inPlace = false) {
    if (manifest.format_version > 2 || manifest.target !== "onnx")
      throw new Error("artifacts of format 1 or 2 for the target onnx were expected");
    Object.assign(this, { ort, manifest, session, inPlace });
    this.chunk = Math.min(CHUNK, manifest.graph.max_chunk);
    this.reset();
  }

  reset() {
    this.position = 0;
    this.state = new Map();
    for (const { past, shape, dtype, fill } of this.manifest.state) {
      const sizes = shape.map((size) => ({ B: 1, P: 0 })[size] ?? size);
      const array = new ARRAYS[dtype](sizes.reduce((a, b) => a * b, 1));
      array.fill(dtype === "int64" ? BigInt(fill) : fill);
      this.state.set(past, new this.ort.Tensor(dtype, array, sizes));
    }
  }

  get stateBytes() {
    let total = 0;
    for (const tensor of this.state.values()) total += tensor.size * ARRAYS[tensor.type].BYTES_PER_ELEMENT;
    return total;
  }

  /** Continue from the bytes of a state that any runtime of the same model has saved. */
  async restore(file) {
    const { position, state } = await readState(file, this.manifest);
    this.position = position;
    for (const [past, { dtype, data, sizes }] of state) this.state.set(past, new this.ort.Tensor(dtype, data, sizes));
  }

  /** Return the bytes of a file with the state; `ids` are all tokens that it has seen, for a prompt cache. */
  async save(ids) {
    const state = new Map();
    for (const [past, tensor] of this.state)
      state.set(past, { dtype: tensor.type, data: await tensor.getData(), sizes: tensor.dims });
    return writeState(this.manifest, this.position, state, ids);
  }

  /** Advance by any number of tokens and return the logits of the next one. */
  async advance(ids) {
    if (!ids.length) throw new Error("the prompt has no tokens");
    let logits;
    for (let start = 0; start < ids.length; start += this.chunk)
      logits = await this.#run(ids.slice(start, start + this.chunk));
    return logits;
  }

  async #run(ids) {
    const int64 = (values, shape) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const feeds = { input_ids: int64(ids, [1, ids.length]), position: int64([this.position], [1]) };
    const fetches = { logits: null };
    for (const { past, present, grows } of this.manifest.state) {
      feeds[past] = this.state.get(past);
      fetches[present] = this.inPlace && !grows ? feeds[past] : null;
    }
    const results = await this.session.run(feeds, fetches);
    for (const { past, present } of this.manifest.state) {
      const tensor = results[present];
      if (tensor !== feeds[past] && feeds[past].location === "gpu-buffer") feeds[past].dispose();
      this.state.set(past, tensor);
    }
    const before = Math.floor(this.position / FADE);
    this.position += ids.length;
    const times = Math.floor(this.position / FADE) - before;
    if (times) await this.#halveSums(0.5 ** times);
    return results.logits.data;
  }

  /** Sums without a decay would become inexact; readers use only their ratios. */
  async #halveSums(factor) {
    for (const [past, tensor] of this.state) {
      const state = past.endsWith("recurrent_state") && this.state.has(past.replace(/state$/, "mass"));
      if (!state && !/(recurrent_mass|judge_state|cell_(count|key|value))$/.test(past)) continue;
      const data = (await tensor.getData()).map((number) => number * factor);
      this.state.set(past, new this.ort.Tensor(tensor.type, data, tensor.dims));
    }
  }
}

/** The level at which ONNX Runtime loaded the graph when it was verified; another one rounds differently. */
export function optimisation({ lowering, precision }) {
  if (lowering === "portable") return "all";
  return ["fp16", "bf16"].includes(precision) ? "basic" : "disabled";
}

/** Ids that end a text: the tokenizer's eos_token, and those that generation_config.json and config.json name. */
export function endIds(tokenizer, settings, ...configs) {
  const name = settings?.eos_token?.content ?? settings?.eos_token;
  const named = name == null ? [] : (tokenizer.token_to_id(name) ?? []);
  return new Set([named, ...configs.map((config) => config?.eos_token_id ?? [])].flat());
}

/** Turns ids into text one at a time; the pieces together are the text of all ids. */
export class Detokenizer {
  #ids = []; // the ids that later text depends on
  #out = 0; // units of their text that were returned

  /**
   * @param tokenizer The tokenizer.
   * @param context Ids before the first one; their text is part of no piece, but a character that they begin is.
   */
  constructor(tokenizer, context = []) {
    this.tokenizer = tokenizer;
    let start = Math.max(0, context.length - CONTEXT);
    while (start && !this.#decode(context.slice(start, start + 1))) start--; // an id without text may drop a space
    for (const token of context.slice(start)) this.push(token);
  }

  /** Return the text that this token completes. */
  push(token) {
    this.#ids.push(token);
    const whole = this.#decode(this.#ids);
    const text = whole.replace(/\ufffd$/, ""); // the beginning of a character, whose other bytes may follow
    const piece = text.slice(this.#out);
    this.#out = Math.max(this.#out, text.length);
    if (piece) {
      const held = whole.slice(text.length); // begins in this token
      for (const size of [1, 2]) {
        const short = this.#decode(this.#ids.slice(-size));
        if (!short.endsWith(held) || !short) continue; // the first token of a text may lose a space
        [this.#ids, this.#out] = [this.#ids.slice(-size), short.length - held.length];
        break;
      }
    }
    return piece;
  }

  /** Return the text that was held back: an incomplete character. */
  flush() {
    const piece = this.#decode(this.#ids).slice(this.#out);
    this.#out += piece.length;
    return piece;
  }

  #decode(ids) {
    if (!ids.length) return "";
    // the library's clean-up would remove spaces that the model wrote
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

/** Texts on one session: a prompt and its continuation, or a chat. */
export class Writer {
  #begun = false;
  #unseen = []; // written, but not yet read by the session

  /**
   * @param session A session.
   * @param tokenizer The tokenizer.
   * @param ends Ids that end a text, from `endIds`.
   * @param options Of the `Sampler`, and `tokens`, the largest number to write; `stop`, a list of texts; `chat`, a
   *   `Chat`, and `system`, what it begins with; `state`, bytes of a saved state that the text continues.
   */
  constructor(session, tokenizer, ends, options) {
    Object.assign(this, { session, tokenizer, options });
    this.ends = new Set([...ends, ...(options.chat?.ends ?? [])]);
    this.sampler = new Sampler(options);
    const added = [...tokenizer.get_added_tokens_decoder().values()];
    this.special = new Map(added.filter((token) => token.special).map(({ content, id }) => [content, id]));
  }

  /**
   * Stream `{ token, text }` of the continuation of a prompt or, in a chat, of the answer to a question. Text comes once
   * its last character is complete.
   *
   * @param read What reads the first prompt, from the session and ids to logits.
   */
  async *write(prompt, read = (session, ids) => session.advance(ids)) {
    const { session, tokenizer } = this;
    const { chat, system, state, tokens, stop = [] } = this.options;
    const text = !chat ? prompt : this.#begun ? chat.next(prompt) : chat.first(prompt, system);
    const ids = [...this.#unseen, ...tokenizer.encode(text, { add_special_tokens: !state && !chat }).ids];
    if (!this.#begun) session.reset();
    if (!this.#begun && state) await session.restore(state);
    let logits = await (this.#begun ? session.advance(ids) : read(session, ids));
    this.#begun = true;
    const detokenizer = new Detokenizer(tokenizer, ids);
    const stops = new StopStrings(stop, this.special);
    for (let count = 1; ; count++) {
      const token = this.sampler.choose(logits);
      const end = this.ends.has(token) || stops.ids.has(token);
      let [out, found] = end ? ["", false] : stops.push(detokenizer.push(token));
      const last = end || found || count >= tokens;
      if (last && !found) out += stops.push(detokenizer.flush())[0] + stops.flush();
      this.#unseen = end ? [] : [token]; // the next turn has the answer's end
      yield { token, text: out };
      if (last) return;
      logits = await session.advance([token]);
    }
  }
}

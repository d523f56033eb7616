// One sequence on an artifact, in Node and in browsers: `ort` is onnxruntime-node or onnxruntime-web.

const CHUNK = 64; // prompt tokens a call; more are not faster
const HELD = 4; // longest UTF-8 character; more tokens without a whole character are no beginning of one

export class Session {
  /**
   * @param ort The module of ONNX Runtime.
   * @param manifest The artifact's manifest.json, parsed.
   * @param session InferenceSession of its graph.
   * @param inPlace Whether this ONNX Runtime writes outputs into given tensors; onnxruntime-node does.
   */
  constructor(ort, manifest, session, inPlace = false) {
    if (manifest.format_version !== 1 || manifest.target !== "onnx")
      throw new Error("artifacts of format 1 for the target onnx were expected");
    Object.assign(this, { ort, manifest, session, inPlace });
    this.chunk = Math.min(CHUNK, manifest.graph.max_chunk);
    this.reset();
  }

  reset() {
    const arrays = { float32: Float32Array, int64: BigInt64Array };
    this.position = 0;
    this.state = new Map();
    for (const { past, shape, dtype, fill } of this.manifest.state) {
      const sizes = shape.map((size) => ({ B: 1, P: 0 })[size] ?? size);
      const array = new arrays[dtype](sizes.reduce((a, b) => a * b, 1));
      array.fill(dtype === "int64" ? BigInt(fill) : fill);
      this.state.set(past, new this.ort.Tensor(dtype, array, sizes));
    }
  }

  get stateBytes() {
    let total = 0;
    for (const tensor of this.state.values()) total += tensor.size * (tensor.type === "int64" ? 8 : 4);
    return total;
  }

  /** Advance by any number of tokens and return the most likely next one. */
  async advance(ids) {
    if (!ids.length) throw new Error("the prompt has no tokens");
    let logits;
    for (let start = 0; start < ids.length; start += this.chunk)
      logits = await this.#run(ids.slice(start, start + this.chunk));
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    return best;
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
    this.position += ids.length;
    return results.logits.data;
  }
}

/** Ids that end a text, from generation_config.json or else config.json. */
export function endIds(...configs) {
  const found = configs.find((config) => config?.eos_token_id != null)?.eos_token_id;
  return new Set([found ?? []].flat());
}

/** Stream `{ token, text }` of the most likely continuation; text comes when its last character is whole. */
export async function* generate(session, tokenizer, ends, prompt, tokens) {
  const decode = (ids) => (ids.length ? tokenizer.decode(ids, { skip_special_tokens: true }) : "");
  let ids = tokenizer.encode(prompt).ids;
  session.reset();
  let token = await session.advance(ids);
  ids = ids.slice(-HELD); // the end of the prompt decides about a leading space
  for (let done = ids.length, count = 1; ; count++) {
    ids.push(token);
    const last = count >= tokens || ends.has(token);
    const printed = decode(ids.slice(0, done));
    let text = ends.has(token) ? "" : decode(ids).slice(printed.length);
    if (!last && text.endsWith("\ufffd") && ids.length - done < HELD) text = "";
    else [ids, done] = [ids.slice(-2 * HELD), Math.min(ids.length, 2 * HELD)];
    yield { token, text };
    if (last) return;
    token = await session.advance([token]);
  }
}

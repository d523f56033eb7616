// What comes after the logits: the next token, and where a text ends.

const MASK = (1n << 128n) - 1n;
const MULTIPLIER = (2549297995355413924n << 64n) | 4865540595714422341n;
const STEP = 2 ** -53;

/** Draws as the package does: the same seed writes the same tokens, but for rounding. */
export class Sampler {
  #state = 0n;

  /** @param settings Temperature (0 takes the most likely token), topK (0 takes all), topP, minP and seed. */
  constructor({ temperature = 0, topK = 0, topP = 1, minP = 0, seed = Math.floor(Math.random() * 2 ** 53) } = {}) {
    Object.assign(this, { temperature, topK, topP, minP });
    const [first, second, third, fourth] = spread(BigInt(seed));
    this.increment = ((((third << 64n) | fourth) << 1n) | 1n) & MASK;
    this.#random();
    this.#state = (this.#state + ((first << 64n) | second)) & MASK;
    this.#random();
  }

  /** Return the id of the next token. */
  choose(logits) {
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    if (!Number.isFinite(logits[best])) throw new Error("the model returned no numbers");
    if (!this.temperature) return best;
    let ids = Array.from(logits.keys());
    if (this.topK && this.topK < ids.length) {
      const least = Float32Array.from(logits).sort().at(-this.topK);
      ids = ids.filter((id) => logits[id] >= least);
    }
    const weights = new Float32Array(logits.length);
    let total = 0;
    for (const id of ids) {
      weights[id] = Math.exp(Math.fround(Math.fround(logits[id] - logits[best]) / Math.fround(this.temperature)));
      total += weights[id];
    }
    const least = Math.max(this.minP, ((1 - this.topP) / ids.length) * total);
    ids = ids.filter((id) => weights[id] >= least);
    if (this.topP < 1) {
      ids.sort((a, b) => weights[b] - weights[a]);
      let sum = 0;
      const last = ids.findIndex((id) => (sum += weights[id]) >= this.topP * total);
      if (last >= 0) ids.length = last + 1;
    }
    const drawn = this.#random() * ids.reduce((sum, id) => sum + weights[id], 0);
    let sum = 0;
    return ids.find((id) => (sum += weights[id]) > drawn) ?? ids.at(-1);
  }

  /** PCG64 (XSL RR 128/64), seeded as numpy does. */
  #random() {
    this.#state = (this.#state * MULTIPLIER + this.increment) & MASK;
    const mixed = BigInt.asUintN(64, this.#state >> 64n) ^ BigInt.asUintN(64, this.#state);
    const turn = this.#state >> 122n;
    return Number(BigInt.asUintN(64, (mixed >> turn) | (mixed << (64n - turn))) >> 11n) * STEP;
  }
}

/** Return numpy's SeedSequence of one number: the state and the increment of PCG64. */
function spread(seed) {
  let constant = 0x43b0d7e5;
  const hash = (value, factor) => {
    value ^= constant;
    constant = Math.imul(constant, factor);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const words = [Number(seed & 0xffffffffn) | 0, Number((seed >> 32n) & 0xffffffffn) | 0, 0, 0];
  const pool = words.map((word) => hash(word, 0x931e8875));
  for (let from = 0; from < 4; from++)
    for (let to = 0; to < 4; to++) {
      if (from === to) continue;
      const mixed = Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, hash(pool[from], 0x931e8875));
      pool[to] = mixed ^ ((mixed | 0) >>> 16);
    }
  constant = 0x8b51f9dd;
  const made = Array.from({ length: 8 }, (_, i) => BigInt(hash(pool[i % 4], 0x58f38ded) >>> 0));
  return [0, 2, 4, 6].map((i) => (made[i + 1] << 32n) | made[i]);
}

/** Cuts a stream of text before the first stop string, even if that arrives in pieces. */
export class StopStrings {
  #held = "";

  /**
   * @param stops The stop strings.
   * @param special Special tokens with their ids, a Map. A stop string that begins with one stops at its id.
   */
  constructor(stops, special) {
    this.stops = stops.filter((stop) => stop);
    this.ids = new Set();
    for (const [token, id] of special) if (this.stops.some((stop) => stop.startsWith(token))) this.ids.add(id);
  }

  /** Return the text that cannot be part of a stop string, and whether one was found. */
  push(text) {
    this.#held += text;
    const found = this.stops.map((stop) => this.#held.indexOf(stop)).filter((at) => at >= 0);
    let keep = 0;
    for (const stop of this.stops)
      for (let size = Math.min(this.#held.length, stop.length - 1); size > keep; size--)
        if (this.#held.endsWith(stop.slice(0, size))) keep = size;
    const out = this.#held.slice(0, found.length ? Math.min(...found) : this.#held.length - keep);
    this.#held = found.length ? "" : this.#held.slice(out.length);
    return [out, found.length > 0];
  }

  /** Return the text that was held back, which is no stop string. */
  flush() {
    const out = this.#held;
    this.#held = "";
    return out;
  }
}

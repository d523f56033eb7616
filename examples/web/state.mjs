// Reads and writes a state for any runtime: a file in the format safetensors with the tensors of one sequence.

const BYTES = { F32: 4, F16: 2, I64: 8, I32: 4, I8: 1 };
const NAMES = { F32: "float32", F16: "float16", I64: "int64", I32: "int32", I8: "int8" };
export const ARRAYS = {
  float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array,
};

/**
 * Return the number of tokens that the state has seen, and its tensors as the artifact has them.
 *
 * @param file Bytes of the file, an ArrayBuffer.
 * @param manifest The artifact's manifest.json, parsed.
 */
export async function readState(file, manifest) {
  const { header, tensors } = await parse(file);
  if (!manifest.identity) throw new Error("this artifact reads no states of other runtimes: build it again");
  if (header.identity !== manifest.identity) throw new Error("this state belongs to another model");
  const state = new Map();
  const missing = (name) => new Error(`this state has no ${name} that fits this artifact`);
  for (const prefix of new Set(manifest.state.map(({ past }) => past.slice(0, past.lastIndexOf("."))))) {
    const wanted = manifest.state.filter(({ past }) => past.startsWith(`${prefix}.`));
    const given = new Map([...tensors].filter(([name]) => name.startsWith(`${prefix}.`)));
    const position = wanted.find(({ past }) => past.endsWith(".slot_position"));
    if (position && given.has(`${prefix}.slot_key`)) order(given, wanted, headsOf(manifest, prefix, position), prefix);
    for (const { past, shape, dtype, grows } of wanted) {
      const tensor = given.get(past);
      if (!tensor) throw missing(past);
      const sizes = shape.map((size, axis) => (grows && axis === 2 ? tensor.shape[axis] : size === "B" ? 1 : size));
      const data = cast(tensor, given.get(`${past}_scale`), dtype);
      if (!data || data.length !== sizes.reduce((a, b) => a * b, 1)) throw missing(past);
      state.set(past, { dtype, data, sizes });
    }
  }
  const seen = tensors.get("position");
  if (seen?.dtype !== "int64" || seen.data.length !== 1) throw new Error("the state of one sequence was expected");
  return { position: Number(seen.data[0]), state };
}

/** Return the fingerprint of the model whose state it is, and the tokens that it has seen, if they were saved. */
export async function readIds(file) {
  const { header, tensors } = await parse(file);
  return { model: header.model, ids: Array.from(tensors.get("ids")?.data ?? [], Number) };
}

/** Return the bytes of a file with a state; `ids` are the tokens that it has seen, if they are saved with it. */
export async function writeState(manifest, position, state, ids) {
  if (!manifest.fingerprint) throw new Error("this artifact writes no states for other runtimes: build it again");
  const tensors = new Map([["position", { dtype: "int64", data: BigInt64Array.of(BigInt(position)), sizes: [1] }]]);
  if (ids) tensors.set("ids", { dtype: "int64", data: BigInt64Array.from(ids, BigInt), sizes: [ids.length] });
  for (const [past, tensor] of state) tensors.set(past, tensor);
  const header = {};
  let end = 0;
  for (const [name, { dtype, data, sizes }] of tensors) {
    tensors.get(name).bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const type = Object.keys(NAMES).find((key) => NAMES[key] === dtype);
    header[name] = { dtype: type, shape: sizes, data_offsets: [end, (end += data.byteLength)] };
  }
  const { fingerprint: model, identity } = manifest;
  header.__metadata__ = { "ligerexport.snapshot": "2", model, identity, sha256: await digest(tensors) };
  const text = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(text.length / 8) * 8).fill(32);
  padded.set(text);
  const length = new BigUint64Array([BigInt(padded.length)]); // little-endian, as all browsers and Node are
  const parts = [length, padded, ...Array.from(tensors.values(), (tensor) => tensor.bytes)];
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Return the metadata and the tensors of a file, whose sizes and hash are checked. */
async function parse(file) {
  const damaged = new Error("this file is not a saved state");
  if (file.byteLength < 8) throw damaged;
  const length = Number(new DataView(file).getBigUint64(0, true));
  if (8 + length > file.byteLength) throw damaged;
  let content;
  try {
    content = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)));
  } catch {
    throw damaged;
  }
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: range }] of Object.entries(content)) {
    if (name === "__metadata__") continue;
    const count = shape.reduce((a, b) => a * b, 1);
    if (!BYTES[dtype] || range[1] - range[0] !== count * BYTES[dtype] || 8 + length + range[1] > file.byteLength)
      throw damaged;
    const bytes = file.slice(8 + length + range[0], 8 + length + range[1]); // a copy, aligned for its type
    tensors.set(name, { dtype: NAMES[dtype], shape, bytes, data: new ARRAYS[NAMES[dtype]](bytes) });
  }
  const header = content.__metadata__ ?? {};
  if (header["ligerexport.snapshot"] !== "2") throw new Error("a saved state of format 2 was expected");
  if (header.sha256 !== (await digest(tensors))) throw new Error("this state was changed after it was written");
  return { header, tensors };
}

/** Return the sha256 of all names and their bytes, in the order of the names, in hex. */
async function digest(tensors) {
  const parts = [...tensors.keys()].sort().flatMap((name) => [new TextEncoder().encode(name), tensors.get(name).bytes]);
  const hash = await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer());
  return Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return the number of slots of each KV head of a layer, and whether each head keeps scores. */
function headsOf(manifest, prefix, position) {
  const layer = Number(prefix.slice(prefix.lastIndexOf(".") + 1));
  const words = manifest.liger.heads?.[layer]?.split(" ");
  const sizes = manifest.slots?.[layer] ?? Array(position.shape[1]).fill(position.shape[2]);
  return sizes.map((size, head) => ({ size, scored: !words || words[head].includes("+") }));
}

/** Put the slots of a layer in the order of their positions, head by head: some runtimes leave them in any order. */
function order(given, wanted, heads, prefix) {
  const positions = Array.from(given.get(`${prefix}.slot_position`).data, Number);
  const from = [];
  const places = []; // of each slot among those with a score
  let scored = 0;
  for (const head of heads) {
    const slots = Array.from({ length: head.size }, (_, i) => from.length + i);
    places.push(...slots.map(() => (head.scored ? scored++ : -1)));
    from.push(...slots.sort((a, b) => positions[a] - positions[b]));
  }
  if (from.length !== positions.length) throw new Error(`${prefix} of this state has ${positions.length} slots`);
  for (const [name, tensor] of given) {
    if (!name.startsWith(`${prefix}.slot_`)) continue;
    const { data, shape } = tensor;
    const made = new data.constructor(data.length);
    if (name.endsWith("slot_score")) {
      const target = wanted.find(({ past }) => past === name)?.shape ?? shape;
      const [now, then] = [shape, target].map((sizes) => scoreIndex(sizes, heads[0].size, places, scored));
      const pools = data.length / scored;
      for (const [to, source] of from.entries())
        if (places[to] >= 0) for (let pool = 0; pool < pools; pool++) made[then(pool, to)] = data[now(pool, source)];
    } else {
      const width = data.length / from.length;
      for (const [to, source] of from.entries())
        made.set(data.subarray(source * width, (source + 1) * width), to * width);
    }
    given.set(name, { ...tensor, data: made });
  }
}

/** Return a function from a pool and a slot to the index of a score in `[1, H, pools, N]` or `[1, pools, slots]`. */
function scoreIndex(shape, size, places, scored) {
  if (shape.length === 3) return (pool, slot) => pool * scored + places[slot];
  return (pool, slot) => (Math.floor(slot / size) * shape[2] + pool) * size + (slot % size);
}

/** Return the numbers in the type of the artifact, or nothing if they are not converted here. */
function cast({ dtype, data }, scale, wanted) {
  if (dtype === wanted) return data;
  if (wanted === "int64" && dtype === "int32") return BigInt64Array.from(data, BigInt);
  if (wanted === "int32" && dtype === "int64") return Int32Array.from(data, Number);
  if (wanted !== "float32") return undefined;
  if (dtype === "float16") return Float32Array.from(data, half);
  if (dtype !== "int8" || !scale) return undefined;
  const width = data.length / scale.data.length;
  const scales = Float32Array.from(scale.data, half);
  return Float32Array.from(data, (code, i) => code * scales[Math.floor(i / width)]);
}

/** Return the number with these 16 bits. */
function half(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// The model, in its own thread. Incoming messages: { backend } first, then { prompt, options } with the options of
// `Writer`, { prompt } to continue the same text, { stop }, or { save } for the bytes of the state.

import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { Chat } from "./chat.mjs";
import { endIds, optimisation, Session, Writer } from "./liger.mjs";

const RUNTIME = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
const ARTIFACT = new URL("./artifact/", import.meta.url).href;

const json = async (name) => {
  const answer = await fetch(ARTIFACT + name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer.json();
};

let model, stopped, writer;

async function load(backend) {
  const manifest = await json("manifest.json");
  const optional = (name) => (name in manifest.files ? json(name) : {});
  const ort = await import(`${RUNTIME}ort.${backend}.min.mjs`);
  ort.env.wasm.wasmPaths = RUNTIME;
  const graph = manifest.graph.file;
  const weights = Object.keys(manifest.files).filter((name) => name.startsWith(graph) && name !== graph);
  const [tokens, names, more, generation, config, pieces, session] = await Promise.all([
    json("tokenizer.json"),
    optional("special_tokens_map.json"),
    optional("tokenizer_config.json"),
    optional("generation_config.json"),
    optional("config.json"),
    optional("chat.json"),
    ort.InferenceSession.create(ARTIFACT + graph, {
      executionProviders: [backend],
      graphOptimizationLevel: optimisation(manifest),
      // WebAssembly has no fast products with 4-bit weights, so they become fp32 while loading (lowering `portable`).
      extra: { session: { disable_quant_qdq: backend === "wasm" ? "1" : "0" } },
      externalData: weights.map((path) => ({ path, data: ARTIFACT + path })),
    }),
  ]);
  const settings = { ...names, ...more };
  const tokenizer = new Tokenizer(tokens, settings);
  model = {
    session: new Session(ort, manifest, session),
    tokenizer,
    pieces,
    ends: endIds(tokenizer, settings, generation, config),
  };
  postMessage({ ready: manifest.source.model, stateBytes: model.session.stateBytes });
}

/** Let messages such as stop arrive, which a promise of ONNX Runtime may not do. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(0);
  });

async function write({ prompt, options }) {
  stopped = false;
  if (options) {
    const chat = options.chat && new Chat(model.pieces);
    writer = new Writer(model.session, model.tokenizer, model.ends, { ...options, chat });
  }
  for await (const piece of writer.write(prompt)) {
    postMessage({ ...piece, stateBytes: model.session.stateBytes });
    await breathe();
    if (stopped) break;
  }
  postMessage({ done: true });
}

onmessage = async ({ data }) => {
  try {
    if (data.stop) stopped = true;
    else if (data.backend) await load(data.backend);
    else if (data.save) postMessage({ saved: await model.session.save() });
    else await write(data);
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};

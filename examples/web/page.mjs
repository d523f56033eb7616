// The page sends the prompt to the worker and shows its text. `?backend=webgpu` runs on the GPU.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.mjs", { type: "module" });
const megabytes = (bytes) => `state of ${(bytes / 1e6).toFixed(2)} MB`;
let ids, begin;

function busy(yes) {
  for (const id of ["write", "next", "save"]) at(id).disabled = yes || (id !== "write" && !ids);
  at("stop").disabled = !yes;
}

function download(bytes) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = "liger.state";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function options() {
  const number = (id) => (at(id).value ? Number(at(id).value) : undefined);
  return {
    tokens: number("tokens"),
    state: await at("state").files[0]?.arrayBuffer(),
    chat: at("chat").checked,
    system: at("system").value,
    stop: [at("stop-at").value],
    temperature: number("temperature"),
    topK: number("top-k"),
    topP: number("top-p"),
    minP: number("min-p"),
    seed: number("seed"),
  };
}

async function write(fresh) {
  ids = [];
  at("text").replaceChildren();
  busy(true);
  worker.postMessage({ prompt: at("prompt").value, options: fresh ? await options() : undefined });
}

worker.onerror = (event) => (at("status").textContent = `error: ${event.message}`);
worker.onmessage = ({ data }) => {
  const { ready, token, text, done, error, saved, stateBytes } = data;
  if (error) at("status").textContent = `error: ${error}`;
  else if (ready) at("status").textContent = `${ready} is ready, ${megabytes(stateBytes)}`;
  else if (saved) download(saved);
  else if (!done) {
    if (!ids.length) begin = performance.now();
    ids.push(token);
    at("text").append(text);
    const speed = (ids.length - 1) / ((performance.now() - begin) / 1000);
    const speeds = ids.length > 1 ? `, ${speed.toFixed(1)} a second` : "";
    at("status").textContent = `${ids.length} tokens${speeds}, ${megabytes(stateBytes)}`;
  }
  at("text").dataset.ids = ids?.join(" ") ?? "";
  if (ready || done || error || saved) busy(false);
};

document.querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  write(true);
};
at("next").onclick = () => write(false);
at("save").onclick = () => {
  busy(true);
  worker.postMessage({ save: true });
};
at("stop").onclick = () => worker.postMessage({ stop: true });

const gpu = new URLSearchParams(location.search).get("backend") === "webgpu" && "gpu" in navigator;
worker.postMessage({ backend: gpu ? "webgpu" : "wasm" });

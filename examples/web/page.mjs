// The page sends the prompt to the worker and shows its text. `?backend=webgpu` runs on the GPU.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.mjs", { type: "module" });
const megabytes = (bytes) => `state of ${(bytes / 1e6).toFixed(2)} MB`;
let ids, begin;

function busy(yes) {
  at("write").disabled = yes;
  at("stop").disabled = !yes;
}

worker.onerror = (event) => (at("status").textContent = `error: ${event.message}`);
worker.onmessage = ({ data }) => {
  const { ready, token, text, done, error, stateBytes } = data;
  if (error) at("status").textContent = `error: ${error}`;
  else if (ready) at("status").textContent = `${ready} is ready, ${megabytes(stateBytes)}`;
  else if (!done) {
    if (!ids.length) begin = performance.now();
    ids.push(token);
    at("text").append(text);
    const speed = (ids.length - 1) / ((performance.now() - begin) / 1000);
    const speeds = ids.length > 1 ? `, ${speed.toFixed(1)} a second` : "";
    at("status").textContent = `${ids.length} tokens${speeds}, ${megabytes(stateBytes)}`;
  }
  at("text").dataset.ids = ids?.join(" ") ?? "";
  if (ready || done || error) busy(false);
};

document.querySelector("form").onsubmit = async (event) => {
  event.preventDefault();
  ids = [];
  at("text").replaceChildren();
  busy(true);
  const state = await at("state").files[0]?.arrayBuffer();
  worker.postMessage({ prompt: at("prompt").value, tokens: Number(at("tokens").value), state });
};
at("stop").onclick = () => worker.postMessage({ stop: true });

const gpu = new URLSearchParams(location.search).get("backend") === "webgpu" && "gpu" in navigator;
worker.postMessage({ backend: gpu ? "webgpu" : "wasm" });

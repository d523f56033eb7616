// liger-run ARTIFACT --ids 1,2,3: generates and measures on a TensorRT engine; the last line of stdout is JSON.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "session.h"

namespace {

constexpr char kUsage[] =
    "usage: liger-run ARTIFACT --ids 1,2,3 [--follow 4,5] [--tokens N] [--batch N] [--sequences N] [--plugin FILE] [--build]\n"
    "                 [--precision fp16] [--no-graph] [--bench STEPS] [--prefill-bench TOKENS] [--profile STEPS]\n"
    "                 [--dump-logits FILE] [--dump-state FILE] [--verbose]\n"
    "Lists of ids may be @FILE. --follow: after generating, start again and give these one by one after the prompt;\n"
    "what is dumped is of that.\n"
    "--batch: the most sequences of the engine; --sequences: how many run, all unless given.\n"
    "The plugin is libligerexport_trt.so of the artifact if none is given. Logits are fp32 [calls, B, vocab]: of the\n"
    "prompt, then of each generated token. State is all tensors one after the other, in the order of the manifest.\n";

struct Settings {
  liger::Options options;
  std::vector<int32_t> ids, follow;
  int tokens = 64, bench = 0, prefill_bench = 0, profile = 0, sequences = 0;
  bool graph = true;
  std::string logits, state;
};

std::vector<int32_t> read_ids(std::string text) {
  if (!text.empty() && text[0] == '@') {
    std::ifstream file(text.substr(1));
    text.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::vector<int32_t> ids;
  std::istringstream list(text);
  for (std::string id; std::getline(list, id, ',');) ids.push_back(std::stoi(id));
  return ids;
}

// Throws `std::out_of_range` where a value is missing.
Settings parse(const std::vector<std::string>& words) {
  Settings made;
  made.options.artifact = words.at(0);
  made.options.plugin = made.options.artifact / "libligerexport_trt.so";
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--build") made.options.build = true;
    else if (word == "--graph") made.graph = true;
    else if (word == "--no-graph") made.graph = false;
    else if (word == "--verbose") made.options.verbose = true;
    else if (word == "--tokens") made.tokens = std::stoi(words.at(++i));
    else if (word == "--batch") made.options.batch = std::stoi(words.at(++i));
    else if (word == "--sequences") made.sequences = std::stoi(words.at(++i));
    else if (word == "--bench") made.bench = std::stoi(words.at(++i));
    else if (word == "--prefill-bench") made.prefill_bench = std::stoi(words.at(++i));
    else if (word == "--plugin") made.options.plugin = words.at(++i);
    else if (word == "--precision") made.options.precision = words.at(++i);
    else if (word == "--dump-logits") made.logits = words.at(++i);
    else if (word == "--dump-state") made.state = words.at(++i);
    else if (word == "--profile") made.profile = std::stoi(words.at(++i));
    else if (word == "--ids") made.ids = read_ids(words.at(++i));
    else if (word == "--follow") made.follow = read_ids(words.at(++i));
    else throw std::out_of_range(word);
  }
  if (made.sequences == 0) made.sequences = made.options.batch;
  if (made.ids.empty() || made.sequences < 1 || made.sequences > made.options.batch) throw std::out_of_range("--ids");
  return made;
}

nlohmann::json spread(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) { return times[static_cast<size_t>(share * (times.size() - 1) + 0.5)]; };
  return {{"median_ms", at(0.5)}, {"p10_ms", at(0.1)}, {"p90_ms", at(0.9)}, {"runs", times.size()}};
}

// The same prompt for all sequences.
std::vector<int32_t> repeated(const std::vector<int32_t>& ids, int batch) {
  std::vector<int32_t> all;
  for (int b = 0; b < batch; ++b) all.insert(all.end(), ids.begin(), ids.end());
  return all;
}

nlohmann::json generate(liger::Session& session, const Settings& settings) {
  std::ofstream dump;
  if (!settings.logits.empty()) dump.open(settings.logits, std::ios::binary);
  const auto keep = [&] {
    if (!dump.is_open()) return;
    const std::vector<float> logits = session.Logits();
    dump.write(reinterpret_cast<const char*>(logits.data()), static_cast<std::streamsize>(4 * logits.size()));
  };
  const bool last = settings.follow.empty();  // what is dumped
  std::vector<std::vector<int32_t>> written;
  const std::vector<int32_t> prompt = repeated(settings.ids, session.batch());
  session.Advance(prompt);
  std::vector<int32_t> next = session.Likeliest();
  if (last) keep();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < settings.tokens; ++i) {
    written.push_back(next);
    session.Advance(next);
    next = session.Likeliest();
    if (last) keep();
  }
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
  if (!last) {
    session.Reset();
    session.Advance(prompt);
    keep();
    for (const int32_t id : settings.follow) session.Advance(std::vector<int32_t>(session.batch(), id)), keep();
  }
  return {{"tokens", written}, {"tokens_per_second", settings.tokens / time.count()}};
}

nlohmann::json dump_state(const liger::Session& session, const std::string& path) {
  nlohmann::json described = nlohmann::json::array();
  std::ofstream file(path, std::ios::binary);
  for (const auto& x : session.state()) {
    std::vector<char> data(x.bytes);
    liger::check(cudaMemcpy(data.data(), x.data, x.bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    file.write(data.data(), static_cast<std::streamsize>(x.bytes));
    described.push_back({{"name", x.present}, {"dtype", x.dtype}, {"shape", x.shape}});
  }
  return described;
}

nlohmann::json time_prefill(liger::Session& session, int tokens) {
  const std::vector<int32_t> ids(static_cast<size_t>(tokens) * session.batch(), 1);
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    session.Reset();
    const auto begin = std::chrono::steady_clock::now();
    session.Advance(ids);
    liger::check(cudaStreamSynchronize(session.stream()), "a prefill");
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
    if (i >= 2) times.push_back(time.count());  // sizes that are new are prepared in the first
  }
  auto made = spread(times);
  made["tokens"] = tokens;
  return made;
}

nlohmann::json time_steps(liger::Session& session, int steps, bool graph) {
  std::vector<double> times;
  for (int i = 0; i < 20; ++i) session.TimeStep(graph);
  for (int i = 0; i < steps; ++i) times.push_back(session.TimeStep(graph));
  return spread(times);
}

}  // namespace

int main(int argc, char** argv) try {
  setenv("CUDA_MODULE_LOADING", "LAZY", 0);  // a builder has a thousand kernels, of which an engine needs some
  Settings settings;
  try {
    settings = parse({argv + 1, argv + argc});
  } catch (const std::logic_error&) {
    std::cerr << kUsage;
    return 2;
  }
  using Severity = nvinfer1::ILogger::Severity;
  liger::Logger logger(settings.options.verbose ? Severity::kVERBOSE : Severity::kWARNING);
  const liger::Engine engine(settings.options, logger);
  if (engine.seconds > 0) std::cerr << "built in " << engine.seconds << " s" << std::endl;
  liger::Session session(engine, settings.sequences, settings.graph);
  size_t available = 0, total = 0;
  liger::check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  nlohmann::json report = {{"tensorrt", getInferLibVersion()},  {"engine", engine.file.string()},
                           {"build_seconds", engine.seconds},   {"batch", settings.sequences},
                           {"graph", settings.graph},           {"state_bytes", session.state_bytes()},
                           {"prompt_tokens", settings.ids.size()}, {"device_bytes", total - available}};
  report["generated"] = generate(session, settings);
  if (!settings.state.empty()) report["state"] = dump_state(session, settings.state);
  if (settings.bench > 0 && settings.graph) report["step"] = time_steps(session, settings.bench, true);
  if (settings.bench > 0) report["step_no_graph"] = time_steps(session, settings.bench, false);
  if (settings.profile > 0) report["layers"] = session.Profile(settings.profile);
  if (settings.prefill_bench > 0) report["prefill"] = time_prefill(session, settings.prefill_bench);
  std::cout << report << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

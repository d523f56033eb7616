// liger-run ARTIFACT --ids 1,2,3: generates and measures on a TensorRT engine; the last line of stdout is JSON.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "session.h"

namespace {

constexpr char kUsage[] =
    "usage: liger-run ARTIFACT --ids 1,2,3 [--tokens N] [--batch N] [--plugin FILE] [--build] [--precision fp16]\n"
    "                 [--no-graph] [--bench STEPS] [--prefill-bench TOKENS] [--dump-logits FILE] [--dump-state FILE]\n"
    "                 [--verbose]\n"
    "The plugin is libligerexport_trt.so of the artifact if none is given. Logits are fp32 [calls, B, vocab]: of the\n"
    "prompt, then of each generated token. State is all tensors one after the other, in the order of the manifest.\n";

struct Settings {
  liger::Options options;
  std::vector<int32_t> ids;
  int tokens = 64, bench = 0, prefill_bench = 0;
  bool graph = true;
  std::string logits, state;
};

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
    else if (word == "--bench") made.bench = std::stoi(words.at(++i));
    else if (word == "--prefill-bench") made.prefill_bench = std::stoi(words.at(++i));
    else if (word == "--plugin") made.options.plugin = words.at(++i);
    else if (word == "--precision") made.options.precision = words.at(++i);
    else if (word == "--dump-logits") made.logits = words.at(++i);
    else if (word == "--dump-state") made.state = words.at(++i);
    else if (word == "--ids") {
      std::istringstream list(words.at(++i));
      for (std::string id; std::getline(list, id, ',');) made.ids.push_back(std::stoi(id));
    } else {
      throw std::out_of_range(word);
    }
  }
  if (made.ids.empty() || made.options.batch < 1) throw std::out_of_range("--ids");
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
  std::vector<std::vector<int32_t>> written;
  session.Advance(repeated(settings.ids, session.batch()));
  std::vector<int32_t> next = session.Likeliest();
  keep();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < settings.tokens; ++i) {
    written.push_back(next);
    if (i + 1 == settings.tokens && !dump.is_open()) break;
    session.Advance(next);
    next = session.Likeliest();
    keep();
  }
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
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

nlohmann::json time_steps(liger::Session& session, int steps) {
  std::vector<double> times;
  for (int i = 0; i < 20; ++i) session.TimeStep();
  for (int i = 0; i < steps; ++i) times.push_back(session.TimeStep());
  return spread(times);
}

}  // namespace

int main(int argc, char** argv) try {
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
  liger::Session session(engine, settings.options.batch, settings.graph);
  nlohmann::json report = {{"tensorrt", getInferLibVersion()},  {"engine", engine.file.string()},
                           {"build_seconds", engine.seconds},   {"batch", settings.options.batch},
                           {"graph", settings.graph},           {"state_bytes", session.state_bytes()},
                           {"prompt_tokens", settings.ids.size()}};
  report["generated"] = generate(session, settings);
  if (!settings.state.empty()) report["state"] = dump_state(session, settings.state);
  if (settings.bench > 0) report["step"] = time_steps(session, settings.bench);
  if (settings.prefill_bench > 0) report["prefill"] = time_prefill(session, settings.prefill_bench);
  std::cout << report << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

// liger-run ARTIFACT --ids 1,2,3: generates and measures on a TensorRT engine; the last line of stdout is JSON.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "capi.h"

namespace {

constexpr char kUsage[] =
    "usage: liger-run ARTIFACT --ids 1,2,3 [--follow 4,5] [--tokens N] [--batch N] [--sequences N] [--plugin FILE]\n"
    "                 [--build] [--precision fp16] [--no-graph] [--bench STEPS] [--prefill-bench TOKENS,..]\n"
    "                 [--profile STEPS] [--dump-logits FILE] [--dump-state FILE] [--verbose]\n"
    "       liger-run ARTIFACT --build [--batch N] [--plugin FILE] [--precision fp16]\n"
    "The plugin is libligerexport_trt.so beside this program, if none is given; an artifact's is not taken by itself.\n"
    "Logits are fp32 [calls, B, vocab]: of the prompt, then of each generated token. State is all tensors one after the other, in the\n"
    "order of the manifest. Lists of ids may be @FILE.\n"
    "--follow: after generating, start again and give these one by one after the prompt; what is dumped is of that.\n"
    "--batch: the most sequences of the engine; --sequences: how many run, all unless given.\n";

struct Settings {
  std::string artifact, plugin, precision, logits, state;
  std::vector<int32_t> ids, follow, prefill_bench;
  int batch = 1, sequences = 0, tokens = 64, bench = 0, profile = 0, flags = 0;
  bool graph = true;
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

// Throws `std::logic_error` if an argument makes no sense.
Settings parse(const std::vector<std::string>& words) {
  Settings made;
  made.artifact = words.at(0);
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--build") made.flags |= LIGER_BUILD;
    else if (word == "--graph") made.graph = true;
    else if (word == "--no-graph") made.graph = false;
    else if (word == "--verbose") made.flags |= LIGER_VERBOSE;
    else if (word == "--tokens") made.tokens = std::stoi(words.at(++i));
    else if (word == "--batch") made.batch = std::stoi(words.at(++i));
    else if (word == "--bench") made.bench = std::stoi(words.at(++i));
    else if (word == "--prefill-bench") made.prefill_bench = read_ids(words.at(++i));
    else if (word == "--plugin") made.plugin = words.at(++i);
    else if (word == "--precision") made.precision = words.at(++i);
    else if (word == "--dump-logits") made.logits = words.at(++i);
    else if (word == "--dump-state") made.state = words.at(++i);
    else if (word == "--sequences") made.sequences = std::stoi(words.at(++i));
    else if (word == "--profile") made.profile = std::stoi(words.at(++i));
    else if (word == "--ids") made.ids = read_ids(words.at(++i));
    else if (word == "--follow") made.follow = read_ids(words.at(++i));
    else throw std::out_of_range(word);
  }
  if (made.sequences == 0) made.sequences = made.batch;
  if (made.ids.empty() && !(made.flags & LIGER_BUILD)) throw std::out_of_range("--ids");
  return made;
}

template <typename T>
T need(T made) {
  if (made == nullptr) throw std::runtime_error(liger_error());
  return made;
}

void need(int failed) {
  if (failed) throw std::runtime_error(liger_error());
}

const char* text_or_null(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

using Engine = std::unique_ptr<liger_engine, decltype(&liger_engine_close)>;

// A session and the logits of its last call.
class Session {
 public:
  Session(const Engine& engine, int batch, bool graph)
      : session_(need(liger_session_open(engine.get(), batch, graph, 0)), liger_session_close),
        described(nlohmann::json::parse(liger_session_describe(session_.get()))),
        batch(batch),
        logits(batch * described.at("vocab").get<size_t>()) {}

  // `ids` are `[B, T]`, row by row; waits for logits if they are wanted.
  void Advance(const std::vector<int32_t>& ids, bool wanted) {
    const int tokens = static_cast<int>(ids.size()) / batch;
    need(liger_session_advance(get(), ids.data(), tokens, wanted ? logits.data() : nullptr));
  }

  std::vector<int32_t> Likeliest() const {
    std::vector<int32_t> best;
    const auto vocab = static_cast<int64_t>(logits.size()) / batch;
    for (auto row = logits.begin(); row != logits.end(); row += vocab)
      best.push_back(static_cast<int32_t>(std::max_element(row, row + vocab) - row));
    return best;
  }

  liger_session* get() { return session_.get(); }

 private:
  std::unique_ptr<liger_session, decltype(&liger_session_close)> session_;

 public:
  const nlohmann::json described;
  const int batch;
  std::vector<float> logits;
};

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

nlohmann::json generate(Session& session, const Settings& settings) {
  std::ofstream dump;
  if (!settings.logits.empty()) dump.open(settings.logits, std::ios::binary);
  const auto keep = [&] {
    if (!dump.is_open()) return;
    const auto* data = reinterpret_cast<const char*>(session.logits.data());
    dump.write(data, static_cast<std::streamsize>(sizeof(float) * session.logits.size()));
  };
  const bool last = settings.follow.empty();  // what is dumped
  std::vector<std::vector<int32_t>> written;
  const std::vector<int32_t> prompt = repeated(settings.ids, session.batch);
  session.Advance(prompt, true);
  std::vector<int32_t> next = session.Likeliest();
  if (last) keep();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < settings.tokens; ++i) {
    written.push_back(next);
    session.Advance(next, true);
    next = session.Likeliest();
    if (last) keep();
  }
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
  if (!last) {
    need(liger_session_reset(session.get(), LIGER_ALL_ROWS));
    session.Advance(prompt, true);
    keep();
    for (const int32_t id : settings.follow) session.Advance(std::vector<int32_t>(session.batch, id), true), keep();
  }
  return {{"tokens", written}, {"tokens_per_second", settings.tokens / time.count()}};
}

nlohmann::json dump_state(Session& session, const std::string& path) {
  nlohmann::json all = nlohmann::json::array();
  std::ofstream file(path, std::ios::binary);
  for (const auto& x : session.described.at("state")) {
    std::vector<char> data(x.at("bytes").get<size_t>());
    need(liger_session_read(session.get(), static_cast<int>(all.size()), LIGER_ALL_ROWS, data.data(), data.size()));
    file.write(data.data(), static_cast<std::streamsize>(data.size()));
    all.push_back({{"name", x.at("present")}, {"dtype", x.at("dtype")}, {"shape", x.at("shape")}});
  }
  return all;
}

nlohmann::json time_prefill(Session& session, int tokens) {
  std::vector<int32_t> ids(static_cast<size_t>(tokens) * session.batch);
  const auto vocab = static_cast<int64_t>(session.logits.size()) / session.batch;
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7919 % vocab);  // no repetition
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    need(liger_session_reset(session.get(), LIGER_ALL_ROWS));
    const auto begin = std::chrono::steady_clock::now();
    session.Advance(ids, false);
    need(liger_session_wait(session.get()));
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
    if (i >= 2) times.push_back(time.count());  // the first calls prepare new sizes
  }
  auto made = spread(times);
  made["tokens"] = tokens;
  return made;
}

nlohmann::json time_steps(Session& session, int steps, bool graph) {
  std::vector<double> times;
  for (int i = 0; i < 20 + steps; ++i) {
    double time = 0;
    need(liger_session_time_step(session.get(), graph, &time));
    if (i >= 20) times.push_back(time);
  }
  return spread(times);
}

}  // namespace

int main(int argc, char** argv) try {
  setenv("CUDA_MODULE_LOADING", "LAZY", 0);  // a builder has a thousand kernels, and an engine needs few
  Settings settings;
  try {
    settings = parse({argv + 1, argv + argc});
  } catch (const std::logic_error&) {
    std::cerr << kUsage;
    return 2;
  }
  const Engine engine(need(liger_engine_open(settings.artifact.c_str(), text_or_null(settings.plugin),
                                             text_or_null(settings.precision), settings.batch, settings.flags)),
                      liger_engine_close);
  auto report = nlohmann::json::parse(liger_engine_describe(engine.get()));
  if (!settings.ids.empty()) {
    Session session(engine, settings.sequences, settings.graph);
    size_t taken = 0;
    need(liger_device_bytes(&taken));
    report.update({{"batch", settings.sequences},
                   {"device_bytes", taken},
                   {"graph", settings.graph},
                   {"state_bytes", session.described.at("state_bytes")},
                   {"prompt_tokens", settings.ids.size()}});
    report["generated"] = generate(session, settings);
    if (!settings.state.empty()) report["state"] = dump_state(session, settings.state);
    if (settings.bench > 0 && settings.graph) report["step"] = time_steps(session, settings.bench, true);
    if (settings.bench > 0) report["step_no_graph"] = time_steps(session, settings.bench, false);
    if (settings.profile > 0)
      report["layers"] = nlohmann::json::parse(need(liger_session_profile(session.get(), settings.profile)));
    for (const int tokens : settings.prefill_bench) report["prefill"].push_back(time_prefill(session, tokens));
  }
  std::cout << report << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

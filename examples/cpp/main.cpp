// liger-run ARTIFACT PROMPT: writes text with an artifact of ligerexport, by ONNX Runtime alone.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "session.h"
#include "tokenizer.h"

namespace {

constexpr char kUsage[] =
    "usage: liger-run ARTIFACT PROMPT [--tokens N] [--threads N] [--ids] [--library FILE] [--state FILE]\n"
    "       liger-run ARTIFACT --encode     the ids of each line of stdin, a JSON string\n";

nlohmann::json read(const std::filesystem::path& file) {
  std::ifstream stream(file);
  return stream ? nlohmann::json::parse(stream) : nlohmann::json::object();
}

// Ids that end a text, from the configurations and the tokenizer's eos_token.
std::set<int64_t> ends(const std::filesystem::path& artifact, const Tokenizer& tokenizer) {
  std::set<int64_t> found;
  for (const char* name : {"generation_config.json", "config.json"}) {
    const auto id = read(artifact / name).value("eos_token_id", nlohmann::json());
    if (id.is_number()) found.insert(id.get<int64_t>());
    if (id.is_array()) found.merge(id.get<std::set<int64_t>>());
  }
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    auto token = read(artifact / name).value("eos_token", nlohmann::json());
    if (token.is_object()) token = token.value("content", nlohmann::json());
    if (token.is_string()) found.merge(tokenizer.added(token));
  }
  return found;
}

// Turns ONNX Runtime's telemetry off, unless the user has set the variable, which it reads only when it starts.
void disable_telemetry() {
  constexpr char kVariable[] = "ORT_DISABLE_TELEMETRY";
  if (std::getenv(kVariable)) return;
#ifdef _WIN32
  _putenv_s(kVariable, "1");
#else
  setenv(kVariable, "1", 1);
#endif
}

void encode_lines(const Tokenizer& tokenizer) {
  for (std::string line; std::getline(std::cin, line);)
    std::cout << nlohmann::json(tokenizer.encode(nlohmann::json::parse(line).get<std::string>())) << "\n";
}

void write(const std::filesystem::path& artifact, const std::string& prompt, int tokens, int threads, bool as_ids,
           const std::string& library, const std::string& state, const Tokenizer& tokenizer) {
  disable_telemetry();
  const auto stop = ends(artifact, tokenizer);
  Session session(artifact, threads, library);
  if (!state.empty()) session.restore(state);
  const auto ids = tokenizer.encode(prompt, state.empty());
  const auto has_text = [&](int64_t id) { return !tokenizer.bytes(id).empty(); };
  bool begins = tokenizer.strips_space() && std::none_of(ids.begin(), ids.end(), has_text);
  int64_t token = session.advance(ids);
  const auto begin = std::chrono::steady_clock::now();
  int count = 0;
  while (++count) {
    // The bytes of a character may come with several tokens; the reader of the stream joins them.
    std::string text = stop.count(token) ? "" : tokenizer.bytes(token);
    if (begins && !text.empty()) {
      if (text[0] == ' ') text.erase(0, 1);
      begins = false;
    }
    std::cout << (as_ids ? std::to_string(token) + " " : text) << std::flush;
    if (count >= tokens || stop.count(token)) break;
    token = session.advance({token});
  }
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
  std::cout << std::endl;
  std::fprintf(stderr, "%d tokens, %.1f a second, state of %.2f MB\n", count, (count - 1) / time.count(),
               session.state_bytes() / 1e6);
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::string> places;
  std::string library, state;
  int tokens = 64, threads = 0;
  bool as_ids = false, encode = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool more = i + 1 < argc;
    if (word == "--tokens" && more) tokens = std::stoi(argv[++i]);
    else if (word == "--threads" && more) threads = std::stoi(argv[++i]);
    else if (word == "--library" && more) library = argv[++i];
    else if (word == "--state" && more) state = argv[++i];
    else if (word == "--ids") as_ids = true;
    else if (word == "--encode") encode = true;
    else places.push_back(word);
  }
  if (places.size() != (encode ? 1 : 2)) {
    std::cerr << kUsage;
    return 2;
  }
  const std::filesystem::path artifact = places[0];
  const Tokenizer tokenizer(artifact / "tokenizer.json");
  if (encode) encode_lines(tokenizer);
  else write(artifact, places[1], tokens, threads, as_ids, library, state, tokenizer);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

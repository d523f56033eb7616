// liger-run ARTIFACT PROMPT: writes text with an artifact of ligerexport, by ONNX Runtime alone.

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
    "usage: liger-run ARTIFACT PROMPT [--tokens N] [--threads N] [--ids] [--library FILE]\n"
    "       liger-run ARTIFACT --encode     the ids of each line of stdin, a JSON string\n";

// Ids that end a text.
std::set<int64_t> ends(const std::filesystem::path& artifact) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    std::ifstream file(artifact / name);
    const auto config = file ? nlohmann::json::parse(file) : nlohmann::json::object();
    const auto id = config.value("eos_token_id", nlohmann::json());
    if (id.is_array()) return id.get<std::set<int64_t>>();
    if (id.is_number()) return {id.get<int64_t>()};
  }
  return {};
}

// Keeps ONNX Runtime from reporting to its makers, unless the user decided that himself. It reads this once, when it
// starts.
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
           const std::string& library, const Tokenizer& tokenizer) {
  disable_telemetry();
  const auto stop = ends(artifact);
  Session session(artifact, threads, library);
  int64_t token = session.advance(tokenizer.encode(prompt));
  const auto begin = std::chrono::steady_clock::now();
  int count = 0;
  while (++count) {
    // The bytes of a character may come with several tokens; whoever reads the stream puts them together.
    std::cout << (as_ids ? std::to_string(token) + " " : tokenizer.bytes(token)) << std::flush;
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
  std::string library;
  int tokens = 64, threads = 0;
  bool as_ids = false, encode = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool more = i + 1 < argc;
    if (word == "--tokens" && more) tokens = std::stoi(argv[++i]);
    else if (word == "--threads" && more) threads = std::stoi(argv[++i]);
    else if (word == "--library" && more) library = argv[++i];
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
  else write(artifact, places[1], tokens, threads, as_ids, library, tokenizer);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

// liger-run ARTIFACT PROMPT: writes text with an artifact of ligerexport, by ONNX Runtime alone.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>

#include "chat.h"
#include "prompt_cache.h"
#include "sampler.h"
#include "session.h"
#include "tokenizer.h"

namespace {

constexpr char kUsage[] =
    "usage: liger-run ARTIFACT PROMPT [options]\n"
    "       liger-run ARTIFACT --chat [options]     each line of stdin is a question\n"
    "       liger-run ARTIFACT --encode             the ids of each line of stdin, a JSON string\n"
    "  --tokens N            largest number of tokens to write, 64\n"
    "  --threads N           threads; 0 means one per core\n"
    "  --ids                 write ids in place of text\n"
    "  --library FILE        the compiled operator of the lowering native\n"
    "  --chat                send the prompt as a question, with the chat template\n"
    "  --system TEXT         what the chat begins with\n"
    "  --temperature X       0 takes the most likely token each time; also --top-k N, --top-p X, --min-p X\n"
    "  --seed N              the same seed writes the same text\n"
    "  --stop TEXT           end before this text; may be repeated\n"
    "  --prompt-cache FILE   keep the state after the beginning of the prompt\n"
    "  --state FILE          continue from a saved state\n"
    "  --save-state FILE     write the state after the prompt\n";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::vector<std::string> places, stops;
  std::string library, state, save_state, prompt_cache, system;
  int tokens = 64, threads = 0;
  bool as_ids = false, encode = false, chat = false;
  Sampling sampling;
};

template <typename Number>
Number number(const std::string& name, const std::string& text, Number low, Number high) {
  Number value{};
  bool whole = !text.empty();
  if constexpr (std::is_integral_v<Number>) {
    const auto end = text.data() + text.size();
    const auto [at, error] = std::from_chars(text.data(), end, value);
    whole = whole && error == std::errc() && at == end;
  } else {
    char* at = nullptr;
    value = std::strtod(text.c_str(), &at);
    whole = whole && *at == 0;
  }
  if (!whole || !(value >= low && value <= high)) {
    std::ostringstream message;
    message << name << " needs a " << (std::is_integral_v<Number> ? "whole " : "") << "number from " << low << " to "
            << high << ", not '" << text << "'";
    throw UsageError(message.str());
  }
  return value;
}

Options parse(int argc, char** argv) {
  constexpr int kMost = std::numeric_limits<int>::max();
  Options o;
  o.sampling.seed = uint64_t{std::random_device{}()} << 32 | std::random_device{}();
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> with_value = {
      {"--tokens", [&](auto& name, auto& x) { o.tokens = number(name, x, 1, kMost); }},
      {"--threads", [&](auto& name, auto& x) { o.threads = number(name, x, 0, 1024); }},
      {"--library", [&](auto&, auto& x) { o.library = x; }},
      {"--state", [&](auto&, auto& x) { o.state = x; }},
      {"--save-state", [&](auto&, auto& x) { o.save_state = x; }},
      {"--prompt-cache", [&](auto&, auto& x) { o.prompt_cache = x; }},
      {"--system", [&](auto&, auto& x) { o.system = x; }},
      {"--stop", [&](auto&, auto& x) { if (!x.empty()) o.stops.push_back(x); }},
      {"--temperature", [&](auto& name, auto& x) { o.sampling.temperature = number(name, x, 0.0, 1e6); }},
      {"--top-k", [&](auto& name, auto& x) { o.sampling.top_k = number(name, x, 0, kMost); }},
      {"--top-p", [&](auto& name, auto& x) { o.sampling.top_p = number(name, x, 1e-9, 1.0); }},
      {"--min-p", [&](auto& name, auto& x) { o.sampling.min_p = number(name, x, 0.0, 1.0); }},
      {"--seed", [&](auto& name, auto& x) { o.sampling.seed = number(name, x, uint64_t{0}, UINT64_MAX); }},
  };
  const std::map<std::string, bool*> flags = {{"--ids", &o.as_ids}, {"--encode", &o.encode}, {"--chat", &o.chat}};
  bool only_places = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto valued = with_value.find(word);
    const auto flag = flags.find(word);
    if (only_places || word.rfind("--", 0) != 0) {
      o.places.push_back(word);
    } else if (word == "--") {
      only_places = true;
    } else if (flag != flags.end()) {
      *flag->second = true;
    } else if (valued == with_value.end()) {
      throw UsageError("there is no option " + word);
    } else if (++i == argc) {
      throw UsageError(word + " needs a value");
    } else {
      valued->second(word, argv[i]);
    }
  }
  const size_t most = o.encode ? 1 : 2;
  if (o.places.size() > most || o.places.size() < (o.chat ? 1 : most))
    throw UsageError(o.encode ? "one artifact was expected" : "an artifact and one prompt were expected");
  if (!o.state.empty() && !o.prompt_cache.empty())
    throw UsageError("a prompt cache is for the beginning of a text: leave out --state or --prompt-cache");
  if (!o.system.empty() && !o.chat) throw UsageError("--system needs --chat");
  return o;
}

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

void encode_lines(const Tokenizer& tokenizer) {
  for (std::string line; std::getline(std::cin, line);)
    std::cout << nlohmann::json(tokenizer.encode(nlohmann::json::parse(line).get<std::string>())) << "\n";
}

// Writes texts with one session.
class Writer {
 public:
  Writer(const std::filesystem::path& artifact, const Options& options, const Tokenizer& tokenizer)
      : options_(options), tokenizer_(tokenizer), session_(artifact, options.threads, options.library),
        sampler_(options.sampling), ends_(::ends(artifact, tokenizer)) {
    if (options.chat) {
      chat_.emplace(artifact);
      ends_.merge(chat_->ends());
    }
    if (!options.state.empty()) session_.restore(options.state);
  }

  // Writes what follows a prompt or, in a chat, the answer to a question.
  void write(const std::string& prompt) {
    const bool special = options_.state.empty() && !chat_;
    const std::string text = !chat_ ? prompt : begun_ ? chat_->next(prompt) : chat_->first(options_.system, prompt);
    std::vector<int64_t> ids = unseen_;
    for (const int64_t id : tokenizer_.encode(text, special)) ids.push_back(id);
    const bool cached = !begun_ && !options_.prompt_cache.empty();
    const std::vector<float>* logits =
        cached ? &read_prompt(session_, ids, options_.prompt_cache) : &session_.advance(ids);
    if (!begun_ && !options_.save_state.empty()) session_.save(options_.save_state);
    begun_ = true;
    const auto has_text = [&](int64_t id) { return !tokenizer_.bytes(id).empty(); };
    bool begins = tokenizer_.strips_space() && std::none_of(ids.begin(), ids.end(), has_text);
    StopStrings stops(options_.stops, tokenizer_);
    const auto begin = std::chrono::steady_clock::now();
    for (int count = 1;; ++count) {
      const int64_t token = sampler_(*logits);
      const bool end = ends_.count(token) || stops.is_end(token);
      // The bytes of a character may come with several tokens; the reader of the stream joins them.
      std::string bytes = end ? "" : tokenizer_.bytes(token), out;
      if (begins && !bytes.empty()) {
        if (bytes[0] == ' ') bytes.erase(0, 1);
        begins = false;
      }
      const bool last = stops.push(bytes, out) || end || count == options_.tokens;
      if (last) out += stops.flush();
      std::cout << (options_.as_ids ? std::to_string(token) + " " : out) << std::flush;
      if (last) {
        unseen_ = end ? std::vector<int64_t>{} : std::vector<int64_t>{token};  // the next turn has the answer's end
        report(count, std::chrono::steady_clock::now() - begin);
        return;
      }
      logits = &session_.advance({token});
    }
  }

 private:
  void report(int count, std::chrono::duration<double> time) const {
    std::cout << std::endl;
    std::fprintf(stderr, "%d tokens, %.1f a second, state of %.2f MB\n", count, (count - 1) / time.count(),
                 session_.state_bytes() / 1e6);
  }

  const Options& options_;
  const Tokenizer& tokenizer_;
  Session session_;
  Sampler sampler_;
  std::set<int64_t> ends_;
  std::optional<Chat> chat_;
  bool begun_ = false;
  std::vector<int64_t> unseen_;  // written, but not yet read by the session
};

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  const std::filesystem::path artifact = options.places[0];
  const Tokenizer tokenizer(artifact / "tokenizer.json");
  if (options.encode) {
    encode_lines(tokenizer);
    return 0;
  }
  Writer writer(artifact, options, tokenizer);
  if (options.places.size() == 2) writer.write(options.places[1]);
  else for (std::string line; std::getline(std::cin, line);) writer.write(line);
  return 0;
} catch (const UsageError& error) {
  std::cerr << "error: " << error.what() << "\n" << kUsage;
  return 2;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}

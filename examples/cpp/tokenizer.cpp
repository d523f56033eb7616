#include "tokenizer.h"

#include <unicode/normalizer2.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <cctype>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace {

using nlohmann::json;

// GPT-2's pattern, which the pre-tokenizer ByteLevel uses.
constexpr char kByteLevel[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// SentencePiece's spelling of a space.
constexpr char kSpace[] = "\xE2\x96\x81";

constexpr int64_t kMostIds = 1 << 24;

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error("this program has no " + what +
                           "; it reads BPE tokenizers that are byte-level, or have Metaspace and byte fallback");
}

void check(UErrorCode status) {
  if (U_FAILURE(status)) throw std::runtime_error(std::string("ICU: ") + u_errorName(status));
}

// Tokens in tokenizer.json spell each byte as a printable character; this turns them back into bytes.
std::string unspell(const std::string& token) {
  static const auto byte_of = [] {
    std::unordered_map<UChar32, char> map;
    UChar32 next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
      map[printable ? byte : next++] = static_cast<char>(byte);
    }
    return map;
  }();
  std::string bytes;
  const auto text = icu::UnicodeString::fromUTF8(token);
  for (int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) {
    const auto found = byte_of.find(text.char32At(i));
    if (found == byte_of.end()) return token;  // an added token is its own text
    bytes += found->second;
  }
  return bytes;
}

// The text of a SentencePiece token: its name with spaces, or the byte of a name such as <0x0A>.
std::string unspell_piece(std::string token) {
  const bool byte = token.size() == 6 && token.compare(0, 3, "<0x") == 0 && token[5] == '>';
  if (byte && std::isxdigit(token[3]) && std::isxdigit(token[4]))
    return std::string(1, static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
  for (size_t at = 0; (at = token.find(kSpace, at)) != std::string::npos; ++at)
    token.replace(at, sizeof kSpace - 1, " ");
  return token;
}

// `\s` means Unicode's white space in the tokenizers library, but not in ICU.
std::string for_icu(std::string pattern) {
  for (size_t at = 0; (at = pattern.find('\\', at)) != std::string::npos && at + 1 < pattern.size();) {
    const char next = pattern[at + 1];
    const std::string text = next == 's' ? "\\p{White_Space}" : next == 'S' ? "\\P{White_Space}" : pattern.substr(at, 2);
    pattern.replace(at, 2, text);
    at += text.size();
  }
  return pattern;
}

std::string literally(const std::string& text) { return "\\Q" + text + "\\E"; }

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& file) {
  std::ifstream stream(file);
  if (!stream) throw std::runtime_error("there is no " + file.string());
  const json data = json::parse(stream);
  const json& model = data["model"];
  const auto set = [&](const char* key) { return model.contains(key) && !model[key].is_null() && model[key] != ""; };
  if (model.value("type", "BPE") != "BPE") refuse("model " + model["type"].dump());
  pieces_ = model.value("byte_fallback", false);
  if (set("dropout") || set("continuing_subword_prefix") || set("end_of_word_suffix")) refuse("marks within words");
  whole_pieces_ = model.value("ignore_merges", false);

  for (const auto& [token, id] : model["vocab"].items()) {
    vocabulary_[pieces_ ? token : unspell(token)] = id;
    name(id, pieces_ ? unspell_piece(token) : unspell(token));
  }
  for (const json& merge : model["merges"]) {
    std::string left, right;
    if (merge.is_array()) {
      left = merge[0], right = merge[1];
    } else {
      const std::string text = merge;
      const size_t space = text.find(' ');
      left = text.substr(0, space), right = text.substr(space + 1);
    }
    if (!pieces_) left = unspell(left), right = unspell(right);
    const uint64_t pair = static_cast<uint64_t>(vocabulary_.at(left)) << 32 | vocabulary_.at(right);
    merges_.emplace(pair, std::make_pair(merges_.size(), vocabulary_.at(left + right)));
  }
  for (const json& token : data["added_tokens"]) {
    if (token["single_word"] || token["lstrip"] || token["rstrip"]) refuse("added token with conditions");
    added_.push_back({token["content"], token["id"]});
    const std::string content = token["content"];
    name(token["id"], token["special"] ? "" : pieces_ ? unspell_piece(content) : content);
  }
  std::stable_sort(added_.begin(), added_.end(),
                   [](const Added& a, const Added& b) { return a.text.size() > b.text.size(); });

  if (const json& normalizer = data["normalizer"]; !normalizer.is_null()) {
    if (normalizer["type"] != "NFC") refuse("normalizer " + normalizer["type"].dump());
    nfc_ = true;
  }
  if (pieces_) {
    read_pieces(data["pre_tokenizer"], data["decoder"]);
  } else {
    if (data["decoder"].is_null() || data["decoder"]["type"] != "ByteLevel") refuse("decoder but ByteLevel");
    add_pre_tokenizer(data["pre_tokenizer"]);
  }
  if (!data["post_processor"].is_null()) add_post_processor(data["post_processor"]);
}

void Tokenizer::name(int64_t id, std::string bytes) {
  if (id < 0 || id >= kMostIds) refuse("token with the id " + std::to_string(id));
  if (bytes_.size() <= static_cast<size_t>(id)) bytes_.resize(id + 1);
  bytes_[id] = std::move(bytes);
}

template <typename Json>
void Tokenizer::read_pieces(const Json& splitter, Json decoder) {
  const bool plain = !splitter.is_null() && splitter["type"] == "Metaspace" && splitter["replacement"] == kSpace;
  if (!plain || splitter.value("split", true)) refuse("byte fallback with the pre-tokenizer " + splitter.dump());
  prepend_ = splitter.value("prepend_scheme", "always");
  const Json known = {{{"type", "Replace"}, {"pattern", {{"String", kSpace}}}, {"content", " "}},
                      {{"type", "ByteFallback"}},
                      {{"type", "Fuse"}}};
  const std::string found = decoder.dump();
  Json steps = decoder.is_null() ? Json() : decoder.value("decoders", Json::array());
  strips_ = !steps.empty() && steps.back() == Json{{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
  if (strips_) steps.erase(steps.size() - 1);
  if (steps != known) refuse("byte fallback with the decoder " + found);
  constexpr char kDigits[] = "0123456789ABCDEF";
  for (int byte = 0; byte < 256; ++byte) {
    const auto token = vocabulary_.find(std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + ">");
    if (token == vocabulary_.end()) refuse("byte fallback without a token for each byte");
    fallback_.push_back(token->second);
  }
}

template <typename Json>
void Tokenizer::add_pre_tokenizer(const Json& step) {
  const std::string type = step.is_null() ? "null" : step["type"].template get<std::string>();
  if (type == "Sequence") {
    for (const json& part : step["pretokenizers"]) add_pre_tokenizer(part);
  } else if (type == "ByteLevel") {
    prefix_space_ = step["add_prefix_space"];
    if (prefix_space_ && !splits_.empty()) refuse("ByteLevel with a space in front after another pre-tokenizer");
    if (step.value("use_regex", true)) add_split(kByteLevel, true);
  } else if (type == "Digits") {
    add_split(step["individual_digits"] ? "\\p{N}" : "\\p{N}+", true);
  } else if (type == "Split") {
    const std::string behavior = step["behavior"];
    const bool invert = step["invert"];
    if (behavior != "Isolated" && !(behavior == "Removed" && invert)) refuse("Split that is " + behavior);
    const json& pattern = step["pattern"];
    add_split(pattern.contains("Regex") ? pattern["Regex"].template get<std::string>() : literally(pattern["String"]),
              behavior == "Isolated");
  } else {
    refuse("pre-tokenizer " + type);
  }
}

template <typename Json>
void Tokenizer::add_post_processor(const Json& step) {
  const std::string type = step["type"];
  if (type == "Sequence") {
    for (const json& part : step["processors"]) add_post_processor(part);
  } else if (type == "TemplateProcessing") {
    bool seen = false;
    for (const json& piece : step["single"]) {
      if (piece.contains("Sequence")) {
        seen = true;
        continue;
      }
      auto& ids = seen ? after_ : before_;
      for (const int64_t id : step["special_tokens"][piece["SpecialToken"]["id"].template get<std::string>()]["ids"])
        ids.push_back(id);
    }
  } else if (type != "ByteLevel") {  // ByteLevel affects only offsets
    refuse("post-processor " + type);
  }
}

void Tokenizer::add_split(const std::string& pattern, bool gaps) {
  UErrorCode status = U_ZERO_ERROR;
  const auto text = icu::UnicodeString::fromUTF8(for_icu(pattern));
  splits_.push_back({std::unique_ptr<icu::RegexPattern>(icu::RegexPattern::compile(text, 0, status)), gaps});
  if (U_FAILURE(status)) refuse("pattern " + pattern);
}

std::vector<int64_t> Tokenizer::encode(const std::string& text, bool special) const {
  std::vector<int64_t> ids;
  if (special) ids = before_;
  size_t start = 0;
  for (size_t at = 0; at < text.size();) {
    const auto token = std::find_if(added_.begin(), added_.end(), [&](const Added& added) {
      return text.compare(at, added.text.size(), added.text) == 0;
    });
    if (token == added_.end()) {
      ++at;
      continue;
    }
    encode_text(text.substr(start, at - start), start == 0, ids);
    ids.push_back(token->id);
    start = at += token->text.size();
  }
  encode_text(text.substr(start), start == 0, ids);
  if (special) ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

void Tokenizer::encode_text(const std::string& text, bool first, std::vector<int64_t>& ids) const {
  if (text.empty()) return;
  UErrorCode status = U_ZERO_ERROR;
  auto whole = icu::UnicodeString::fromUTF8(text);
  if (nfc_) whole = icu::Normalizer2::getNFCInstance(status)->normalize(whole, status);
  check(status);
  if (prefix_space_ && whole[0] != ' ') whole.insert(0, ' ');
  if (pieces_) {
    const auto space = icu::UnicodeString::fromUTF8(kSpace);
    whole.findAndReplace(" ", space);
    if ((prepend_ == "always" || (prepend_ == "first" && first)) && !whole.startsWith(space)) whole.insert(0, space);
  }
  std::vector<icu::UnicodeString> pieces{whole};
  for (const Split& split : splits_) {
    std::vector<icu::UnicodeString> parts;
    const auto add = [&](const icu::UnicodeString& piece, int32_t from, int32_t to) {
      if (to > from) parts.emplace_back(piece, from, to - from);
    };
    for (const auto& piece : pieces) {
      const std::unique_ptr<icu::RegexMatcher> match(split.pattern->matcher(piece, status));
      int32_t end = 0;
      for (check(status); match->find(status); end = match->end(status)) {
        if (split.gaps) add(piece, end, match->start(status));
        add(piece, match->start(status), match->end(status));
      }
      check(status);
      if (split.gaps) add(piece, end, piece.length());
    }
    pieces = std::move(parts);
  }
  for (const auto& piece : pieces) {
    std::string bytes;
    encode_piece(piece.toUTF8String(bytes), ids);
  }
}

void Tokenizer::encode_piece(const std::string& piece, std::vector<int64_t>& ids) const {
  if (const auto whole = vocabulary_.find(piece); whole_pieces_ && whole != vocabulary_.end()) {
    ids.push_back(whole->second);
    return;
  }
  std::vector<int64_t> tokens;
  for (size_t at = 0, size = 1; at < piece.size(); at += size) {
    size = 1;
    while (pieces_ && at + size < piece.size() && (piece[at + size] & 0xC0) == 0x80) ++size;  // a character
    const auto found = vocabulary_.find(piece.substr(at, size));
    if (found != vocabulary_.end()) tokens.push_back(found->second);
    else if (!pieces_) throw std::runtime_error("the tokenizer has no token for a byte of the text");
    else for (size_t i = at; i < at + size; ++i) tokens.push_back(fallback_[static_cast<unsigned char>(piece[i])]);
  }
  merge(tokens);
  ids.insert(ids.end(), tokens.begin(), tokens.end());
}

// Merges the pair with the lowest rank first, and the leftmost of equals. Pieces can be long, so pairs are in a queue.
void Tokenizer::merge(std::vector<int64_t>& tokens) const {
  constexpr int64_t kGone = -1;
  const size_t end = tokens.size();
  std::vector<size_t> next(end), previous(end);
  std::priority_queue<Waiting, std::vector<Waiting>, std::greater<>> queue;
  const auto pair = [&](size_t left) { return static_cast<uint64_t>(tokens[left]) << 32 | tokens[next[left]]; };
  const auto wait = [&](size_t left) {
    if (next[left] == end) return;
    if (const auto found = merges_.find(pair(left)); found != merges_.end())
      queue.emplace(found->second.first, left, pair(left), found->second.second);
  };
  for (size_t i = 0; i < end; ++i) next[i] = i + 1, previous[i] = i - 1;
  for (size_t i = 0; i < end; ++i) wait(i);
  while (!queue.empty()) {
    const auto [rank, left, both, result] = queue.top();
    queue.pop();
    if (tokens[left] == kGone || next[left] == end || pair(left) != both) continue;  // one of them was already merged
    const size_t right = next[left];
    tokens[left] = result, tokens[right] = kGone, next[left] = next[right];
    if (next[left] != end) previous[next[left]] = left;
    wait(left);
    if (left != 0) wait(previous[left]);
  }
  tokens.erase(std::remove(tokens.begin(), tokens.end(), kGone), tokens.end());
}

const std::string& Tokenizer::bytes(int64_t id) const {
  static const std::string none;
  return static_cast<size_t>(id) < bytes_.size() ? bytes_[id] : none;
}

std::set<int64_t> Tokenizer::added(const std::string& token) const {
  std::set<int64_t> ids;
  for (const Added& added : added_)
    if (added.text == token) ids.insert(added.id);
  return ids;
}

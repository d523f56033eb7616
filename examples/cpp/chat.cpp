#include "chat.h"

#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <fstream>
#include <stdexcept>

namespace {

bool is_space(UChar32 c) { return u_isUWhiteSpace(c) || (c >= 0x1c && c <= 0x1f); }

std::string trimmed(const std::string& text) {
  const auto whole = icu::UnicodeString::fromUTF8(text);
  int32_t start = 0, end = whole.length();
  while (start < end && is_space(whole[start])) ++start;
  while (end > start && is_space(whole[end - 1])) --end;
  std::string found;
  return whole.tempSubStringBetween(start, end).toUTF8String(found);
}

}  // namespace

Chat::Chat(const std::filesystem::path& artifact) {
  std::ifstream file(artifact / "chat.json");
  if (!file)
    throw std::runtime_error(artifact.string() + " has no chat.json: its model has no chat template, or one that only "
                             "the package can render");
  pieces_ = nlohmann::json::parse(file);
}

std::string Chat::first(const std::string& system, const std::string& question) const {
  const auto& pieces = pieces_[system.empty() ? "first" : "system"];
  if (pieces.is_null()) throw std::runtime_error("chat.json has no pieces for a system message");
  std::string text = pieces[0];
  if (!system.empty()) text += said(system) + pieces[1].get<std::string>();
  return text + said(question) + pieces.back().get<std::string>();
}

std::string Chat::next(const std::string& question) const {
  const auto& pieces = pieces_["next"];
  return pieces[0].get<std::string>() + said(question) + pieces[1].get<std::string>();
}

std::string Chat::said(const std::string& text) const {
  for (const std::string token : pieces_["special"])
    if (text.find(token) != std::string::npos)
      throw std::runtime_error("a message has " + token + ", which this program cannot send as text");
  const std::string shorter = trimmed(text);
  if (shorter.empty()) throw std::runtime_error("a message is empty");
  return pieces_["trims"] ? shorter : text;
}

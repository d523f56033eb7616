// The chat template of an artifact, which chat.json has as pieces of text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

class Chat {
 public:
  // Throws std::runtime_error if the artifact has no chat.json.
  explicit Chat(const std::filesystem::path& artifact);

  // Text of a question that begins a conversation, with a system message unless that is empty.
  std::string first(const std::string& system, const std::string& question) const;

  // Text between the model's last answer and its next one.
  std::string next(const std::string& question) const;

  // Ids that end an answer.
  std::set<int64_t> ends() const { return pieces_["ends"].get<std::set<int64_t>>(); }

 private:
  std::string said(const std::string& text) const;

  nlohmann::json pieces_;
};

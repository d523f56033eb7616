// BPE from tokenizer.json: of bytes, or of characters with byte fallback, as in SentencePiece. Other kinds of tokenizer
// are refused with the reason.
#pragma once

#include <unicode/regex.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

class Tokenizer {
 public:
  explicit Tokenizer(const std::filesystem::path& file);

  // Ids of a text, with those of the post-processor, such as BOS, unless it continues another.
  std::vector<int64_t> encode(const std::string& text, bool special = true) const;

  // Bytes of a token, which may be part of a character. A special token has none.
  const std::string& bytes(int64_t id) const;

  // Whether decoding removes the space at the beginning of a text.
  bool strips_space() const { return strips_; }

  // Id of an added token, such as a special one; none if there is no such token.
  std::set<int64_t> added(const std::string& token) const;

 private:
  struct Split {
    std::unique_ptr<icu::RegexPattern> pattern;
    bool gaps;  // whether the text between matches is kept
  };
  struct Added {
    std::string text;
    int64_t id;
  };

  using Waiting = std::tuple<size_t, size_t, uint64_t, int64_t>;  // rank, place of the left one, pair, result

  template <typename Json>
  void read_pieces(const Json& splitter, Json decoder);
  template <typename Json>
  void add_pre_tokenizer(const Json& step);
  template <typename Json>
  void add_post_processor(const Json& step);
  void name(int64_t id, std::string bytes);
  void add_split(const std::string& pattern, bool gaps);
  void encode_text(const std::string& text, bool first, std::vector<int64_t>& ids) const;
  void encode_piece(const std::string& piece, std::vector<int64_t>& ids) const;
  void merge(std::vector<int64_t>& tokens) const;

  std::unordered_map<std::string, int64_t> vocabulary_;                  // by bytes, or by the names of pieces
  std::vector<std::string> bytes_;                                       // by id
  std::unordered_map<uint64_t, std::pair<uint32_t, uint32_t>> merges_;  // left << 32 | right: rank and result
  std::vector<Added> added_;                                             // longest first
  std::vector<Split> splits_;
  std::vector<int64_t> before_, after_, fallback_;
  std::string prepend_;  // when a text of pieces gets a leading space: always, first, never
  bool nfc_ = false, prefix_space_ = false, whole_pieces_ = false, pieces_ = false, strips_ = false;
};

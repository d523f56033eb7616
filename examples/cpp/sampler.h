// What comes after the logits: the next token, and where a text ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tokenizer.h"

struct Sampling {
  double temperature = 0, top_p = 1, min_p = 0;  // a temperature of 0 takes the most likely token
  size_t top_k = 0;                              // 0 takes all
  uint64_t seed = 0;
};

// Draws as the package does: the same seed writes the same tokens, but for rounding.
class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);

  int64_t operator()(const std::vector<float>& logits);

 private:
  double random();  // PCG64 (XSL RR 128/64), seeded as numpy does

  Sampling sampling_;
  uint64_t high_ = 0, low_ = 0, add_high_, add_low_;
};

// Cuts a stream of bytes before the first stop string, even if that arrives in pieces.
class StopStrings {
 public:
  // A stop string that begins with a special token stops at its id.
  StopStrings(std::vector<std::string> stops, const Tokenizer& tokenizer);

  bool is_end(int64_t id) const { return ids_.count(id) != 0; }

  // Adds bytes to `out` that are no part of a stop string; returns whether one was found.
  bool push(const std::string& bytes, std::string& out);

  // Bytes that were held back.
  std::string flush() { return std::move(held_); }

 private:
  std::vector<std::string> stops_;
  std::set<int64_t> ids_;
  std::string held_;
};

// One sequence on an artifact: the step graph, and the state that each call updates in place.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "state.h"

class Session {
 public:
  // `library` has the operator of artifacts with the lowering `native`, unless it is part of this program; 0 threads means one per physical core.
  Session(const std::filesystem::path& artifact, int threads, const std::string& library);

  // Advance by any number of tokens and return the logits of the next one.
  const std::vector<float>& advance(const std::vector<int64_t>& ids);

  // Continue from a state that any runtime of the same model has saved.
  void restore(const std::filesystem::path& file);

  // Write the state for any runtime of the same model. `ids` are all tokens that it has seen, for a prompt cache.
  void save(const std::filesystem::path& file, const std::vector<int64_t>& ids = {});

  const nlohmann::json& manifest() const { return manifest_; }

  size_t state_bytes() const;

 private:
  void run(const int64_t* ids, int64_t count);
  void halve_sums(int64_t times);

  nlohmann::json manifest_;
  Ort::Env env_;
  Ort::Session session_{nullptr};
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;  // input_ids, position, past.* and logits, present.*
  std::vector<Ort::Value> given_, made_;       // past and present of a tensor that does not grow share their memory
  std::vector<bool> grows_;
  std::vector<float> logits_;
  int64_t position_ = 0;
  size_t chunk_;
};

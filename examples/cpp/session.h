// One sequence on an artifact: the step graph, and the state that each call updates in place.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

class Session {
 public:
  // `library` has the operator of artifacts with the lowering `native`; 0 threads means one per physical core.
  Session(const std::filesystem::path& artifact, int threads, const std::string& library);

  // Advance by any number of tokens and return the most likely next one.
  int64_t advance(const std::vector<int64_t>& ids);

  // Continue from a state that any runtime of the same model has saved.
  void restore(const std::filesystem::path& file);

  size_t state_bytes() const;

 private:
  void run(const int64_t* ids, int64_t count);

  nlohmann::json manifest_;
  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR, "liger"};
  Ort::Session session_{nullptr};
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;  // input_ids, position, past.* and logits, present.*
  std::vector<Ort::Value> given_, made_;       // past and present of a tensor that does not grow share their memory
  std::vector<bool> grows_;
  std::vector<float> logits_;
  int64_t position_ = 0;
  size_t chunk_;
};

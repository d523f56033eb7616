// Builds a TensorRT engine from an artifact: plugin, parser, profiles, and the cached files.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace liger {

// The text of an error; a second line that begins with "hint: " says what to do.
inline std::runtime_error error(const std::string& text, const std::string& hint = "") {
  return std::runtime_error(hint.empty() ? text : text + "\nhint: " + hint);
}

inline void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) throw error(std::string(what) + ": " + cudaGetErrorString(result));
}

class Logger final : public nvinfer1::ILogger {
 public:
  explicit Logger(Severity most) : most_(most) {}
  void log(Severity severity, const char* text) noexcept override;

 private:
  Severity most_;
};

struct Options {
  std::filesystem::path artifact, plugin;  // "" for a plugin beside this library
  std::string precision;  // of activations; "" takes the manifest's
  int batch = 1;          // most sequences at once
  bool build = false;     // even if there is an engine
  bool verbose = false;
};

class Engine {
 public:
  explicit Engine(const Options& options);

  // The engine for one more session. Before TensorRT 10, two contexts cannot share a profile, so each session has its
  // own copy of the weights.
  std::shared_ptr<nvinfer1::ICudaEngine> Take();

  const nlohmann::json& manifest() const { return manifest_; }
  int batch() const { return batch_; }  // most sequences

  // Most tokens of each sequence in one call. Many sequences share the chunk, so that memory does not grow with both.
  int Chunk(int sequences) const;

  // The optimization profile of a session's steps or of its other calls.
  int Profile(int sequences, bool step) const;
  nlohmann::json Describe() const;

 private:
  bool Find(const Options& options);
  void Build(const Options& options);
  std::shared_ptr<nvinfer1::ICudaEngine> Read();

  Logger logger_;
  nlohmann::json manifest_, here_;
  int chunk_ = 0, batch_ = 0;
  double seconds_ = 0;  // duration of the build
  std::filesystem::path file_;
  std::mutex mutex_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::shared_ptr<nvinfer1::ICudaEngine> engine_;
};

}  // namespace liger

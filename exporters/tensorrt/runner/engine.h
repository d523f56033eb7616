// From an artifact to a TensorRT engine: the plugin, the parser, the profiles, and the files that are kept.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace liger {

inline void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(result));
}

class Logger final : public nvinfer1::ILogger {
 public:
  explicit Logger(Severity most) : most_(most) {}
  void log(Severity severity, const char* text) noexcept override;

 private:
  Severity most_;
};

struct Options {
  std::filesystem::path artifact, plugin;
  std::string precision;  // of activations, "" for what the manifest says
  int batch = 1;          // the most sequences at once
  bool build = false;     // even where there is an engine
  bool verbose = false;
};

struct Engine {
  Engine(const Options& options, Logger& logger);

  nlohmann::json manifest;
  int chunk;       // the most tokens of one call
  double seconds;  // that building took, 0 where it was read
  std::filesystem::path file;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;

 private:
  void Build(const Options& options, Logger& logger, const std::filesystem::path& plan);
};

}  // namespace liger

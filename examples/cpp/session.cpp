#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <stdexcept>

#ifdef LIGER_NATIVE  // the operator is part of this program, as on iOS, where an app loads no library by its path
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);
#endif

namespace {

constexpr size_t kChunk = 64;            // prompt tokens per call; more are not faster
constexpr int64_t kFade = int64_t{1} << 20;  // tokens after which sums without a decay are halved

template <typename Element>
Ort::Value view(const Ort::MemoryInfo& memory, Element* data, const std::vector<int64_t>& shape) {
  size_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  return Ort::Value::CreateTensor<Element>(memory, data, count, shape.data(), shape.size());
}

ONNXTensorElementDataType code_of(const std::string& type) {
  if (type == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (type == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (type == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  if (type == "int32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  if (type == "int8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  throw std::runtime_error("state of type " + type + ", which this program does not know");
}

size_t bytes_of(const Ort::Value& tensor) {
  const auto info = tensor.GetTensorTypeAndShapeInfo();
  for (const char* type : {"float32", "float16", "int64", "int32", "int8"})
    if (code_of(type) == info.GetElementType()) return info.GetElementCount() * width_of(type);
  return 0;
}

Ort::Value made_of(const std::vector<int64_t>& shape, const std::string& type) {
  Ort::AllocatorWithDefaultOptions allocator;
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), code_of(type));
}

// A tensor before the first token: floating-point numbers start at 0, and the positions of slots at -1.
Ort::Value filled(const std::vector<int64_t>& shape, const std::string& type, double fill) {
  Ort::Value tensor = made_of(shape, type);
  std::memset(tensor.GetTensorMutableRawData(), fill == -1 ? 0xff : 0, bytes_of(tensor));
  return tensor;
}

// Another tensor on the same memory.
Ort::Value alias(const Ort::MemoryInfo& memory, Ort::Value& tensor, const std::vector<int64_t>& shape) {
  return Ort::Value::CreateTensor(memory, tensor.GetTensorMutableRawData(), bytes_of(tensor), shape.data(),
                                  shape.size(), tensor.GetTensorTypeAndShapeInfo().GetElementType());
}

// Turns ONNX Runtime's telemetry off, unless the user has set the variable, which it reads only when it starts.
Ort::Env quiet_environment() {
  constexpr char kVariable[] = "ORT_DISABLE_TELEMETRY";
#ifdef _WIN32
  if (!std::getenv(kVariable)) _putenv_s(kVariable, "1");
#else
  setenv(kVariable, "1", 0);
#endif
  return Ort::Env(ORT_LOGGING_LEVEL_ERROR, "liger");
}

}  // namespace

Session::Session(const std::filesystem::path& artifact, int threads, const std::string& library)
    : env_(quiet_environment()) {
  std::ifstream file(artifact / "manifest.json");
  if (!file) throw std::runtime_error(artifact.string() + " is not an artifact: there is no manifest.json");
  manifest_ = nlohmann::json::parse(file);
  const auto& manifest = manifest_;
  if (manifest["format_version"] > 2 || manifest["target"] != "onnx")
    throw std::runtime_error("this program reads artifacts of format 1 or 2 for the target onnx");
  auto graph = manifest["graph"];
#ifndef LIGER_NATIVE
  if (manifest["lowering"] == "native" && library.empty()) {
    graph = manifest.value("fallback", nlohmann::json());
    if (graph.is_null())
      throw std::runtime_error("the lowering native needs --library, or build the artifact with --lowering native,ort");
  }
#endif

  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");  // free the cores between operators
  // The level at which the graph was verified: another one rounds differently.
  if (manifest["lowering"] != "portable") {
    const bool half = manifest["precision"] == "fp16" || manifest["precision"] == "bf16";
    options.SetGraphOptimizationLevel(half ? ORT_ENABLE_BASIC : ORT_DISABLE_ALL);
  }
  void* handle = nullptr;
  if (!library.empty())
    Ort::ThrowOnError(Ort::GetApi().RegisterCustomOpsLibrary(options, library.c_str(), &handle));
#ifdef LIGER_NATIVE
  else
    Ort::ThrowOnError(RegisterCustomOps(options, OrtGetApiBase()));
#endif
  session_ = Ort::Session(env_, (artifact / graph["file"].get<std::string>()).c_str(), options);

  chunk_ = std::min(kChunk, manifest["graph"]["max_chunk"].get<size_t>());
  logits_.resize(manifest["model"]["vocab_size"].get<size_t>());
  inputs_ = {"input_ids", "position"};
  outputs_ = {"logits"};
  given_.emplace_back(nullptr);  // the ids of each call
  given_.push_back(view(memory_, &position_, {1}));
  made_.push_back(view(memory_, logits_.data(), {1, static_cast<int64_t>(logits_.size())}));
  for (const auto& tensor : manifest["state"]) {
    std::vector<int64_t> shape;  // for one sequence (B), before it has grown (P)
    for (const auto& size : tensor["shape"])
      shape.push_back(size.is_number() ? size.get<int64_t>() : size == "B" ? 1 : 0);
    const bool grows = tensor["grows"];
    given_.push_back(filled(shape, tensor["dtype"], tensor["fill"]));
    Ort::Value present{nullptr};  // none for a growing tensor, which ONNX Runtime allocates
    if (!grows) present = alias(memory_, given_.back(), shape);
    made_.push_back(std::move(present));
    inputs_.push_back(tensor["past"]);
    outputs_.push_back(tensor["present"]);
    grows_.push_back(grows);
  }
}

const std::vector<float>& Session::advance(const std::vector<int64_t>& ids) {
  if (ids.empty()) throw std::runtime_error("the prompt has no tokens");
  for (size_t start = 0; start < ids.size(); start += chunk_) run(&ids[start], std::min(chunk_, ids.size() - start));
  return logits_;
}

void Session::run(const int64_t* ids, int64_t count) {
  std::vector<const char*> inputs, outputs;
  for (const auto& name : inputs_) inputs.push_back(name.c_str());
  for (const auto& name : outputs_) outputs.push_back(name.c_str());
  given_[0] = view(memory_, const_cast<int64_t*>(ids), {1, count});
  session_.Run(Ort::RunOptions{nullptr}, inputs.data(), given_.data(), given_.size(), outputs.data(), made_.data(),
               made_.size());
  for (size_t i = 0; i < grows_.size(); ++i) {
    if (!grows_[i]) continue;
    given_[2 + i] = std::move(made_[1 + i]);
    made_[1 + i] = Ort::Value{nullptr};
  }
  const int64_t before = position_ / kFade;
  position_ += count;
  if (const int64_t times = position_ / kFade - before) halve_sums(times);
}

// Sums without a decay would become inexact; readers use only their ratios.
void Session::halve_sums(int64_t times) {
  const auto ends = [](const std::string& name, const std::string& end) {
    return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  const std::string state = "recurrent_state", mass = "recurrent_mass";
  for (size_t i = 2; i < inputs_.size(); ++i) {
    std::string name = inputs_[i];
    bool sum = false;
    for (const char* end : {"recurrent_mass", "judge_state", "cell_count", "cell_key", "cell_value"})
      sum = sum || ends(name, end);
    if (ends(name, state)) {
      name.replace(name.size() - state.size(), state.size(), mass);
      sum = std::find(inputs_.begin(), inputs_.end(), name) != inputs_.end();
    }
    if (!sum) continue;
    auto* const numbers = static_cast<float*>(given_[i].GetTensorMutableRawData());
    const size_t count = given_[i].GetTensorTypeAndShapeInfo().GetElementCount();
    for (size_t j = 0; j < count; ++j) numbers[j] *= std::ldexp(1.0f, -static_cast<int>(times));
  }
}

size_t Session::state_bytes() const {
  size_t total = 0;
  for (size_t i = 2; i < given_.size(); ++i) total += bytes_of(given_[i]);
  return total;
}

void Session::restore(const std::filesystem::path& file) {
  const State state = read_state(file, manifest_);
  position_ = state.position;
  for (size_t i = 0; i < grows_.size(); ++i) {
    const Tensor& tensor = state.tensors.at(inputs_[2 + i]);
    if (grows_[i]) given_[2 + i] = made_of(tensor.shape, tensor.type);
    std::memcpy(given_[2 + i].GetTensorMutableRawData(), tensor.data.data(), tensor.data.size());
  }
}

void Session::save(const std::filesystem::path& file, const std::vector<int64_t>& ids) {
  State state{position_, {}};
  for (size_t i = 0; i < grows_.size(); ++i) {
    Ort::Value& value = given_[2 + i];
    const auto& tensor = manifest_["state"][i];
    const auto* data = static_cast<const char*>(value.GetTensorMutableRawData());
    std::vector<int64_t> shape;
    for (const auto& size : tensor["shape"])
      shape.push_back(size.is_number() ? size.get<int64_t>() : size == "B" ? 1 : position_);
    state.tensors[inputs_[2 + i]] = {tensor["dtype"], shape, {data, data + bytes_of(value)}};
  }
  write_state(file, manifest_, state, ids);
}

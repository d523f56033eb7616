#include "session.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

namespace {

constexpr size_t kChunk = 64;  // prompt tokens per call; more are not faster

template <typename Element>
Ort::Value filled(const std::vector<int64_t>& shape, Element value) {
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value tensor = Ort::Value::CreateTensor<Element>(allocator, shape.data(), shape.size());
  size_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  std::fill_n(tensor.GetTensorMutableData<Element>(), count, value);
  return tensor;
}

template <typename Element>
Ort::Value view(const Ort::MemoryInfo& memory, Element* data, const std::vector<int64_t>& shape) {
  size_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  return Ort::Value::CreateTensor<Element>(memory, data, count, shape.data(), shape.size());
}

}  // namespace

Session::Session(const std::filesystem::path& artifact, int threads, const std::string& library) {
  std::ifstream file(artifact / "manifest.json");
  if (!file) throw std::runtime_error(artifact.string() + " is not an artifact: there is no manifest.json");
  const auto manifest = nlohmann::json::parse(file);
  if (manifest["format_version"] != 1 || manifest["target"] != "onnx")
    throw std::runtime_error("this program reads artifacts of format 1 for the target onnx");
  if (manifest["lowering"] == "native" && library.empty())
    throw std::runtime_error("the lowering native needs --library, or build the artifact with --lowering ort");

  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");  // free the cores between operators
  void* handle = nullptr;
  if (!library.empty())
    Ort::ThrowOnError(Ort::GetApi().RegisterCustomOpsLibrary(options, library.c_str(), &handle));
  const auto graph = artifact / manifest["graph"]["file"].get<std::string>();
  session_ = Ort::Session(env_, graph.c_str(), options);

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
    const std::string type = tensor["dtype"];
    const bool grows = tensor["grows"];
    Ort::Value present{nullptr};  // none for a growing tensor, which ONNX Runtime allocates
    if (type == "float32") {
      given_.push_back(filled(shape, tensor["fill"].get<float>()));
      if (!grows) present = view(memory_, given_.back().GetTensorMutableData<float>(), shape);
    } else if (type == "int64") {
      given_.push_back(filled(shape, tensor["fill"].get<int64_t>()));
      if (!grows) present = view(memory_, given_.back().GetTensorMutableData<int64_t>(), shape);
    } else {
      throw std::runtime_error("state of type " + type + "; float32 and int64 were expected");
    }
    made_.push_back(std::move(present));
    inputs_.push_back(tensor["past"]);
    outputs_.push_back(tensor["present"]);
    grows_.push_back(grows);
  }
}

int64_t Session::advance(const std::vector<int64_t>& ids) {
  if (ids.empty()) throw std::runtime_error("the prompt has no tokens");
  for (size_t start = 0; start < ids.size(); start += chunk_) run(&ids[start], std::min(chunk_, ids.size() - start));
  return std::max_element(logits_.begin(), logits_.end()) - logits_.begin();
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
  position_ += count;
}

size_t Session::state_bytes() const {
  size_t total = 0;
  for (size_t i = 2; i < given_.size(); ++i) {
    const auto info = given_[i].GetTensorTypeAndShapeInfo();
    total += info.GetElementCount() * (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4);
  }
  return total;
}

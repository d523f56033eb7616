// A TensorRT for tests: engines of one small model whose arithmetic is on integers, so that any cut of a prompt gives
// the same bits. A "graph" is JSON with the names, types and shapes of inputs and outputs; an engine is that, with its
// sizes. Like TensorRT it refuses shapes outside the profile, and before version 10 a profile that is in use.

#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "fake.h"

using nlohmann::json;
using namespace nvinfer1;

namespace {

bool failing(const char* what) {
  const char* const given = std::getenv("FAKE_FAILS");
  return given != nullptr && std::strcmp(given, what) == 0;
}

const json* find(const json& graph, const char* name) {
  for (const char* side : {"inputs", "outputs"})
    for (const json& x : graph.at(side))
      if (x.at("name") == name) return &x;
  return nullptr;
}

Dims dims_of(const json& tensor) {
  Dims made{};
  for (const json& size : tensor.at("shape")) made.d[made.nbDims++] = size.is_string() ? -1 : size.get<int>();
  return made;
}

DataType type_of(const json& tensor) {
  const std::string name = tensor.at("dtype");
  return name == "float32" ? DataType::kFLOAT : name == "int32" ? DataType::kINT32 : DataType::kHALF;
}

struct Tensor final : ITensor {
  explicit Tensor(const json& x) : name(x.at("name")), dims(dims_of(x)), type(type_of(x)) {}
  const char* getName() const override { return name.c_str(); }
  Dims getDimensions() const override { return dims; }
  DataType getType() const override { return type; }
  std::string name;
  Dims dims;
  DataType type;
};

struct Bytes final : IHostMemory, fake::Counted {
  explicit Bytes(std::string given) : text(std::move(given)) {}
  void* data() const override { return const_cast<char*>(text.data()); }
  size_t size() const override { return text.size(); }
  std::string text;
};

struct Network final : INetworkDefinition, fake::Counted {
  int getNbInputs() const override { return static_cast<int>(inputs.size()); }
  ITensor* getInput(int index) const override { return const_cast<Tensor*>(&inputs[index]); }
  int getNbLayers() const override { return 0; }
  ILayer* getLayer(int) const override { return nullptr; }
  json graph;
  std::vector<Tensor> inputs;
};

struct Profile final : IOptimizationProfile {
  bool setDimensions(const char* name, OptProfileSelector select, const Dims& dims) override {
    if (std::strcmp(name, "input_ids") == 0 && select == OptProfileSelector::kMAX) most = dims;
    return true;
  }
  Dims most{};
};

struct Timing final : ITimingCache, fake::Counted {
  IHostMemory* serialize() const override { return new Bytes("timing"); }
};

struct Config final : IBuilderConfig, fake::Counted {
  bool setTacticSources(uint32_t) override { return true; }
  void setFlag(BuilderFlag) override {}
  void setPreviewFeature(PreviewFeature, bool) override {}
  int addOptimizationProfile(const IOptimizationProfile* x) override {
    profiles.push_back(static_cast<const Profile*>(x)->most);
    return static_cast<int>(profiles.size()) - 1;
  }
  ITimingCache* createTimingCache(const void*, size_t) const override { return new Timing; }
  bool setTimingCache(const ITimingCache& x, bool) override { return cache = &x, true; }
  const ITimingCache* getTimingCache() const override { return cache; }
  std::vector<Dims> profiles;
  const ITimingCache* cache = nullptr;
};

struct Builder final : IBuilder, fake::Counted {
  INetworkDefinition* createNetworkV2(uint32_t) override { return new Network; }
  IBuilderConfig* createBuilderConfig() override { return new Config; }
  IOptimizationProfile* createOptimizationProfile() override { return &profiles.emplace_back(); }
  IHostMemory* buildSerializedNetwork(INetworkDefinition& network, IBuilderConfig& config) override {
    if (failing("build")) return nullptr;
    json engine = {{"graph", static_cast<Network&>(network).graph}, {"version", getInferLibVersion()}};
    for (const Dims& most : static_cast<Config&>(config).profiles)
      engine["profiles"].push_back({most.d[0], most.d[1]});
    return new Bytes(engine.dump());
  }
  std::deque<Profile> profiles;
};

struct Engine;

constexpr int64_t kScratch = 1 << 12;

struct Context final : IExecutionContext, fake::Counted {
  explicit Context(Engine& engine) : engine(engine) {}
  ~Context() override;
  bool setOptimizationProfileAsync(int index, cudaStream_t) override;
  bool setInputShape(const char* name, const Dims& dims) override;
  bool setTensorAddress(const char* name, void* data) override { return addresses[name] = data, true; }
  bool enqueueV3(cudaStream_t stream) override;
  void setProfiler(IProfiler* given) override { profiler = given; }
#if NV_TENSORRT_MAJOR >= 10
  void setDeviceMemoryV2(void* data, int64_t size) override { scratch = size == kScratch ? data : nullptr; }
#else
  void setDeviceMemory(void* data) override { scratch = data; }
#endif

  template <typename T>
  T* at(const std::string& name) {
    return static_cast<T*>(addresses.at(name));
  }

  Engine& engine;
  int profile = -1;
  void* scratch = nullptr;
  bool ran = false;
  IProfiler* profiler = nullptr;
  std::map<std::string, void*> addresses;
  Dims ids{};
};

struct Engine final : ICudaEngine, fake::Counted {
  explicit Engine(json given) : all(std::move(given)), graph(all.at("graph")) {}
#if NV_TENSORRT_MAJOR >= 10
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) override { return new Context(*this); }
  int64_t getDeviceMemorySizeV2() const override { return kScratch; }
#else
  IExecutionContext* createExecutionContextWithoutDeviceMemory() override { return new Context(*this); }
  size_t getDeviceMemorySize() const override { return kScratch; }
#endif
  int getNbOptimizationProfiles() const override { return static_cast<int>(all.at("profiles").size()); }
  Dims getTensorShape(const char* name) const override { return dims_of(*find(graph, name)); }
  DataType getTensorDataType(const char* name) const override { return type_of(*find(graph, name)); }
  const json all;
  const json& graph;
  std::set<int> taken;
};

Context::~Context() { engine.taken.erase(profile); }

bool Context::setOptimizationProfileAsync(int index, cudaStream_t) {
  if (NV_TENSORRT_MAJOR < 10 && !engine.taken.insert(index).second) return false;
  profile = index;
  return true;
}

bool Context::setInputShape(const char* name, const Dims& dims) {
  const json* const tensor = find(engine.graph, name);
  const json& most = engine.all.at("profiles").at(profile);
  if (tensor == nullptr || dims.d[0] < 1 || dims.d[0] > most.at(0)) return false;
  if (std::strcmp(name, "input_ids") == 0) return ids = dims, dims.d[1] >= 1 && dims.d[1] <= most.at(1);
  const Dims known = dims_of(*tensor);
  for (int i = 1; i < known.nbDims; ++i)
    if (dims.d[i] != known.d[i]) return false;
  return true;
}

constexpr int kSlots = 4;

// Adds each token to a number in fp32, and leaves it in a ring of slots; padding leaves no trace.
bool Context::enqueueV3(cudaStream_t stream) {
  if (failing("run") || scratch == nullptr || (fake::capturing(stream) && !ran)) return false;
  for (const char* name : {"0.recurrent_state", "0.slot_position", "0.slot_key"})
    if (addresses.at(std::string("past.") + name) != addresses.at(std::string("present.") + name)) return false;
  ran = true;
  if (profiler != nullptr) profiler->reportLayerTime("LigerMixer", 0.25f);
  const auto rows = static_cast<int>(ids.d[0]), tokens = static_cast<int>(ids.d[1]);
  const auto vocab = static_cast<int>(engine.getTensorShape("logits").d[1]);
  const int32_t *id = at<int32_t>("input_ids"), *position = at<int32_t>("position");
  auto *sum = at<float>("past.0.recurrent_state"), *logits = at<float>("logits");
  auto* slot = at<int32_t>("past.0.slot_position");
  auto* key = at<uint16_t>("past.0.slot_key");
  fake::put(stream, [=] {
    for (int b = 0; b < rows; ++b) {
      for (int t = 0; t < tokens; ++t) {
        const int now = position[b] + t, x = id[b * tokens + t];
        if (now < 0) continue;
        sum[b] = std::fmod(sum[b] * 31 + static_cast<float>(7 * x + now), 65521.0f);
        slot[b * kSlots + now % kSlots] = now;
        key[b * kSlots + now % kSlots] = static_cast<uint16_t>(x + 1);
      }
      int64_t total = static_cast<int64_t>(sum[b]);
      for (int i = 0; i < kSlots; ++i) total += slot[b * kSlots + i] + (i + 1) * key[b * kSlots + i];
      for (int v = 0; v < vocab; ++v) logits[b * vocab + v] = static_cast<float>((total + 13 * v) % 97);
    }
  });
  return true;
}

struct Runtime final : IRuntime, fake::Counted {
  ICudaEngine* deserializeCudaEngine(const void* data, size_t size) override {
    const auto* const text = static_cast<const char*>(data);
    json engine = json::parse(text, text + size, nullptr, false);
    return engine.is_object() && engine.at("version") == getInferLibVersion() ? new Engine(engine) : nullptr;
  }
};

struct Registry final : IPluginRegistry {
  void* loadLibrary(const char*) override { return this; }
};

struct ParserError final : nvonnxparser::IParserError {
  int node() const override { return 3; }
  const char* desc() const override { return "no such operator"; }
};

struct Parser final : nvonnxparser::IParser, fake::Counted {
  explicit Parser(Network& network) : network(network) {}
  bool parseFromFile(const char* path, int) override {
    if (failing("parse")) return false;
    network.graph = json::parse(std::ifstream(path));
    for (const json& x : network.graph.at("inputs")) network.inputs.emplace_back(x);
    return true;
  }
  int getNbErrors() const override { return 1; }
  const nvonnxparser::IParserError* getError(int) const override { return &wrong; }
  Network& network;
  ParserError wrong;
};

}  // namespace

IBuilder* nvinfer1::createInferBuilder(ILogger&) { return new Builder; }
IRuntime* nvinfer1::createInferRuntime(ILogger&) { return new Runtime; }

nvonnxparser::IParser* nvonnxparser::createParser(INetworkDefinition& network, ILogger&) {
  return new Parser(static_cast<Network&>(network));
}

IPluginRegistry* getPluginRegistry() {
  static Registry registry;
  return &registry;
}

int getInferLibVersion() { return fake::number("FAKE_TENSORRT", NV_TENSORRT_MAJOR < 10 ? 8503 : 101302); }

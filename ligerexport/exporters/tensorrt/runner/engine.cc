#include "engine.h"

#include <NvOnnxParser.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

namespace liger {
namespace {

std::vector<char> read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return {};
  std::vector<char> data(static_cast<size_t>(file.tellg()));
  file.seekg(0).read(data.data(), static_cast<std::streamsize>(data.size()));
  return data;
}

// Writes a file that gets its name only when it is whole.
void write(const std::filesystem::path& path, const void* data, size_t size) {
  const std::filesystem::path part = path.string() + ".part";
  std::ofstream file(part, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file) throw error("cannot write " + part.string());
  std::filesystem::rename(part, path);
}

constexpr int kFewTokens = 128;  // fewest tokens of each of many sequences, however small their share of the chunk is
constexpr char kPlugin[] = "libligerexport_trt.so";

// The plugin beside this library, or one that the loader finds. Never the artifact's: a model must not bring code.
std::filesystem::path find_plugin() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&find_plugin), &info);
  const auto here = std::filesystem::path(info.dli_fname == nullptr ? "" : info.dli_fname).parent_path();
  for (const auto& file : {here / kPlugin, here / "plugin" / kPlugin})
    if (std::filesystem::exists(file)) return file;
  return kPlugin;
}

// Returns the file.
std::filesystem::path load_plugin(const Options& options) {
  const auto wanted = options.plugin.empty() ? find_plugin() : options.plugin;
  void* const library = dlopen(wanted.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw error(std::string("cannot open the plugin library: ") + dlerror(),
                "name it: liger-run --plugin FILE, or LIGEREXPORT_TRT_PLUGIN; one in an artifact is not taken by itself");
#if NV_TENSORRT_MAJOR >= 10
  if (getPluginRegistry()->loadLibrary(wanted.c_str()) == nullptr)
    throw error("TensorRT does not take " + wanted.string() + " as a plugin library");
#endif
  const auto kernels = options.artifact / "kernels.liger";
  const auto use = reinterpret_cast<int (*)(const char*)>(dlsym(library, "ligerexport_load_kernels"));
  if (use == nullptr) throw error(wanted.string() + " is no plugin library of ligerexport");
  if (std::filesystem::exists(kernels) && use(kernels.c_str()) != 0) throw error("cannot use " + kernels.string());
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(use), &info);
  return info.dli_fname;
}

std::string crc32(const std::vector<char>& data) {
  uint32_t crc = ~0u;
  for (const char byte : data) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  char text[9];
  std::snprintf(text, sizeof(text), "%08x", ~crc);
  return text;
}

// Everything that an engine depends on except its profiles; `package.py` writes the same.
nlohmann::json record_of(const Options& options, const nlohmann::json& manifest, const std::filesystem::path& plugin) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const std::string graph = manifest.at("graph").at("file");
  std::string model;
  for (const std::string& name : {graph, graph + ".data", std::string("kernels.liger")})
    if (manifest.at("files").contains(name))
      model += (model.empty() ? "" : "-") + manifest["files"][name].at("sha256").get<std::string>().substr(0, 8);
  return {{"tensorrt", getInferLibVersion()},
          {"sm", 10 * major + minor},
          {"plugin", crc32(read(plugin))},
          {"precision", options.precision.empty() ? manifest.at("precision").get<std::string>() : options.precision},
          {"model", model}};
}

std::string describe(const nlohmann::json& record) {
  std::string text;
  for (const auto& [key, value] : record.items())
    text += (text.empty() ? "" : ", ") + key + " " + (value.is_string() ? value.get<std::string>() : value.dump());
  return text;
}

#if NV_TENSORRT_MAJOR < 10
// Without strong typing, a builder may compute 32-bit parts of a graph in 16 bits; norms, softmax and logits keep 32.
void keep_floats(nvinfer1::INetworkDefinition& network) {
  using nvinfer1::DataType;
  using nvinfer1::LayerType;
  for (int i = 0; i < network.getNbLayers(); ++i) {
    nvinfer1::ILayer& layer = *network.getLayer(i);
    if (layer.getType() == LayerType::kCONSTANT || layer.getType() == LayerType::kPLUGIN_V2) continue;
    bool floats = layer.getNbInputs() > 0 && layer.getNbOutputs() > 0;
    for (int j = 0; j < layer.getNbInputs(); ++j)
      floats = floats && layer.getInput(j) != nullptr && layer.getInput(j)->getType() == DataType::kFLOAT;
    for (int j = 0; j < layer.getNbOutputs(); ++j) floats = floats && layer.getOutput(j)->getType() == DataType::kFLOAT;
    if (floats) layer.setPrecision(DataType::kFLOAT);
  }
}
#endif

}  // namespace

void Logger::log(Severity severity, const char* text) noexcept {
#if NV_TENSORRT_MAJOR < 10
  // TensorRT 8.5 reports this for every input of all profiles but the first in each call, although it works.
  if (std::strstr(text, "getProfileDimensions: bindingIndex")) return;
#endif
  if (severity <= most_) std::fprintf(stderr, "tensorrt: %s\n", text);
}

Engine::Engine(const Options& options)
    : logger_(options.verbose ? nvinfer1::ILogger::Severity::kVERBOSE : nvinfer1::ILogger::Severity::kWARNING) {
  std::ifstream text(options.artifact / "manifest.json");
  if (!text) throw error(options.artifact.string() + " is not an artifact: there is no manifest.json");
  manifest_ = nlohmann::json::parse(text);
  const int format = manifest_.at("format_version");  // 2 has states with one axis for the slots of all KV heads
  if (format < 1 || format > 2 || manifest_.at("lowering") != "plugin")
    throw error("this program reads artifacts of formats 1 and 2 with the lowering plugin");
  chunk_ = manifest_.at("graph").at("max_chunk");
  if (const int most = manifest_.at("device").at("max_batch"); options.batch < 1 || options.batch > most)
    throw error("batch " + std::to_string(options.batch), "this artifact has kernels for 1 to " + std::to_string(most) +
                                                              " sequences; build it with --max-batch");
  here_ = record_of(options, manifest_, load_plugin(options));
  if (options.build || !Find(options)) Build(options);
  runtime_.reset(nvinfer1::createInferRuntime(logger_));
  engine_ = Read();
}

// Looks for the engine with the fewest sequences that suffice. Engines for other machines are not deserialised.
bool Engine::Find(const Options& options) {
  std::string other;
  bool known = false;
  for (const auto& entry : std::filesystem::directory_iterator(options.artifact)) {
    if (entry.path().extension() != ".engine") continue;
    const auto data = read(entry.path().string() + ".json");
    auto record = nlohmann::json::parse(data.begin(), data.end(), nullptr, false);
    if (!record.is_object() || !record["batch"].is_number_integer()) {
      other = entry.path().filename().string() + " does not say what it was built for";
      continue;
    }
    const int batch = record["batch"];
    record.erase("batch");
    if (record != here_) {
      other = entry.path().filename().string() + " was built for " + describe(record);
      continue;
    }
    known = true;
    if (batch >= options.batch && (file_.empty() || batch < batch_)) file_ = entry.path(), batch_ = batch;
  }
  if (!known && !other.empty())
    throw error(other + "; here is " + describe(here_), "liger-run " + options.artifact.string() + " --build --batch " +
                                                            std::to_string(options.batch));
  return !file_.empty();
}

int Engine::Profile(int sequences, bool step) const {
  if (batch_ == 1) return step ? 0 : 1;
  return (step ? 0 : 2) + (sequences == 1 ? 0 : 1);
}

int Engine::Chunk(int sequences) const {
  return sequences == 1 ? chunk_ : std::min(chunk_, std::max(kFewTokens, chunk_ / batch_));
}

nlohmann::json Engine::Describe() const {
  nlohmann::json all = here_;
  all.update({{"engine", file_.string()}, {"build_seconds", seconds_}, {"batch", batch_}, {"chunk", chunk_}});
  return all;
}

std::shared_ptr<nvinfer1::ICudaEngine> Engine::Read() {
  const auto data = read(file_);
  std::shared_ptr<nvinfer1::ICudaEngine> engine;
  if (runtime_) engine.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
  if (!engine) throw error("TensorRT cannot read " + file_.string(), "build it again with --build");
  if (engine->getNbOptimizationProfiles() != 1 + Profile(batch_, false))
    throw error(file_.string() + " was built by another version of this program", "build it again with --build");
  return engine;
}

std::shared_ptr<nvinfer1::ICudaEngine> Engine::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (NV_TENSORRT_MAJOR < 10 && engine_.use_count() > 1) return Read();
  return engine_;
}

void Engine::Build(const Options& options) {
  const auto begin = std::chrono::steady_clock::now();
  const std::string stem = "trt" + here_["tensorrt"].dump() + "-sm" + here_["sm"].dump();
  const std::filesystem::path timing = options.artifact / (stem + ".timing");
  batch_ = options.batch;
  file_ = options.artifact / (stem + "-b" + std::to_string(batch_) + ".engine");
  std::fprintf(stderr, "liger: building %s, which takes minutes\n", file_.c_str());

  std::unique_ptr<nvinfer1::IBuilder> builder(nvinfer1::createInferBuilder(logger_));
  if (!builder) throw error("TensorRT cannot make a builder");
#if NV_TENSORRT_MAJOR >= 11
  const uint32_t flags = 0;
#elif NV_TENSORRT_MAJOR == 10
  const uint32_t flags = 1u << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  const uint32_t flags = 1u << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#endif
  std::unique_ptr<nvinfer1::INetworkDefinition> network(builder->createNetworkV2(flags));
  std::unique_ptr<nvonnxparser::IParser> parser(nvonnxparser::createParser(*network, logger_));
  const auto graph = options.artifact / manifest_.at("graph").at("file").get<std::string>();
  const auto severity = static_cast<int>(nvinfer1::ILogger::Severity::kWARNING);
  if (!parser || !parser->parseFromFile(graph.c_str(), severity)) {
    std::string text = "the parser refuses " + graph.string();
    for (int i = 0; parser && i < parser->getNbErrors(); ++i) {
      const auto* refused = parser->getError(i);
      text += "\n  node " + std::to_string(refused->node()) + ": " + refused->desc();
    }
    throw error(text);
  }

  std::unique_ptr<nvinfer1::IBuilderConfig> config(builder->createBuilderConfig());
#if NV_TENSORRT_MAJOR < 10
  config->setTacticSources(0);  // the plugin computes all products
  config->setPreviewFeature(nvinfer1::PreviewFeature::kFASTER_DYNAMIC_SHAPES_0805, true);
  bool halves = false;  // also in an fp32 graph, if its state has them
  for (int i = 0; i < network->getNbInputs(); ++i)
    halves = halves || network->getInput(i)->getType() == nvinfer1::DataType::kHALF;
  const std::string precision = here_["precision"];
  if (halves || precision == "fp16" || precision == "float16" || precision == "int8") {  // codes have fp16 beside them
    config->setFlag(nvinfer1::BuilderFlag::kFP16);
    config->setFlag(nvinfer1::BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
    keep_floats(*network);
  }
#endif
  std::vector<std::pair<int, int>> calls = {{1, 1}, {1, chunk_}};  // `Profile` relies on the order
  if (batch_ > 1) calls = {{1, 1}, {batch_, 1}, {1, chunk_}, {batch_, Chunk(batch_)}};
  for (const auto& [batch, tokens] : calls) {
    nvinfer1::IOptimizationProfile* profile = builder->createOptimizationProfile();
    for (int i = 0; i < network->getNbInputs(); ++i) {
      const nvinfer1::ITensor* input = network->getInput(i);
      nvinfer1::Dims least = input->getDimensions(), most = least;
      for (int axis = 0; axis < least.nbDims; ++axis) {
        if (least.d[axis] >= 0) continue;
        least.d[axis] = 1;  // the first axis is B, the second of the ids is T
        most.d[axis] = axis == 0 ? batch : tokens;
      }
      profile->setDimensions(input->getName(), nvinfer1::OptProfileSelector::kMIN, least);
      profile->setDimensions(input->getName(), nvinfer1::OptProfileSelector::kOPT, most);
      profile->setDimensions(input->getName(), nvinfer1::OptProfileSelector::kMAX, most);
    }
    if (config->addOptimizationProfile(profile) < 0) throw error("TensorRT refuses an optimization profile");
  }
  const auto known = read(timing);
  std::unique_ptr<nvinfer1::ITimingCache> cache(config->createTimingCache(known.data(), known.size()));
  if (cache) config->setTimingCache(*cache, false);
  std::unique_ptr<nvinfer1::IHostMemory> made(builder->buildSerializedNetwork(*network, *config));
  if (!made) throw error("TensorRT cannot build an engine of " + graph.string());

  nlohmann::json record = here_;
  record["batch"] = batch_;
  const std::string text = record.dump(1) + "\n";
  write(file_, made->data(), made->size());
  write(file_.string() + ".json", text.data(), text.size());
  if (const auto* timed = config->getTimingCache()) {
    const std::unique_ptr<nvinfer1::IHostMemory> data(timed->serialize());
    if (data) write(timing, data->data(), data->size());
  }
  seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace liger

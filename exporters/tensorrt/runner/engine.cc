#include "engine.h"

#include <NvOnnxParser.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
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

// Under its name only when it is whole.
void write(const std::filesystem::path& path, const nvinfer1::IHostMemory& data) {
  const std::filesystem::path part = path.string() + ".part";
  std::ofstream file(part, std::ios::binary);
  file.write(static_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + part.string());
  std::filesystem::rename(part, path);
}

void load_plugin(const Options& options) {
  void* const library = dlopen(options.plugin.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(std::string("cannot open the plugin library: ") + dlerror());
#if NV_TENSORRT_MAJOR >= 10
  if (getPluginRegistry()->loadLibrary(options.plugin.c_str()) == nullptr)
    throw std::runtime_error("TensorRT does not take " + options.plugin.string() + " as a plugin library");
#endif
  const auto kernels = options.artifact / "kernels.liger";
  const auto use = reinterpret_cast<int (*)(const char*)>(dlsym(library, "ligerexport_load_kernels"));
  if (use == nullptr) throw std::runtime_error(options.plugin.string() + " is no plugin library of ligerexport");
  if (std::filesystem::exists(kernels) && use(kernels.c_str()) != 0)
    throw std::runtime_error("cannot use " + kernels.string());
}

#if NV_TENSORRT_MAJOR < 10
// Before strong typing a builder may compute in 16 bits what the graph has in 32: norms, softmax and logits stay.
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
  if (severity <= most_) std::fprintf(stderr, "tensorrt: %s\n", text);
}

Engine::Engine(const Options& options, Logger& logger) : seconds(0) {
  std::ifstream text(options.artifact / "manifest.json");
  if (!text) throw std::runtime_error(options.artifact.string() + " is not an artifact: there is no manifest.json");
  manifest = nlohmann::json::parse(text);
  if (manifest.at("format_version") != 1 || manifest.at("lowering") != "plugin")
    throw std::runtime_error("this program reads artifacts of format 1 with the lowering plugin");
  chunk = manifest.at("graph").at("max_chunk");
  load_plugin(options);

  int device = 0;
  cudaDeviceProp properties{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const std::string stem = "trt" + std::to_string(getInferLibVersion()) + "-sm" + std::to_string(properties.major) +
                           std::to_string(properties.minor);
  file = options.artifact / (stem + "-b" + std::to_string(options.batch) + ".engine");
  if (options.build || !std::filesystem::exists(file)) {
    const auto begin = std::chrono::steady_clock::now();
    Build(options, logger, options.artifact / (stem + ".timing"));
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  const auto data = read(file);
  runtime.reset(nvinfer1::createInferRuntime(logger));
  if (runtime) engine.reset(runtime->deserializeCudaEngine(data.data(), data.size()));
  if (!engine) throw std::runtime_error("TensorRT cannot read " + file.string() + "; try --build");
}

void Engine::Build(const Options& options, Logger& logger, const std::filesystem::path& timing) {
  std::unique_ptr<nvinfer1::IBuilder> builder(nvinfer1::createInferBuilder(logger));
  if (!builder) throw std::runtime_error("TensorRT cannot make a builder");
#if NV_TENSORRT_MAJOR >= 11
  const uint32_t flags = 0;
#elif NV_TENSORRT_MAJOR == 10
  const uint32_t flags = 1u << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  const uint32_t flags = 1u << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#endif
  std::unique_ptr<nvinfer1::INetworkDefinition> network(builder->createNetworkV2(flags));
  std::unique_ptr<nvonnxparser::IParser> parser(nvonnxparser::createParser(*network, logger));
  const auto graph = options.artifact / manifest.at("graph").at("file").get<std::string>();
  const auto severity = static_cast<int>(nvinfer1::ILogger::Severity::kWARNING);
  if (!parser || !parser->parseFromFile(graph.c_str(), severity)) {
    std::string text = "the parser refuses " + graph.string();
    for (int i = 0; parser && i < parser->getNbErrors(); ++i) {
      const auto* error = parser->getError(i);
      text += "\n  node " + std::to_string(error->node()) + ": " + error->desc();
    }
    throw std::runtime_error(text);
  }

  std::unique_ptr<nvinfer1::IBuilderConfig> config(builder->createBuilderConfig());
#if NV_TENSORRT_MAJOR < 10
  using nvinfer1::TacticSource;
  // There is nothing for cuDNN; what joins products with their neighbours asks for cuBLAS.
  config->setTacticSources(1u << static_cast<int>(TacticSource::kCUBLAS) |
                           1u << static_cast<int>(TacticSource::kCUBLAS_LT));
  config->setPreviewFeature(nvinfer1::PreviewFeature::kFASTER_DYNAMIC_SHAPES_0805, true);
  const std::string precision =
      options.precision.empty() ? manifest.at("precision").get<std::string>() : options.precision;
  if (precision == "fp16" || precision == "float16") {
    config->setFlag(nvinfer1::BuilderFlag::kFP16);
    config->setFlag(nvinfer1::BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
    keep_floats(*network);
  }
#endif
  // One token of one sequence, of any number of them, and a chunk, which is the last.
  std::vector<std::pair<int, int>> calls = {{options.batch, 1}, {options.batch, chunk}};
  if (options.batch > 1) calls.insert(calls.begin(), {1, 1});
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
    if (config->addOptimizationProfile(profile) < 0)
      throw std::runtime_error("TensorRT refuses an optimization profile");
  }
  const auto known = read(timing);
  std::unique_ptr<nvinfer1::ITimingCache> cache(config->createTimingCache(known.data(), known.size()));
  if (cache) config->setTimingCache(*cache, false);
  std::unique_ptr<nvinfer1::IHostMemory> made(builder->buildSerializedNetwork(*network, *config));
  if (!made) throw std::runtime_error("TensorRT cannot build an engine of " + graph.string());
  write(file, *made);
  if (const auto* timed = config->getTimingCache()) {
    const std::unique_ptr<nvinfer1::IHostMemory> data(timed->serialize());
    if (data) write(timing, *data);
  }
}

}  // namespace liger

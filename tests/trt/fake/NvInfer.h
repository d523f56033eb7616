// As much of TensorRT's interface as the runner uses, for tests on a machine without it: version 8 or 10, as
// NV_TENSORRT_MAJOR says. What engines compute is in `fake.cc`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16 };
enum class LayerType : int32_t { kCONSTANT, kPLUGIN_V2, kOTHER };
enum class OptProfileSelector : int32_t { kMIN, kOPT, kMAX };
enum class NetworkDefinitionCreationFlag : int32_t { kEXPLICIT_BATCH, kSTRONGLY_TYPED };
enum class BuilderFlag : int32_t { kFP16, kPREFER_PRECISION_CONSTRAINTS };
enum class TacticSource : int32_t { kCUBLAS, kCUBLAS_LT };
enum class PreviewFeature : int32_t { kFASTER_DYNAMIC_SHAPES_0805 };

struct Dims {
  int32_t nbDims;
#if NV_TENSORRT_MAJOR < 10
  int32_t d[8];
#else
  int64_t d[8];
#endif
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, const char* text) noexcept = 0;
  virtual ~ILogger() = default;
};

class ITensor {
 public:
  virtual ~ITensor() = default;
  virtual const char* getName() const = 0;
  virtual Dims getDimensions() const = 0;
  virtual DataType getType() const = 0;
};

class ILayer {
 public:
  virtual ~ILayer() = default;
  virtual LayerType getType() const = 0;
  virtual int getNbInputs() const = 0;
  virtual int getNbOutputs() const = 0;
  virtual ITensor* getInput(int index) const = 0;
  virtual ITensor* getOutput(int index) const = 0;
  virtual void setPrecision(DataType type) = 0;
};

class INetworkDefinition {
 public:
  virtual ~INetworkDefinition() = default;
  virtual int getNbInputs() const = 0;
  virtual ITensor* getInput(int index) const = 0;
  virtual int getNbLayers() const = 0;
  virtual ILayer* getLayer(int index) const = 0;
};

#if NV_TENSORRT_MAJOR >= 10
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC, kON_PROFILE_CHANGE, kUSER_MANAGED };
#endif

class IOptimizationProfile {
 public:
  virtual ~IOptimizationProfile() = default;
  virtual bool setDimensions(const char* name, OptProfileSelector select, const Dims& dims) = 0;
};

class IHostMemory {
 public:
  virtual ~IHostMemory() = default;
  virtual void* data() const = 0;
  virtual size_t size() const = 0;
};

class ITimingCache {
 public:
  virtual ~ITimingCache() = default;
  virtual IHostMemory* serialize() const = 0;
};

class IBuilderConfig {
 public:
  virtual ~IBuilderConfig() = default;
  virtual bool setTacticSources(uint32_t sources) = 0;
  virtual void setFlag(BuilderFlag flag) = 0;
  virtual void setPreviewFeature(PreviewFeature feature, bool on) = 0;
  virtual int addOptimizationProfile(const IOptimizationProfile* profile) = 0;
  virtual ITimingCache* createTimingCache(const void* data, size_t size) const = 0;
  virtual bool setTimingCache(const ITimingCache& cache, bool ignore) = 0;
  virtual const ITimingCache* getTimingCache() const = 0;
};

class IBuilder {
 public:
  virtual ~IBuilder() = default;
  virtual INetworkDefinition* createNetworkV2(uint32_t flags) = 0;
  virtual IBuilderConfig* createBuilderConfig() = 0;
  virtual IOptimizationProfile* createOptimizationProfile() = 0;
  virtual IHostMemory* buildSerializedNetwork(INetworkDefinition& network, IBuilderConfig& config) = 0;
};

class IProfiler {
 public:
  virtual ~IProfiler() = default;
  virtual void reportLayerTime(const char* layer, float milliseconds) noexcept = 0;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  virtual bool setOptimizationProfileAsync(int index, cudaStream_t stream) = 0;
  virtual bool setInputShape(const char* name, const Dims& dims) = 0;
  virtual bool setTensorAddress(const char* name, void* data) = 0;
  virtual bool enqueueV3(cudaStream_t stream) = 0;
  virtual void setProfiler(IProfiler* profiler) = 0;
#if NV_TENSORRT_MAJOR >= 10
  virtual void setDeviceMemoryV2(void* data, int64_t size) = 0;
#else
  virtual void setDeviceMemory(void* data) = 0;
#endif
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
#if NV_TENSORRT_MAJOR >= 10
  virtual IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) = 0;
  virtual int64_t getDeviceMemorySizeV2() const = 0;
#else
  virtual IExecutionContext* createExecutionContextWithoutDeviceMemory() = 0;
  virtual size_t getDeviceMemorySize() const = 0;
#endif
  virtual int getNbOptimizationProfiles() const = 0;
  virtual Dims getTensorShape(const char* name) const = 0;
  virtual DataType getTensorDataType(const char* name) const = 0;
};

class IRuntime {
 public:
  virtual ~IRuntime() = default;
  virtual ICudaEngine* deserializeCudaEngine(const void* data, size_t size) = 0;
};

class IPluginRegistry {
 public:
  virtual ~IPluginRegistry() = default;
  virtual void* loadLibrary(const char* path) = 0;
};

IBuilder* createInferBuilder(ILogger& logger);
IRuntime* createInferRuntime(ILogger& logger);

}  // namespace nvinfer1

nvinfer1::IPluginRegistry* getPluginRegistry();
int getInferLibVersion();

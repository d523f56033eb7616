// The part of ONNX Runtime's C++ interface that examples/cpp uses, for machines that have its library from the Python
// package and no headers. An entry's number in the table of functions never changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

using OrtStatus = void;
using OrtSessionOptions = void;
using OrtApi = void* const;
struct OrtApiBase {
  OrtApi* (*GetApi)(uint32_t version);
};
extern "C" const OrtApiBase* OrtGetApiBase();

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum GraphOptimizationLevel { ORT_DISABLE_ALL = 0, ORT_ENABLE_BASIC = 1, ORT_ENABLE_ALL = 99 };
enum OrtAllocatorType { OrtDeviceAllocator = 0 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10
};

namespace Ort {

template <typename Result = OrtStatus*, typename... Arguments>
Result entry(size_t number, Arguments... arguments) {
  static OrtApi* const table = OrtGetApiBase()->GetApi(12);
  return reinterpret_cast<Result (*)(Arguments...)>(table[number])(arguments...);
}

inline void ThrowOnError(OrtStatus* status) {
  if (!status) return;
  const std::string message = entry<const char*>(2, status);
  entry<void>(93, status);
  throw std::runtime_error(message);
}

template <size_t release>
class Handle {
 public:
  explicit Handle(std::nullptr_t) {}
  Handle(Handle&& other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(p_, other.p_);
    return *this;
  }
  ~Handle() {
    if (p_) entry<void>(release, p_);
  }
  operator void*() const { return p_; }

 protected:
  Handle() = default;
  void* p_ = nullptr;
};

struct Api {
  OrtStatus* RegisterCustomOpsLibrary(void* options, const char* path, void** handle) const {
    return entry(29, options, path, handle);
  }
};
inline Api GetApi() { return {}; }

struct Env : Handle<92> {
  Env(OrtLoggingLevel level, const char* name) { ThrowOnError(entry(3, int{level}, name, &p_)); }
};

struct RunOptions : Handle<97> {
  using Handle::Handle;
};

struct SessionOptions : Handle<100> {
  SessionOptions() { ThrowOnError(entry(10, &p_)); }
  void SetGraphOptimizationLevel(GraphOptimizationLevel level) { ThrowOnError(entry(23, p_, int{level})); }
  void SetIntraOpNumThreads(int count) { ThrowOnError(entry(24, p_, count)); }
  void AddConfigEntry(const char* key, const char* value) { ThrowOnError(entry(130, p_, key, value)); }
};

struct AllocatorWithDefaultOptions {
  AllocatorWithDefaultOptions() { ThrowOnError(entry(78, &p)); }
  operator void*() const { return p; }
  void* p = nullptr;
};

struct MemoryInfo : Handle<94> {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType memory) {
    MemoryInfo info;
    ThrowOnError(entry(69, int{allocator}, int{memory}, &info.p_));
    return info;
  }
};

struct TensorTypeAndShapeInfo : Handle<99> {
  explicit TensorTypeAndShapeInfo(void* value) { ThrowOnError(entry(65, value, &p_)); }
  size_t GetElementCount() const {
    size_t count = 0;
    ThrowOnError(entry(64, p_, &count));
    return count;
  }
  ONNXTensorElementDataType GetElementType() const {
    ONNXTensorElementDataType type;
    ThrowOnError(entry(60, p_, &type));
    return type;
  }
};

struct Value : Handle<96> {
  using Handle::Handle;
  template <typename T>
  static constexpr ONNXTensorElementDataType kType = sizeof(T) == 8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

  static Value CreateTensor(void* allocator, const int64_t* shape, size_t rank, ONNXTensorElementDataType type) {
    Value value(nullptr);
    ThrowOnError(entry(48, allocator, shape, rank, int{type}, &value.p_));
    return value;
  }
  static Value CreateTensor(void* memory, void* data, size_t bytes, const int64_t* shape, size_t rank,
                            ONNXTensorElementDataType type) {
    Value value(nullptr);
    ThrowOnError(entry(49, memory, data, bytes, shape, rank, int{type}, &value.p_));
    return value;
  }
  template <typename T>
  static Value CreateTensor(void* memory, T* data, size_t count, const int64_t* shape, size_t rank) {
    return CreateTensor(memory, data, count * sizeof(T), shape, rank, kType<T>);
  }
  void* GetTensorMutableRawData() {
    void* data = nullptr;
    ThrowOnError(entry(51, p_, &data));
    return data;
  }
  TensorTypeAndShapeInfo GetTensorTypeAndShapeInfo() const { return TensorTypeAndShapeInfo(p_); }
};

struct Session : Handle<95> {
  using Handle::Handle;
  Session(const Env& env, const char* path, const SessionOptions& options) {
    ThrowOnError(entry(7, static_cast<void*>(env), path, static_cast<void*>(options), &p_));
  }
  // A Value is one pointer, as in the real interface: arrays of them are arrays of pointers.
  void Run(const RunOptions& options, const char* const* inputs, const Value* given, size_t input_count,
           const char* const* outputs, Value* made, size_t output_count) {
    ThrowOnError(entry(9, p_, static_cast<void*>(options), inputs, given, input_count, outputs, output_count, made));
  }
};
static_assert(sizeof(Value) == sizeof(void*));

}  // namespace Ort

#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

namespace liger {
namespace {

constexpr char kIds[] = "input_ids";
constexpr char kPosition[] = "position";
constexpr char kLogits[] = "logits";

struct TypeRow {
  nvinfer1::DataType type;
  const char* name;
  size_t bytes;
};

constexpr TypeRow kTypes[] = {
    {nvinfer1::DataType::kFLOAT, "float32", 4}, {nvinfer1::DataType::kHALF, "float16", 2},
    {nvinfer1::DataType::kINT32, "int32", 4},
#if NV_TENSORRT_MAJOR >= 9
    {nvinfer1::DataType::kBF16, "bfloat16", 2},
#endif
};

const TypeRow& row_of(nvinfer1::DataType type, const std::string& name) {
  for (const TypeRow& row : kTypes)
    if (row.type == type) return row;
  throw std::runtime_error("'" + name + "' has a type that this program does not know");
}

void need(bool done, const std::string& what) {
  if (!done) throw std::runtime_error("TensorRT refuses " + what);
}

// One element; what state starts with is a small integer, which all types hold exactly.
std::vector<char> element(const TypeRow& row, double value) {
  std::vector<char> made(row.bytes);
  const auto whole = static_cast<int32_t>(value);
  const auto real = static_cast<float>(value);
  if (row.type == nvinfer1::DataType::kINT32) std::memcpy(made.data(), &whole, sizeof(whole));
  else if (row.type == nvinfer1::DataType::kFLOAT) std::memcpy(made.data(), &real, sizeof(real));
  else if (value != 0) throw std::runtime_error("state of 16 bits starts with 0 only");
  return made;
}

struct Profiler final : nvinfer1::IProfiler {
  void reportLayerTime(const char* layer, float milliseconds) noexcept override {
    times[layer].push_back(milliseconds);
  }
  std::map<std::string, std::vector<float>> times;
};

}  // namespace

Session::Session(const Engine& engine, int batch, bool graph) : engine_(engine), batch_(batch) {
  nvinfer1::ICudaEngine& trt = *engine.engine;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  step_.reset(trt.createExecutionContext());
  prefill_.reset(trt.createExecutionContext());
  need(step_ && prefill_, "an execution context");
  const int last = trt.getNbOptimizationProfiles() - 1;
  need(step_->setOptimizationProfileAsync(batch == 1 ? 0 : last - 1, stream_), "the profile of the step");
  need(prefill_->setOptimizationProfileAsync(last, stream_), "the profile of the prefill");

  vocab_ = static_cast<int>(trt.getTensorShape(kLogits).d[1]);
  ids_ = Allocate(sizeof(int32_t) * batch * engine.chunk);
  positions_ = Allocate(sizeof(int32_t) * batch);
  logits_ = Allocate(sizeof(float) * batch * vocab_);
  for (const auto& tensor : engine.manifest.at("state")) {
    State x{tensor.at("past"), tensor.at("present"), "", {}, tensor.at("fill"), 0, nullptr};
    const TypeRow& row = row_of(trt.getTensorDataType(x.past.c_str()), x.past);
    const nvinfer1::Dims dims = trt.getTensorShape(x.past.c_str());
    x.dtype = row.name, x.bytes = row.bytes;
    for (int i = 0; i < dims.nbDims; ++i) {
      x.shape.push_back(i == 0 ? batch : static_cast<int64_t>(dims.d[i]));
      if (x.shape.back() < 0) throw std::runtime_error("'" + x.past + "' grows with the text, which is not supported");
      x.bytes *= x.shape.back();
    }
    x.data = Allocate(x.bytes);
    state_.push_back(x);
  }
  Reset();
  Bind(*step_, 1);
  Enqueue(*step_);  // what is allocated at the first call must not be captured
  check(cudaStreamSynchronize(stream_), "the first step");
  if (graph) {
    cudaGraph_t captured = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    Enqueue(*step_);
    check(cudaStreamEndCapture(stream_, &captured), "cudaStreamEndCapture");
    check(cudaGraphInstantiateWithFlags(&graph_, captured, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(captured), "cudaGraphDestroy");
  }
  Reset();
}

Session::~Session() {
  if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  step_.reset();
  prefill_.reset();
  for (void* data : memory_) cudaFree(data);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void* Session::Allocate(size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, std::max<size_t>(bytes, 256)), "cudaMalloc");
  check(cudaMemset(data, 0, bytes), "cudaMemset");
  memory_.push_back(data);
  return data;
}

void Session::Bind(nvinfer1::IExecutionContext& context, int tokens) {
  nvinfer1::Dims ids{}, positions{};
  ids.nbDims = 2, ids.d[0] = batch_, ids.d[1] = tokens;
  positions.nbDims = 1, positions.d[0] = batch_;
  const auto bind = [&](const char* name, void* data) { need(context.setTensorAddress(name, data), name); };
  need(context.setInputShape(kIds, ids), "the shape of the ids");
  need(context.setInputShape(kPosition, positions), "the shape of the positions");
  bind(kIds, ids_), bind(kPosition, positions_), bind(kLogits, logits_);
  for (const State& x : state_) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int>(x.shape.size());
    for (int i = 0; i < dims.nbDims; ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(x.shape[i]);
    need(context.setInputShape(x.past.c_str(), dims), "the shape of " + x.past);
    bind(x.past.c_str(), x.data);
    bind(x.present.c_str(), x.data);
  }
}

void Session::Enqueue(nvinfer1::IExecutionContext& context) { need(context.enqueueV3(stream_), "to run"); }

void Session::Step() {
  if (graph_ != nullptr) check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
  else Enqueue(*step_);
}

void Session::Reset() {
  for (const State& x : state_) {
    const std::vector<char> one = element(row_of(engine_.engine->getTensorDataType(x.past.c_str()), x.past), x.fill);
    if (std::count(one.begin(), one.end(), one[0]) != static_cast<std::ptrdiff_t>(one.size()))
      throw std::runtime_error("state that starts with " + std::to_string(x.fill) + " is not supported");
    check(cudaMemset(x.data, one[0], x.bytes), "cudaMemset");
  }
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // that was on another stream
  position_ = 0;
}

void Session::Upload(const int32_t* ids, int tokens, int stride) {
  const std::vector<int32_t> positions(batch_, position_);
  const size_t width = sizeof(int32_t) * tokens;
  check(cudaMemcpy2DAsync(ids_, width, ids, sizeof(int32_t) * stride, width, batch_, cudaMemcpyHostToDevice, stream_),
        "cudaMemcpy2DAsync");
  check(cudaMemcpyAsync(positions_, positions.data(), sizeof(int32_t) * batch_, cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync");
}

void Session::Advance(const std::vector<int32_t>& ids) {
  const int length = static_cast<int>(ids.size()) / batch_;
  if (length == 0) throw std::runtime_error("there are no tokens");
  for (int start = 0; start < length; start += engine_.chunk) {
    const int tokens = std::min(engine_.chunk, length - start);
    Upload(&ids[start], tokens, length);
    if (tokens > 1) {
      Bind(*prefill_, tokens);
      Enqueue(*prefill_);
    } else {
      Step();
    }
    position_ += tokens;
  }
}

std::vector<float> Session::Logits() {
  std::vector<float> made(static_cast<size_t>(batch_) * vocab_);
  check(cudaMemcpyAsync(made.data(), logits_, sizeof(float) * made.size(), cudaMemcpyDeviceToHost, stream_),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream_), "a call");
  return made;
}

std::vector<int32_t> Session::Likeliest() {
  const std::vector<float> logits = Logits();
  std::vector<int32_t> best;
  for (int b = 0; b < batch_; ++b) {
    const auto row = logits.begin() + static_cast<int64_t>(b) * vocab_;
    best.push_back(static_cast<int32_t>(std::max_element(row, row + vocab_) - row));
  }
  return best;
}

double Session::TimeStep(bool graph) {
  const std::vector<int32_t> ids(batch_, 1);
  cudaEvent_t begin = nullptr, end = nullptr;
  float milliseconds = 0;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  Upload(ids.data(), 1, 1);
  check(cudaEventRecord(begin, stream_), "cudaEventRecord");
  if (graph) Step();
  else Enqueue(*step_);
  check(cudaEventRecord(end, stream_), "cudaEventRecord");
  check(cudaEventSynchronize(end), "a step");
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  position_ += 1;
  return milliseconds;
}

nlohmann::json Session::Profile(int steps) {
  const std::vector<int32_t> ids(batch_, 1);
  Profiler profiler;
  Upload(ids.data(), 1, 1);
  step_->setProfiler(&profiler);
  for (int i = 0; i < steps; ++i) Enqueue(*step_);
  check(cudaStreamSynchronize(stream_), "a step");
  step_->setProfiler(nullptr);
  nlohmann::json medians = nlohmann::json::object();
  for (auto& [name, times] : profiler.times) {
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    medians[name] = times[times.size() / 2];
  }
  return medians;
}

size_t Session::state_bytes() const {
  size_t total = 0;
  for (const State& x : state_) total += x.bytes;
  return total;
}

}  // namespace liger

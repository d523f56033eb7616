#include "session.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace liger {
namespace {

constexpr char kIds[] = "input_ids";
constexpr char kPosition[] = "position";
constexpr char kLogits[] = "logits";
constexpr size_t kAlignment = 256;  // of memory for TensorRT

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
  throw error("'" + name + "' has a type that this program does not know");
}

void need(bool done, const std::string& what) {
  if (!done) throw error("TensorRT refuses " + what);
}

// One element; initial values of states are small integers, which all types represent exactly.
std::vector<char> element(const TypeRow& row, double value) {
  std::vector<char> made(row.bytes);
  const auto whole = static_cast<int32_t>(value);
  const auto real = static_cast<float>(value);
  if (row.type == nvinfer1::DataType::kINT32) std::memcpy(made.data(), &whole, sizeof(whole));
  else if (row.type == nvinfer1::DataType::kFLOAT) std::memcpy(made.data(), &real, sizeof(real));
  else if (value != 0) throw error("state of 16 bits starts with 0 only");
  return made;
}

Device on_device(size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, std::max(bytes, kAlignment)), "cudaMalloc");
  return Device(data);
}

Pinned pinned(size_t bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), "cudaMallocHost");
  return Pinned(data);
}

Event event(unsigned flags) {
  cudaEvent_t made = nullptr;
  check(cudaEventCreateWithFlags(&made, flags), "cudaEventCreate");
  return Event(made);
}

// Contexts get their working memory from here, so that two can share it.
#if NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 1)
nvinfer1::IExecutionContext* create_context(nvinfer1::ICudaEngine& engine) {
  return engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
}
int64_t scratch_bytes(const nvinfer1::ICudaEngine& engine) { return engine.getDeviceMemorySizeV2(); }
void set_scratch(nvinfer1::IExecutionContext& context, void* data, int64_t bytes) {
  context.setDeviceMemoryV2(data, bytes);
}
#else
nvinfer1::IExecutionContext* create_context(nvinfer1::ICudaEngine& engine) {
  return engine.createExecutionContextWithoutDeviceMemory();
}
int64_t scratch_bytes(const nvinfer1::ICudaEngine& engine) { return static_cast<int64_t>(engine.getDeviceMemorySize()); }
void set_scratch(nvinfer1::IExecutionContext& context, void* data, int64_t) { context.setDeviceMemory(data); }
#endif

struct Profiler final : nvinfer1::IProfiler {
  void reportLayerTime(const char* layer, float milliseconds) noexcept override {
    times[layer].push_back(milliseconds);
  }
  std::map<std::string, std::vector<float>> times;
};

}  // namespace

Session::Session(Engine& engine, int batch, bool graph, int chunk)
    : engine_(engine.Take()), batch_(batch), chunk_(chunk), position_(std::max(batch, 0)), graphs_(graph) {
  if (batch < 1 || batch > engine.batch())
    throw error("batch " + std::to_string(batch), "this engine was opened for 1 to " + std::to_string(engine.batch()));
  if (chunk < 1 || chunk > engine.Chunk(1))
    throw error("chunk " + std::to_string(chunk), "this graph takes 1 to " + std::to_string(engine.Chunk(1)));
  chunk_ = std::min(chunk, engine.Chunk(batch));
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  stream_.reset(stream);
  uploaded_ = event(cudaEventDisableTiming);
  scratch_ = on_device(scratch_bytes(*engine_));
  step_ = Context(engine.Profile(batch, true));
  prefill_ = Context(engine.Profile(batch, false));

  vocab_ = static_cast<int>(engine_->getTensorShape(kLogits).d[1]);
  ids_at_ = (sizeof(int32_t) * batch + kAlignment - 1) / kAlignment * kAlignment;
  const size_t input = ids_at_ + sizeof(int32_t) * batch * chunk, logits = sizeof(float) * batch * vocab_;
  input_ = on_device(input), host_input_ = pinned(input);
  logits_ = on_device(logits), host_logits_ = pinned(logits);
  for (const auto& tensor : engine.manifest().at("state")) state_.push_back(Make(tensor));
  Reset();
  Bind(*step_, 1);
  if (!graph) return;
  const std::vector<int32_t> ids(batch_);
  Upload(ids.data(), 1, 1);
  Enqueue(*step_);  // allocations of the first call must not be captured
  Wait();
  step_graph_ = Capture(*step_);
  Reset();
}

Session::~Session() { cudaStreamSynchronize(stream_.get()); }

std::unique_ptr<nvinfer1::IExecutionContext> Session::Context(int profile) {
  std::unique_ptr<nvinfer1::IExecutionContext> made(create_context(*engine_));
  need(made != nullptr, "a context");
  set_scratch(*made, scratch_.get(), scratch_bytes(*engine_));
  need(made->setOptimizationProfileAsync(profile, stream_.get()), "profile " + std::to_string(profile));
  return made;
}

Session::State Session::Make(const nlohmann::json& described) const {
  State x;
  x.past = described.at("past"), x.present = described.at("present");
  const TypeRow& row = row_of(engine_->getTensorDataType(x.past.c_str()), x.past);
  const nvinfer1::Dims dims = engine_->getTensorShape(x.past.c_str());
  x.dtype = row.name;
  x.shape = {batch_};
  size_t count = 1;
  for (int i = 1; i < dims.nbDims; ++i) {
    if (dims.d[i] < 0) throw error("'" + x.past + "' grows with the text, which is not supported");
    x.shape.push_back(dims.d[i]);
    count *= dims.d[i];
  }
  const std::vector<char> one = element(row, described.at("fill"));
  for (size_t i = 0; i < count; ++i) x.first.insert(x.first.end(), one.begin(), one.end());
  x.data = on_device(x.first.size() * batch_);
  return x;
}

void Session::Bind(nvinfer1::IExecutionContext& context, int tokens) {
  nvinfer1::Dims ids{}, positions{};
  ids.nbDims = 2, ids.d[0] = batch_, ids.d[1] = tokens;
  positions.nbDims = 1, positions.d[0] = batch_;
  const auto bind = [&](const char* name, void* data) { need(context.setTensorAddress(name, data), name); };
  need(context.setInputShape(kIds, ids), "the shape of the ids");
  need(context.setInputShape(kPosition, positions), "the shape of the positions");
  bind(kPosition, input_.get()), bind(kIds, static_cast<char*>(input_.get()) + ids_at_), bind(kLogits, logits_.get());
  for (const State& x : state_) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int>(x.shape.size());
    for (int i = 0; i < dims.nbDims; ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(x.shape[i]);
    need(context.setInputShape(x.past.c_str(), dims), "the shape of " + x.past);
    bind(x.past.c_str(), x.data.get());
    bind(x.present.c_str(), x.data.get());
  }
}

void Session::Enqueue(nvinfer1::IExecutionContext& context) { need(context.enqueueV3(stream_.get()), "to run"); }

Graph Session::Capture(nvinfer1::IExecutionContext& context) {
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t made = nullptr;
  check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  const bool done = context.enqueueV3(stream_.get());
  const cudaError_t ended = cudaStreamEndCapture(stream_.get(), &captured);
  need(done, "to run");
  check(ended, "cudaStreamEndCapture");
  const cudaError_t result = cudaGraphInstantiateWithFlags(&made, captured, 0);
  cudaGraphDestroy(captured);
  check(result, "cudaGraphInstantiate");
  return Graph(made);
}

void Session::Step() {
  if (step_graph_) check(cudaGraphLaunch(step_graph_.get(), stream_.get()), "cudaGraphLaunch");
  else Enqueue(*step_);
}

// The first call of a size prepares things that must not be captured, so a chunk is captured when it is repeated.
void Session::Chunk(int tokens) {
  const bool whole = graphs_ && tokens == chunk_;
  if (whole && !chunk_graph_ && bound_ == tokens) chunk_graph_ = Capture(*prefill_);
  if (whole && chunk_graph_) return check(cudaGraphLaunch(chunk_graph_.get(), stream_.get()), "cudaGraphLaunch");
  if (bound_ != tokens) Bind(*prefill_, tokens);
  bound_ = tokens;
  Enqueue(*prefill_);
}

void Session::Reset(int row) {
  for (size_t i = 0; i < state_.size(); ++i) {
    std::vector<char> rows;
    for (int b = 0; b < (row == kAll ? batch_ : 1); ++b)
      rows.insert(rows.end(), state_[i].first.begin(), state_[i].first.end());
    Write(static_cast<int>(i), row, rows.data(), rows.size());
  }
  if (row == kAll) std::fill(position_.begin(), position_.end(), 0);
  else position_.at(row) = 0;
}

// Copies through memory that the device reads itself; it is written again only after the previous copy has ended.
void Session::Upload(const int32_t* ids, int tokens, int stride) {
  check(cudaEventSynchronize(uploaded_.get()), "a call");
  char* const host = static_cast<char*>(host_input_.get());
  const size_t width = sizeof(int32_t) * tokens;
  std::memcpy(host, position_.data(), sizeof(int32_t) * batch_);
  for (int64_t b = 0; b < batch_; ++b) std::memcpy(host + ids_at_ + b * width, ids + b * stride, width);
  check(cudaMemcpyAsync(input_.get(), host, ids_at_ + width * batch_, cudaMemcpyHostToDevice, stream_.get()),
        "cudaMemcpyAsync");
  check(cudaEventRecord(uploaded_.get(), stream_.get()), "cudaEventRecord");
}

void Session::Advance(const int32_t* ids, int tokens) {
  if (tokens < 1) throw error("there are no tokens");
  for (int start = 0; start < tokens; start += chunk_) {
    const int now = std::min(chunk_, tokens - start);
    Upload(ids + start, now, tokens);
    if (now > 1) Chunk(now);
    else Step();
    for (int32_t& seen : position_) seen += now;
  }
}

void Session::Wait() { check(cudaStreamSynchronize(stream_.get()), "a call"); }

void Session::Logits(float* to) {
  const size_t bytes = sizeof(float) * batch_ * vocab_;
  check(cudaMemcpyAsync(host_logits_.get(), logits_.get(), bytes, cudaMemcpyDeviceToHost, stream_.get()),
        "cudaMemcpyAsync");
  Wait();
  std::memcpy(to, host_logits_.get(), bytes);
}

void* Session::Place(int tensor, int row, size_t bytes) const {
  const State& x = state_.at(tensor);
  if (row != kAll && (row < 0 || row >= batch_)) throw error("there is no row " + std::to_string(row));
  const size_t one = x.first.size(), whole = row == kAll ? one * batch_ : one;
  if (bytes != whole)
    throw error("'" + x.past + "' has " + std::to_string(whole) + " bytes and not " + std::to_string(bytes));
  return static_cast<char*>(x.data.get()) + (row == kAll ? 0 : row * one);
}

void Session::Read(int tensor, int row, void* to, size_t bytes) {
  const void* const from = Place(tensor, row, bytes);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_.get()), "cudaMemcpyAsync");
  Wait();
}

void Session::Write(int tensor, int row, const void* from, size_t bytes) {
  void* const to = Place(tensor, row, bytes);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()), "cudaMemcpyAsync");
  Wait();
}

double Session::TimeStep(bool graph) {
  const std::vector<int32_t> ids(batch_, 1);
  const Event begin = event(cudaEventDefault), end = event(cudaEventDefault);
  float milliseconds = 0;
  Upload(ids.data(), 1, 1);
  check(cudaEventRecord(begin.get(), stream_.get()), "cudaEventRecord");
  if (graph) Step();
  else Enqueue(*step_);
  check(cudaEventRecord(end.get(), stream_.get()), "cudaEventRecord");
  check(cudaEventSynchronize(end.get()), "a step");
  check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "cudaEventElapsedTime");
  for (int32_t& seen : position_) seen += 1;
  return milliseconds;
}

nlohmann::json Session::Profile(int steps) {
  const std::vector<int32_t> ids(batch_, 1);
  Profiler profiler;
  Upload(ids.data(), 1, 1);
  step_->setProfiler(&profiler);
  for (int i = 0; i < steps; ++i) Enqueue(*step_);
  Wait();
  step_->setProfiler(nullptr);
  nlohmann::json medians = nlohmann::json::object();
  for (auto& [name, times] : profiler.times) {
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    medians[name] = times[times.size() / 2];
  }
  return medians;
}

nlohmann::json Session::Describe() const {
  nlohmann::json state = nlohmann::json::array();
  size_t bytes = 0;
  for (const State& x : state_) {
    state.push_back({{"past", x.past}, {"present", x.present}, {"dtype", x.dtype}, {"shape", x.shape},
                     {"bytes", x.first.size() * batch_}});
    bytes += x.first.size() * batch_;
  }
  return {{"batch", batch_}, {"chunk", chunk_}, {"vocab", vocab_}, {"state_bytes", bytes}, {"state", state}};
}

}  // namespace liger

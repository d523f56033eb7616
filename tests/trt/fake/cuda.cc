// A slow device for tests: streams keep what they are given until somebody waits, and memory that the device reads by
// itself is read only then.

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "fake.h"

struct CUstream_st {
  std::deque<fake::Work> work;
  std::vector<fake::Work>* captured = nullptr;

  void Drain() {
    for (; !work.empty(); work.pop_front()) work.front()();
  }
};
struct CUgraph_st {
  std::vector<fake::Work> work;
};
struct CUgraphExec_st {
  std::vector<fake::Work> work;
};
struct CUevent_st {
  cudaStream_t stream = nullptr;
  int pending = 0;
};

namespace {

std::mutex mutex;
std::map<const char*, size_t> pinned;

bool is_pinned(const void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const char* const at = static_cast<const char*>(data);
  auto after = pinned.upper_bound(at);
  return after != pinned.begin() && (--after, at < after->first + after->second);
}

void* garbage(size_t bytes) { return std::memset(std::malloc(bytes), 0xCD, bytes); }

template <typename T>
cudaError_t made(T* to, T value) {
  ++fake::alive;
  *to = value;
  return cudaSuccess;
}

template <typename T>
cudaError_t gone(T* x) {
  --fake::alive;
  delete x;
  return cudaSuccess;
}

}  // namespace

std::atomic<int> fake::alive{0};

void fake::put(cudaStream_t stream, Work work) {
  if (stream->captured != nullptr) stream->captured->push_back(std::move(work));
  else stream->work.push_back(std::move(work));
}

bool fake::capturing(cudaStream_t stream) { return stream->captured != nullptr; }

extern "C" __attribute__((visibility("default"))) int fake_alive() { return fake::alive; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "not while capturing" : "invalid value";
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int sm = fake::number("FAKE_SM", 90);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? sm / 10 : sm % 10;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) { return made(data, garbage(bytes)); }

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = 1 << 20, *available = *total - 4096;
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  --fake::alive;
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  *data = garbage(bytes);
  pinned[static_cast<const char*>(*data)] = bytes;
  return made(data, *data);
}

cudaError_t cudaFreeHost(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  pinned.erase(static_cast<const char*>(data));
  return cudaFree(data);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  fake::put(stream, [=] { std::memcpy(to, from, bytes); });
  if (!fake::capturing(stream) && !is_pinned(kind == cudaMemcpyHostToDevice ? from : to)) stream->Drain();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return made(stream, new CUstream_st); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return gone(stream); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (fake::capturing(stream)) return cudaErrorStreamCaptureUnsupported;
  stream->Drain();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->captured = new std::vector<fake::Work>;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  made(graph, new CUgraph_st{*stream->captured});
  delete stream->captured;
  stream->captured = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return made(exec, new CUgraphExec_st{graph->work});
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const fake::Work& work : graph->work) fake::put(stream, work);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return gone(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return gone(graph); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return made(event, new CUevent_st); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return gone(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  ++event->pending;
  fake::put(stream, [=] { --event->pending; });
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  for (; event->pending > 0; event->stream->work.pop_front()) event->stream->work.front()();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0.5f, cudaSuccess;
}

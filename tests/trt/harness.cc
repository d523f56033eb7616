// Runs the core of the TensorRT plugin on a CUDA driver that does nothing but write down what it is asked for.
//
//   harness run PACK SM DTYPE LAYER NUMBER..    reads "BATCH TOKENS" from stdin, one call of a mixer a line
//   harness product PACK SM DTYPE LAYER NUMBER..    reads "ROWS" from stdin, one call of a product a line
//   harness check PACK..                        reads packs, and runs what every plan would launch; its peak of memory
//                                               goes to stderr, as Linux says it
//
// Inputs lie at (1 + i) << 32 and outputs at the addresses of their inputs, the mixed heads at 64 << 32, the workspace
// at 65 << 32; what is allocated comes after 66 << 32.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "linear.h"
#include "mixer.h"

namespace {

int device_sm = 90;
bool quiet = false;
const liger::Pack* pack = nullptr;
CUdeviceptr next_allocation = CUdeviceptr{66} << 32;

struct Function {
  const void* image;
  std::string symbol;
};

const liger::Kernel& kernel_of(const Function& function, const liger::Cubin*& cubin) {
  for (const liger::Kernel& kernel : pack->kernels())
    for (const liger::Cubin& x : kernel.cubins)
      if (pack->blob(x.blob).data() == function.image && x.symbol.c_str() == function.symbol) return cubin = &x, kernel;
  std::abort();
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? device_sm / 10 : device_sm % 10;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "failed", CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!quiet && std::memcmp(image, "\177ELF", 4) != 0) std::cout << "text " << std::strlen(static_cast<const char*>(image)) << "\n";
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{module, name});
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }
CUresult cuMemFree(CUdeviceptr) { return CUDA_SUCCESS; }
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  *address = next_allocation;
  next_allocation += (bytes + 4095) / 4096 * 4096;
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes, CUstream) {
  if (!quiet) std::cout << "set " << address << " " << int{value} << " " << bytes << "\n";
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr address, const void* from, size_t bytes, CUstream) {
  if (quiet) return CUDA_SUCCESS;
  std::cout << "upload " << address;
  for (size_t i = 0; i < bytes / 4; ++i) std::cout << " " << static_cast<const int32_t*>(from)[i];
  std::cout << "\n";
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  if (!quiet) std::cout << "copy " << to << " " << from << " " << bytes << "\n";
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                        unsigned shared, CUstream, void** parameters, void**) {
  const liger::Cubin* cubin = nullptr;
  const Function& function = *reinterpret_cast<Function*>(handle);
  const liger::Kernel& kernel = kernel_of(function, cubin);
  if (quiet) return CUDA_SUCCESS;
  std::cout << "launch " << function.symbol << " " << x << " " << y << " " << z << " " << threads << " " << shared;
  for (size_t i = 0; i < kernel.arguments.size(); ++i) {
    if (kernel.arguments[i].type == liger::Kernel::kFloat)
      std::cout << " " << *static_cast<float*>(parameters[i]);
    else if (kernel.arguments[i].type == liger::Kernel::kInt32)
      std::cout << " " << *static_cast<int32_t*>(parameters[i]);
    else
      std::cout << " " << *static_cast<int64_t*>(parameters[i]);
  }
  std::cout << "\n";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* x, CUfunction handle, void** parameters, void** extra) {
  if (x->numAttrs != 1 || x->attrs->id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) std::abort();
  if (!quiet) std::cout << "overlap\n";
  return cuLaunchKernel(handle, x->gridDimX, x->gridDimY, x->gridDimZ, x->blockDimX, x->blockDimY, x->blockDimZ,
                        x->sharedMemBytes, x->hStream, parameters, extra);
}
}

namespace {

void* at(size_t index) { return reinterpret_cast<void*>(index << 32); }

liger::Call make_call(const liger::Mixer& mixer, const std::string& dtype, int64_t batch, int64_t tokens) {
  const liger::MixerAttributes& a = mixer.attributes();
  const int64_t all = batch * tokens, slots = batch * a.slots * (a.ragged ? 1 : a.kv_heads), codes = a.scaled ? 4 : 1;
  liger::Call call{};
  call.dtype = dtype, call.workspace = at(65);
  const auto add = [&](int64_t rows, int64_t elements) {
    call.inputs.push_back(at(1 + call.inputs.size()));
    call.rows.push_back(rows), call.elements.push_back(elements);
  };
  const auto add_state = [&](int64_t elements) { add(batch, elements), call.outputs.push_back(at(call.inputs.size())); };
  const int64_t query = a.q_heads * a.d_k, key = a.kv_heads * a.d_k, value = a.kv_heads * a.d_v;
  if (a.joint) add(all, all * (query + key + value));
  else for (int64_t width : {query, key, value}) add(all, all * width);
  add(batch, batch);
  add(2, 2 * (a.max_distance + 64 + 1) * (a.d_k / 2));
  if (a.foresees) add(all, all * a.kv_heads);
  call.outputs = {at(64)};
  for (int64_t elements : {slots * a.d_k / codes, slots * a.d_v / codes}) add_state(elements);
  if (a.scaled) add_state(slots), add_state(slots);
  add_state(slots);
  if (a.pools) add_state((a.ragged ? batch * a.scored : slots) * a.pools);
  if (a.recurrent) add_state(batch * a.kv_heads * a.d_k * a.d_v);
  if (a.keyed) add_state(batch * a.kv_heads * a.d_k * a.d_k);
  if (a.evicts) add_state(batch * a.kv_heads * a.d_k);
  if (a.judged) add_state(batch * a.kv_heads * a.d_k * (a.d_v + 1));
  return call;
}

liger::Call make_call(const liger::Linear& linear, const std::string& dtype, int64_t rows) {
  const liger::LinearAttributes& a = linear.attributes();
  liger::Call call{};
  call.dtype = dtype, call.workspace = at(65), call.outputs = {at(64)};
  const int64_t height = a.outputs;  // of a product without a gate
  call.elements = {rows * (a.indexed ? 1 : a.inputs), height * a.inputs / (a.coded ? 4 : 1)};
  if (a.coded) call.elements.push_back(a.indexed ? a.inputs : height);
  if (a.normed) call.elements.push_back(a.inputs);
  if (a.biased) call.elements.push_back(height);
  if (a.added) call.elements.push_back(rows * a.outputs);
  if (a.side) call.elements.insert(call.elements.end(), {int64_t{a.side} * a.inputs, a.side}), call.outputs.push_back(at(63));
  call.rows.assign(call.elements.size(), rows);
  for (size_t i = 0; i < call.elements.size(); ++i) call.inputs.push_back(at(1 + i));
  return call;
}

template <typename N>
N open(int count, char** words) {
  pack = &liger::kernels();
  device_sm = std::atoi(words[1]);
  std::string text;
  for (int i = 3; i < count; ++i) text += std::string(words[i]) + " ";
  return N(liger::parse<typename N::Attributes>(text));
}

template <typename N>
void enqueue(N& node, const liger::Call& call, const char* dtype) {
  std::cout << "call " << node.Workspace(dtype, call.rows) << "\n";
  try {
    node.Enqueue(call);
  } catch (const liger::Error& error) {
    std::cout << "error " << error.what() << "\n";
  }
}

int run(int count, char** words) {
  if (ligerexport_load_kernels(words[0]) != 0) return 1;
  auto mixer = open<liger::Mixer>(count, words);
  mixer.Prepare();
  int64_t batch = 0, tokens = 0;
  std::string how;
  for (std::string line; std::getline(std::cin, line);) {
    how.clear();
    std::istringstream(line) >> batch >> tokens >> how;
    liger::Call call = make_call(mixer, words[2], batch, tokens);
    if (how == "apart" || how == "timed") call.outputs.back() = at(63);
    if (how == "ragged") ++call.rows[0];
    call.timed = how == "timed";
    enqueue(mixer, call, words[2]);
  }
  return 0;
}

int product(int count, char** words) {
  if (ligerexport_load_kernels(words[0]) != 0) return 1;
  auto linear = open<liger::Linear>(count, words);
  linear.Prepare();
  for (int64_t rows = 0; std::cin >> rows;) enqueue(linear, make_call(linear, words[2], rows), words[2]);
  return 0;
}

void run_all_plans(const liger::Pack& read) {
  pack = &read;
  for (const liger::Plan& plan : read.plans()) {
    liger::Axes given = {{"batch", 2}, {"rows", 3}, {"tokens", plan.op == "step" ? 1 : 200}};
    for (const char* tensor : {"query", "key", "value"})
      for (int i = 0; i < 3; ++i) given[std::string(tensor) + "_stride_" + std::to_string(i)] = 4096 >> (4 * i);
    const auto axes = plan.Fit(given);
    if (axes.empty()) continue;
    liger::Places places;
    for (const liger::Buffer& x : plan.buffers) places[x.name] = {CUdeviceptr{1} << 32, x.Bytes(axes)};
    liger::Memory memory;
    liger::workspace_bytes(plan, axes);
    for (uint32_t sm : plan.sms) liger::run(read, plan, axes, sm, places, CUdeviceptr{65} << 32, memory, nullptr);
  }
}

int check(int count, char** files) {
  quiet = true;
  for (int i = 0; i < count; ++i) try {
      const liger::Pack& read = *new liger::Pack(liger::Pack::Read(files[i]));  // modules know packs by their address
      run_all_plans(read);
      std::cout << "ok\n";
    } catch (const liger::Error& error) {
      std::cout << "error " << error.what() << "\n";
    }
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM", 0) == 0) std::cerr << line << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  std::cout.precision(9);
  const std::string what = argv[1];
  return (what == "run" ? run : what == "product" ? product : check)(argc - 2, argv + 2);
} catch (const std::exception& error) {
  std::cout << "error " << error.what() << "\n";
  return 1;
}

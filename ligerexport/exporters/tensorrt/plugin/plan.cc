#include "plan.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>

namespace liger {
namespace {

constexpr char kPast[] = "past_";
constexpr char kPresent[] = "present_";

bool is_present(const Buffer& buffer) { return buffer.name.rfind(kPresent, 0) == 0; }

std::string past_of(const Buffer& buffer) { return kPast + buffer.name.substr(sizeof(kPresent) - 1); }

bool in_workspace(const Buffer& buffer) {
  return buffer.role == Buffer::kScratch || (buffer.role == Buffer::kOutput && is_present(buffer));
}

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool capturing(CUstream stream) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  check(cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

// Code on the device, by context: a module is loaded once and kept.
CUfunction function_of(const Pack& pack, const Kernel& kernel, uint32_t sm) {
  static std::mutex mutex;
  static std::map<std::tuple<CUcontext, const uint8_t*, std::string>, CUfunction> known;
  const Cubin* cubin = kernel.For(sm);
  if (cubin == nullptr) throw Error("the kernel pack has no code for sm_" + std::to_string(sm));
  const Blob& blob = pack.blob(cubin->blob);
  CUcontext context = nullptr;
  check(cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  std::lock_guard<std::mutex> lock(mutex);
  CUfunction& function = known[{context, blob.data(), cubin->symbol}];
  if (function == nullptr) {
    CUmodule module = nullptr;
    CUfunction found = nullptr;
    check(cuModuleLoadData(&module, blob.data()), "cuModuleLoadData");
    check(cuModuleGetFunction(&found, module, cubin->symbol.c_str()), "cuModuleGetFunction");
    if (cubin->shared > 48 << 10)
      check(cuFuncSetAttribute(found, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(cubin->shared)),
            "cuFuncSetAttribute");
    function = found;
  }
  return function;
}

union Slot {  // an argument as a kernel takes it
  CUdeviceptr address;
  int64_t wide;
  int32_t narrow;
  float number;
};

// Whether kernels may begin before the previous one ends: not with LIGEREXPORT_OVERLAP=0, and not with drivers before
// CUDA 12.3, which is the first that can capture such launches.
bool overlapping() {
  static const bool wanted = [] {
    const char* const asked = std::getenv("LIGEREXPORT_OVERLAP");
    int version = 0;
    return (asked == nullptr || *asked != '0') && cuDriverGetVersion(&version) == CUDA_SUCCESS && version >= 12030;
  }();
  return wanted;
}

void start(CUfunction function, const unsigned grid[3], const Cubin& cubin, bool overlaps, CUstream stream,
           void** parameters) {
#if CUDA_VERSION >= 11080
  if (overlaps && overlapping()) {
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = grid[0], config.gridDimY = grid[1], config.gridDimZ = grid[2];
    config.blockDimX = cubin.threads, config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = cubin.shared, config.hStream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    return check(cuLaunchKernelEx(&config, function, parameters, nullptr), "cuLaunchKernelEx");
  }
#else
  static_cast<void>(overlaps);
#endif
  check(cuLaunchKernel(function, grid[0], grid[1], grid[2], cubin.threads, 1, 1, cubin.shared, stream, parameters,
                       nullptr),
        "cuLaunchKernel");
}

unsigned grid_size(int64_t size) {
  if (size < 0 || size > INT_MAX) throw Error("a launch of the kernel pack has no valid grid");
  return static_cast<unsigned>(size);
}

}  // namespace

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuGetErrorString(result, &text);
  throw Error(std::string(what) + ": " + (text == nullptr ? "error " + std::to_string(result) : text));
}

Memory::~Memory() {
  for (CUdeviceptr address : all_) cuMemFree(address);  // fails if the context is gone, which frees the memory too
}

CUdeviceptr Memory::Allocate(size_t bytes, CUstream stream) {
  if (capturing(stream)) throw Error("run a call of these sizes once before it is captured as a CUDA graph");
  CUdeviceptr address = 0;
  check(cuMemAlloc(&address, std::max<size_t>(bytes, 1)), "cuMemAlloc");
  all_.push_back(address);
  return address;
}

CUdeviceptr Memory::Kept(const std::string& name, size_t bytes, CUstream stream) {
  auto& [address, size] = kept_[name];
  if (address == 0 || size < bytes) {
    address = Allocate(bytes, stream);
    size = bytes;
    check(cuMemsetD8Async(address, 0, bytes, stream), "cuMemsetD8Async");
    check(cuStreamSynchronize(stream), "cuStreamSynchronize");  // the next call may be on another stream
  }
  return address;
}

CUdeviceptr Memory::Table(const Buffer& buffer, const Plan& plan, const std::vector<int64_t>& axes, CUstream stream) {
  const Cut cut = {plan.Value("batch", axes), plan.Value("tokens", axes), plan.Value("segment", axes),
                   plan.Value("chunk", axes)};
  CUdeviceptr& address = tables_[{buffer.table, cut.batch, cut.tokens, cut.segment, cut.chunk}];
  if (address == 0) address = Upload(buffer, table_rows(buffer.table, cut), axes, stream);
  return address;
}

CUdeviceptr Memory::Constant(const Buffer& buffer, const std::vector<int64_t>& axes, CUstream stream) {
  CUdeviceptr& address = constants_[&buffer];
  if (address == 0) address = Upload(buffer, buffer.content, axes, stream);
  return address;
}

CUdeviceptr Memory::Upload(const Buffer& buffer, const std::vector<int32_t>& rows, const std::vector<int64_t>& axes,
                           CUstream stream) {
  const size_t bytes = rows.size() * sizeof(int32_t);
  if (static_cast<int64_t>(bytes) != buffer.Bytes(axes)) throw Error("a table has another size than its plan says");
  const CUdeviceptr made = Allocate(bytes, stream);
  check(cuMemcpyHtoDAsync(made, rows.data(), bytes, stream), "cuMemcpyHtoDAsync");
  check(cuStreamSynchronize(stream), "cuStreamSynchronize");
  return made;
}

size_t workspace_bytes(const Plan& plan, const std::vector<int64_t>& axes) {
  size_t bytes = 0;
  for (const Buffer& x : plan.buffers)
    if (in_workspace(x)) bytes += aligned(x.Bytes(axes));
  return bytes;
}

void load(const Pack& pack, const Plan& plan, uint32_t sm) {
  for (const Launch& x : plan.launches) function_of(pack, pack.kernels()[x.kernel], sm);
}

void run(const Pack& pack, const Plan& plan, const std::vector<int64_t>& axes, uint32_t sm, const Places& places,
         CUdeviceptr workspace, Memory& memory, CUstream stream) {
  std::vector<CUdeviceptr> addresses;
  for (const Buffer& x : plan.buffers) {
    const size_t bytes = x.Bytes(axes);
    if (in_workspace(x)) {
      addresses.push_back(workspace);
      workspace += aligned(bytes);
      if (x.zero && bytes > 0) check(cuMemsetD8Async(addresses.back(), 0, bytes, stream), "cuMemsetD8Async");
    } else if (x.role == Buffer::kPersistent) {
      addresses.push_back(memory.Kept(x.name, bytes, stream));
    } else if (x.role == Buffer::kTable) {
      addresses.push_back(memory.Table(x, plan, axes, stream));
    } else if (x.role == Buffer::kConstant) {
      addresses.push_back(memory.Constant(x, axes, stream));
    } else {
      const auto found = places.find(x.name);
      if (found == places.end()) throw Error("the kernels need '" + x.name + "', which this layer does not have");
      if (found->second.bytes != static_cast<int64_t>(bytes))
        throw Error("'" + x.name + "' has " + std::to_string(found->second.bytes) + " bytes where the kernels take " +
                    std::to_string(bytes));
      addresses.push_back(found->second.address);
    }
  }
  for (const Launch& x : plan.launches) {
    const Kernel& kernel = pack.kernels()[x.kernel];
    const Cubin& cubin = *kernel.For(sm);
    std::vector<Slot> slots(kernel.arguments.size());  // hidden arguments follow the values and stay null
    std::vector<void*> parameters;
    for (size_t i = 0; i < x.values.size(); ++i) {
      const Value& value = x.values[i];
      const auto [type, divisible] = kernel.arguments[i];
      if (value.kind == Value::kNumber) {
        slots[i].number = value.number;
        continue;
      }
      int64_t number = value.expression(axes);
      if (value.kind == Value::kAddress) {
        if (number < 0 || number > plan.buffers[value.buffer].Bytes(axes)) throw Error("a plan leaves its buffers");
        number = static_cast<int64_t>(addresses[value.buffer] + static_cast<CUdeviceptr>(number));
      }
      if (number % divisible != 0)
        throw Error("a kernel was promised an address or a size divisible by " + std::to_string(divisible));
      if (type == Kernel::kInt32) slots[i].narrow = static_cast<int32_t>(number);
      else slots[i].wide = number;
    }
    for (Slot& slot : slots) parameters.push_back(&slot);
    const unsigned grid[] = {grid_size(x.grid[0](axes)), grid_size(x.grid[1](axes)), grid_size(x.grid[2](axes))};
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) continue;
    start(function_of(pack, kernel, sm), grid, cubin, kernel.overlaps, stream, parameters.data());
  }
  for (size_t i = 0; i < plan.buffers.size(); ++i) {
    const Buffer& x = plan.buffers[i];
    if (x.role != Buffer::kOutput || !is_present(x)) continue;
    const auto found = places.find(past_of(x));
    if (found == places.end()) throw Error("the kernels make '" + x.name + "', which this layer does not have");
    check(cuMemcpyDtoDAsync(found->second.address, addresses[i], x.Bytes(axes), stream), "cuMemcpyDtoDAsync");
  }
}

std::vector<int32_t> table_rows(Buffer::Table table, const Cut& cut) {
  const auto cdiv = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  for (int64_t size : {cut.batch, cut.tokens, cut.segment, cut.chunk, cut.batch * cut.tokens})
    if (size < 1 || size > INT_MAX) throw Error("a table cannot be made of these sizes");
  std::vector<int32_t> rows;
  const auto add = [&](int64_t value) { rows.push_back(static_cast<int32_t>(value)); };
  if (table == Buffer::kOffsets) {
    for (int64_t b = 0; b <= cut.batch; ++b) add(b * cdiv(cut.tokens, cut.segment));
    return rows;
  }
  const int64_t size = table == Buffer::kSegments ? cut.segment : cut.chunk;
  const int64_t pieces = cdiv(cut.tokens, size), chunks = cdiv(cut.tokens, cut.chunk);
  for (int64_t b = 0; b < cut.batch; ++b)
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t start = b * cut.tokens + i * size;
      add(start), add(std::min(start + size, (b + 1) * cut.tokens)), add(b), add(i == pieces - 1);
      add(b * chunks + i * size / cut.chunk);
    }
  return rows;
}

}  // namespace liger

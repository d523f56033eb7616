#include "node.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

namespace liger {
namespace {

std::mutex pack_mutex;
const Pack* pack = nullptr;  // never freed: modules and engines refer to it

std::string beside_this_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&ligerexport_load_kernels), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "" : file.substr(0, slash + 1);
}

}  // namespace

void check_contract(const char* kind, int32_t contract) {
  if (contract < kOldestContract || contract > kContract)
    throw Error("the graph was made for contract " + std::to_string(contract) + " of " + kind + ", this library has " +
                std::to_string(kOldestContract) + " to " + std::to_string(kContract) + "; use the library of the ligerexport that wrote the artifact");
}

uint32_t compute_capability() {
  check(cuInit(0), "cuInit");
  CUdevice device = 0;
  int major = 0, minor = 0;
  check(cuCtxGetDevice(&device), "cuCtxGetDevice");
  check(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
  check(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
  return static_cast<uint32_t>(10 * major + minor);
}

const Pack& kernels() {
  std::lock_guard<std::mutex> lock(pack_mutex);
  if (pack == nullptr) {
    const char* given = std::getenv("LIGEREXPORT_KERNELS");
    pack = new Pack(Pack::Read(given != nullptr && *given ? given : beside_this_library() + "kernels.liger"));
  }
  return *pack;
}

bool Layer::Takes(const std::string& dtype) const {
  for (const Plan& x : kernels().plans())
    if (x.layer == spec_ && x.dtype == dtype) return true;
  return false;
}

void Layer::Prepare() const {
  const Pack& pack = kernels();
  bool found = false;
  for (const char* dtype : {"fp32", "fp16", "bf16"}) {
    if (!Takes(dtype)) continue;
    const uint32_t built = Serving(pack, dtype);
    for (const Plan& x : pack.plans())
      for (uint32_t other : x.sms)
        if (x.layer == spec_ && x.dtype == dtype && other == built) load(pack, x, built);
    found = true;
  }
  if (!found) throw Error("the kernel pack has nothing for layer " + spec_ + "; it belongs to another artifact");
}

uint32_t Layer::Serving(const Pack& pack, const std::string& dtype) const {
  return pack.Serving(spec_, dtype, compute_capability());
}

Layer::Chosen Layer::Choose(const Pack& pack, const std::string& op, const std::string& dtype, uint32_t sm,
                            const Axes& axes) const {
  for (const Plan& x : pack.plans()) {
    if (x.layer != spec_ || x.op != op || x.dtype != dtype) continue;
    for (uint32_t built : x.sms) {
      if (built != sm) continue;
      auto values = x.Fit(axes);
      if (!values.empty()) return {&x, std::move(values)};
    }
  }
  std::string sizes;
  for (const auto& [name, size] : axes) {
    if (name.find("_stride_") == std::string::npos)
      sizes += (sizes.empty() ? "" : ", ") + name + " " + std::to_string(size);
  }
  throw Error("the kernel pack has no " + op + " for " + sizes + " of layer " + spec_);
}

}  // namespace liger

extern "C" __attribute__((visibility("default"))) int ligerexport_load_kernels(const char* path) try {
  auto read = std::make_unique<liger::Pack>(liger::Pack::Read(path));
  std::lock_guard<std::mutex> lock(liger::pack_mutex);
  liger::pack = read.release();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "ligerexport: %s\n", error.what());
  return 1;
}

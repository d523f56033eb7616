// Launches plans of a kernel pack through the CUDA driver only.
#pragma once

#include <cuda.h>

#include <map>
#include <string>
#include <vector>

#include "pack.h"

namespace liger {

// Throws with the driver's message if a call failed.
void check(CUresult result, const char* what);

// Device memory that is kept between calls: counters that kernels reset, and tables made by the host. CUDA graphs hold
// its addresses, so nothing is moved or freed during its lifetime.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory();

  // At least `bytes` bytes, zero when new.
  CUdeviceptr Kept(const std::string& name, size_t bytes, CUstream stream);

  // The table of a plan at these axes.
  CUdeviceptr Table(const Buffer& buffer, const Plan& plan, const std::vector<int64_t>& axes, CUstream stream);

  // The content of a constant.
  CUdeviceptr Constant(const Buffer& buffer, const std::vector<int64_t>& axes, CUstream stream);

 private:
  CUdeviceptr Allocate(size_t bytes, CUstream stream);
  CUdeviceptr Upload(const Buffer& buffer, const std::vector<int32_t>& rows, const std::vector<int64_t>& axes,
                     CUstream stream);

  std::vector<CUdeviceptr> all_;
  std::map<std::string, std::pair<CUdeviceptr, size_t>> kept_;
  std::map<std::vector<int64_t>, CUdeviceptr> tables_;
  std::map<const Buffer*, CUdeviceptr> constants_;
};

struct Place {
  CUdeviceptr address;
  int64_t bytes;
};

using Places = std::map<std::string, Place>;

// Bytes of workspace that a plan needs, a multiple of `kAlignment`.
constexpr size_t kAlignment = 256;
size_t workspace_bytes(const Plan& plan, const std::vector<int64_t>& axes);

// Loads the compiled code of a plan onto the device, so that the first launch does not wait for it.
void load(const Pack& pack, const Plan& plan, uint32_t sm);

// Launches a plan on `stream`. `places` holds inputs, outputs and state by name; buffers that the plan calls `present_X`
// are in the workspace first and replace `past_X` after the last launch.
void run(const Pack& pack, const Plan& plan, const std::vector<int64_t>& axes, uint32_t sm, const Places& places,
         CUdeviceptr workspace, Memory& memory, CUstream stream);

// The rows of a table, 32-bit integers; see LINEAR_ATTENTION_TABLES in ligerexport/kernels/plans.py.
struct Cut {
  int64_t batch, tokens, segment, chunk;
};
std::vector<int32_t> table_rows(Buffer::Table table, const Cut& cut);

}  // namespace liger

// The kernel pack `kernels.liger`, as `ligerexport.exporters.tensorrt.pack` writes it: cubins, and plans of
// launches. A file is not trusted: anything unexpected is an `Error`.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace liger {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Integers over axes: numbers, axes, + - * and cdiv in postfix.
struct Expression {
  enum Kind : uint8_t { kNumber, kAxis, kAdd, kSubtract, kMultiply, kCeilDivide, kKinds };
  struct Term {
    Kind kind;
    int64_t value;
  };
  std::vector<Term> terms;

  // Throws if a result exceeds 64 bits or a divisor is not positive.
  int64_t operator()(const std::vector<int64_t>& axes) const;
};

struct Cubin {
  uint32_t sm, threads, shared, blob;
  std::string symbol;
};

struct Kernel {
  enum Type : uint8_t { kPointer, kInt32, kInt64, kFloat, kTypes };
  struct Argument {
    Type type;
    uint8_t divisible;  // promised divisor of the address or the integer
  };
  uint32_t hidden;  // pointers after the arguments of a launch, always null
  bool overlaps;    // waits for the previous kernel, and may be launched before that one ends
  std::vector<Argument> arguments;
  std::vector<Cubin> cubins;

  // The code for a device, or null. Code for 8.x also runs on later 8.x, PTX on all later devices.
  const Cubin* For(uint32_t sm) const;
};

struct Buffer {
  enum Role : uint8_t { kInput, kOutput, kState, kScratch, kPersistent, kTable, kConstant, kRoles };
  enum Table : uint8_t { kNone, kSegments, kChunks, kOffsets, kTables };
  std::string name;
  Role role;
  uint8_t width;  // bytes per element
  bool zero;      // before each call, or once for persistent buffers
  Table table;
  std::vector<Expression> shape;
  std::vector<int32_t> content;  // of a constant

  int64_t Bytes(const std::vector<int64_t>& axes) const;
};

struct Value {
  enum Kind : uint8_t { kAddress, kInteger, kNumber, kKinds };
  Kind kind;
  uint32_t buffer;
  Expression expression;  // offset in bytes, or the integer
  float number;
};

struct Launch {
  uint32_t kernel;
  Expression grid[3];
  std::vector<Value> values;
};

struct Range {
  uint32_t axis;
  int64_t low, high;
};

using Axes = std::map<std::string, int64_t>;  // sizes that a caller chooses, by name

struct Plan {
  std::string layer, op, dtype;
  std::vector<uint32_t> sms;
  std::vector<std::string> axes;    // chosen by the caller
  std::vector<Expression> derived;  // each follows from the axes before it
  std::vector<Range> ranges;
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;

  // Values of all axes; empty if the plan is not for these sizes.
  std::vector<int64_t> Fit(const Axes& given) const;
  int64_t Value(const std::string& axis, const std::vector<int64_t>& values) const;
};

using Blob = std::vector<uint8_t>;  // separate, since the driver needs aligned code

class Pack {
 public:
  static Pack Read(const std::string& path);
  explicit Pack(const std::vector<uint8_t>& bytes);
  Pack(Pack&&) = default;
  Pack(const Pack&) = delete;

  const std::vector<Kernel>& kernels() const { return kernels_; }
  const std::vector<Plan>& plans() const { return plans_; }
  const Blob& blob(size_t i) const { return blobs_[i]; }

  // The compute capability in the pack that serves a device; throws if there is none for the layer.
  uint32_t Serving(const std::string& layer, const std::string& dtype, uint32_t sm) const;

 private:
  std::vector<Kernel> kernels_;
  std::vector<Plan> plans_;
  std::vector<Blob> blobs_;
};

uint32_t crc32(const uint8_t* data, size_t size);

}  // namespace liger

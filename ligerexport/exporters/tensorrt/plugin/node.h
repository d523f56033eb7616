// What nodes of the plugin have in common, without TensorRT: their tensors, a call, and the plans behind them.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace liger {

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "ligerexport";
constexpr int32_t kContract = 2;

enum class Type { kActivation, kFloat, kInteger };

// Data of one call; inputs and outputs in the order of the node's.
struct Call {
  std::string dtype;  // of activations: fp32, fp16, bf16
  std::vector<const void*> inputs;
  std::vector<int64_t> rows, elements;  // of the inputs; rows are the first axis
  std::vector<void*> outputs;
  void* workspace;
  CUstream stream;
  bool timed;  // by a builder, which gives state its own outputs; elsewhere they are the inputs
};

inline int64_t width(Type type, const std::string& dtype) {
  return type == Type::kActivation && dtype != "fp32" ? 2 : 4;
}

inline CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

// What a node says of itself: a name of its layer, and integers that `Integers` of A lists.
template <typename A>
using Integers = std::vector<std::pair<const char*, int32_t A::*>>;

// For engines; `parse` reads it.
template <typename A>
std::string text_of(const A& attributes) {
  std::string text = attributes.layer_spec;
  for (const auto& [name, field] : A::Integers()) text += " " + std::to_string(attributes.*field);
  return text;
}

template <typename A>
A parse(const std::string& text) {
  std::istringstream in(text);
  A made;
  in >> made.layer_spec;
  for (const auto& [name, field] : A::Integers()) in >> made.*field;
  if (!in) throw Error("the engine holds a node of another version of this library; build it again");
  made.Check();
  return made;
}

// Throws where a node is of another contract than this library.
void check_contract(const char* kind, int32_t contract);

// The kernels of this process; they are read when they are first needed.
const Pack& kernels();

// Of the current device, 90 for 9.0.
uint32_t compute_capability();

// The plans of one layer.
class Layer {
 public:
  explicit Layer(std::string spec) : spec_(std::move(spec)) {}

  // Whether there are kernels for activations of this type.
  bool Takes(const std::string& dtype) const;

  // Puts the layer's kernels on the device; throws where there are none.
  void Prepare() const;

 protected:
  struct Chosen {
    const Plan* plan;
    std::vector<int64_t> axes;
  };

  // The compute capability whose kernels this device takes.
  uint32_t Serving(const Pack& pack, const std::string& dtype) const;

  // The plan of an operator for these sizes; throws where there is none.
  Chosen Choose(const Pack& pack, const std::string& op, const std::string& dtype, uint32_t sm, const Axes& axes) const;

 private:
  std::string spec_;
};

}  // namespace liger

// Reads kernels from a file instead of LIGEREXPORT_KERNELS or `kernels.liger` beside this library. Returns 0, or 1
// where the file cannot be used, and says why on stderr.
extern "C" int ligerexport_load_kernels(const char* path);

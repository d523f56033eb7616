// Base of the plugin's nodes, without TensorRT: their tensors, a call, and their plans.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace liger {

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "ligerexport";
// Nodes of equal KV heads are those of contract 2; ragged ones came with 3, keyed rows with 4, codes of weights with 5.
constexpr int32_t kOldestContract = 2, kContract = 5;

// `kStored` is the type of keys and values in the state, which `MixerAttributes` gives.
enum class Type { kActivation, kFloat, kHalf, kInteger, kStored };

// Data of one call; inputs and outputs are in the order of the node.
struct Call {
  std::string dtype;  // of activations: fp32, fp16, bf16
  std::vector<const void*> inputs;
  std::vector<int64_t> rows, elements;  // of the inputs; rows are the first axis
  std::vector<void*> outputs;
  void* workspace;
  CUstream stream;
  bool timed;  // by a builder, which passes separate outputs for the state; otherwise they are the inputs
};

inline int64_t width(Type type, const std::string& dtype) {
  return type == Type::kHalf || (type == Type::kActivation && dtype != "fp32") ? 2 : 4;
}

inline CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

// Attributes of a node: the name of its layer, and the integers that `Integers` of A lists.
template <typename A>
using Integers = std::vector<std::pair<const char*, int32_t A::*>>;

// The text that is stored in engines; `parse` reads it.
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

// Throws if a node has a contract that this library does not know.
void check_contract(const char* kind, int32_t contract);

// The kernels of this process, read at first use.
const Pack& kernels();

// Compute capability of the current device, 90 for 9.0.
uint32_t compute_capability();

// The plans of one layer.
class Layer {
 public:
  explicit Layer(std::string spec) : spec_(std::move(spec)) {}

  // Whether there are kernels for activations of this type.
  bool Takes(const std::string& dtype) const;

  // Loads the layer's kernels onto the device; throws if there are none.
  void Prepare() const;

 protected:
  struct Chosen {
    const Plan* plan;
    std::vector<int64_t> axes;
  };

  // The compute capability of the kernels that this device runs.
  uint32_t Serving(const Pack& pack, const std::string& dtype) const;

  // The plan of an operator for these sizes; throws if there is none.
  Chosen Choose(const Pack& pack, const std::string& op, const std::string& dtype, uint32_t sm, const Axes& axes) const;

 private:
  std::string spec_;
};

}  // namespace liger

// Reads kernels from a file instead of LIGEREXPORT_KERNELS or `kernels.liger` beside this library. Returns 0, or 1
// if the file cannot be used, with the reason on stderr.
extern "C" int ligerexport_load_kernels(const char* path);

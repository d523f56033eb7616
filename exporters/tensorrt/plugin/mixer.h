// One `ligerexport::LigerMixer` node, without TensorRT: which tensors it has, and what it launches.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace liger {

constexpr char kName[] = "LigerMixer";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "ligerexport";
constexpr int32_t kContract = 1;

// The node's attributes.
struct Attributes {
  std::string layer_spec;
  int32_t contract = 0, q_heads = 0, kv_heads = 0, d_k = 0, d_v = 0, slots = 0, pools = 0, max_distance = 0;
  int32_t foresees = 0, judged = 0, recurrent = 0, evicts = 0;

  static const std::vector<std::pair<const char*, int32_t Attributes::*>>& Integers();

  // Throws where the node is of another contract than this library, or is no layer.
  void Check() const;

  std::string Text() const;  // for engines; `Parse` reads it
  static Attributes Parse(const std::string& text);
};

enum class Type { kActivation, kFloat, kInteger };

// Data of one call; inputs and outputs in the order of the node's.
struct Call {
  std::string dtype;  // of activations: fp32, fp16, bf16
  int64_t batch, tokens;
  std::vector<const void*> inputs;
  std::vector<int64_t> elements;  // of the inputs
  std::vector<void*> outputs;
  void* workspace;
  CUstream stream;
  bool timed;  // by a builder, which gives state its own outputs; elsewhere they are the inputs
};

class Mixer {
 public:
  explicit Mixer(Attributes attributes);

  const Attributes& attributes() const { return attributes_; }
  int Inputs() const { return first_state() + static_cast<int>(state_.size()); }
  int Outputs() const { return 1 + static_cast<int>(state_.size()); }
  int first_state() const { return 5 + (attributes_.foresees != 0); }

  Type InputType(int index) const;
  Type OutputType(int index) const { return index == 0 ? Type::kActivation : InputType(first_state() + index - 1); }

  // Whether there are kernels for activations of this type.
  bool Takes(const std::string& dtype) const;

  // Puts the layer's kernels on the device; throws where there are none.
  void Prepare() const;

  // Bytes for any call up to these sizes.
  size_t Workspace(const std::string& dtype, int64_t batch, int64_t tokens) const;

  // Throws where something does not fit.
  void Enqueue(const Call& call);

 private:
  struct State {
    std::string name;
    Type type;
  };
  struct Chosen {
    const Plan* plan;
    std::vector<int64_t> axes;
  };

  Axes Sizes(int64_t batch, int64_t tokens, bool step) const;
  Chosen Choose(const Pack& pack, const std::string& op, const std::string& dtype, uint32_t sm, const Axes& axes,
                bool needed) const;
  size_t WorkspaceOf(const Pack& pack, const std::string& dtype, uint32_t sm, int64_t batch, int64_t tokens) const;
  void OneByOne(const Pack& pack, const Call& call, uint32_t sm, const Places& state);

  Attributes attributes_;
  std::vector<State> state_;
  Memory memory_;
};

// The kernels of this process; they are read when they are first needed.
const Pack& kernels();

}  // namespace liger

// Reads kernels from a file instead of LIGEREXPORT_KERNELS or `kernels.liger` beside this library. Returns 0, or 1
// where the file cannot be used, and says why on stderr.
extern "C" int ligerexport_load_kernels(const char* path);

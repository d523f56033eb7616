// One `ligerexport::LigerMixer` node, without TensorRT: its tensors and launches.
#pragma once

#include "node.h"

namespace liger {

// The node's attributes.
struct MixerAttributes {
  std::string layer_spec;
  int32_t contract = 0, q_heads = 0, kv_heads = 0, d_k = 0, d_v = 0, slots = 0, pools = 0, max_distance = 0;
  int32_t joint = 0, foresees = 0, judged = 0, recurrent = 0, evicts = 0, keyed = 0;
  // The slots of all heads lie on one axis (`ragged`), and so do the scores of `scored` of them. Keys and values are
  // fp16 (`halved`), or codes of 8 bits, four in an int32, with fp16 scales (`scaled`), or else as activations.
  int32_t ragged = 0, scored = 0, halved = 0, scaled = 0;

  static const liger::Integers<MixerAttributes>& Integers();
  void Check() const;  // throws if the contract is not this library's or the attributes make no sense
};

// Inputs are query, key and value `[B * T, H * d]`, or one tensor that has them side by side (`joint`), position `[B]`,
// the rotary table, the learned score `[B * T, H]` if there is one, and the state.
class Mixer : public Layer {
 public:
  using Attributes = MixerAttributes;
  static constexpr char kName[] = "LigerMixer";

  explicit Mixer(Attributes attributes);

  const Attributes& attributes() const { return attributes_; }
  int Inputs() const { return first_state() + static_cast<int>(state_.size()); }
  int Outputs() const { return 1 + static_cast<int>(state_.size()); }
  int Typed() const { return 0; }  // the first input with the type of activations
  int32_t Width(int output) const { return output == 0 ? attributes_.q_heads * attributes_.d_v : 0; }  // 0: as state

  Type InputType(int index) const;
  Type OutputType(int index) const { return index == 0 ? Type::kActivation : InputType(first_state() + index - 1); }

  // Bytes for any call up to these rows of the inputs.
  size_t Workspace(const std::string& dtype, const std::vector<int64_t>& rows) const;

  // Throws if an input does not fit.
  void Enqueue(const Call& call);

 private:
  struct State {
    std::string name;
    Type type;
  };
  int position() const { return attributes_.joint ? 1 : 3; }  // the input with the tokens seen
  int first_state() const { return position() + 2 + (attributes_.foresees != 0); }
  Axes Sizes(int64_t batch, int64_t tokens, bool step) const;
  Chosen ChooseFor(const Pack& pack, const std::string& dtype, uint32_t sm, int64_t batch, int64_t tokens) const;

  Attributes attributes_;
  std::vector<State> state_;
  Memory memory_;
};

}  // namespace liger

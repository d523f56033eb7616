// One `ligerexport::LigerLinear` node, without TensorRT: a product with a weight, with the norm before it and the gate
// or the sum after it.
#pragma once

#include "node.h"

namespace liger {

// The node's attributes.
struct LinearAttributes {
  std::string layer_spec;
  int32_t contract = 0, outputs = 0, inputs = 0, normed = 0, biased = 0, added = 0, wide = 0, side = 0;
  // The weight is codes of 8 bits around 128, four in an int32, with a scale for each row (`coded`). Where rows of it are looked up
  // (`indexed`), x is their ids `[M, 1]`, and there is no product.
  int32_t coded = 0, indexed = 0;

  static const liger::Integers<LinearAttributes>& Integers();
  void Check() const;  // throws if the contract is not this library's or the attributes make no sense
};

// Inputs are x `[M, K]`, fp32 if it is normed, and the weight; then, each if it exists, the scales, the norm's weight, the
// bias, the residual, and weight and bias of the side, all fp32. Beside codes, what has 16 bits is fp16.
class Linear : public Layer {
 public:
  using Attributes = LinearAttributes;
  static constexpr char kName[] = "LigerLinear";

  explicit Linear(Attributes attributes);

  const Attributes& attributes() const { return attributes_; }
  int Inputs() const { return static_cast<int>(names_.size()); }
  int Outputs() const { return attributes_.side ? 2 : 1; }
  // The first input with the type of activations, -1 if it is always fp16.
  int Typed() const { return attributes_.coded ? -1 : attributes_.normed ? 1 : 0; }
  int32_t Width(int output) const { return output == 0 ? attributes_.outputs : attributes_.side; }
  Type InputType(int index) const;
  Type OutputType(int index) const { return index > 0 || attributes_.wide ? Type::kFloat : activation(); }

  // Bytes for any call up to these rows of the inputs.
  size_t Workspace(const std::string& dtype, const std::vector<int64_t>& rows) const;

  // Throws if an input does not fit.
  void Enqueue(const Call& call);

 private:
  Type activation() const { return attributes_.coded ? Type::kHalf : Type::kActivation; }

  Attributes attributes_;
  std::vector<const char*> names_;  // of the inputs
  Memory memory_;
};

}  // namespace liger

#include "linear.h"

namespace liger {

const Integers<LinearAttributes>& LinearAttributes::Integers() {
  static const liger::Integers<LinearAttributes> fields = {
      {"contract", &LinearAttributes::contract}, {"N", &LinearAttributes::outputs},
      {"K", &LinearAttributes::inputs},          {"normed", &LinearAttributes::normed},
      {"biased", &LinearAttributes::biased},     {"added", &LinearAttributes::added},
      {"wide", &LinearAttributes::wide},         {"side", &LinearAttributes::side},
      {"coded", &LinearAttributes::coded},       {"indexed", &LinearAttributes::indexed},
  };
  return fields;
}

void LinearAttributes::Check() const {
  check_contract(Linear::kName, contract);
  if (outputs <= 0 || inputs <= 0 || side < 0 || (indexed && (!coded || !wide || normed)) || layer_spec.empty())
    throw Error("a LigerLinear node has no valid attributes: " + text_of(*this));
}

Linear::Linear(Attributes attributes) : Layer(attributes.layer_spec), attributes_(std::move(attributes)) {
  attributes_.Check();
  names_ = {"input", "weight"};
  if (attributes_.coded) names_.push_back("scale");
  if (attributes_.normed) names_.push_back("norm");
  if (attributes_.biased) names_.push_back("bias");
  if (attributes_.added) names_.push_back("residual");
  if (attributes_.side) names_.insert(names_.end(), {"side_weight", "side_bias"});
}

Type Linear::InputType(int index) const {
  if (index > 1) return Type::kFloat;
  if (index == 1) return attributes_.coded ? Type::kInteger : Type::kActivation;
  return attributes_.indexed ? Type::kInteger : attributes_.normed ? Type::kFloat : activation();
}

size_t Linear::Workspace(const std::string& dtype, const std::vector<int64_t>& rows) const {
  const Pack& pack = kernels();
  const Chosen chosen = Choose(pack, "linear", dtype, Serving(pack, dtype), {{"rows", rows.at(0)}});
  return workspace_bytes(*chosen.plan, chosen.axes);  // fewer rows take less
}

void Linear::Enqueue(const Call& call) {
  const int64_t rows = call.rows.at(0);
  if (rows == 0) return;
  const Pack& pack = kernels();
  const uint32_t sm = Serving(pack, call.dtype);
  Places places;
  for (int i = 0; i < Inputs(); ++i)
    places[names_[i]] = {address(call.inputs.at(i)), call.elements.at(i) * width(InputType(i), call.dtype)};
  for (int i = 0; i < Outputs(); ++i)
    places[i == 0 ? "output" : "side_output"] = {address(call.outputs.at(i)),
                                                 rows * Width(i) * width(OutputType(i), call.dtype)};
  const Chosen chosen = Choose(pack, "linear", call.dtype, sm, {{"rows", rows}});
  run(pack, *chosen.plan, chosen.axes, sm, places, address(call.workspace), memory_, call.stream);
}

}  // namespace liger

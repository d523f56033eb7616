#include "mixer.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "operands.h"

namespace liger {

const Integers<MixerAttributes>& MixerAttributes::Integers() {
  static const liger::Integers<MixerAttributes> fields = {
      {"contract", &MixerAttributes::contract},   {"q_heads", &MixerAttributes::q_heads},
      {"kv_heads", &MixerAttributes::kv_heads},   {"d_k", &MixerAttributes::d_k},
      {"d_v", &MixerAttributes::d_v},             {"slots", &MixerAttributes::slots},
      {"pools", &MixerAttributes::pools},         {"max_distance", &MixerAttributes::max_distance},
      {"joint", &MixerAttributes::joint},         {"foresees", &MixerAttributes::foresees},
      {"judged", &MixerAttributes::judged},       {"recurrent", &MixerAttributes::recurrent},
      {"evicts", &MixerAttributes::evicts},       {"ragged", &MixerAttributes::ragged},
      {"scored", &MixerAttributes::scored},       {"halved", &MixerAttributes::halved},
      {"scaled", &MixerAttributes::scaled},       {"keyed", &MixerAttributes::keyed},
  };
  return fields;
}

void MixerAttributes::Check() const {
  check_contract(Mixer::kName, contract);
  const bool sound = q_heads > 0 && kv_heads > 0 && q_heads % kv_heads == 0 && d_k > 0 && d_v > 0 && slots >= 0 &&
                     pools >= 0 && max_distance > 0 && !layer_spec.empty() && (!scaled || (d_k % 4 == 0 && d_v % 4 == 0));
  if (!sound) throw Error("a LigerMixer node has no valid attributes: " + text_of(*this));
}

Mixer::Mixer(Attributes attributes) : Layer(attributes.layer_spec), attributes_(std::move(attributes)) {
  attributes_.Check();
  for (const StateRow& row : kState)
    if (row.needs == nullptr || attributes_.*row.needs) {
      const Type stored = attributes_.scaled ? Type::kInteger : attributes_.halved ? Type::kHalf : Type::kActivation;
      state_.push_back({row.name, row.type == Type::kStored ? stored : row.type});
    }
}

Type Mixer::InputType(int index) const {
  if (index >= first_state()) return state_.at(index - first_state()).type;
  return index < position() ? Type::kActivation : index == position() ? Type::kInteger : Type::kFloat;
}

Axes Mixer::Sizes(int64_t batch, int64_t tokens, bool step) const {
  const Attributes& a = attributes_;
  Axes axes = {{"batch", batch}, {"tokens", tokens}};
  const std::tuple<const char*, int64_t, int64_t> tensors[] = {
      {"query", a.q_heads, a.d_k}, {"key", a.kv_heads, a.d_k}, {"value", a.kv_heads, a.d_v}};
  int64_t joint = 0;
  for (const auto& [name, heads, width] : tensors) joint += heads * width;
  for (const auto& [name, heads, width] : tensors) {
    const std::string stride = std::string(name) + "_stride_";
    const int64_t row = attributes_.joint ? joint : heads * width;
    axes[stride + "0"] = tokens * row;
    axes[stride + "1"] = step ? width : row;
    axes[stride + "2"] = width;
  }
  return axes;
}

Layer::Chosen Mixer::ChooseFor(const Pack& pack, const std::string& dtype, uint32_t sm, int64_t batch,
                               int64_t tokens) const {
  const bool step = tokens == 1;
  return Choose(pack, step ? "step" : "prefill", dtype, sm, Sizes(batch, tokens, step));
}

size_t Mixer::Workspace(const std::string& dtype, const std::vector<int64_t>& rows) const {
  const int64_t batch = rows.at(position()), tokens = batch == 0 ? 0 : rows.at(0) / batch;
  // Segments depend on the size of a call, so a smaller call can need more than a larger one.
  static std::mutex mutex;
  static std::map<std::tuple<const Pack*, std::string, std::string, uint32_t, int64_t, int64_t>, size_t> known;
  const Pack& pack = kernels();
  const uint32_t sm = Serving(pack, dtype);
  std::lock_guard<std::mutex> lock(mutex);
  const auto [found, fresh] = known.insert({{&pack, attributes_.layer_spec, dtype, sm, batch, tokens}, 0});
  if (fresh)
    for (int64_t b = 1; b <= batch; ++b)
      for (int64_t t = 1; t <= tokens; ++t) {
        const Chosen chosen = ChooseFor(pack, dtype, sm, b, t);
        found->second = std::max(found->second, workspace_bytes(*chosen.plan, chosen.axes));
      }
  return found->second;
}

void Mixer::Enqueue(const Call& call) {
  const int64_t batch = call.rows.at(position()), tokens = batch == 0 ? 0 : call.rows.at(0) / batch;
  if (tokens == 0) return;
  if (batch * tokens != call.rows.at(0)) throw Error("the sequences of a call differ in length");
  const Pack& pack = kernels();
  const uint32_t sm = Serving(pack, call.dtype);
  const Attributes& a = attributes_;
  Places places;
  std::vector<const char*> names(std::begin(kOperands), std::end(kOperands));
  if (a.joint) names.erase(names.begin() + 1, names.begin() + 3);
  for (int i = 0; i < Inputs(); ++i) {
    const int64_t bytes = call.elements.at(i) * width(InputType(i), call.dtype);
    if (i < first_state()) {
      places[names[i]] = {address(call.inputs.at(i)), bytes};
      continue;
    }
    const std::string& name = state_[i - first_state()].name;
    void* const present = call.outputs.at(1 + i - first_state());
    if (present != call.inputs.at(i)) {
      if (!call.timed)
        throw Error("'" + name + "' must be bound to one address as input and output: state is updated in place");
      check(cuMemcpyDtoDAsync(address(present), address(call.inputs[i]), bytes, call.stream), "cuMemcpyDtoDAsync");
    }
    places[name] = places["past_" + name] = {address(present), bytes};
  }
  const int64_t size = width(Type::kActivation, call.dtype), all = batch * tokens * size;
  if (a.joint) {  // kernels take strides: each part begins at its place in the first row
    const CUdeviceptr begin = places["query"].address;
    const int64_t key = a.q_heads * a.d_k * size, value = key + a.kv_heads * a.d_k * size;
    places["query"].bytes = batch * tokens * key;
    places["key"] = {begin + key, batch * tokens * (value - key)};
    places["value"] = {begin + value, all * a.kv_heads * a.d_v};
  }
  places["output"] = {address(call.outputs.at(0)), all * Width(0)};
  const Chosen chosen = ChooseFor(pack, call.dtype, sm, batch, tokens);
  run(pack, *chosen.plan, chosen.axes, sm, places, address(call.workspace), memory_, call.stream);
}

}  // namespace liger

#include "mixer.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace liger {
namespace {

// Copies `rows` pieces of `bytes` bytes, whose begins lie so far apart on either side.
void copy_rows(CUdeviceptr to, size_t to_pitch, CUdeviceptr from, size_t from_pitch, size_t bytes, size_t rows,
               CUstream stream) {
  CUDA_MEMCPY2D copy{};
  copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  copy.srcDevice = from, copy.srcPitch = from_pitch;
  copy.dstDevice = to, copy.dstPitch = to_pitch;
  copy.WidthInBytes = bytes, copy.Height = rows;
  check(cuMemcpy2DAsync(&copy, stream), "cuMemcpy2DAsync");
}

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

const Integers<MixerAttributes>& MixerAttributes::Integers() {
  static const liger::Integers<MixerAttributes> fields = {
      {"contract", &MixerAttributes::contract},   {"q_heads", &MixerAttributes::q_heads},
      {"kv_heads", &MixerAttributes::kv_heads},   {"d_k", &MixerAttributes::d_k},
      {"d_v", &MixerAttributes::d_v},             {"slots", &MixerAttributes::slots},
      {"pools", &MixerAttributes::pools},         {"max_distance", &MixerAttributes::max_distance},
      {"joint", &MixerAttributes::joint},         {"foresees", &MixerAttributes::foresees},
      {"judged", &MixerAttributes::judged},       {"recurrent", &MixerAttributes::recurrent},
      {"evicts", &MixerAttributes::evicts},
  };
  return fields;
}

void MixerAttributes::Check() const {
  check_contract(Mixer::kName, contract);
  const bool sound = q_heads > 0 && kv_heads > 0 && q_heads % kv_heads == 0 && d_k > 0 && d_v > 0 && slots >= 0 &&
                     pools >= 0 && max_distance > 0 && !layer_spec.empty();
  if (!sound) throw Error("a LigerMixer node has no valid attributes: " + text_of(*this));
}

Mixer::Mixer(Attributes attributes) : Layer(attributes.layer_spec), attributes_(std::move(attributes)) {
  attributes_.Check();
  state_ = {{"slot_key", Type::kActivation}, {"slot_value", Type::kActivation}, {"slot_position", Type::kInteger}};
  if (attributes_.pools) state_.push_back({"slot_score", Type::kFloat});
  if (attributes_.recurrent) state_.push_back({"recurrent_state", Type::kFloat});
  if (attributes_.evicts) state_.push_back({"recurrent_mass", Type::kFloat});
  if (attributes_.judged) state_.push_back({"judge_state", Type::kFloat});
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

size_t Mixer::WorkspaceOf(const Pack& pack, const std::string& dtype, uint32_t sm, int64_t batch,
                          int64_t tokens) const {
  if (tokens > 1) {
    const Chosen prefill = Choose(pack, "prefill", dtype, sm, Sizes(batch, tokens, false), false);
    if (prefill.plan != nullptr) return workspace_bytes(*prefill.plan, prefill.axes);
  }
  const Chosen step = Choose(pack, "step", dtype, sm, Sizes(batch, tokens, true), true);
  size_t bytes = workspace_bytes(*step.plan, step.axes);
  if (tokens > 1) {  // as `OneByOne` takes them
    bytes += aligned(tokens * ((batch + 3) / 4 * 4 * sizeof(int32_t)));
    bytes += aligned(batch * attributes_.kv_heads * sizeof(float));
    bytes += aligned(batch * attributes_.q_heads * attributes_.d_v * width(Type::kActivation, dtype));
  }
  return bytes;
}

size_t Mixer::Workspace(const std::string& dtype, const std::vector<int64_t>& rows) const {
  const int64_t batch = rows.at(position()), tokens = batch == 0 ? 0 : rows.at(0) / batch;
  // Segments are cut by the size of a call, so that a smaller call can take more than a larger one.
  static std::mutex mutex;
  static std::map<std::tuple<const Pack*, std::string, std::string, uint32_t, int64_t, int64_t>, size_t> known;
  const Pack& pack = kernels();
  const uint32_t sm = Serving(pack, dtype);
  std::lock_guard<std::mutex> lock(mutex);
  const auto [found, fresh] = known.insert({{&pack, attributes_.layer_spec, dtype, sm, batch, tokens}, 0});
  if (fresh)
    for (int64_t b = 1; b <= batch; ++b)
      for (int64_t t = 1; t <= tokens; ++t)
        found->second = std::max(found->second, WorkspaceOf(pack, dtype, sm, b, t));
  return found->second;
}

void Mixer::Enqueue(const Call& call) {
  const int64_t batch = call.rows.at(position()), tokens = batch == 0 ? 0 : call.rows.at(0) / batch;
  if (tokens == 0) return;
  if (batch * tokens != call.rows.at(0)) throw Error("the sequences of a call differ in length");
  const Pack& pack = kernels();
  const uint32_t sm = Serving(pack, call.dtype);
  const Attributes& a = attributes_;
  Places places, past;
  std::vector<const char*> names = {"query", "key", "value", "position", "rotary", "score"};
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
    places[name] = past["past_" + name] = {address(present), bytes};
  }
  const int64_t size = width(Type::kActivation, call.dtype), all = batch * tokens * size;
  if (a.joint) {  // kernels take strides, so each begins where it lies in the first row
    const CUdeviceptr begin = places["query"].address;
    const int64_t key = a.q_heads * a.d_k * size, value = key + a.kv_heads * a.d_k * size;
    places["query"].bytes = batch * tokens * key;
    places["key"] = {begin + key, batch * tokens * (value - key)};
    places["value"] = {begin + value, all * a.kv_heads * a.d_v};
  }
  places["output"] = {address(call.outputs.at(0)), all * Width(0)};
  if (tokens > 1) {
    const Chosen prefill = Choose(pack, "prefill", call.dtype, sm, Sizes(batch, tokens, false), false);
    if (prefill.plan == nullptr) return OneByOne(pack, call, batch, tokens, sm, places);
    past.insert(places.begin(), places.end());
    return run(pack, *prefill.plan, prefill.axes, sm, past, address(call.workspace), memory_, call.stream);
  }
  const Chosen step = Choose(pack, "step", call.dtype, sm, Sizes(batch, 1, true), true);
  run(pack, *step.plan, step.axes, sm, places, address(call.workspace), memory_, call.stream);
}

// A step after the other, where there are no kernels for many tokens at once.
void Mixer::OneByOne(const Pack& pack, const Call& call, int64_t batch, int64_t tokens, uint32_t sm,
                     const Places& given) {
  const Axes sizes = Sizes(batch, tokens, true);
  const Chosen step = Choose(pack, "step", call.dtype, sm, sizes, true);
  const Chosen positions = Choose(pack, "positions", call.dtype, sm, {{"batch", batch}, {"tokens", tokens}}, true);
  const int64_t stride = (batch + 3) / 4 * 4 * sizeof(int32_t);  // as the plan has it: addresses stay aligned
  const int64_t size = width(Type::kActivation, call.dtype);
  const size_t scores = attributes_.kv_heads * sizeof(float);
  const size_t row = given.at("output").bytes / (batch * tokens);
  CUdeviceptr workspace = address(call.workspace);
  const auto take = [&](size_t bytes) { return std::exchange(workspace, workspace + aligned(bytes)); };
  const CUdeviceptr all = take(stride * tokens), score = take(batch * scores), mixed = take(batch * row);

  const Places counted = {{"position", given.at("position")}, {"positions", {all, stride * tokens}}};
  run(pack, *positions.plan, positions.axes, sm, counted, workspace, memory_, call.stream);
  for (int64_t t = 0; t < tokens; ++t) {
    Places now = given;
    now["position"] = {all + t * stride, given.at("position").bytes};
    for (const char* name : {"query", "key", "value"}) {
      Place& place = now[name];
      place.bytes /= tokens;
      place.address += t * sizes.at(std::string(name) + "_stride_0") / tokens * size;
    }
    if (attributes_.foresees) {
      copy_rows(score, scores, given.at("score").address + t * scores, tokens * scores, scores, batch,
                call.stream);
      now["score"] = {score, static_cast<int64_t>(batch * scores)};
    }
    now["output"] = {mixed, static_cast<int64_t>(batch * row)};
    run(pack, *step.plan, step.axes, sm, now, workspace, memory_, call.stream);
    copy_rows(given.at("output").address + t * row, tokens * row, mixed, row, row, batch, call.stream);
  }
}

}  // namespace liger

#include "mixer.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <tuple>
#include <utility>

namespace liger {
namespace {

std::mutex pack_mutex;
const Pack* pack = nullptr;  // never freed: modules and engines refer to it

std::string beside_this_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&ligerexport_load_kernels), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "" : file.substr(0, slash + 1);
}

uint32_t compute_capability() {
  check(cuInit(0), "cuInit");
  CUdevice device = 0;
  int major = 0, minor = 0;
  check(cuCtxGetDevice(&device), "cuCtxGetDevice");
  check(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
  check(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
  return static_cast<uint32_t>(10 * major + minor);
}

int64_t width(Type type, const std::string& dtype) { return type == Type::kActivation && dtype != "fp32" ? 2 : 4; }

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

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

const std::vector<std::pair<const char*, int32_t Attributes::*>>& Attributes::Integers() {
  static const std::vector<std::pair<const char*, int32_t Attributes::*>> fields = {
      {"contract", &Attributes::contract},   {"q_heads", &Attributes::q_heads},
      {"kv_heads", &Attributes::kv_heads},   {"d_k", &Attributes::d_k},
      {"d_v", &Attributes::d_v},             {"slots", &Attributes::slots},
      {"pools", &Attributes::pools},         {"max_distance", &Attributes::max_distance},
      {"foresees", &Attributes::foresees},   {"judged", &Attributes::judged},
      {"recurrent", &Attributes::recurrent}, {"evicts", &Attributes::evicts},
  };
  return fields;
}

void Attributes::Check() const {
  if (contract != kContract)
    throw Error("the graph was made for contract " + std::to_string(contract) + " of LigerMixer, this library has " +
                std::to_string(kContract) + "; use the library of the ligerexport that wrote the artifact");
  const bool sound = q_heads > 0 && kv_heads > 0 && q_heads % kv_heads == 0 && d_k > 0 && d_v > 0 && slots >= 0 &&
                     pools >= 0 && max_distance > 0 && !layer_spec.empty();
  if (!sound) throw Error("a LigerMixer node has no valid attributes: " + Text());
}

std::string Attributes::Text() const {
  std::string text = layer_spec;
  for (const auto& [name, field] : Integers()) text += " " + std::to_string(this->*field);
  return text;
}

Attributes Attributes::Parse(const std::string& text) {
  std::istringstream in(text);
  Attributes made;
  in >> made.layer_spec;
  for (const auto& [name, field] : Integers()) in >> made.*field;
  if (!in) throw Error("the engine holds a LigerMixer of another version of this library; build it again");
  made.Check();
  return made;
}

Mixer::Mixer(Attributes attributes) : attributes_(std::move(attributes)) {
  attributes_.Check();
  state_ = {{"slot_key", Type::kActivation}, {"slot_value", Type::kActivation}, {"slot_position", Type::kInteger}};
  if (attributes_.pools) state_.push_back({"slot_score", Type::kFloat});
  if (attributes_.recurrent) state_.push_back({"recurrent_state", Type::kFloat});
  if (attributes_.evicts) state_.push_back({"recurrent_mass", Type::kFloat});
  if (attributes_.judged) state_.push_back({"judge_state", Type::kFloat});
}

Type Mixer::InputType(int index) const {
  if (index >= first_state()) return state_.at(index - first_state()).type;
  return index < 3 ? Type::kActivation : index == 3 ? Type::kInteger : Type::kFloat;
}

bool Mixer::Takes(const std::string& dtype) const {
  for (const Plan& x : kernels().plans())
    if (x.layer == attributes_.layer_spec && x.dtype == dtype) return true;
  return false;
}

void Mixer::Prepare() const {
  const Pack& pack = kernels();
  const uint32_t sm = compute_capability();
  bool found = false;
  for (const char* dtype : {"fp32", "fp16", "bf16"}) {
    if (!Takes(dtype)) continue;
    const uint32_t built = pack.Serving(attributes_.layer_spec, dtype, sm);
    for (const Plan& x : pack.plans())
      for (uint32_t other : x.sms)
        if (x.layer == attributes_.layer_spec && x.dtype == dtype && other == built) load(pack, x, built);
    found = true;
  }
  if (!found)
    throw Error("the kernel pack has nothing for layer " + attributes_.layer_spec + "; it belongs to another artifact");
}

Axes Mixer::Sizes(int64_t batch, int64_t tokens, bool step) const {
  const Attributes& a = attributes_;
  Axes axes = {{"batch", batch}, {"tokens", tokens}};
  const std::tuple<const char*, int64_t, int64_t> tensors[] = {
      {"query", a.q_heads, a.d_k}, {"key", a.kv_heads, a.d_k}, {"value", a.kv_heads, a.d_v}};
  for (const auto& [name, heads, width] : tensors) {
    const std::string stride = std::string(name) + "_stride_";
    axes[stride + "0"] = tokens * heads * width;
    axes[stride + "1"] = step ? width : heads * width;
    axes[stride + "2"] = width;
  }
  return axes;
}

Mixer::Chosen Mixer::Choose(const Pack& pack, const std::string& op, const std::string& dtype, uint32_t sm,
                            const Axes& axes, bool needed) const {
  for (const Plan& x : pack.plans()) {
    if (x.layer != attributes_.layer_spec || x.op != op || x.dtype != dtype) continue;
    for (uint32_t built : x.sms) {
      if (built != sm) continue;
      auto values = x.Fit(axes);
      if (!values.empty()) return {&x, std::move(values)};
    }
  }
  if (!needed) return {nullptr, {}};
  throw Error("the kernel pack has no " + op + " for a batch of " + std::to_string(axes.at("batch")) + " and " +
              std::to_string(axes.at("tokens")) + " tokens of layer " + attributes_.layer_spec);
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

size_t Mixer::Workspace(const std::string& dtype, int64_t batch, int64_t tokens) const {
  // Segments are cut by the size of a call, so that a smaller call can take more than a larger one.
  static std::mutex mutex;
  static std::map<std::tuple<const Pack*, std::string, std::string, uint32_t, int64_t, int64_t>, size_t> known;
  const Pack& pack = kernels();
  const uint32_t sm = pack.Serving(attributes_.layer_spec, dtype, compute_capability());
  std::lock_guard<std::mutex> lock(mutex);
  const auto [found, fresh] = known.insert({{&pack, attributes_.layer_spec, dtype, sm, batch, tokens}, 0});
  if (fresh)
    for (int64_t b = 1; b <= batch; ++b)
      for (int64_t t = 1; t <= tokens; ++t)
        found->second = std::max(found->second, WorkspaceOf(pack, dtype, sm, b, t));
  return found->second;
}

void Mixer::Enqueue(const Call& call) {
  if (call.batch == 0 || call.tokens == 0) return;
  const Pack& pack = kernels();
  const uint32_t sm = pack.Serving(attributes_.layer_spec, call.dtype, compute_capability());
  Places places, past;
  const char* const names[] = {"query", "key", "value", "position", "rotary", "score"};
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
  const int64_t row = attributes_.q_heads * attributes_.d_v * width(Type::kActivation, call.dtype);
  places["output"] = {address(call.outputs.at(0)), call.batch * call.tokens * row};
  if (call.tokens > 1) {
    const Chosen prefill = Choose(pack, "prefill", call.dtype, sm, Sizes(call.batch, call.tokens, false), false);
    if (prefill.plan == nullptr) return OneByOne(pack, call, sm, places);
    past.insert(places.begin(), places.end());
    return run(pack, *prefill.plan, prefill.axes, sm, past, address(call.workspace), memory_, call.stream);
  }
  const Chosen step = Choose(pack, "step", call.dtype, sm, Sizes(call.batch, 1, true), true);
  run(pack, *step.plan, step.axes, sm, places, address(call.workspace), memory_, call.stream);
}

// A step after the other, where there are no kernels for many tokens at once.
void Mixer::OneByOne(const Pack& pack, const Call& call, uint32_t sm, const Places& given) {
  const Axes sizes = {{"batch", call.batch}, {"tokens", call.tokens}};
  const Chosen positions = Choose(pack, "positions", call.dtype, sm, sizes, true);
  const Chosen step = Choose(pack, "step", call.dtype, sm, Sizes(call.batch, call.tokens, true), true);
  const int64_t stride = (call.batch + 3) / 4 * 4 * sizeof(int32_t);  // as the plan has it: addresses stay aligned
  const size_t scores = attributes_.kv_heads * sizeof(float);
  const size_t row = given.at("output").bytes / (call.batch * call.tokens);
  CUdeviceptr workspace = address(call.workspace);
  const auto take = [&](size_t bytes) { return std::exchange(workspace, workspace + aligned(bytes)); };
  const CUdeviceptr all = take(stride * call.tokens), score = take(call.batch * scores), mixed = take(call.batch * row);

  const Places counted = {{"position", given.at("position")}, {"positions", {all, stride * call.tokens}}};
  run(pack, *positions.plan, positions.axes, sm, counted, workspace, memory_, call.stream);
  for (int64_t t = 0; t < call.tokens; ++t) {
    Places now = given;
    now["position"] = {all + t * stride, given.at("position").bytes};
    for (const char* name : {"query", "key", "value"}) {
      Place& place = now[name];
      place.bytes /= call.tokens;
      place.address += t * (place.bytes / call.batch);
    }
    if (attributes_.foresees) {
      copy_rows(score, scores, given.at("score").address + t * scores, call.tokens * scores, scores, call.batch,
                call.stream);
      now["score"] = {score, static_cast<int64_t>(call.batch * scores)};
    }
    now["output"] = {mixed, static_cast<int64_t>(call.batch * row)};
    run(pack, *step.plan, step.axes, sm, now, workspace, memory_, call.stream);
    copy_rows(given.at("output").address + t * row, call.tokens * row, mixed, row, row, call.batch, call.stream);
  }
}

const Pack& kernels() {
  std::lock_guard<std::mutex> lock(pack_mutex);
  if (pack == nullptr) {
    const char* given = std::getenv("LIGEREXPORT_KERNELS");
    pack = new Pack(Pack::Read(given != nullptr && *given ? given : beside_this_library() + "kernels.liger"));
  }
  return *pack;
}

}  // namespace liger

extern "C" __attribute__((visibility("default"))) int ligerexport_load_kernels(const char* path) try {
  auto read = std::make_unique<liger::Pack>(liger::Pack::Read(path));
  std::lock_guard<std::mutex> lock(liger::pack_mutex);
  liger::pack = read.release();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "ligerexport: %s\n", error.what());
  return 1;
}

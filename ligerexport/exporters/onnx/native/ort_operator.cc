// The operators of ONNX Runtime in the domain `ligerexport`.
//
// `BoundedMemory`, over `bounded_memory.h`. Its inputs and outputs are listed in `operands.h`: query `[B T, H_q d_k]`, key
// and value `[B T, H d]`, or all three side by side as the first; position `[B]`; cosine and sine by offset `[rows, R]`;
// the slots; scores on arrival `[B, H, 1, T]`; turn `[3, R]`, state and mass of a recurrence over evicted tokens; and, for
// learned scores that the operator computes itself instead of taking them as scores on arrival, the layer's input
// `[B T, D]`, weight `[H, D]` and bias `[H]`. Outputs: the mixed heads `[B T, H_q d_v]`, then the new state, and, if a
// graph asks for it, the share of the last token's attention that fell on evicted tokens `[B, H_q]`.
//
// `RaggedMemory` has the same operands for a layer in which each key head has sizes of its own: the slots of all heads lie
// on one axis, head after head. `RaggedMemoryFloat16` has slots in fp16, `RaggedMemoryInt8` codes with scales in fp16, and
// `RaggedMemoryExact` the same codes and scales in fp32 without rounding, for comparisons.
//
// These may lend memory `[layers, bytes]` uint8 as the last input: each node writes into the row of its layer what the call
// overwrites, and `liger_take_back` puts it back. This is for layers whose ranks are known on arrival.
//
// `BlockLinear`, over `block_linear.h`. Inputs: `[B T, K]`, codes, scales and zero points as `MatMulNBits` has them, and a
// bias `[N]`. Output: `[B T, N]`.
//
// `GatedUnit`, over `gated_unit.h`. Inputs: gate and up `[B T, I]`, or both side by side as the first. Output: `[B T, I]`.

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "block_linear.h"
#include "bounded_memory.h"
#include "gated_unit.h"
#include "operands.h"
#include "ort_abi.h"

namespace {

constexpr const char* kDomain = "ligerexport";

using namespace liger::operands;

// A graph may come from anybody. All sizes are checked before anything is read: attributes once, shapes in each call.
void need(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

constexpr int64_t kMost = int64_t{1} << 31;  // largest of all sizes; the product of two fits into 64 bits

// Base of all kernels: attributes, tensors and threads of ONNX Runtime.
struct Access {
  const OrtApi* api;

  // Throws if a call of ONNX Runtime failed.
  void Done(OrtStatus* bad) const {
    if (bad == nullptr) return;
    ort::call<void>(api, ort::kReleaseStatus, bad);
    throw std::invalid_argument("an attribute or an output is missing");
  }

  int64_t Size(const OrtKernelInfo* info, const std::string& name, int64_t least = 1) const {
    const int64_t value = Integer(info, name);
    need(value >= least && value < kMost, "an attribute is out of range");
    return value;
  }

  // Checks the number of elements of a tensor.
  void Holds(const OrtValue* value, int64_t count, const char* what, bool optional = false) const {
    if (optional && value == nullptr) return;
    int64_t found = 1;
    for (int64_t size : Shape(value)) found *= size;
    need(found == count, what);
  }

  int64_t Integer(const OrtKernelInfo* info, const std::string& name) const {
    int64_t value = 0;
    Done(ort::call(api, ort::kGetAttributeInt, info, name.c_str(), &value));
    return value;
  }

  // Returns an attribute that graphs of earlier versions do not have, 0 for them.
  int64_t Later(const OrtKernelInfo* info, const std::string& name) const {
    int64_t value = 0;
    OrtStatus* const bad = ort::call(api, ort::kGetAttributeInt, info, name.c_str(), &value);
    if (bad != nullptr) ort::call<void>(api, ort::kReleaseStatus, bad);
    return value;
  }

  float Real(const OrtKernelInfo* info, const std::string& name) const {
    float value = 0;
    Done(ort::call(api, ort::kGetAttributeFloat, info, name.c_str(), &value));
    return value;
  }

  const OrtValue* Value(OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    OrtStatus* const bad = ort::call(api, ort::kGetInput, static_cast<const OrtKernelContext*>(context), index, &value);
    if (bad != nullptr) ort::call<void>(api, ort::kReleaseStatus, bad);  // an optional input is absent
    return value;
  }

  template <typename T>
  T* Data(const OrtValue* value) const {
    void* data = nullptr;
    if (value != nullptr) ort::call(api, ort::kGetTensorMutableData, const_cast<OrtValue*>(value), &data);
    return static_cast<T*>(data);
  }

  std::vector<int64_t> Shape(const OrtValue* value) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t rank = 0;
    need(value != nullptr, "an input is missing");
    ort::call(api, ort::kGetTensorTypeAndShape, value, &info);
    ort::call(api, ort::kGetDimensionsCount, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &rank);
    std::vector<int64_t> shape(rank);
    ort::call(api, ort::kGetDimensions, static_cast<const OrtTensorTypeAndShapeInfo*>(info), shape.data(), rank);
    ort::call<void>(api, ort::kReleaseShape, info);
    return shape;
  }

  template <typename T>
  T* Allocate(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape) const {
    OrtValue* value = nullptr;
    Done(ort::call(api, ort::kGetOutput, context, index, shape.data(), shape.size(), &value));
    return Data<T>(value);
  }

  // Calls work(0) to work(count - 1) on ONNX Runtime's own threads.
  template <typename Work>
  void Parallel(OrtKernelContext* context, int64_t count, Work work) const {
    void (*each)(void*, size_t) = [](void* to, size_t i) { (*static_cast<Work*>(to))(i); };
    ort::call(api, ort::kParallelFor, static_cast<const OrtKernelContext*>(context), each, static_cast<size_t>(count),
              size_t{0}, static_cast<void*>(&work));
  }
};

// Names of ragged operators and numbers of element types in ONNX Runtime's interface.
template <typename T>
constexpr const char* kRaggedName = "RaggedMemory";
template <>
constexpr const char* kRaggedName<liger::Half> = "RaggedMemoryFloat16";
template <>
constexpr const char* kRaggedName<int8_t> = "RaggedMemoryInt8";
template <>
constexpr const char* kRaggedName<liger::Exact> = "RaggedMemoryExact";
template <typename T>
constexpr OrtElementType kType = kFloat;
template <>
constexpr OrtElementType kType<liger::Half> = kFloat16;
template <>
constexpr OrtElementType kType<int8_t> = kInt8;

template <typename T, bool kRagged>
struct Memory : Access {
  static constexpr const char* kName = kRagged ? kRaggedName<T> : "BoundedMemory";
  using Scale = liger::Scale<T>;
  static constexpr size_t kInputCount = kInputs, kOutputCount = kOutputs;
  liger::Layer layer;
  int64_t number;  // of the layer

  Memory(const OrtApi* table, const OrtKernelInfo* info) : Access{table}, number(Later(info, "layer")) {
    const auto size = [&](const std::string& name, int64_t least = 1) { return Size(info, name, least); };
    layer = {size("q_heads"), size("kv_heads"), size("d_k"), size("d_v"), size("sinks", 0), size("max_distance", 0),
             Integer(info, "evicts"), Real(info, "scale"), Real(info, "recurrence_weight"), {}, {}, 0, 0, 0};
    need(layer.q_heads % layer.kv_heads == 0, "query heads are no multiple of key heads");
    need(layer.kv_heads <= 4096, "there are too many heads");
    const int64_t pools = size("pools", 0);
    need(pools <= 16, "there are too many pools");
    for (int64_t i = 0; i < pools; ++i) {
      const auto integer = [&](const char* name) { return Integer(info, Pool(i) + name); };
      layer.pools.push_back({integer("_received"), integer("_maximum"), integer("_by_value"),
                             Real(info, Pool(i) + "_horizon")});
    }
    for (int64_t h = 0; h < layer.kv_heads; ++h) {
      const std::string head = kRagged ? "head" + std::to_string(h) + "_" : "";
      liger::Size memory{size(head + "window"), 0, layer.slots, 0, {}, {}};
      int64_t kept = memory.window + layer.sinks;
      for (int64_t i = 0; i < pools; ++i) {
        memory.counts.push_back(size(head + Pool(i) + "_count", kRagged ? 0 : 1));
        memory.first_distances.push_back(Integer(info, head + Pool(i) + "_first_distance"));
        kept += memory.counts.back();
      }
      if (kept == memory.window + layer.sinks) memory.counts.clear();
      need(std::count(memory.counts.begin(), memory.counts.end(), 0) == 0, "a head has slots in some pools only");
      memory.slots = kRagged ? kept : size("slots");
      need(kept <= memory.slots && kept < kMost, "there are fewer slots than are kept");
      // scores are [pools, slots] for the slots of all heads, or for those of each head
      memory.score = kRagged ? layer.score_pool : layer.scores;
      const int64_t scored = memory.counts.empty() ? 0 : memory.slots;
      layer.score_pool = kRagged ? layer.score_pool + scored : scored;
      layer.scores += scored * pools, layer.slots += memory.slots;
      layer.heads.push_back(memory);
    }
  }

  static std::string Pool(int64_t i) { return "pool" + std::to_string(i); }

  // Checks the inputs of a call against the layer.
  void Check(OrtKernelContext* context, const liger::Call<T>& call, int64_t tokens) const {
    const auto holds = [&](size_t input, int64_t count, const char* what) {
      Holds(Value(context, input), count, what, Optional(input, false));
    };
    const liger::Layer& l = layer;
    const int64_t heads = call.batch * l.kv_heads, slots = call.batch * l.slots;
    need(call.batch > 0 && tokens % call.batch == 0, "the tokens are not of the sequences");
    const bool whole = Value(context, kKey) == nullptr;
    need(whole == (Value(context, kValue) == nullptr), "key and value come together");
    holds(kQuery, tokens * (l.q_heads * l.d_k + (whole ? l.kv_heads * (l.d_k + l.d_v) : 0)), "the query is of another size");
    holds(kKey, tokens * l.kv_heads * l.d_k, "the key is of another size");
    holds(kValue, tokens * l.kv_heads * l.d_v, "the value is of another size");
    need(2 * call.half <= l.d_k, "the rotary table is wider than a head");
    const int64_t rows = Shape(Value(context, kCos))[0];
    need(rows > l.max_distance && rows - l.max_distance >= call.length, "the rotary table is too short");
    holds(kSin, rows * call.half, "cosine and sine differ");
    holds(kSlotKey, slots * l.d_k, "the slots' keys are of another size");
    holds(kSlotValue, slots * l.d_v, "the slots' values are of another size");
    holds(kSlotPosition, slots, "the slots' positions are of another size");
    need((Value(context, kSlotScore) != nullptr) == (l.scores > 0), "scores and pools come together");
    holds(kSlotScore, call.batch * l.scores, "the slots' scores are of another size");
    for (size_t scale : {kSlotKeyScale, kSlotValueScale}) {
      need((Value(context, scale) != nullptr) == liger::kScaled<T>, "scales and codes come together");
      holds(scale, slots, "the slots' scales are of another size");
    }
    bool arrives = false;
    for (const liger::Pool& pool : l.pools) arrives = arrives || !pool.received;
    need(!arrives || call.arrival != nullptr || call.hidden != nullptr, "scores on arrival are missing");
    holds(kArrival, heads * call.length, "the scores on arrival are of another size");
    if (call.hidden != nullptr) {
      need(call.score_weight != nullptr && call.score_bias != nullptr, "the map of the scores is missing");
      holds(kHidden, tokens * call.width, "the layer's input is of another size");
      holds(kScoreWeight, l.kv_heads * call.width, "the map of the scores is of another size");
      holds(kScoreBias, l.kv_heads, "the map of the scores is of another size");
    }
    if (!l.evicts) return;
    need(call.turn != nullptr && call.past_state != nullptr && call.past_mass != nullptr, "what evicts has no state");
    holds(kTurn, 3 * call.half, "the turn is of another size");
    holds(kRecurrentState, heads * l.d_k * l.d_v, "the state is of another size");
    holds(kRecurrentMass, heads * l.d_k, "the mass is of another size");
  }

  // Returns the bytes of a head's record of a call, at most.
  int64_t UndoBytes(int64_t length) const {
    const int64_t slot = (layer.d_k + layer.d_v) * sizeof(T) + 2 * sizeof(Scale) + sizeof(int64_t);
    return sizeof(liger::Undo) + length * (sizeof(liger::Undo::Change) + 2 * (slot + layer.pools.size() * sizeof(float)));
  }

  template <typename X>
  X* Renewed(OrtKernelContext* context, size_t input, size_t output) const {
    const OrtValue* past = Value(context, input);
    return past == nullptr ? nullptr : Allocate<X>(context, output, Shape(past));
  }

  void Compute(OrtKernelContext* context) const {
    const auto input = [&](size_t index) { return Data<const float>(Value(context, index)); };
    liger::Call<T> call{};
    const auto positions = Shape(Value(context, kPosition)), query = Shape(Value(context, kQuery));
    const auto table = Shape(Value(context, kCos));
    need(positions.size() == 1 && query.size() == 2 && table.size() == 2, "a tensor has another rank");
    call.batch = positions[0];
    const int64_t tokens = query[0];
    call.length = tokens / std::max<int64_t>(call.batch, 1);
    call.half = table[1];
    call.query = input(kQuery), call.key = input(kKey), call.value = input(kValue);
    call.query_row = layer.q_heads * layer.d_k, call.key_row = layer.kv_heads * layer.d_k;
    call.value_row = layer.kv_heads * layer.d_v;
    if (call.key == nullptr) {
      call.key = call.query + call.query_row, call.value = call.key + call.key_row;
      call.query_row = call.key_row = call.value_row = call.query_row + call.key_row + call.value_row;
    }
    call.cos = input(kCos), call.sin = input(kSin), call.arrival = input(kArrival), call.turn = input(kTurn);
    call.hidden = input(kHidden), call.score_weight = input(kScoreWeight), call.score_bias = input(kScoreBias);
    if (call.hidden != nullptr) call.width = Shape(Value(context, kHidden)).at(1);
    call.position = Data<const int64_t>(Value(context, kPosition));
    call.past_key = Data<const T>(Value(context, kSlotKey)), call.past_value = Data<const T>(Value(context, kSlotValue));
    call.past_key_scale = Data<const Scale>(Value(context, kSlotKeyScale));
    call.past_value_scale = Data<const Scale>(Value(context, kSlotValueScale));
    call.past_position = {Data<void>(Value(context, kSlotPosition)), kRagged};
    call.past_score = input(kSlotScore);
    call.past_state = input(kRecurrentState), call.past_mass = input(kRecurrentMass);
    Check(context, call, tokens);
    if (const auto lent = Value(context, kUndo); lent != nullptr && Shape(lent).at(0) > 0) {
      const auto shape = Shape(lent);
      call.undo_head = shape.back() / (call.batch * layer.kv_heads) / 8 * 8;
      need(shape.size() == 2 && number >= 0 && number < shape[0] && call.undo_head >= UndoBytes(call.length),
           "the memory for taking back is too small");
      call.undo = Data<char>(lent) + number * shape[1];
    }
    call.mixed = Allocate<float>(context, kMixed, {tokens, layer.q_heads * layer.d_v});
    call.new_key = Renewed<T>(context, kSlotKey, kNewSlotKey);
    call.new_value = Renewed<T>(context, kSlotValue, kNewSlotValue);
    call.new_key_scale = Renewed<Scale>(context, kSlotKeyScale, kNewSlotKeyScale);
    call.new_value_scale = Renewed<Scale>(context, kSlotValueScale, kNewSlotValueScale);
    call.new_position = {Renewed<void>(context, kSlotPosition, kNewSlotPosition), kRagged};
    call.new_score = Renewed<float>(context, kSlotScore, kNewSlotScore);
    call.new_state = Renewed<float>(context, kRecurrentState, kNewRecurrentState);
    call.new_mass = Renewed<float>(context, kRecurrentMass, kNewRecurrentMass);
    call.forgotten = Allocate<float>(context, kForgotten, {call.batch, layer.q_heads});
    if (call.forgotten != nullptr) std::fill_n(call.forgotten, call.batch * layer.q_heads, 0.0f);
    need(call.mixed && call.new_key && call.new_value && call.new_position.data, "an output is missing");
    need(!call.past_score == !call.new_score && !call.past_state == !call.new_state && !call.past_mass == !call.new_mass &&
             !call.past_key_scale == !call.new_key_scale && !call.past_value_scale == !call.new_value_scale,
         "a state that goes in comes out");
    std::atomic<bool> damaged{false};
    call.damaged = &damaged;
    liger::run(layer, call, [&](int64_t count, auto work) { Parallel(context, count, work); });
    need(!damaged, "the slots hold positions that no text leaves there");
  }

  static OrtElementType Type(size_t i, bool output) {
    if (output ? i == kNewSlotPosition : i == kSlotPosition) return kRagged ? kInt32 : kInt64;
    if (output ? i == kNewSlotKey || i == kNewSlotValue : i == kSlotKey || i == kSlotValue) return kType<T>;
    if (output ? i == kNewSlotKeyScale || i == kNewSlotValueScale : i == kSlotKeyScale || i == kSlotValueScale) return kType<Scale>;
    if (!output && i == kUndo) return kUint8;
    return !output && i == kPosition ? kInt64 : kFloat;
  }
  static bool Optional(size_t i, bool output) {
    return output ? i >= kNewSlotScore : i == kKey || i == kValue || i >= kSlotScore;
  }
};

struct BlockLinear : Access {
  static constexpr const char* kName = "BlockLinear";
  static constexpr size_t kInputCount = 5, kOutputCount = 1;
  liger::BlockMatrix matrix;
  bool exact;

  BlockLinear(const OrtApi* table, const OrtKernelInfo* info)
      : Access{table}, matrix(Size(info, "N"), Size(info, "K"), Size(info, "bits"), Size(info, "block_size")),
        exact(Integer(info, "accuracy_level") == 1) {
    need(matrix.bits == 4 || matrix.bits == 8, "codes have 4 or 8 bits");
    need(matrix.block == 32 || matrix.block == 64 || matrix.block == 128, "blocks have 32, 64 or 128 codes");
  }

  void Compute(OrtKernelContext* context) const {
    liger::BlockMatrix m = matrix;
    m.codes = Data<const uint8_t>(Value(context, 1)), m.zero_point = Data<const uint8_t>(Value(context, 3));
    m.scale = Data<const float>(Value(context, 2));
    const auto *x = Data<const float>(Value(context, 0)), *bias = Data<const float>(Value(context, 4));
    const int64_t tokens = Shape(Value(context, 0)).at(0);
    Holds(Value(context, 0), tokens * m.width, "the input is of another width");
    Holds(Value(context, 1), m.rows * m.code_row, "the codes are of another size");
    Holds(Value(context, 2), m.rows * m.blocks, "the scales are of another size");
    Holds(Value(context, 3), m.rows * m.zero_row, "the zero points are of another size");
    Holds(Value(context, 4), m.rows, "the bias is of another size", true);
    float* output = Allocate<float>(context, 0, {tokens, m.rows});
    need(output != nullptr, "the output is missing");
    liger::block_linear(m, x, bias, tokens, exact, output,
                        [&](int64_t count, auto work) { Parallel(context, count, work); });
  }

  static OrtElementType Type(size_t i, bool output) { return !output && (i == 1 || i == 3) ? kUint8 : kFloat; }
  static bool Optional(size_t i, bool) { return i == 4; }
};

struct GatedUnit : Access {
  static constexpr const char* kName = "GatedUnit";
  static constexpr size_t kInputCount = 2, kOutputCount = 1;
  static constexpr int64_t kPiece = 1 << 15;  // fewest numbers for a thread
  liger::Activation activation;

  GatedUnit(const OrtApi* table, const OrtKernelInfo* info)
      : Access{table}, activation(static_cast<liger::Activation>(Size(info, "activation", 0))) {}

  void Compute(OrtKernelContext* context) const {
    const OrtValue* first = Value(context, 0);
    const float *gate = Data<const float>(first), *up = Data<const float>(Value(context, 1));
    const auto shape = Shape(first);
    need(shape.size() == 2 && shape[1] > 1, "the gate has another shape");
    const int64_t tokens = shape[0], row = shape[1], width = up == nullptr ? row / 2 : row;
    Holds(Value(context, 1), tokens * width, "gate and up differ", true);
    if (up == nullptr) up = gate + width;
    float* output = Allocate<float>(context, 0, {tokens, width});
    need(output != nullptr, "the output is missing");
    const auto work = [=, kind = activation](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        liger::gated_unit(kind, output + t * width, gate + t * row, up + t * row, width);
    };
    const int64_t rows = std::max<int64_t>(kPiece / width, 1), pieces = (tokens + rows - 1) / rows;
    if (pieces < 2) return work(0, tokens);
    Parallel(context, pieces, [=](int64_t i) { work(i * rows, std::min((i + 1) * rows, tokens)); });
  }

  static OrtElementType Type(size_t, bool) { return kFloat; }
  static bool Optional(size_t i, bool) { return i == 1; }
};

// Returns a status for an exception, since none may leave the library.
template <typename Work>
OrtStatus* answered(const OrtApi* api, Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return ort::call(api, ort::kCreateStatus, ort::kFail, error.what());
  }
}

template <typename Kernel>
OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = ort::kVersion;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** made) -> OrtStatus* {
    return answered(api, [&] { *made = new Kernel(api, info); });
  };
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kInputCount; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kOutputCount; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::Type(i, false); };
  op.GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::Type(i, true); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return Kernel::Optional(i, false) ? kOptional : kRequired;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return Kernel::Optional(i, true) ? kOptional : kRequired;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    auto* const made = static_cast<Kernel*>(kernel);
    return answered(made->api, [&] { made->Compute(context); });
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

extern "C" {

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp operators[] = {
      make_operator<Memory<float, false>>(),  make_operator<Memory<float, true>>(),
      make_operator<Memory<liger::Half, true>>(), make_operator<Memory<int8_t, true>>(),
      make_operator<Memory<liger::Exact, true>>(), make_operator<BlockLinear>(), make_operator<GatedUnit>()};
  const OrtApi* api = base->GetApi(ort::kTableVersion);
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the process: sessions refer to it
  if (OrtStatus* bad = ort::call(api, ort::kCreateCustomOpDomain, kDomain, &domain)) return bad;
  for (const OrtCustomOp& op : operators)
    if (OrtStatus* bad = ort::call(api, ort::kCustomOpDomainAdd, domain, &op)) return bad;
  return ort::call(api, ort::kAddCustomOpDomain, options, domain);
}

// `liger::take_back` for callers of the library; 0 for success.
int liger_take_back(char* undo, int64_t layers, int64_t stride, int64_t batch, int64_t heads, const int64_t* kept,
                    char* const (*ranges)[liger::Undo::kParts][2]) {
  return !liger::take_back(undo, layers, stride, batch, heads, kept, ranges);
}
}

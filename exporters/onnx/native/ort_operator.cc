// The operators of ONNX Runtime in the domain `ligerexport`.
//
// `BoundedMemory`, over `bounded_memory.h`. Inputs: query `[B T, H_q d_k]`, key and value `[B T, H d]`, or all three side
// by side as the first; position `[B]`, cosine and sine by offset `[rows, R]`, the slots' keys, values, positions and
// scores, the scores on arrival `[B, H, 1, T]`, for a recurrence over evicted tokens its turn `[3, R]`, state and mass,
// and where scores are foreseen, in the place of those on arrival, the layer's input `[B T, D]`, weight `[H, D]` and bias
// `[H]`. Outputs: the mixed heads `[B T, H_q d_v]`, then the new state in the order of the old.
//
// `BlockLinear`, over `block_linear.h`. Inputs: `[B T, K]`, codes, scales and zero points as `MatMulNBits` has them, and a
// bias `[N]`. Output: `[B T, N]`.
//
// `GatedUnit`, over `gated_unit.h`. Inputs: gate and up `[B T, I]`, or both side by side as the first. Output: `[B T, I]`.

#include <string>

#include "block_linear.h"
#include "bounded_memory.h"
#include "gated_unit.h"
#include "ort_abi.h"

namespace {

constexpr const char* kDomain = "ligerexport";

enum Input {
  kQuery, kKey, kValue, kPosition, kCos, kSin, kSlotKey, kSlotValue, kSlotPosition, kSlotScore, kArrival, kTurn,
  kState, kMass, kHidden, kScoreWeight, kScoreBias, kInputs
};
enum Output { kMixed, kNewKey, kNewValue, kNewPosition, kNewScore, kNewState, kNewMass, kOutputs };

// What kernels have in common: attributes, tensors and threads of ONNX Runtime.
struct Access {
  const OrtApi* api;

  int64_t Integer(const OrtKernelInfo* info, const std::string& name) const {
    int64_t value = 0;
    ort::call(api, ort::kGetAttributeInt, info, name.c_str(), &value);
    return value;
  }

  float Real(const OrtKernelInfo* info, const std::string& name) const {
    float value = 0;
    ort::call(api, ort::kGetAttributeFloat, info, name.c_str(), &value);
    return value;
  }

  const OrtValue* Value(OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    ort::call(api, ort::kGetInput, static_cast<const OrtKernelContext*>(context), index, &value);
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
    ort::call(api, ort::kGetOutput, context, index, shape.data(), shape.size(), &value);
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

struct BoundedMemory : Access {
  static constexpr const char* kName = "BoundedMemory";
  static constexpr size_t kInputCount = kInputs, kOutputCount = kOutputs;
  liger::Layer layer;

  BoundedMemory(const OrtApi* table, const OrtKernelInfo* info) : Access{table} {
    const auto integer = [&](const std::string& name) { return Integer(info, name); };
    layer = {integer("q_heads"), integer("kv_heads"), integer("d_k"), integer("d_v"), integer("slots"),
             integer("window"), integer("sinks"), integer("max_distance"), integer("evicts"), Real(info, "scale"),
             Real(info, "recurrence_weight"), {}};
    for (int64_t i = 0; i < integer("pools"); ++i) {
      const std::string pool = "pool" + std::to_string(i) + "_";
      layer.pools.push_back({integer(pool + "count"), integer(pool + "received"), integer(pool + "maximum"),
                             integer(pool + "by_value"), integer(pool + "first_distance"), Real(info, pool + "horizon")});
    }
  }

  template <typename T>
  T* Renewed(OrtKernelContext* context, size_t input, size_t output) const {
    const OrtValue* past = Value(context, input);
    return past == nullptr ? nullptr : Allocate<T>(context, output, Shape(past));
  }

  void Compute(OrtKernelContext* context) const {
    const auto input = [&](size_t index) { return Data<const float>(Value(context, index)); };
    liger::Call call{};
    call.batch = Shape(Value(context, kPosition))[0];
    const int64_t tokens = Shape(Value(context, kQuery))[0];
    call.length = tokens / call.batch;
    call.half = Shape(Value(context, kCos))[1];
    call.query = input(kQuery), call.key = input(kKey), call.value = input(kValue);
    call.query_row = layer.q_heads * layer.d_k, call.key_row = layer.kv_heads * layer.d_k;
    call.value_row = layer.kv_heads * layer.d_v;
    if (call.key == nullptr) {
      call.key = call.query + call.query_row, call.value = call.key + call.key_row;
      call.query_row = call.key_row = call.value_row = call.query_row + call.key_row + call.value_row;
    }
    call.cos = input(kCos), call.sin = input(kSin), call.arrival = input(kArrival), call.turn = input(kTurn);
    call.hidden = input(kHidden), call.score_weight = input(kScoreWeight), call.score_bias = input(kScoreBias);
    if (call.hidden != nullptr) call.width = Shape(Value(context, kHidden))[1];
    call.position = Data<const int64_t>(Value(context, kPosition));
    call.past_key = input(kSlotKey), call.past_value = input(kSlotValue), call.past_score = input(kSlotScore);
    call.past_position = Data<const int64_t>(Value(context, kSlotPosition));
    call.past_state = input(kState), call.past_mass = input(kMass);
    call.mixed = Allocate<float>(context, kMixed, {tokens, layer.q_heads * layer.d_v});
    call.new_key = Renewed<float>(context, kSlotKey, kNewKey);
    call.new_value = Renewed<float>(context, kSlotValue, kNewValue);
    call.new_position = Renewed<int64_t>(context, kSlotPosition, kNewPosition);
    call.new_score = Renewed<float>(context, kSlotScore, kNewScore);
    call.new_state = Renewed<float>(context, kState, kNewState);
    call.new_mass = Renewed<float>(context, kMass, kNewMass);
    liger::run(layer, call, [&](int64_t count, auto work) { Parallel(context, count, work); });
  }

  static OrtElementType Type(size_t i, bool output) {
    return (output ? i == kNewPosition : i == kPosition || i == kSlotPosition) ? kInt64 : kFloat;
  }
  static bool Optional(size_t i, bool output) {
    return output ? i >= kNewScore : i == kKey || i == kValue || i >= kSlotScore;
  }
};

struct BlockLinear : Access {
  static constexpr const char* kName = "BlockLinear";
  static constexpr size_t kInputCount = 5, kOutputCount = 1;
  liger::BlockMatrix matrix;
  bool exact;

  BlockLinear(const OrtApi* table, const OrtKernelInfo* info)
      : Access{table}, matrix(Integer(info, "N"), Integer(info, "K"), Integer(info, "bits"), Integer(info, "block_size")),
        exact(Integer(info, "accuracy_level") == 1) {}

  void Compute(OrtKernelContext* context) const {
    liger::BlockMatrix m = matrix;
    m.codes = Data<const uint8_t>(Value(context, 1)), m.zero_point = Data<const uint8_t>(Value(context, 3));
    m.scale = Data<const float>(Value(context, 2));
    const auto *x = Data<const float>(Value(context, 0)), *bias = Data<const float>(Value(context, 4));
    const int64_t tokens = Shape(Value(context, 0))[0];
    float* output = Allocate<float>(context, 0, {tokens, m.rows});
    liger::block_linear(m, x, bias, tokens, exact, output,
                        [&](int64_t count, auto work) { Parallel(context, count, work); });
  }

  static OrtElementType Type(size_t i, bool output) { return !output && (i == 1 || i == 3) ? kUint8 : kFloat; }
  static bool Optional(size_t i, bool) { return i == 4; }
};

struct GatedUnit : Access {
  static constexpr const char* kName = "GatedUnit";
  static constexpr size_t kInputCount = 2, kOutputCount = 1;
  static constexpr int64_t kPiece = 1 << 15;  // numbers that are worth a thread
  liger::Activation activation;

  GatedUnit(const OrtApi* table, const OrtKernelInfo* info)
      : Access{table}, activation(static_cast<liger::Activation>(Integer(info, "activation"))) {}

  void Compute(OrtKernelContext* context) const {
    const OrtValue* first = Value(context, 0);
    const float *gate = Data<const float>(first), *up = Data<const float>(Value(context, 1));
    const int64_t tokens = Shape(first)[0], row = Shape(first)[1], width = up == nullptr ? row / 2 : row;
    if (up == nullptr) up = gate + width;
    float* output = Allocate<float>(context, 0, {tokens, width});
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

template <typename Kernel>
OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = ort::kVersion;
  op.CreateKernel = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info) -> void* {
    return new Kernel(api, info);
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
  op.KernelCompute = [](void* kernel, OrtKernelContext* context) { static_cast<Kernel*>(kernel)->Compute(context); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

extern "C" {

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp operators[] = {make_operator<BoundedMemory>(), make_operator<BlockLinear>(),
                                            make_operator<GatedUnit>()};
  const OrtApi* api = base->GetApi(ort::kTableVersion);
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the process: sessions refer to it
  if (OrtStatus* bad = ort::call(api, ort::kCreateCustomOpDomain, kDomain, &domain)) return bad;
  for (const OrtCustomOp& op : operators)
    if (OrtStatus* bad = ort::call(api, ort::kCustomOpDomainAdd, domain, &op)) return bad;
  return ort::call(api, ort::kAddCustomOpDomain, options, domain);
}
}

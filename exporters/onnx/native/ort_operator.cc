// `ligerexport::BoundedMemory`, an operator of ONNX Runtime over `bounded_memory.h`.
//
// Inputs: query `[B T, H_q d_k]`, key and value `[B T, H d]`, position `[B]`, cosine and sine by offset `[rows, R]`, the
// slots' keys, values, positions and scores, the scores on arrival `[B, H, 1, T]`, and for a recurrence over evicted
// tokens its turn `[3, R]`, state and mass. Outputs: the mixed heads `[B T, H_q d_v]`, then the new state in the order of
// the old.

#include <string>

#include "bounded_memory.h"
#include "ort_abi.h"

namespace {

constexpr const char* kDomain = "ligerexport";

enum Input {
  kQuery, kKey, kValue, kPosition, kCos, kSin, kSlotKey, kSlotValue, kSlotPosition, kSlotScore, kArrival, kTurn,
  kState, kMass, kInputs
};
enum Output { kMixed, kNewKey, kNewValue, kNewPosition, kNewScore, kNewState, kNewMass, kOutputs };

struct Kernel {
  const OrtApi* api;
  liger::Layer layer;

  Kernel(const OrtApi* table, const OrtKernelInfo* info) : api(table) {
    const auto integer = [&](const std::string& name) {
      int64_t value = 0;
      ort::call(api, ort::kGetAttributeInt, info, name.c_str(), &value);
      return value;
    };
    const auto real = [&](const std::string& name) {
      float value = 0;
      ort::call(api, ort::kGetAttributeFloat, info, name.c_str(), &value);
      return value;
    };
    layer = {integer("q_heads"), integer("kv_heads"), integer("d_k"), integer("d_v"), integer("slots"),
             integer("window"), integer("sinks"), integer("max_distance"), integer("evicts"), real("scale"),
             real("recurrence_weight"), {}};
    for (int64_t i = 0; i < integer("pools"); ++i) {
      const std::string pool = "pool" + std::to_string(i) + "_";
      layer.pools.push_back({integer(pool + "count"), integer(pool + "received"), integer(pool + "maximum"),
                             integer(pool + "by_value"), integer(pool + "first_distance"), real(pool + "horizon")});
    }
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
    call.cos = input(kCos), call.sin = input(kSin), call.arrival = input(kArrival), call.turn = input(kTurn);
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
    liger::run(layer, call, [&](int64_t count, auto work) {  // on ONNX Runtime's own threads
      void (*each)(void*, size_t) = [](void* to, size_t i) { (*static_cast<decltype(work)*>(to))(i); };
      ort::call(api, ort::kParallelFor, static_cast<const OrtKernelContext*>(context), each,
                static_cast<size_t>(count), size_t{0}, static_cast<void*>(&work));
    });
  }
};

OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = ort::kVersion;
  op.CreateKernel = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info) -> void* {
    return new Kernel(api, info);
  };
  op.GetName = [](const OrtCustomOp*) { return "BoundedMemory"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return kOutputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == kPosition || i == kSlotPosition ? kInt64 : kFloat; };
  op.GetOutputType = [](const OrtCustomOp*, size_t i) { return i == kNewPosition ? kInt64 : kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i < kSlotScore ? kRequired : kOptional; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return i < kNewScore ? kRequired : kOptional; };
  op.KernelCompute = [](void* kernel, OrtKernelContext* context) { static_cast<Kernel*>(kernel)->Compute(context); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

extern "C" {

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp op = make_operator();
  const OrtApi* api = base->GetApi(ort::kTableVersion);
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the process: sessions refer to it
  if (OrtStatus* bad = ort::call(api, ort::kCreateCustomOpDomain, kDomain, &domain)) return bad;
  if (OrtStatus* bad = ort::call(api, ort::kCustomOpDomainAdd, domain, &op)) return bad;
  return ort::call(api, ort::kAddCustomOpDomain, options, domain);
}
}

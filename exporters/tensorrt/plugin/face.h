// What both faces to TensorRT share: types, the logger, attributes from fields.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "mixer.h"

namespace liger {

// Where messages go; stderr until somebody gave a logger.
void say(nvinfer1::ILogger::Severity severity, const std::string& text) noexcept;

// Runs what may throw and returns its result; a message and `otherwise` where it threw. Nothing may leave through
// TensorRT.
template <typename R, typename F>
R guarded(const char* where, R otherwise, F&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    say(nvinfer1::ILogger::Severity::kERROR, std::string(kName) + ", " + (where == nullptr ? "" : where) +
                                                 ": " + error.what());
  }
  return otherwise;
}

// `fp32`, `fp16`, `bf16`, or "" for what activations cannot be.
inline std::string dtype_of(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kFLOAT) return "fp32";
  if (type == nvinfer1::DataType::kHALF) return "fp16";
#if NV_TENSORRT_MAJOR >= 9
  if (type == nvinfer1::DataType::kBF16) return "bf16";
#endif
  return "";
}

inline int64_t elements_of(const nvinfer1::Dims& dims) {
  int64_t count = 1;
  for (int i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
  return count;
}

// Whether the tensor at `position` of inputs and outputs may be what `at(i)`, a PluginTensorDesc, says.
template <typename At>
bool fits(const Mixer& mixer, int position, At&& at) {
  const nvinfer1::PluginTensorDesc& tensor = at(position);
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const int inputs = mixer.Inputs();
  switch (position < inputs ? mixer.InputType(position) : mixer.OutputType(position - inputs)) {
    case Type::kFloat: return tensor.type == nvinfer1::DataType::kFLOAT;
    case Type::kInteger: return tensor.type == nvinfer1::DataType::kINT32;
    default: break;
  }
  if (position > 0) return tensor.type == at(0).type;
  const std::string dtype = dtype_of(tensor.type);
  return !dtype.empty() && mixer.Takes(dtype);
}

inline Call call_of(const Mixer& mixer, const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream, bool timed) {
  Call call{};
  call.dtype = dtype_of(descriptions[0].type);
  call.batch = descriptions[0].dims.d[0], call.tokens = descriptions[0].dims.d[1];
  call.inputs.assign(inputs, inputs + mixer.Inputs());
  call.outputs.assign(outputs, outputs + mixer.Outputs());
  for (int i = 0; i < mixer.Inputs(); ++i) call.elements.push_back(elements_of(descriptions[i].dims));
  call.workspace = workspace, call.stream = stream, call.timed = timed;
  return call;
}

// Shape of an output: the mixed heads `[B, T, H_q d_v]`, and state as it came in.
inline nvinfer1::DimsExprs output_shape(const Mixer& mixer, int index, const nvinfer1::DimsExprs* inputs,
                                        nvinfer1::IExprBuilder& builder) {
  if (index > 0) return inputs[mixer.first_state() + index - 1];
  nvinfer1::DimsExprs shape = inputs[0];
  shape.d[2] = builder.constant(mixer.attributes().q_heads * mixer.attributes().d_v);
  return shape;
}

inline nvinfer1::DataType output_type(const Mixer& mixer, int index, const nvinfer1::DataType* inputs) {
  return index == 0 ? inputs[0] : inputs[mixer.first_state() + index - 1];
}

// What a creator reads: the ONNX parser passes attributes that are listed here.
const nvinfer1::PluginFieldCollection& fields();

Attributes attributes_of(const nvinfer1::PluginFieldCollection* given);

inline void check_counts(const Mixer& mixer, int inputs, int outputs) {
  if (inputs == mixer.Inputs() && outputs == mixer.Outputs()) return;
  throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, its " +
              "attributes ask for " + std::to_string(mixer.Inputs()) + " and " + std::to_string(mixer.Outputs()));
}

void set_logger(nvinfer1::ILogger* logger);

}  // namespace liger

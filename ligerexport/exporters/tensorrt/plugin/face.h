// Shared by both interfaces to TensorRT: types, the logger, and attributes from fields.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "linear.h"
#include "mixer.h"

namespace liger {

// Destination of messages; stderr until there is a logger.
void say(nvinfer1::ILogger::Severity severity, const std::string& text) noexcept;

// Returns the result of `work`, or prints a message and returns `otherwise` if it throws: no exception may reach
// TensorRT.
template <typename R, typename F>
R guarded(const char* where, R otherwise, F&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    say(nvinfer1::ILogger::Severity::kERROR,
        std::string(kNamespace) + ", " + (where == nullptr ? "" : where) + ": " + error.what());
  }
  return otherwise;
}

// `fp32`, `fp16`, `bf16`, or "" for a type that activations cannot have.
inline std::string dtype_of(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kFLOAT) return "fp32";
  if (type == nvinfer1::DataType::kHALF) return "fp16";
#if NV_TENSORRT_MAJOR >= 9
  if (type == nvinfer1::DataType::kBF16) return "bf16";
#endif
  return "";
}

// The type of activations of a node; `at(i)` returns the type of input i.
template <typename N, typename At>
std::string dtype_in(const N& node, At&& at) {
  return node.Typed() < 0 ? "fp16" : dtype_of(at(node.Typed()));
}

inline int64_t elements_of(const nvinfer1::Dims& dims) {
  int64_t count = 1;
  for (int i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
  return count;
}

// Whether the tensor at `position` of inputs and outputs may have the description `at(i)`, a PluginTensorDesc.
template <typename N, typename At>
bool fits(const N& node, int position, At&& at) {
  const nvinfer1::PluginTensorDesc& tensor = at(position);
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const int inputs = node.Inputs();
  switch (position < inputs ? node.InputType(position) : node.OutputType(position - inputs)) {
    case Type::kFloat: return tensor.type == nvinfer1::DataType::kFLOAT;
    case Type::kHalf: return tensor.type == nvinfer1::DataType::kHALF;
    case Type::kInteger: return tensor.type == nvinfer1::DataType::kINT32;
    default: break;
  }
  if (position > node.Typed()) return tensor.type == at(node.Typed()).type;
  const std::string dtype = dtype_of(tensor.type);
  return !dtype.empty() && node.Takes(dtype);
}

// Rows of the inputs; `dims(i)` returns their sizes.
template <typename N, typename D>
std::vector<int64_t> rows_of(const N& node, D&& dims) {
  std::vector<int64_t> rows;
  for (int i = 0; i < node.Inputs(); ++i) rows.push_back(dims(i).nbDims > 0 ? dims(i).d[0] : 1);
  return rows;
}

template <typename N>
Call call_of(const N& node, const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
             void* const* outputs, void* workspace, cudaStream_t stream, bool timed) {
  Call call{};
  call.dtype = dtype_in(node, [&](int i) { return descriptions[i].type; });
  call.inputs.assign(inputs, inputs + node.Inputs());
  call.outputs.assign(outputs, outputs + node.Outputs());
  call.rows = rows_of(node, [&](int i) { return descriptions[i].dims; });
  for (int i = 0; i < node.Inputs(); ++i) call.elements.push_back(elements_of(descriptions[i].dims));
  call.workspace = workspace, call.stream = stream, call.timed = timed;
  return call;
}

// Shape of an output: that of the first input with another width, or for state, which comes last, that of its input.
template <typename N>
nvinfer1::DimsExprs output_shape(const N& node, int index, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) {
  const int32_t width = node.Width(index);
  if (width == 0) return inputs[node.Inputs() - node.Outputs() + index];
  nvinfer1::DimsExprs shape = inputs[0];
  shape.d[shape.nbDims - 1] = builder.constant(width);
  return shape;
}

template <typename N>
nvinfer1::DataType output_type(const N& node, int index, const nvinfer1::DataType* inputs) {
  switch (node.OutputType(index)) {
    case Type::kFloat: return nvinfer1::DataType::kFLOAT;
    case Type::kHalf: return nvinfer1::DataType::kHALF;
    case Type::kInteger: return nvinfer1::DataType::kINT32;
    default: return inputs[node.Typed()];
  }
}

// Attributes that a creator reads: the ONNX parser passes only those that are listed here.
template <typename A>
const nvinfer1::PluginFieldCollection& fields() {
  using nvinfer1::PluginField;
  using nvinfer1::PluginFieldType;
  static const auto all = [] {
    std::vector<PluginField> made = {{"layer_spec", nullptr, PluginFieldType::kCHAR, 0}};
    for (const auto& [name, field] : A::Integers()) made.push_back({name, nullptr, PluginFieldType::kINT32, 1});
    return made;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(all.size()), all.data()};
  return collection;
}

template <typename A>
A attributes_of(const nvinfer1::PluginFieldCollection* given) {
  A made;
  for (int i = 0; given != nullptr && i < given->nbFields; ++i) {
    const nvinfer1::PluginField& x = given->fields[i];
    if (x.data == nullptr || x.name == nullptr) continue;
    if (std::strcmp(x.name, "layer_spec") == 0 && x.length > 0) {
      const char* const text = static_cast<const char*>(x.data);
      made.layer_spec.assign(text, std::find(text, text + x.length, '\0'));
    }
    for (const auto& [name, field] : A::Integers())
      if (std::strcmp(x.name, name) == 0 && x.type == nvinfer1::PluginFieldType::kINT32)
        std::memcpy(&(made.*field), x.data, sizeof(int32_t));
  }
  made.Check();
  return made;
}

template <typename N>
void check_counts(const N& node, int inputs, int outputs) {
  if (inputs == node.Inputs() && outputs == node.Outputs()) return;
  throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, its " +
              "attributes ask for " + std::to_string(node.Inputs()) + " and " + std::to_string(node.Outputs()));
}

void set_logger(nvinfer1::ILogger* logger);

}  // namespace liger

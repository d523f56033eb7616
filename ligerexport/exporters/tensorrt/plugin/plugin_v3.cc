// The nodes for TensorRT 10 and newer: IPluginV3, found by IPluginRegistry::loadLibrary.

#include "face.h"

namespace liger {
namespace {

template <typename N>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // `timed`: whether a builder may run the node to time it; nodes of an engine are never timed.
  Plugin(typename N::Attributes attributes, bool timed) : node_(std::move(attributes)), timed_(timed) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<Plugin*>("clone", nullptr, [&] { return new Plugin(node_.attributes(), timed_); });
  }

  const char* getPluginName() const noexcept override { return N::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept override {
    return guarded("configurePlugin", 1, [&] { return check_counts(node_, inputs, outputs), 0; });
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* inputs,
                             int32_t count) const noexcept override {
    return guarded("getOutputDataTypes", 1, [&] {
      check_counts(node_, count, outputs);
      for (int i = 0; i < outputs; ++i) types[i] = output_type(node_, i, inputs);
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* shapes, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded("getOutputShapes", 1, [&] {
      check_counts(node_, count, outputs);
      for (int i = 0; i < outputs; ++i) shapes[i] = output_shape(node_, i, inputs, builder);
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return guarded("supportsFormatCombination", false, [&] {
      check_counts(node_, inputs, outputs);
      return fits(node_, position, [&](int i) -> const nvinfer1::PluginTensorDesc& { return tensors[i].desc; });
    });
  }

  int32_t getNbOutputs() const noexcept override { return node_.Outputs(); }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return guarded("getWorkspaceSize", size_t{0}, [&] {
      return node_.Workspace(dtype_in(node_, [&](int i) { return inputs[i].desc.type; }),
                             rows_of(node_, [&](int i) { return inputs[i].max; }));
    });
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* descriptions, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded("enqueue", 1, [&] {
      node_.Enqueue(call_of(node_, descriptions, inputs, outputs, workspace, stream, timed_));
      return 0;
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return guarded<nvinfer1::IPluginV3*>("attachToContext", nullptr, [&] {
      node_.Prepare();
      return new Plugin(node_.attributes(), timed_);
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>("getFieldsToSerialize", nullptr, [&] {
      const auto& x = node_.attributes();
      using nvinfer1::PluginFieldType;
      const auto length = static_cast<int32_t>(x.layer_spec.size());
      fields_ = {{"layer_spec", x.layer_spec.data(), PluginFieldType::kCHAR, length}};
      for (const auto& [name, field] : N::Attributes::Integers())
        fields_.push_back({name, &(x.*field), PluginFieldType::kINT32, 1});
      collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
      return &collection_;
    });
  }

 private:
  N node_;
  bool timed_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

template <typename N>
class Creator final : public nvinfer1::IPluginCreatorV3One {
  using Attributes = typename N::Attributes;

 public:
  nvinfer1::IPluginV3* createPlugin(const char* node, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return guarded<Plugin<N>*>(node, nullptr, [&] {
      return new Plugin<N>(attributes_of<Attributes>(given), phase == nvinfer1::TensorRTPhase::kBUILD);
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields<Attributes>(); }
  const char* getPluginName() const noexcept override { return N::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
};

}  // namespace
}  // namespace liger

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  if (finder != nullptr) liger::set_logger(finder->findLogger());
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static liger::Creator<liger::Mixer> mixer;
  static liger::Creator<liger::Linear> linear;
  static nvinfer1::IPluginCreatorInterface* const all[] = {&mixer, &linear};
  count = 2;
  return all;
}

// The nodes for TensorRT 8.5 and 8.6: IPluginV2DynamicExt.

#include "face.h"

namespace liger {
namespace {

template <typename N>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  // `timed`: whether a builder may run the node to time it; nodes of an engine are never timed.
  Plugin(typename N::Attributes attributes, bool timed) : node_(std::move(attributes)), timed_(timed) {}

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return guarded<Plugin*>("clone", nullptr, [&] { return new Plugin(node_.attributes(), timed_); });
  }

  nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* inputs, int32_t count,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded("getOutputDimensions", nvinfer1::DimsExprs{}, [&] {
      check_counts(node_, count, node_.Outputs());
      return output_shape(node_, index, inputs, builder);
    });
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return guarded("supportsFormatCombination", false, [&] {
      check_counts(node_, inputs, outputs);
      return fits(node_, position, [&](int i) -> const nvinfer1::PluginTensorDesc& { return tensors[i]; });
    });
  }

  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return guarded("getWorkspaceSize", size_t{0}, [&] {
      return node_.Workspace(dtype_in(node_, [&](int i) { return inputs[i].type; }),
                             rows_of(node_, [&](int i) { return inputs[i].dims; }));
    });
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* descriptions, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded("enqueue", 1, [&] {
      node_.Enqueue(call_of(node_, descriptions, inputs, outputs, workspace, stream, timed_));
      return 0;
    });
  }

  nvinfer1::DataType getOutputDataType(int32_t index, const nvinfer1::DataType* inputs,
                                       int32_t) const noexcept override {
    return output_type(node_, index, inputs);
  }

  const char* getPluginType() const noexcept override { return N::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return node_.Outputs(); }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const char*) noexcept override {}
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t initialize() noexcept override {
    return guarded("initialize", 1, [&] { return node_.Prepare(), 0; });
  }

  size_t getSerializationSize() const noexcept override { return text_of(node_.attributes()).size(); }

  void serialize(void* to) const noexcept override {
    const std::string text = text_of(node_.attributes());
    std::memcpy(to, text.data(), text.size());
  }

 private:
  N node_;
  bool timed_;
};

template <typename N>
class Creator final : public nvinfer1::IPluginCreator {
  using Attributes = typename N::Attributes;

 public:
  const char* getPluginName() const noexcept override { return N::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields<Attributes>(); }

  nvinfer1::IPluginV2* createPlugin(const char* node,
                                    const nvinfer1::PluginFieldCollection* given) noexcept override {
    set_logger(getLogger());  // there is no logger before the first builder or runtime
    return guarded<Plugin<N>*>(node, nullptr, [&] { return new Plugin<N>(attributes_of<Attributes>(given), true); });
  }

  nvinfer1::IPluginV2* deserializePlugin(const char* node, const void* data, size_t size) noexcept override {
    set_logger(getLogger());
    return guarded<Plugin<N>*>(node, nullptr, [&] {
      return new Plugin<N>(parse<Attributes>({static_cast<const char*>(data), size}), false);
    });
  }

  void setPluginNamespace(const char*) noexcept override {}
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
};

Creator<Mixer> mixer;
Creator<Linear> linear;

// Registers the nodes in their namespace when the library is opened; REGISTER_TENSORRT_PLUGIN knows no namespace.
const bool registered = getPluginRegistry()->registerCreator(mixer, kNamespace) &&
                        getPluginRegistry()->registerCreator(linear, kNamespace);

}  // namespace
}  // namespace liger

#include "face.h"

#include <cstdio>

namespace liger {
namespace {

nvinfer1::ILogger* sink = nullptr;

}  // namespace

void set_logger(nvinfer1::ILogger* logger) { sink = logger; }

void say(nvinfer1::ILogger::Severity severity, const std::string& text) noexcept {
  if (sink != nullptr) sink->log(severity, text.c_str());
  else std::fprintf(stderr, "ligerexport: %s\n", text.c_str());
}

const nvinfer1::PluginFieldCollection& fields() {
  using nvinfer1::PluginField;
  using nvinfer1::PluginFieldType;
  static const auto all = [] {
    std::vector<PluginField> made = {{"layer_spec", nullptr, PluginFieldType::kCHAR, 0}};
    for (const auto& [name, field] : Attributes::Integers())
      made.push_back({name, nullptr, PluginFieldType::kINT32, 1});
    return made;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(all.size()), all.data()};
  return collection;
}

Attributes attributes_of(const nvinfer1::PluginFieldCollection* given) {
  Attributes made;
  for (int i = 0; given != nullptr && i < given->nbFields; ++i) {
    const nvinfer1::PluginField& x = given->fields[i];
    if (x.data == nullptr || x.name == nullptr) continue;
    if (std::strcmp(x.name, "layer_spec") == 0 && x.length > 0) {
      const char* const text = static_cast<const char*>(x.data);
      made.layer_spec.assign(text, std::find(text, text + x.length, '\0'));
    }
    for (const auto& [name, field] : Attributes::Integers())
      if (std::strcmp(x.name, name) == 0 && x.type == nvinfer1::PluginFieldType::kINT32)
        std::memcpy(&(made.*field), x.data, sizeof(int32_t));
  }
  made.Check();
  return made;
}

}  // namespace liger

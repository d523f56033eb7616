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

}  // namespace liger

// As much of the ONNX parser's interface as the runner uses; see `NvInfer.h`.
#pragma once

#include <NvInfer.h>

namespace nvonnxparser {

class IParserError {
 public:
  virtual ~IParserError() = default;
  virtual int node() const = 0;
  virtual const char* desc() const = 0;
};

class IParser {
 public:
  virtual ~IParser() = default;
  virtual bool parseFromFile(const char* path, int severity) = 0;
  virtual int getNbErrors() const = 0;
  virtual const IParserError* getError(int index) const = 0;
};

IParser* createParser(nvinfer1::INetworkDefinition& network, nvinfer1::ILogger& logger);

}  // namespace nvonnxparser

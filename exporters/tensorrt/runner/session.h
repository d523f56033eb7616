// A batch of sequences on an engine: state that each call updates in place, and the step as a CUDA graph.
#pragma once

#include <string>
#include <vector>

#include "engine.h"

namespace liger {

class Session {
 public:
  Session(const Engine& engine, int batch, bool graph);
  ~Session();
  Session(const Session&) = delete;

  // Starts all sequences anew.
  void Reset();

  // Advances every sequence by the same number of tokens, `ids` `[B, T]` row after row.
  void Advance(const std::vector<int32_t>& ids);

  // Logits of the last call, `[B, vocab]`, and the most likely tokens.
  std::vector<float> Logits();
  std::vector<int32_t> Likeliest();

  // Milliseconds of one step on the device, without what the host does between steps.
  double TimeStep(bool graph);

  // Medians in milliseconds of the layers of a step, by name, without the graph; layers wait for each other.
  nlohmann::json Profile(int steps);

  int batch() const { return batch_; }
  size_t state_bytes() const;
  cudaStream_t stream() const { return stream_; }

  struct State {
    std::string past, present, dtype;
    std::vector<int64_t> shape;
    double fill;
    size_t bytes;
    void* data;
  };
  const std::vector<State>& state() const { return state_; }

 private:
  void* Allocate(size_t bytes);
  void Bind(nvinfer1::IExecutionContext& context, int tokens);
  void Upload(const int32_t* ids, int tokens, int stride);
  void Enqueue(nvinfer1::IExecutionContext& context);
  void Step();

  const Engine& engine_;
  int batch_, vocab_ = 0;
  int32_t position_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::unique_ptr<nvinfer1::IExecutionContext> step_, prefill_;
  std::vector<void*> memory_;
  std::vector<State> state_;
  void *ids_ = nullptr, *positions_ = nullptr, *logits_ = nullptr;
};

}  // namespace liger

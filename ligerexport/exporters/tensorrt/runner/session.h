// A batch of sequences on an engine, with state that is updated in place, and the step as a CUDA graph.
#pragma once

#include <string>
#include <vector>

#include "engine.h"

namespace liger {

template <auto release>
struct Release {
  template <typename T>
  void operator()(T* x) const {
    release(x);
  }
};
using Device = std::unique_ptr<void, Release<cudaFree>>;
using Pinned = std::unique_ptr<void, Release<cudaFreeHost>>;
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Release<cudaStreamDestroy>>;
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Release<cudaEventDestroy>>;
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Release<cudaGraphExecDestroy>>;

class Session {
 public:
  static constexpr int kAll = -1;  // rows

  // `graph`: whether steps and repeated calls of a whole chunk are replayed as CUDA graphs; `chunk`: most tokens of one
  // call, at most the engine's limit for one sequence.
  Session(Engine& engine, int batch, bool graph, int chunk);
  ~Session();

  // Resets one row, or all.
  void Reset(int row = kAll);

  // Advances every row by `tokens` tokens, `ids` `[B, tokens]`. Returns before the device has finished.
  void Advance(const int32_t* ids, int tokens);

  // Waits for the device and copies the logits of the last call, `[B, vocab]`, to `to`.
  void Wait();
  void Logits(float* to);

  // Copies one row of a state tensor, or all rows; `bytes` must be their size.
  void Read(int tensor, int row, void* to, size_t bytes);
  void Write(int tensor, int row, const void* from, size_t bytes);

  // Milliseconds of one step on the device, without the host's time between steps.
  double TimeStep(bool graph);

  // Medians in milliseconds of the layers of a step, by name, without the graph; layers wait for each other.
  nlohmann::json Profile(int steps);

  // Tokens that each row has seen; -n if n tokens of padding follow. May be changed between calls.
  std::vector<int32_t>& position() { return position_; }

  nlohmann::json Describe() const;

 private:
  struct State {
    std::string past, present, dtype;
    std::vector<int64_t> shape;  // of all rows
    std::vector<char> first;     // content of a row that has seen nothing
    Device data;
  };

  std::unique_ptr<nvinfer1::IExecutionContext> Context(int profile);
  void Bind(nvinfer1::IExecutionContext& context, int tokens);
  void Upload(const int32_t* ids, int tokens, int stride);
  void Enqueue(nvinfer1::IExecutionContext& context);
  void Step();
  void Chunk(int tokens);
  Graph Capture(nvinfer1::IExecutionContext& context);
  State Make(const nlohmann::json& described) const;
  void* Place(int tensor, int row, size_t bytes) const;

  // Members are freed from the last to the first, so each is declared after those that it uses.
  std::shared_ptr<nvinfer1::ICudaEngine> engine_;
  int batch_, chunk_, vocab_ = 0;
  std::vector<int32_t> position_;
  Stream stream_;
  Event uploaded_;
  std::vector<State> state_;
  Device scratch_;         // of both contexts, whose calls follow each other on one stream
  Device input_, logits_;  // `input_` holds positions, and ids after `ids_at_` bytes
  Pinned host_input_, host_logits_;
  size_t ids_at_;
  std::unique_ptr<nvinfer1::IExecutionContext> step_, prefill_;
  bool graphs_;
  int bound_ = 0;  // tokens of the last call of `prefill_`
  Graph step_graph_, chunk_graph_;
};

}  // namespace liger

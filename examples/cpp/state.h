// A state that any runtime has saved: a file in the format safetensors with the tensors of one sequence.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

struct Tensor {
  std::string type;  // as in the manifest
  std::vector<int64_t> shape;
  std::vector<char> data;
};

struct State {
  int64_t position;                       // tokens that it has seen
  std::map<std::string, Tensor> tensors;  // by the names of the graph's inputs, as the artifact has them
};

// Reads a file and brings it into the form that the artifact with this manifest has. Throws std::runtime_error.
State read_state(const std::filesystem::path& file, const nlohmann::json& manifest);

// Bytes of an element.
size_t width_of(const std::string& type);

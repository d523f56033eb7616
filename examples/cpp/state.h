// A state for any runtime: a file in the format safetensors with the tensors of one sequence.
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

// Writes a state, whole or not at all; `ids` are the tokens that it has seen, or empty.
void write_state(const std::filesystem::path& file, const nlohmann::json& manifest, const State& state,
                 const std::vector<int64_t>& ids);

struct SavedIds {
  std::string model;         // the fingerprint in its manifest
  std::vector<int64_t> ids;  // all tokens that the state has seen; empty if they were not saved
};

// Reads the tokens of a file. Throws std::runtime_error.
SavedIds read_ids(const std::filesystem::path& file);

// Bytes of an element.
size_t width_of(const std::string& type);

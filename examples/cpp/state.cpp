#include "state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "sha256.h"

namespace {

using nlohmann::json;
using Tensors = std::map<std::string, Tensor>;

const std::map<std::string, std::string> kNames = {
    {"F32", "float32"}, {"F16", "float16"}, {"I64", "int64"}, {"I32", "int32"}, {"I8", "int8"}};

size_t count_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>());
}

template <typename Element>
Element at(const Tensor& tensor, size_t i) {
  Element value;
  std::memcpy(&value, tensor.data.data() + i * sizeof value, sizeof value);
  return value;
}

int64_t integer(const Tensor& tensor, size_t i) {
  return tensor.type == "int64" ? at<int64_t>(tensor, i) : at<int32_t>(tensor, i);
}

std::string digest(const Tensors& tensors) {
  std::string bytes;
  for (const auto& [name, tensor] : tensors) bytes.append(name).append(tensor.data.begin(), tensor.data.end());
  return sha256(std::move(bytes));
}

// The tensors and the metadata of a file; the sizes of every tensor and the hash of all are checked.
std::pair<Tensors, json> parse(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error("there is no file " + file.string());
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const std::runtime_error damaged("this file is not a saved state");
  uint64_t length = 0;
  if (bytes.size() < sizeof length) throw damaged;
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - sizeof length) throw damaged;
  const char* begin = bytes.data() + sizeof length;
  const size_t room = bytes.size() - sizeof length - length;
  const json content = json::parse(begin, begin + length, nullptr, false);
  if (!content.is_object()) throw damaged;
  Tensors tensors;
  for (const auto& [name, entry] : content.items()) {
    if (name == "__metadata__") continue;
    if (!entry.is_object() || !entry.contains("shape") || !entry.contains("data_offsets")) throw damaged;
    const auto type = kNames.find(entry.at("dtype").get<std::string>());
    const auto range = entry.at("data_offsets").get<std::vector<size_t>>();
    const auto shape = entry.at("shape").get<std::vector<int64_t>>();
    if (type == kNames.end() || range.size() != 2 || range[0] > range[1] || range[1] > room ||
        range[1] - range[0] != count_of(shape) * width_of(type->second))
      throw damaged;
    const char* data = begin + length;
    tensors[name] = {type->second, shape, {data + range[0], data + range[1]}};
  }
  const json header = content.value("__metadata__", json::object());
  if (header.value("ligerexport.snapshot", "") != "2") throw std::runtime_error("a saved state of format 2 was expected");
  if (header.value("sha256", "") != digest(tensors))
    throw std::runtime_error("this state was changed after it was written");
  return {tensors, header};
}

struct Heads {
  std::vector<size_t> sizes;  // slots of each KV head
  std::vector<bool> scored;   // whether it keeps scores
};

Heads heads_of(const json& manifest, const std::string& prefix, const json& position) {
  const size_t layer = std::stoul(prefix.substr(prefix.rfind('.') + 1));
  Heads heads;
  if (manifest.contains("slots") && layer < manifest["slots"].size())
    heads.sizes = manifest["slots"][layer].get<std::vector<size_t>>();
  else
    heads.sizes.assign(position["shape"][1].get<size_t>(), position["shape"][2].get<size_t>());
  heads.scored.assign(heads.sizes.size(), true);
  const auto layers = manifest["liger"].value("heads", json::array());
  if (layer < layers.size()) {
    std::istringstream words(layers[layer].get<std::string>());
    size_t head = 0;
    for (std::string word; words >> word && head < heads.scored.size(); ++head)
      heads.scored[head] = word.find('+') != std::string::npos;
  }
  return heads;
}

// Puts the slots of a layer in the order of their positions, head by head: some runtimes leave them in any order.
void order(Tensors& layer, const json& manifest, const Heads& heads, const std::string& prefix) {
  const Tensor position = layer.at(prefix + ".slot_position");
  std::vector<size_t> from(count_of(position.shape)), place(from.size());
  const bool integers = position.type == "int64" || position.type == "int32";
  if (!integers || std::accumulate(heads.sizes.begin(), heads.sizes.end(), size_t{0}) != from.size())
    throw std::runtime_error(prefix + " of this state has " + std::to_string(from.size()) + " slots");
  std::iota(from.begin(), from.end(), size_t{0});
  size_t start = 0, scored = 0;
  for (size_t head = 0; head < heads.sizes.size(); start += heads.sizes[head++]) {
    const auto first = from.begin() + start, last = first + heads.sizes[head];
    for (size_t slot = start; slot < start + heads.sizes[head]; ++slot)
      place[slot] = heads.scored[head] ? scored++ : SIZE_MAX;
    std::stable_sort(first, last, [&](size_t a, size_t b) { return integer(position, a) < integer(position, b); });
  }
  for (auto& [name, tensor] : layer) {
    if (name.rfind(prefix + ".slot_", 0) != 0) continue;
    const Tensor old = tensor;
    if (name != prefix + ".slot_score") {
      const size_t bytes = old.data.size() / from.size();
      for (size_t to = 0; to < from.size(); ++to)
        std::memcpy(tensor.data.data() + to * bytes, old.data.data() + from[to] * bytes, bytes);
      continue;
    }
    // Scores are [1, H, pools, N] or [1, pools, slots].
    const bool apart = old.shape.size() == 4;
    if (old.type != "float32" || scored == 0 || (apart && heads.sizes.size() * heads.sizes[0] != scored))
      throw std::runtime_error("this state has no " + name + " that fits this artifact");
    const size_t pools = count_of(old.shape) / scored, size = heads.sizes[0];
    const auto index = [&](size_t axes, size_t pool, size_t slot) {
      return axes == 3 ? pool * scored + place[slot] : (slot / size * pools + pool) * size + slot % size;
    };
    size_t axes = old.shape.size();
    for (const auto& wanted : manifest["state"])
      if (wanted["past"] == name) axes = wanted["shape"].size();
    for (size_t to = 0; to < from.size(); ++to)
      for (size_t pool = 0; pool < pools && place[to] != SIZE_MAX; ++pool)
        std::memcpy(tensor.data.data() + 4 * index(axes, pool, to),
                    old.data.data() + 4 * index(old.shape.size(), pool, from[to]), 4);
  }
}

float half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * std::ldexp(exponent != 0 ? fraction + 1024 : fraction, std::max(exponent, 1) - 25);
}

// Returns a tensor in the type of the artifact; empty if it is not converted here.
std::vector<char> cast(const Tensor& tensor, const Tensor* scale, const std::string& wanted) {
  if (tensor.type == wanted) return tensor.data;
  const size_t count = count_of(tensor.shape);
  std::vector<char> made(count * width_of(wanted));
  const auto put = [&](size_t i, auto value) { std::memcpy(made.data() + i * sizeof value, &value, sizeof value); };
  if (wanted == "int64" && tensor.type == "int32") {
    for (size_t i = 0; i < count; ++i) put(i, int64_t{at<int32_t>(tensor, i)});
  } else if (wanted == "int32" && tensor.type == "int64") {
    for (size_t i = 0; i < count; ++i) put(i, static_cast<int32_t>(at<int64_t>(tensor, i)));
  } else if (wanted == "float32" && tensor.type == "float16") {
    for (size_t i = 0; i < count; ++i) put(i, half(at<uint16_t>(tensor, i)));
  } else if (wanted == "float32" && tensor.type == "int8" && scale && scale->type == "float16" &&
             count_of(scale->shape) != 0 && count >= count_of(scale->shape)) {
    const size_t width = (count - 1) / count_of(scale->shape) + 1;
    for (size_t i = 0; i < count; ++i) put(i, at<int8_t>(tensor, i) * half(at<uint16_t>(*scale, i / width)));
  } else {
    return {};
  }
  return made;
}

}  // namespace

size_t width_of(const std::string& type) {
  static const std::map<std::string, size_t> widths = {
      {"float32", 4}, {"float16", 2}, {"int64", 8}, {"int32", 4}, {"int8", 1}};
  const auto found = widths.find(type);
  if (found == widths.end()) throw std::runtime_error("state of type " + type + ", which this program does not know");
  return found->second;
}

State read_state(const std::filesystem::path& file, const json& manifest) {
  auto [tensors, header] = parse(file);
  if (!manifest.contains("identity"))
    throw std::runtime_error("this artifact reads no states of other runtimes: build it again");
  if (header.value("identity", "") != manifest["identity"].get<std::string>())
    throw std::runtime_error("this state belongs to another model");
  for (const auto& wanted : manifest["state"]) {
    const std::string name = wanted["past"], end = ".slot_position", prefix = name.substr(0, name.rfind('.'));
    if (name == prefix + end && tensors.count(name) && tensors.count(prefix + ".slot_key")) {
      const Heads heads = heads_of(manifest, prefix, wanted);
      Tensors layer;
      for (const auto& [key, tensor] : tensors)
        if (key.rfind(prefix + ".", 0) == 0) layer[key] = tensor;
      order(layer, manifest, heads, prefix);
      for (auto& [key, tensor] : layer) tensors[key] = std::move(tensor);
    }
  }
  State state;
  for (const auto& wanted : manifest["state"]) {
    const std::string name = wanted["past"], type = wanted["dtype"];
    const auto found = tensors.find(name), scale = tensors.find(name + "_scale");
    std::vector<int64_t> shape;
    for (const auto& size : wanted["shape"]) {
      const bool grows = size == "P" && found != tensors.end() && found->second.shape.size() > shape.size();
      shape.push_back(size.is_number() ? size.get<int64_t>() : grows ? found->second.shape[shape.size()] : 1);
    }
    std::vector<char> data;
    if (found != tensors.end()) data = cast(found->second, scale == tensors.end() ? nullptr : &scale->second, type);
    if (found == tensors.end() || data.size() != count_of(shape) * width_of(type) ||
        (data.empty() && !found->second.data.empty()))
      throw std::runtime_error("this state has no " + name + " that fits this artifact");
    state.tensors[name] = {type, shape, std::move(data)};
  }
  const auto seen = tensors.find("position");
  if (seen == tensors.end() || seen->second.type != "int64" || count_of(seen->second.shape) != 1)
    throw std::runtime_error("the state of one sequence was expected");
  state.position = at<int64_t>(seen->second, 0);
  return state;
}

SavedIds read_ids(const std::filesystem::path& file) {
  const auto [tensors, header] = parse(file);
  SavedIds saved{header.value("model", ""), {}};
  const auto found = tensors.find("ids");
  if (found == tensors.end() || found->second.type != "int64") return saved;
  for (size_t i = 0; i < count_of(found->second.shape); ++i) saved.ids.push_back(at<int64_t>(found->second, i));
  return saved;
}

void write_state(const std::filesystem::path& file, const json& manifest, const State& state,
                 const std::vector<int64_t>& ids) {
  if (!manifest.contains("fingerprint"))
    throw std::runtime_error("this artifact writes no states for other runtimes: build it again");
  Tensors tensors = state.tensors;
  const auto add = [&](const char* name, const int64_t* numbers, size_t count) {
    const auto* data = reinterpret_cast<const char*>(numbers);
    tensors[name] = {"int64", {static_cast<int64_t>(count)}, {data, data + count * sizeof *numbers}};
  };
  add("position", &state.position, 1);
  if (!ids.empty()) add("ids", ids.data(), ids.size());
  json header, metadata = {{"ligerexport.snapshot", "2"}, {"model", manifest["fingerprint"]},
                           {"identity", manifest["identity"]}, {"sha256", digest(tensors)}};
  size_t end = 0;
  for (const auto& [name, tensor] : tensors) {
    const auto type = std::find_if(kNames.begin(), kNames.end(), [&, &wanted = tensor.type](const auto& row) {
      return row.second == wanted;
    });
    header[name] = {{"dtype", type->first}, {"shape", tensor.shape}, {"data_offsets", {end, end + tensor.data.size()}}};
    end += tensor.data.size();
  }
  header["__metadata__"] = metadata;
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  const std::filesystem::path part = file.string() + ".part";
  std::ofstream stream(part, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(&length), sizeof length) << text;
  for (const auto& [name, tensor] : tensors) stream.write(tensor.data.data(), tensor.data.size());
  stream.close();
  if (!stream) throw std::runtime_error("cannot write " + part.string());
  std::filesystem::rename(part, file);
}

// What a call over a draft overwrites, so that its last tokens can be taken back, and its first ones put in place again.
//
// A call of K tokens frees and fills at most K slots of a head. Its record holds these slots as they were, and the K
// tokens as slots would hold them. Then the state after any number of them, to the bit and slot for slot what a call of
// just these tokens leaves, takes only copies of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "layer.h"

namespace liger {

struct Undo {  // of one KV head of one sequence; K `Change`s and 2 K rows follow
  enum Part { kKey, kValue, kKeyScale, kValueScale, kPosition, kScore, kParts };
  char* at[kParts];        // the head's first slot in each tensor of the new state; null if there is none
  int64_t bytes[kParts];   // of a slot there
  int64_t pools, pool;     // number of pools, and bytes from the scores of a pool to those of the next
  int64_t length, filled;  // K, and the number of slots that were freed or empty, at most K

  struct Change {
    int64_t place;  // a slot, in the order in which they are filled
    int64_t gone;   // the token at which the new token with this number loses its slot; K if it stays, -1 if it is padding
  };

  int64_t row() const {
    int64_t sum = pools * bytes[kScore];
    for (int part = 0; part < kScore; ++part) sum += bytes[part];
    return sum;
  }
  int64_t size() const { return sizeof(Undo) + length * (sizeof(Change) + 2 * row()); }
  Change* changes() { return reinterpret_cast<Change*>(this + 1); }
  char* old_row(int64_t i) { return reinterpret_cast<char*>(changes() + length) + i * row(); }
  char* new_row(int64_t t) { return old_row(length + t); }

  // Calls copy(part, address in the state, address in the row, bytes) for each piece of a slot.
  template <typename Copy>
  void each(int64_t place, char* row, const Copy& copy) const {
    for (int part = 0; part < kParts; ++part) {
      if (at[part] == nullptr) continue;
      for (int64_t p = 0; p < (part == kScore ? pools : 1); ++p, row += bytes[part])
        copy(part, at[part] + p * pool + place * bytes[part], row, bytes[part]);
    }
  }
};

// Writes the record of a head, whose new state already has the slots of the old one, before new tokens go to free slots.
template <typename T>
void remember(const Layer& layer, const Call<T>& call, const Workspace<T>& w, int64_t b, int64_t h) {
  auto* const undo = new (call.undo + (b * layer.kv_heads + h) * call.undo_head) Undo{};
  const Size& size = layer.heads[h];
  const int64_t first = b * layer.slots + size.first, slots = size.slots, candidates = slots + call.length;
  const int64_t pools = size.counts.size(), position = call.new_position.narrow ? sizeof(int32_t) : sizeof(int64_t);
  const auto set = [&](Undo::Part part, auto* tensor, int64_t at, int64_t bytes) {
    if (tensor != nullptr) undo->at[part] = reinterpret_cast<char*>(tensor) + at * bytes, undo->bytes[part] = bytes;
  };
  set(Undo::kKey, call.new_key, first, layer.d_k * sizeof(T));
  set(Undo::kValue, call.new_value, first, layer.d_v * sizeof(T));
  set(Undo::kKeyScale, call.new_key_scale, first, sizeof(Scale<T>));
  set(Undo::kValueScale, call.new_value_scale, first, sizeof(Scale<T>));
  set(Undo::kPosition, static_cast<char*>(call.new_position.data), first, position);
  if (pools > 0) set(Undo::kScore, call.new_score, b * layer.scores + size.score, sizeof(float));
  undo->pools = pools, undo->pool = layer.score_pool * sizeof(float), undo->length = call.length;
  undo->filled = std::min<int64_t>(w.free.size(), call.length);
  for (int64_t i = 0; i < call.length; ++i) {
    auto& change = undo->changes()[i];
    const int64_t now = call.position[b] + i;
    change = {0, now < 0 ? -1 : w.gone[slots + i]};
    char* row = undo->new_row(i);
    const auto put = [&](const void* x, int64_t bytes) { std::memcpy(row, x, bytes), row += bytes; };
    put(&w.key[i * layer.d_k], undo->bytes[Undo::kKey]), put(&w.value[i * layer.d_v], undo->bytes[Undo::kValue]);
    put(&w.key_scale[i], undo->bytes[Undo::kKeyScale]), put(&w.value_scale[i], undo->bytes[Undo::kValueScale]);
    const auto narrow = static_cast<int32_t>(now);
    put(call.new_position.narrow ? static_cast<const void*>(&narrow) : &now, position);
    for (int64_t p = 0; p < pools; ++p) put(&w.score[p * candidates + slots + i], sizeof(float));
    if (i >= undo->filled) continue;
    change.place = w.free[i];
    undo->each(change.place, undo->old_row(i),
               [](int, const char* slot, char* kept, int64_t bytes) { std::memcpy(kept, slot, bytes); });
  }
}

// Leaves the first `kept` tokens of a call. A piece of the state is written only inside of `ranges`, the beginning and
// end of each tensor; returns whether all were.
inline bool take_back(Undo& undo, int64_t kept, char* const (*ranges)[2]) {
  bool inside = true;
  const auto write = [&](int part, char* slot, const char* row, int64_t bytes) {
    if (slot < ranges[part][0] || slot + bytes > ranges[part][1])
      inside = false;
    else
      std::memcpy(slot, row, bytes);
  };
  Undo::Change* const changes = undo.changes();
  for (int64_t i = 0; i < undo.filled; ++i) undo.each(changes[i].place, undo.old_row(i), write);
  for (int64_t t = 0, i = 0; t < kept && i < undo.filled; ++t)
    if (changes[t].gone >= kept) undo.each(changes[i++].place, undo.new_row(t), write);
  return inside;
}

// Does this for all heads: each of `layers` has `stride` bytes for the records of `batch` sequences, of which the first
// `kept` `[batch]` tokens stay. Returns whether all records are of the state whose addresses are `ranges`.
inline bool take_back(char* records, int64_t layers, int64_t stride, int64_t batch, int64_t heads, const int64_t* kept,
                      char* const (*ranges)[Undo::kParts][2]) {
  const int64_t rows = batch * heads, bytes = stride / rows / 8 * 8;
  for (int64_t i = 0; i < layers * rows; ++i) {
    auto& undo = *reinterpret_cast<Undo*>(records + i / rows * stride + i % rows * bytes);
    if (undo.length == 0 || undo.size() > bytes || !take_back(undo, kept[i % rows / heads], ranges[i / rows])) return false;
  }
  return true;
}

}  // namespace liger

// The bounded exact memory of one layer on the CPU: `ligerexport.kernels.memory_attention`, and with evicted tokens
// `ligerexport.kernels.evicted`, in C++. Heads may have memories of their own sizes, and slots be of any type of
// `stored.h`, as in `ligerexport.kernels.ragged`.
//
// Tokens are read one after the other, so that a memory is a few lists and no sort over all candidates is needed. If a
// new state shares the memory of the old one, only what changed is written. If ranks are known on arrival, which tokens
// stay does not depend on the attention; then the candidates of a head are divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "head.h"

namespace liger {

// `parallel(n, work)` calls work(0) to work(n - 1) on any number of threads.
template <typename T, typename Parallel>
void run(const Layer& layer, const Call<T>& call, const Parallel& parallel) {
  const int64_t count = call.batch * layer.kv_heads;
  if (layer.evicts || std::any_of(layer.pools.begin(), layer.pools.end(), [](const Pool& x) { return x.received; })) {
    parallel(count, [&](int64_t i) {
      thread_local Workspace<T> space;
      Head<T> head(layer, call, i / layer.kv_heads, i % layer.kv_heads, space);
      head.Read();
      if (!*call.damaged) head.Run();
    });
    return;
  }
  thread_local std::vector<Workspace<T>> kept;
  std::vector<Workspace<T>>& spaces = kept;  // of this thread, for all of them
  spaces.resize(std::max<size_t>(spaces.size(), count));
  struct Place {
    Head<T>* head;
    int64_t part, partial;
  };
  std::vector<Head<T>> heads;
  std::vector<Place> places;
  std::vector<int64_t> partials;
  int64_t numbers = 0;
  heads.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    Head<T>& head = heads.emplace_back(layer, call, i / layer.kv_heads, i % layer.kv_heads, spaces[i]);
    partials.push_back(numbers);
    for (int64_t part = 0; part < head.parts(); ++part, numbers += head.partial_size())
      places.push_back({&head, part, numbers});
  }
  const std::unique_ptr<float[]> partial(new float[numbers]);
  parallel(count, [&](int64_t i) { heads[i].Read(), heads[i].Choose(); });
  if (*call.damaged) return;
  parallel(places.size(), [&](int64_t i) {
    thread_local Workspace<T> space;
    places[i].head->Part(places[i].part, &partial[places[i].partial], space);
  });
  parallel(count, [&](int64_t i) { heads[i].Combine(&partial[partials[i]]); });
}

}  // namespace liger

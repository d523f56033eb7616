// What the two halves of the fake share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <functional>

namespace fake {

using Work = std::function<void()>;

extern std::atomic<int> alive;  // objects and memory that nobody has freed

void put(cudaStream_t stream, Work work);
bool capturing(cudaStream_t stream);

inline int number(const char* name, int otherwise) {
  const char* const given = std::getenv(name);
  return given == nullptr ? otherwise : std::atoi(given);
}

struct Counted {
  Counted() { ++alive; }
  ~Counted() { --alive; }
  Counted(const Counted&) = delete;
};

}  // namespace fake

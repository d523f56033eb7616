// Inputs and outputs of `BoundedMemory`, in order. Written from node.py by tests/headers.py.
#pragma once

#include <cstddef>

namespace liger::operands {

enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kPosition,
  kCos,
  kSin,
  kSlotKey,
  kSlotValue,
  kSlotPosition,
  kSlotScore,
  kArrival,
  kTurn,
  kRecurrentState,
  kRecurrentMass,
  kHidden,
  kScoreWeight,
  kScoreBias,
  kSlotKeyScale,
  kSlotValueScale,
  kUndo,
  kInputs,
};

enum Output : size_t {
  kMixed,
  kNewSlotKey,
  kNewSlotValue,
  kNewSlotPosition,
  kNewSlotScore,
  kNewRecurrentState,
  kNewRecurrentMass,
  kNewSlotKeyScale,
  kNewSlotValueScale,
  kForgotten,
  kOutputs,
};

}  // namespace liger::operands

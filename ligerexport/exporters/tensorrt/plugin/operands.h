// The tensors of a `LigerMixer` node, in order. Written from model/state.py by tests/headers.py.
#pragma once

#include "mixer.h"

namespace liger {

// Inputs before the state. A joint node has key and value in the query, and only one with learned scores has a score.
constexpr const char* kOperands[] = {"query", "key", "value", "position", "rotary", "score"};

struct StateRow {
  const char* name;
  Type type;
  int32_t MixerAttributes::*needs;  // is not 0 where the tensor exists; none if it always does
};

constexpr StateRow kState[] = {
    {"slot_key", Type::kStored, nullptr},
    {"slot_value", Type::kStored, nullptr},
    {"slot_key_scale", Type::kHalf, &MixerAttributes::scaled},
    {"slot_value_scale", Type::kHalf, &MixerAttributes::scaled},
    {"slot_position", Type::kInteger, nullptr},
    {"slot_score", Type::kFloat, &MixerAttributes::pools},
    {"recurrent_state", Type::kFloat, &MixerAttributes::recurrent},
    {"recurrent_key", Type::kFloat, &MixerAttributes::keyed},
    {"recurrent_mass", Type::kFloat, &MixerAttributes::evicts},
    {"judge_state", Type::kFloat, &MixerAttributes::judged},
};

}  // namespace liger

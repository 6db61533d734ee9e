// One draw outside of the dispatcher, for loops in C++: the same token as the op fasttrain::sample, from the same code.
#pragma once

#include <cstdint>

namespace fasttrain {

struct SampleSettings {
  float temperature = 1;
  std::int64_t top_k = 0;
  float top_p = 1, min_p = 0;
};

// The token drawn from logits (V,), or -1 if they hold NaN, +inf or nothing but -inf.
std::int64_t draw_token(const float* logits, std::int64_t V, const SampleSettings& settings, std::uint64_t seed, std::uint64_t position);

}  // namespace fasttrain

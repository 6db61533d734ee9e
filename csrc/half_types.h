// The two 16-bit float types, as bit patterns, with round-to-nearest-even conversions in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace fasttrain {

struct bfloat16 { std::uint16_t bits; };
struct float16 { std::uint16_t bits; };

inline float float_from_bits(std::uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline std::uint32_t bits_from_float(float f) { std::uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_float(bfloat16 x) { return float_from_bits(std::uint32_t{x.bits} << 16); }

inline bfloat16 to_bfloat16(float f) {
  const std::uint32_t u = bits_from_float(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float to_float(float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
  return float_from_bits(sign | bits_from_float(magnitude));
}

inline float16 to_float16(float f) {
  const std::uint32_t u = bits_from_float(f), magnitude = u & 0x7fffffffu;
  const std::uint16_t sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds past 65504: infinity
  if (magnitude < 0x38800000u) {  // subnormal result: let the adder round at 2^-24
    const float rounded = float_from_bits(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bits_from_float(rounded) - 0x3f000000u))};
  }
  const std::uint32_t rebased = magnitude - (112u << 23);
  return {static_cast<std::uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13))};
}

}  // namespace fasttrain

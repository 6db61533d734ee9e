// One lane: the baseline of every kernel, and the only one for float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half_types.h"

namespace fasttrain::scalar {

// to[k][i] = from[i][first + k] for eight values of eight rows.
inline void transpose_8x8(const float* const* from, std::int64_t first, float* to, std::int64_t stride) {
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 8; ++i) to[k * stride + i] = from[i][first + k];
}

template <class Real>
struct OneLane {
  using real = Real;
  static constexpr int width = 1;
  Real v;

  static OneLane set(Real x) { return {x}; }
  static OneLane load(const float* p) { return {static_cast<Real>(*p)}; }
  static OneLane load(const double* p) { return {static_cast<Real>(*p)}; }
  static OneLane load(const bfloat16* p) { return {static_cast<Real>(to_float(*p))}; }
  static OneLane load(const float16* p) { return {static_cast<Real>(to_float(*p))}; }
  // The first and the second of each pair.
  static void load_pairs(const bfloat16* p, OneLane& first, OneLane& second) { first = load(p), second = load(p + 1); }
  template <class T>
  static OneLane load_part(const T* p, int n, Real fill) { return n > 0 ? load(p) : set(fill); }

  void store(float* p) const { *p = static_cast<float>(v); }
  void store(double* p) const { *p = static_cast<double>(v); }
  void store(bfloat16* p) const { *p = to_bfloat16(static_cast<float>(v)); }
  void store(float16* p) const { *p = to_float16(static_cast<float>(v)); }
  void store(std::int16_t* p) const { *p = static_cast<std::int16_t>(std::nearbyint(v)); }
  template <class T>
  void stream(T* p) const { store(p); }
  template <class T>
  void store_part(T* p, int n) const { if (n > 0) store(p); }

  friend OneLane operator+(OneLane a, OneLane b) { return {a.v + b.v}; }
  friend OneLane operator-(OneLane a, OneLane b) { return {a.v - b.v}; }
  friend OneLane operator*(OneLane a, OneLane b) { return {a.v * b.v}; }
  friend OneLane operator/(OneLane a, OneLane b) { return {a.v / b.v}; }
  static OneLane fma(OneLane a, OneLane b, OneLane c) { return {a.v * b.v + c.v}; }
  static OneLane max(OneLane a, OneLane b) { return {a.v > b.v ? a.v : b.v}; }
  OneLane exp() const { return {std::exp(v)}; }
  OneLane exp2_nonpositive() const { return {std::exp2(v)}; }
  OneLane tanh() const { return {std::tanh(v)}; }
  Real first() const { return v; }
  Real sum() const { return v; }
  Real max() const { return v; }
};

using Vec = OneLane<float>;
using VecF64 = OneLane<double>;

// Selecting and counting, for kernels that move lanes.
using Mask = bool;
inline Mask greater(Vec a, Vec b) { return a.v > b.v; }
inline Mask at_least(Vec a, Vec b) { return a.v >= b.v; }
inline Mask unordered(Vec a, Vec b) { return a.v != a.v || b.v != b.v; }
inline Mask either(Mask a, Mask b) { return a || b; }
inline Mask both(Mask a, Mask b) { return a && b; }
inline Mask opposite(Mask a) { return !a; }
inline int count(Mask m) { return m; }
inline Vec keep(Mask m, Vec a) { return {m ? a.v : 0.0f}; }  // 0 elsewhere
inline Vec floor(Vec a) { return {std::floor(a.v)}; }
inline Vec round(Vec a) { return {std::nearbyint(a.v)}; }  // to even
inline Vec magnitude(Vec a) { return {std::fabs(a.v)}; }
inline Vec times_two_to(Vec a, Vec n) {  // a 2^n for whole n of which 2^n is a normal number
  return {a.v * float_from_bits(static_cast<std::uint32_t>(static_cast<int>(n.v) + 127) << 23)};
}
inline int compress(Mask m, Vec a, float* out) { *out = a.v; return m; }
struct WideSum {
  double sum;
  static WideSum zero() { return {0.0}; }
  void add(Vec a) { sum += static_cast<double>(a.v); }
  double total() const { return sum; }
};

// One lane of 32 bits: an integer, two of 16 bits, or four bytes.
struct Quads {
  std::int32_t v;
  static Quads set(std::int32_t x) { return {x}; }
  static Quads load(const unsigned char* p) {
    Quads q;
    std::memcpy(&q.v, p, 4);
    return q;
  }
  static Quads spread(const unsigned char* p) { return load(p); }
  Vec to_float() const { return {static_cast<float>(v)}; }
  // Of each half the kBits bits from kShift on.
  template <int kShift, int kBits>
  Quads fields() const {
    constexpr std::uint32_t mask = ((1u << kBits) - 1u) * 0x10001u;
    return {static_cast<std::int32_t>(static_cast<std::uint32_t>(v) >> kShift & mask)};
  }
  int half(int i) const { return static_cast<std::int16_t>(v >> 16 * i); }
};
// Of the two halves the products, added to the 32 bits.
struct PairProducts {
  static Quads plus(Quads sum, Quads a, Quads b) { return {sum.v + a.half(0) * b.half(0) + a.half(1) * b.half(1)}; }
};

}  // namespace fasttrain::scalar

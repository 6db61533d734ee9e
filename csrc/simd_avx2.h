// Eight float lanes (AVX2, FMA, F16C). Include between `#pragma GCC target(...)` push and pop.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "half_types.h"

namespace fasttrain::avx2 {

// to[k][i] = from[i][first + k] for eight values of eight rows; all eight of each row of `to` are written.
inline void transpose_8x8(const float* const* from, std::int64_t first, float* to, std::int64_t stride) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from[i] + first);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
}

struct Vec {
  using real = float;
  static constexpr int width = 8;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  // The first and the second of each pair.
  static void load_pairs(const bfloat16* p, Vec& first, Vec& second) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    first.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  template <class T>
  static Vec load_part(const T* p, int n, float fill) {
    T lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = narrow<T>(fill);
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16()); }
  void store(std::int16_t* p) const {  // rounded to even
    const __m256i whole = _mm256_cvtps_epi32(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bfloat16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void stream(float16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16()); }
  template <class T>
  void store_part(T* p, int n) const {
    T lanes[width];
    store(lanes);
    std::memcpy(p, lanes, n * sizeof(T));
  }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

  // 2^n * P(r) with n = round(x log2 e), r = x - n ln 2 in two parts; P of degree 6. Below 2^-126: zero. NaN stays.
  Vec exp() const {
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), v);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    const __m256 tiny = _mm256_cmp_ps(v, _mm256_set1_ps(-87.33f), _CMP_LT_OQ);
    const __m256 huge = _mm256_cmp_ps(v, _mm256_set1_ps(88.37f), _CMP_GT_OQ);
    const __m256 result = _mm256_andnot_ps(tiny, _mm256_castsi256_ps(scaled));
    return {_mm256_blendv_ps(result, _mm256_set1_ps(__builtin_inff()), huge)};
  }
  // 2^v for v <= 0, v = n + f: 2^n * P(f), P of degree 6 with P(0) = 1, relative error 8e-8. At and below -127 it is
  // exactly 0, since there f = 0 and the exponent field becomes 0. NaN stays.
  Vec exp2_nonpositive() const {
    const __m256 t = _mm256_max_ps(_mm256_set1_ps(-127.0f), v);  // of a pair with a NaN, max gives the second
    const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(t, n);
    __m256 p = _mm256_set1_ps(1.5353362e-4f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3398875e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5503324e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.24022648f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.6931472f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)))};
  }
  // Odd polynomial below 0.625 in magnitude (no cancellation), 1 - 2 / (exp(2|x|) + 1) above.
  Vec tanh() const {
    const __m256 sign = _mm256_and_ps(v, _mm256_set1_ps(-0.0f)), a = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256 one = _mm256_set1_ps(1.0f), z = _mm256_mul_ps(v, v);
    const __m256 e = Vec{_mm256_add_ps(a, a)}.exp().v;
    const __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
    __m256 p = _mm256_set1_ps(-5.70498872745e-3f);
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(2.06390887954e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-5.37397155531e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(1.33314422036e-1f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-3.33332819422e-1f));
    const __m256 near = _mm256_fmadd_ps(_mm256_mul_ps(p, z), v, v);
    const __m256 small = _mm256_cmp_ps(a, _mm256_set1_ps(0.625f), _CMP_LT_OQ);
    return {_mm256_blendv_ps(_mm256_or_ps(far, sign), near, small)};
  }
  float first() const { return _mm256_cvtss_f32(v); }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

 private:
  template <class T>
  static T narrow(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else if constexpr (__is_same(T, bfloat16)) return to_bfloat16(x);
    else return to_float16(x);
  }
  __m128i to_bf16() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  __m128i to_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

// Free functions: GCC gives no target attribute to friends defined in a class.
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }

// Selecting and counting, for kernels that move lanes. A whole number in a float lane is exact up to 2^24 ulps.
struct Mask { __m256 m; };
inline Mask greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask at_least(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask unordered(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
inline Mask opposite(Mask a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
inline int count(Mask m) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.m))); }
inline Vec keep(Mask m, Vec a) { return {_mm256_and_ps(m.m, a.v)}; }  // 0 elsewhere
inline Vec floor(Vec a) { return {_mm256_floor_ps(a.v)}; }
// a 2^n for whole n of which 2^n is a normal number.
inline Vec times_two_to(Vec a, Vec n) {
  const __m256 biased = _mm256_add_ps(n.v, _mm256_set1_ps(8388608.0f + 127.0f));  // n + 127 in the low bits
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23)))};
}
// For each mask of eight lanes: the lanes that it holds, first to last, a byte each.
inline constexpr std::array<std::uint64_t, 256> kLanesOfMask = [] {
  std::array<std::uint64_t, 256> table{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned lane = 0, to = 0; lane < 8; ++lane)
      if (mask >> lane & 1) table[mask] |= std::uint64_t{lane} << (8 * to++);
  return table;
}();
// The lanes of the mask, side by side at `out`; writes a whole vector and returns how many count.
inline int compress(Mask m, Vec a, float* out) {
  const unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(m.m));
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kLanesOfMask[bits])));
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(a.v, lanes));
  return __builtin_popcount(bits);
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }  // to even
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// Sums floats in float64: exact for whole numbers while every lane stays below 2^53.
struct WideSum {
  __m256d low, high;
  static WideSum zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  void add(Vec a) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  }
  double total() const {
    const __m256d sum = _mm256_add_pd(low, high);
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
  }
};

// 32 bits a lane, as many lanes as Vec: an integer, two of 16 bits, or four bytes.
struct Quads {
  __m256i v;
  static Quads set(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
  static Quads load(const unsigned char* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Quads spread(const unsigned char* p) {  // four bytes to every lane
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return set(four);
  }
  Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
  // Of each half the kBits bits from kShift on.
  template <int kShift, int kBits>
  Quads fields() const {
    const __m256i low = kShift == 0 ? v : _mm256_srli_epi16(v, kShift);
    return {kShift + kBits == 16 ? low : _mm256_and_si256(low, _mm256_set1_epi16((1 << kBits) - 1))};
  }
};
// Of each lane's two halves the products, added to its 32 bits.
struct PairProducts {
  static Quads plus(Quads sum, Quads a, Quads b) {
    const __m256i products = _mm256_madd_epi16(a.v, b.v);
    asm("vpaddd %1, %0, %0" : "+x"(sum.v) : "x"(products));  // in place: GCC 12 adds into another register and moves it back
    return sum;
  }
};

}  // namespace fasttrain::avx2

// Sixteen float lanes (AVX-512 F, BW, DQ, VL). Include between `#pragma GCC target(...)` push and pop.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "half_types.h"

namespace fasttrain::avx512 {

struct Vec {
  using real = float;
  static constexpr int width = 16;
  __m512 v;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  // The first and the second of each pair.
  static void load_pairs(const bfloat16* p, Vec& first, Vec& second) {
    const __m512i pairs = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Vec load_part(const float* p, int n, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
  }
  static Vec load_part(const bfloat16* p, int n, float fill) {
    return from_bf16(_mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(to_bfloat16(fill).bits)), first(n), p));
  }
  static Vec load_part(const float16* p, int n, float fill) {
    const __m256i filled = _mm256_set1_epi16(static_cast<short>(to_float16(fill).bits));
    return {_mm512_cvtph_ps(_mm256_mask_loadu_epi16(filled, first(n), p))};
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  void store(std::int16_t* p) const {  // rounded to even
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bfloat16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  void store_part(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_part(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store_part(float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_f16()); }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

  // The same polynomial as the AVX2 version; scalef applies 2^n. Below 2^-126: zero. NaN stays.
  Vec exp() const {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504088896341f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    const __mmask16 keep = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
    const __mmask16 huge = _mm512_cmp_ps_mask(v, _mm512_set1_ps(88.37f), _CMP_GT_OQ);
    const __m512 result = _mm512_maskz_scalef_ps(keep, p, n);
    return {_mm512_mask_blend_ps(huge, result, _mm512_set1_ps(__builtin_inff()))};
  }
  // 2^v for v <= 0: f = v - floor(v) (0 for -inf), P of degree 6 with P(0) = 1, relative error 1e-7; scalef multiplies
  // by 2^floor(v). Far below zero it is exactly 0. NaN stays.
  Vec exp2_nonpositive() const {
    const __m512 f = _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.00021612915f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0012467847f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009675452f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055485282f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022931f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314706f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return {_mm512_scalef_ps(p, v)};
  }
  // Odd polynomial below 0.625 in magnitude (no cancellation), 1 - 2 / (exp(2|x|) + 1) above.
  Vec tanh() const {
    const __m512 sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0f)), a = _mm512_andnot_ps(_mm512_set1_ps(-0.0f), v);
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(v, v);
    const __m512 e = Vec{_mm512_add_ps(a, a)}.exp().v;
    const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
    __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(2.06390887954e-2f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-5.37397155531e-2f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(1.33314422036e-1f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-3.33332819422e-1f));
    const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, z), v, v);
    const __mmask16 small = _mm512_cmp_ps_mask(a, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
    return {_mm512_mask_blend_ps(small, _mm512_or_ps(far, sign), near)};
  }
  float first() const { return _mm512_cvtss_f32(v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }

 private:
  static Vec from_bf16(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  __m256i to_bf16() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, r, _mm512_set1_epi32(0x7fc0)));
  }
  __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// Free functions: GCC gives no target attribute to friends defined in a class.
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

// Selecting and counting, for kernels that move lanes. A whole number in a float lane is exact up to 2^24 ulps.
using Mask = __mmask16;
inline Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
inline Mask opposite(Mask a) { return static_cast<Mask>(~a); }
inline int count(Mask m) { return __builtin_popcount(m); }
inline Vec keep(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m, a.v)}; }  // 0 elsewhere
inline Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline Vec times_two_to(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a 2^n, n whole
// The lanes of the mask, side by side at `out`; writes a whole vector and returns how many count.
inline int compress(Mask m, Vec a, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, a.v));  // not compressstoreu: microcode on AMD
  return count(m);
}
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }  // to even
inline Vec magnitude(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
// Sums floats in float64: exact for whole numbers while every lane stays below 2^53.
struct WideSum {
  __m512d low, high;
  static WideSum zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  void add(Vec a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// 32 bits a lane, as many lanes as Vec: an integer, two of 16 bits, or four bytes.
struct Quads {
  __m512i v;
  static Quads set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Quads load(const unsigned char* p) { return {_mm512_loadu_si512(p)}; }
  static Quads spread(const unsigned char* p) {  // four bytes to every lane
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return set(four);
  }
  Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
  // Of each half the kBits bits from kShift on.
  template <int kShift, int kBits>
  Quads fields() const {
    const __m512i low = kShift == 0 ? v : _mm512_srli_epi16(v, kShift);
    return {kShift + kBits == 16 ? low : _mm512_and_si512(low, _mm512_set1_epi16((1 << kBits) - 1))};
  }
};
// Of each lane's two halves the products, added to its 32 bits.
struct PairProducts {
  static Quads plus(Quads sum, Quads a, Quads b) { return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))}; }
};

}  // namespace fasttrain::avx512

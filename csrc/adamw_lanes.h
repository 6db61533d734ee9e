// Per instruction set: lanes of 32 bits as the compiler's vector types, and what AdamW's blocks need that the compiler
// does not find by itself: roots, and four vectors of floats narrowed to one of eight-bit codes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasttrain::scalar {
typedef std::uint32_t Bits __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
typedef std::uint8_t Codes __attribute__((vector_size(16)));
typedef std::int32_t Signed __attribute__((vector_size(16)));
inline float root(float x) { return std::sqrt(x); }
#if defined(__SSE2__)
inline Bits widened(const std::uint8_t* p) {
  int four;
  std::memcpy(&four, p, sizeof four);
  const __m128i zero = _mm_setzero_si128();
  return reinterpret_cast<Bits>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero));
}
inline Bits widened(const std::uint16_t* p) {
  return reinterpret_cast<Bits>(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128()));
}
inline Floats root(Floats x) { return reinterpret_cast<Floats>(_mm_sqrt_ps(reinterpret_cast<__m128>(x))); }
inline Codes joined(const Bits (&x)[4]) {  // of numbers up to 255
  const auto pack = [&](int i) { return _mm_packs_epi32(reinterpret_cast<__m128i>(x[i]), reinterpret_cast<__m128i>(x[i + 1])); };
  return reinterpret_cast<Codes>(_mm_packus_epi16(pack(0), pack(2)));
}
#else
template <class T>
inline Bits widened(const T* p) {
  Bits x;
  for (int l = 0; l < 4; ++l) x[l] = p[l];
  return x;
}
inline Floats root(Floats x) {
  for (int l = 0; l < 4; ++l) x[l] = std::sqrt(x[l]);
  return x;
}
inline Codes joined(const Bits (&x)[4]) {
  Codes codes;
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<std::uint8_t>(x[i / 4][i % 4]);
  return codes;
}
#endif
inline Bits widened_signed(const std::uint8_t* p) { return (widened(p) ^ 0x80) - 0x80; }
// The codes, in order, of floats whose sign stands apart and to which noise was added: kTop is the largest magnitude's,
// those below 0 become 0. `least` follows the magnitudes.
template <int kTop>
inline Codes narrowed(const Bits (&x)[4], std::uint32_t base, Codes& least) {
  Bits magnitudes[4], signs[4];
  for (int i = 0; i < 4; ++i) {
    const Bits above = ((x[i] & 0x7fffffffu) >> 20) - base;
    magnitudes[i] = reinterpret_cast<Signed>(above) < 0 ? Bits{} : above;
    signs[i] = x[i] >> 24 & 0x80;
  }
  const Codes codes = joined(magnitudes);
  least = codes < least ? codes : least;
  return kTop == 127 ? codes | joined(signs) : codes;
}
}  // namespace fasttrain::scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fasttrain::avx2 {
typedef std::uint32_t Bits __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef std::uint8_t Codes __attribute__((vector_size(32)));
inline Bits widened(const std::uint8_t* p) { return reinterpret_cast<Bits>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Bits widened_signed(const std::uint8_t* p) { return reinterpret_cast<Bits>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Bits widened(const std::uint16_t* p) { return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline float root(float x) { return std::sqrt(x); }
inline Floats root(Floats x) { return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x))); }
template <int kTop>
inline Codes narrowed(const Bits (&x)[4], std::uint32_t base, Codes& least) {
  constexpr int kDropped = kTop == 127 ? 1 : 0;  // the sign, so that what is left is a magnitude
  const __m256i subtracted = _mm256_set1_epi16(static_cast<short>(base << (4 + kDropped)));
  __m256i upper[2], magnitude[2];  // upper halves: sign, exponent, seven bits of mantissa, of which three are kept
  for (int i = 0; i < 2; ++i) {
    upper[i] = _mm256_packus_epi32(_mm256_srli_epi32(reinterpret_cast<__m256i>(x[2 * i]), 16), _mm256_srli_epi32(reinterpret_cast<__m256i>(x[2 * i + 1]), 16));
    magnitude[i] = _mm256_srli_epi16(_mm256_subs_epu16(_mm256_slli_epi16(upper[i], kDropped), subtracted), 4 + kDropped);
  }
  __m256i codes = _mm256_packus_epi16(magnitude[0], magnitude[1]);
  least = reinterpret_cast<Codes>(_mm256_min_epu8(reinterpret_cast<__m256i>(least), codes));
  if (kTop == 127)  // saturation keeps signs
    codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_packs_epi16(upper[0], upper[1]), _mm256_set1_epi8(-128)));
  return reinterpret_cast<Codes>(_mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
}  // namespace fasttrain::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace fasttrain::avx512 {
typedef std::uint32_t Bits __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef std::uint8_t Codes __attribute__((vector_size(64)));
inline Bits widened(const std::uint8_t* p) { return reinterpret_cast<Bits>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Bits widened_signed(const std::uint8_t* p) { return reinterpret_cast<Bits>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Bits widened(const std::uint16_t* p) { return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
inline float root(float x) { return std::sqrt(x); }
inline Floats root(Floats x) { return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x))); }
template <int kTop>
inline Codes narrowed(const Bits (&x)[4], std::uint32_t base, Codes& least) {
  constexpr int kDropped = kTop == 127 ? 1 : 0;
  const __m512i subtracted = _mm512_set1_epi16(static_cast<short>(base << (4 + kDropped)));
  __m512i upper[2], magnitude[2];
  for (int i = 0; i < 2; ++i) {
    upper[i] = _mm512_packus_epi32(_mm512_srli_epi32(reinterpret_cast<__m512i>(x[2 * i]), 16), _mm512_srli_epi32(reinterpret_cast<__m512i>(x[2 * i + 1]), 16));
    magnitude[i] = _mm512_srli_epi16(_mm512_subs_epu16(_mm512_slli_epi16(upper[i], kDropped), subtracted), 4 + kDropped);
  }
  __m512i codes = _mm512_packus_epi16(magnitude[0], magnitude[1]);
  least = reinterpret_cast<Codes>(_mm512_min_epu8(reinterpret_cast<__m512i>(least), codes));
  if (kTop == 127)
    codes = _mm512_or_si512(codes, _mm512_and_si512(_mm512_packs_epi16(upper[0], upper[1]), _mm512_set1_epi8(-128)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Codes>(_mm512_permutexvar_epi32(order, codes));
}
}  // namespace fasttrain::avx512
#pragma GCC pop_options
#endif

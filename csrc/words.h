// Per instruction set: lanes of 64 bits as the compiler's vector types, and what it does not find by itself.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasttrain::scalar {
typedef std::uint64_t Words __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
// The products of the low halves with a constant.
#if defined(__SSE2__)
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
}
#else
inline Words low_product(Words a, std::uint32_t b) { return (a & 0xffffffffu) * b; }
#endif
// The low halves of both, side by side.
inline void store_low(Words a, Words b, std::uint32_t* to) {
  for (int l = 0; l < 2; ++l) to[l] = static_cast<std::uint32_t>(a[l]);
  for (int l = 0; l < 2; ++l) to[2 + l] = static_cast<std::uint32_t>(b[l]);
}
}  // namespace fasttrain::scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fasttrain::avx2 {
typedef std::uint64_t Words __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
inline void store_low(Words a, Words b, std::uint32_t* to) {
  const __m256 pairs = _mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), 0x88);  // a0 a1 b0 b1 a2 a3 b2 b3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_castps_si256(pairs), 0xd8));
}
}  // namespace fasttrain::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace fasttrain::avx512 {
typedef std::uint64_t Words __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
inline void store_low(Words a, Words b, std::uint32_t* to) {
  const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(reinterpret_cast<__m512i>(a), low, reinterpret_cast<__m512i>(b)));
}
}  // namespace fasttrain::avx512
#pragma GCC pop_options
#endif

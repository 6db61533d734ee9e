// What a kernel is fast by: FASTTRAIN_INLINE functions are inlined whatever their size, FASTTRAIN_UNROLL(n) copies the
// body of the loop below it. In a sanitized build they are plain functions and loops: each access there carries its
// check, and the copies would take the compiler ten minutes without a check more.
#pragma once

#ifdef FASTTRAIN_SANITIZED
#define FASTTRAIN_INLINE inline
#define FASTTRAIN_UNROLL(n)
#else
#define FASTTRAIN_INLINE inline __attribute__((always_inline))
#define FASTTRAIN_PRAGMA(text) _Pragma(#text)
#define FASTTRAIN_UNROLL(n) FASTTRAIN_PRAGMA(GCC unroll n)
#endif

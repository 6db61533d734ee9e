// The kernels of the native decode session, compiled for each instruction set and chosen at run time.

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "inlining.h"
#include "isa.h"

#include "simd_scalar.h"
namespace fasttrain::scalar { namespace {
#include "decode_kernels.h"
#include "decode_integer_kernels.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
namespace fasttrain::avx2 { namespace {
#include "decode_kernels.h"
#include "decode_integer_kernels.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
namespace fasttrain::avx2::vnni { namespace {
struct PairProducts {
  static Quads plus(Quads sum, Quads a, Quads b) { return {_mm256_dpwssd_avx_epi32(sum.v, a.v, b.v)}; }
};
#include "decode_integer_kernels.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
namespace fasttrain::avx512 { namespace {
#include "decode_kernels.h"
#include "decode_integer_kernels.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni")
namespace fasttrain::avx512::vnni { namespace {
struct PairProducts {
  static Quads plus(Quads sum, Quads a, Quads b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
};
#include "decode_integer_kernels.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {

const Kernels& decode_kernels() {  // nothing of a set runs, not even to fill a table, where the CPU lacks it
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512 && uses_vnni()) {
    static const Kernels table = avx512::vnni::with_integers(avx512::float_kernels());
    return table;
  }
  if (current_isa() == Isa::avx512) {
    static const Kernels table = avx512::with_integers(avx512::float_kernels());
    return table;
  }
  if (current_isa() == Isa::avx2 && uses_vnni()) {
    static const Kernels table = avx2::vnni::with_integers(avx2::float_kernels());
    return table;
  }
  if (current_isa() == Isa::avx2) {
    static const Kernels table = avx2::with_integers(avx2::float_kernels());
    return table;
  }
#endif
  static const Kernels table = scalar::with_integers(scalar::float_kernels());
  return table;
}

}  // namespace fasttrain

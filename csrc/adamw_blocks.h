// The arithmetic of AdamW on one run of elements, written once as plain loops and compiled once per instruction set:
// this file is included inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard.
//
// Every operation is a single IEEE one in an order that fasttrain/ops/adamw.py repeats, and contraction is off, so the
// result does not depend on the instruction set: the compiler turns the loops into whatever the target has.

// Moments are held in float32, or in blocks of 256 that are widened, updated and rounded again in the L1 cache.
inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return float_from_bits(std::uint32_t{x.bits} << 16); }

template <class T>
inline T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {  // to_bfloat16 without a branch, which would keep the loop from becoming vector code
    const std::uint32_t u = bits_from_float(x), nan = (u & 0x7fffffffu) > 0x7f800000u ? 0x400000u : 0u;
    return {static_cast<std::uint16_t>((nan ? u | nan : u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
}

// Sum of squares in double: element i of a chunk belongs to sum i mod 16, whatever the width of the machine's vectors.
template <class T>
double sum_of_squares(const T* x, std::int64_t n) {
  constexpr int kSums = 16;
  typedef float Floats __attribute__((vector_size(kSums / 2 * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kSums / 2 * sizeof(double))));
  Doubles low{}, high{};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    Floats a, b;
    if constexpr (sizeof(T) == 4) {
      std::memcpy(&a, x + i, sizeof a);
      std::memcpy(&b, x + i + kSums / 2, sizeof b);
    } else {
      for (int l = 0; l < kSums / 2; ++l) { a[l] = widen(x[i + l]); b[l] = widen(x[i + kSums / 2 + l]); }
    }
    const Doubles c = __builtin_convertvector(a, Doubles), d = __builtin_convertvector(b, Doubles);
    low += c * c;  // exact product: 24 + 24 bits
    high += d * d;
  }
  for (; i < n; ++i) {
    const double c = static_cast<double>(widen(x[i]));
    const int l = static_cast<int>(i % kSums);
    if (l < kSums / 2) low[l] += c * c;
    else high[l - kSums / 2] += c * c;
  }
  double total = 0;
  for (int l = 0; l < kSums / 2; ++l) total += low[l] + high[l];
  return total;
}

// The formula. `kEma` and `kZero` are compiled in: an element costs a few instructions, so a test would show.
template <bool kEma, bool kZero, class P>
inline void update(P* __restrict p, P* __restrict g, float* __restrict m, float* __restrict v, P* __restrict e, std::int64_t n,
                   const Factors& f) {
  const float multiplier = f.multiplier, decay = f.decay, weight1 = f.weight1, beta2 = f.beta2, weight2 = f.weight2, eps = f.eps,
              step_size = f.step_size, inverse_root2 = f.inverse_root2, ema_weight = f.ema_weight;
  for (std::int64_t i = 0; i < n; ++i) {
    const float grad = widen(g[i]) * multiplier;
    const float moment1 = m[i] + (grad - m[i]) * weight1;
    const float moment2 = v[i] * beta2 + (grad * grad) * weight2;
    const float denominator = std::sqrt(moment2) * inverse_root2 + eps;
    const P stepped = narrow<P>(widen(p[i]) * decay - (moment1 / denominator) * step_size);
    m[i] = moment1;
    v[i] = moment2;
    p[i] = stepped;
    if (kEma) e[i] = narrow<P>(widen(e[i]) + (widen(stepped) - widen(e[i])) * ema_weight);
    if (kZero) g[i] = narrow<P>(0.0f);
  }
}

// 32 random bits for each of the 256 elements of a block: Philox4x32-10 (Salmon et al. 2011). Element i of the tensor
// takes word (i / 16) mod 4 of counter i / 64 * 16 + i mod 16, so four words of sixteen counters are 64 neighbours.
inline void random_block(std::int64_t first_element, const Randomness& key, std::uint32_t* __restrict out) {
  constexpr int kLanes = kBlock / 4;
  alignas(64) std::uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  const std::uint64_t counter = static_cast<std::uint64_t>(first_element) / 4;
  for (int l = 0; l < kLanes; ++l) {  // the first counter is a multiple of 64: no carry into the high word inside a block
    c0[l] = static_cast<std::uint32_t>(counter) + static_cast<std::uint32_t>(l);
    c1[l] = static_cast<std::uint32_t>(counter >> 32);
    c2[l] = key.step;
    c3[l] = key.parameter;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key.seed), k1 = static_cast<std::uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const std::uint64_t p0 = std::uint64_t{c0[l]} * 0xD2511F53u, p1 = std::uint64_t{c2[l]} * 0xCD9E8D57u;
      c0[l] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
      c2[l] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<std::uint32_t>(p1);
      c3[l] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int unit = 0; unit < kBlock / 64; ++unit) {
    std::memcpy(out + unit * 64, c0 + unit * 16, 64);
    std::memcpy(out + unit * 64 + 16, c1 + unit * 16, 64);
    std::memcpy(out + unit * 64 + 32, c2 + unit * 16, 64);
    std::memcpy(out + unit * 64 + 48, c3 + unit * 16, 64);
  }
}

// bfloat16 with stochastic rounding: sixteen random bits are added below the kept ones, the carry is the rounding.
template <int kShift>
inline void round_block(const float* __restrict wide, const std::uint32_t* __restrict random, bfloat16* __restrict out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t u = bits_from_float(wide[i]), magnitude = u & 0x7fffffffu;
    const std::uint32_t noise = magnitude < 0x7f800000u ? (random[i] >> kShift) & 0xffffu : 0u;
    const std::uint32_t quiet = magnitude > 0x7f800000u ? 0x400000u : 0u;
    out[i].bits = static_cast<std::uint16_t>(((u + noise) | quiet) >> 16);
  }
}

// The eight-bit codes: see fasttrain/ops/_adamw_moments.py. kTop is the largest code of a magnitude; kSigned: bit 7 is
// the sign, and small values are rounded to zero or to code 1; otherwise what is not zero is at least code 1.
template <int kTop>
inline std::int32_t code_base(std::uint32_t exponent) { return std::max<std::int32_t>(static_cast<std::int32_t>(exponent << 3) + 7 - kTop, 0); }

template <int kTop, bool kSigned>
inline void decode_block(const std::uint8_t* __restrict codes, float scale, float* __restrict wide, std::int64_t n) {
  const std::int32_t base = code_base<kTop>(bits_from_float(scale) >> 23);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t code = codes[i] & kTop;
    std::uint32_t u = code != 0 ? static_cast<std::uint32_t>(code + base) << 20 : 0u;
    if (kSigned) u |= static_cast<std::uint32_t>(codes[i] & 0x80) << 24;
    wide[i] = float_from_bits(u);
  }
}

template <int kTop, bool kSigned, int kShift>
inline float encode_block(const float* __restrict wide, const std::uint32_t* __restrict random, std::uint8_t* __restrict codes,
                          std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = bits_from_float(wide[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  std::uint32_t exponent = (largest + 0xfffffu) >> 23;  // of the largest once rounded up
  if (exponent > 255) exponent = 255;
  const float scale = float_from_bits(exponent << 23);
  const std::int32_t base = code_base<kTop>(exponent);
  // A smaller magnitude becomes code 1 with probability magnitude / code 1. The products compared are exact.
  const std::uint32_t lowest = static_cast<std::uint32_t>(base + 1) << 20;
  const float lowest_value = float_from_bits(lowest);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t u = bits_from_float(wide[i]), magnitude = u & 0x7fffffffu, bits16 = (random[i] >> kShift) & 0xffffu;
    std::int32_t code = static_cast<std::int32_t>((magnitude + (bits16 << 4 | 8u)) >> 20) - base;
    code = code > kTop ? kTop : code;
    if (kSigned) {
      const float drawn = static_cast<float>(static_cast<std::int32_t>(bits16)) * lowest_value;
      const std::int32_t small = float_from_bits(magnitude) * 65536.0f > drawn ? 1 : 0;
      code = magnitude < lowest ? small : code;
      codes[i] = static_cast<std::uint8_t>(code | static_cast<std::int32_t>((u >> 24) & 0x80u));
    } else {
      code = code < 1 ? 1 : code;
      codes[i] = static_cast<std::uint8_t>(magnitude != 0 ? code : 0);
    }
  }
  return scale;
}

template <bool kEma, bool kZero, class P>
void run_chunk(const Item& item, std::int64_t begin, std::int64_t end) {
  P* p = static_cast<P*>(item.param);
  P* g = static_cast<P*>(item.grad);
  P* e = static_cast<P*>(item.ema);
  if (item.storage == Storage::float32) {
    update<kEma, kZero, P>(p + begin, g + begin, static_cast<float*>(item.exp_avg) + begin, static_cast<float*>(item.exp_avg_sq) + begin,
                           e + (kEma ? begin : 0), end - begin, item.factors);
    return;
  }
  alignas(64) float m[kBlock], v[kBlock];
  alignas(64) std::uint32_t random[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t n = std::min<std::int64_t>(kBlock, end - at);
    random_block(item.offset + at, item.randomness, random);
    if (item.storage == Storage::bfloat16) {
      bfloat16* narrow_m = static_cast<bfloat16*>(item.exp_avg) + at;
      bfloat16* narrow_v = static_cast<bfloat16*>(item.exp_avg_sq) + at;
      for (std::int64_t i = 0; i < n; ++i) { m[i] = widen(narrow_m[i]); v[i] = widen(narrow_v[i]); }
      update<kEma, kZero, P>(p + at, g + at, m, v, e + (kEma ? at : 0), n, item.factors);
      round_block<0>(m, random, narrow_m, n);
      round_block<16>(v, random, narrow_v, n);
    } else {
      std::uint8_t* code_m = static_cast<std::uint8_t*>(item.exp_avg) + at;
      std::uint8_t* code_v = static_cast<std::uint8_t*>(item.exp_avg_sq) + at;
      float* scale_m = item.scales + at / kBlock;
      float* scale_v = scale_m + (item.numel + kBlock - 1) / kBlock;
      decode_block<127, true>(code_m, *scale_m, m, n);
      decode_block<255, false>(code_v, *scale_v, v, n);
      update<kEma, kZero, P>(p + at, g + at, m, v, e + (kEma ? at : 0), n, item.factors);
      *scale_m = encode_block<127, true, 0>(m, random, code_m, n);
      *scale_v = encode_block<255, false, 16>(v, random, code_v, n);
    }
  }
}

inline void run_chunk(const Item& item, std::int64_t begin, std::int64_t end, bool zero) {
  const bool ema = item.ema != nullptr;
  const auto run = [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    if (ema) zero ? run_chunk<true, true, P>(item, begin, end) : run_chunk<true, false, P>(item, begin, end);
    else zero ? run_chunk<false, true, P>(item, begin, end) : run_chunk<false, false, P>(item, begin, end);
  };
  item.wide ? run(static_cast<float*>(nullptr)) : run(static_cast<bfloat16*>(nullptr));
}

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

// A bfloat16 parameter with the lower half of its float32 master: see fasttrain/ops/_adamw_moments.py.
inline float widen(MasteredBfloat16 x) { return widen(bfloat16{x.bits}); }
inline float join(MasteredBfloat16 p, std::int16_t remainder) {
  return float_from_bits((std::uint32_t{p.bits} << 16) + static_cast<std::uint32_t>(std::int32_t{remainder}));
}
inline std::int16_t split(float master, MasteredBfloat16& p) {
  const std::uint32_t u = bits_from_float(master);
  const std::uint32_t bits = static_cast<std::int32_t>(u & 0x7fffffffu) > 0x7f800000 ? (u & 0x80000000u) | 0x7fc00000u : u;
  p.bits = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
  return static_cast<std::int16_t>(bits & 0xffffu);
}

// Sum of squares in double: element i of a chunk belongs to sum i mod 16, whatever the width of the machine's vectors.
template <class T>
double sum_of_squares(const T* x, std::int64_t n) {
  constexpr int kSums = 16, kLanes = sizeof(Words) / 8;
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
  Doubles sums[kSums / kLanes] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int part = 0; part < kSums / kLanes; ++part) {
      Floats a;
      if constexpr (sizeof(T) == 4) std::memcpy(&a, x + i + part * kLanes, sizeof a);
      else for (int l = 0; l < kLanes; ++l) a[l] = widen(x[i + part * kLanes + l]);
      const Doubles wide = __builtin_convertvector(a, Doubles);
      sums[part] += wide * wide;  // an exact product: 24 + 24 bits
    }
  }
  for (; i < n; ++i) {
    const double wide = static_cast<double>(widen(x[i]));
    sums[i % kSums / kLanes][i % kLanes] += wide * wide;
  }
  double total = 0;
  for (int l = 0; l < kSums; ++l) total += sums[l / kLanes][l % kLanes];
  return total;
}

// The formula. `kEma` and `kZero` are compiled in: an element costs a few instructions, so a test would show.
template <bool kEma, bool kZero, class P>
FASTTRAIN_INLINE void update(P* __restrict p, P* __restrict g, float* __restrict m, float* __restrict v, P* __restrict e,
                   std::int16_t* __restrict remainder, std::int64_t n, const Factors& f) {
  const float multiplier = f.multiplier, decay = f.decay, weight1 = f.weight1, beta2 = f.beta2, weight2 = f.weight2, eps = f.eps,
              step_size = f.step_size, inverse_root2 = f.inverse_root2, ema_weight = f.ema_weight;
  for (std::int64_t i = 0; i < n; ++i) {
    const float grad = widen(g[i]) * multiplier;
    const float moment1 = m[i] + (grad - m[i]) * weight1;
    const float moment2 = v[i] * beta2 + (grad * grad) * weight2;
    const float denominator = std::sqrt(moment2) * inverse_root2 + eps;
    P stepped;
    if constexpr (std::is_same_v<P, MasteredBfloat16>) {
      remainder[i] = split(join(p[i], remainder[i]) * decay - (moment1 / denominator) * step_size, stepped);
    } else {
      stepped = narrow<P>(widen(p[i]) * decay - (moment1 / denominator) * step_size);
    }
    m[i] = moment1;
    v[i] = moment2;
    p[i] = stepped;
    if (kEma) e[i] = narrow<P>(widen(e[i]) + (widen(stepped) - widen(e[i])) * ema_weight);
    if (kZero) g[i] = narrow<P>(0.0f);
  }
}

// 32 random bits for each of 64 elements: Philox4x32-7 (Salmon et al. 2011). Element i of the tensor takes word
// (i / 16) mod 4 of counter i / 64 * 16 + i mod 16, so four words of sixteen counters are 64 neighbours.
// A word lives in the low half of a 64-bit lane: the multiplication reads it there and leaves the product's low word
// there, and nothing looks at what is above it.
struct Philox {
  static constexpr int kRounds = 7, kWidth = sizeof(Words) / 8;
  Words key0[kRounds], key1[kRounds], lane, step, parameter;
  explicit Philox(const Randomness& key) {
    for (int round = 0; round < kRounds; ++round) {
      key0[round] = Words{} + static_cast<std::uint32_t>(static_cast<std::uint32_t>(key.seed) + 0x9E3779B9u * static_cast<std::uint32_t>(round));
      key1[round] = Words{} + static_cast<std::uint32_t>(static_cast<std::uint32_t>(key.seed >> 32) + 0xBB67AE85u * static_cast<std::uint32_t>(round));
    }
    for (int l = 0; l < kWidth; ++l) lane[l] = static_cast<std::uint64_t>(l);
    step = Words{} + key.step;
    parameter = Words{} + key.parameter;
  }
};

FASTTRAIN_INLINE void random_unit(const Philox& philox, std::int64_t first_element, std::uint32_t* __restrict out) {
  for (int lane = 0; lane < 16; lane += 2 * Philox::kWidth) {
    const std::uint64_t counter = static_cast<std::uint64_t>(first_element) / 4 + static_cast<std::uint64_t>(lane);
    Words words[2][4];
    for (int half = 0; half < 2; ++half) {
      Words c0 = philox.lane + (counter + static_cast<std::uint64_t>(half * Philox::kWidth)), c1 = Words{} + (counter >> 32), c2 = philox.step, c3 = philox.parameter;
      for (int round = 0; round < Philox::kRounds; ++round) {
        const Words p0 = low_product(c0, 0xD2511F53u), p1 = low_product(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ philox.key0[round];
        c2 = (p0 >> 32) ^ c3 ^ philox.key1[round];
        c1 = p1;
        c3 = p0;
      }
      words[half][0] = c0;
      words[half][1] = c1;
      words[half][2] = c2;
      words[half][3] = c3;
    }
    for (int word = 0; word < 4; ++word) store_low(words[0][word], words[1][word], out + lane + 16 * word);
  }
}

// bfloat16 with stochastic rounding: sixteen random bits are added below the kept ones, the carry is the rounding.
template <int kShift>
inline void round_unit(const float* __restrict wide, const std::uint32_t* __restrict random, bfloat16* __restrict out) {
  for (int i = 0; i < kUnit; ++i) {
    const std::uint32_t u = bits_from_float(wide[i]);
    const std::int32_t magnitude = static_cast<std::int32_t>(u & 0x7fffffffu);  // AVX2 compares signed numbers only
    const std::uint32_t noise = magnitude < 0x7f800000 ? (kShift ? random[i] >> 16 : random[i] & 0xffffu) : 0u;
    const std::uint32_t quiet = magnitude > 0x7f800000 ? 0x400000u : 0u;
    out[i].bits = static_cast<std::uint16_t>(((u + noise) | quiet) >> 16);
  }
}

// The eight-bit codes: see fasttrain/ops/_adamw_moments.py. kTop is the largest code of a magnitude; kSigned: bit 7 is
// the sign, and small values are rounded to zero or to code 1; otherwise what is not zero is at least code 1.
template <int kTop>
inline std::int32_t code_base(std::uint32_t exponent) { return std::max<std::int32_t>(static_cast<std::int32_t>(exponent << 3) + 7 - kTop, 0); }

template <int kTop, bool kSigned>
inline void decode_block(const std::uint8_t* __restrict codes, float scale, float* __restrict wide) {
  const std::int32_t base = code_base<kTop>(bits_from_float(scale) >> 23);
  std::uint8_t smallest = kTop;
  for (int i = 0; i < kBlock; ++i) smallest = std::min<std::uint8_t>(smallest, codes[i] & kTop);
  if (smallest > 0) {  // the usual block: no zeros
    for (int i = 0; i < kBlock; ++i) {
      const std::uint32_t u = static_cast<std::uint32_t>((codes[i] & kTop) + base) << 20;
      wide[i] = float_from_bits(kSigned ? u | static_cast<std::uint32_t>(codes[i] & 0x80) << 24 : u);
    }
    return;
  }
  for (int i = 0; i < kBlock; ++i) {
    const std::int32_t code = codes[i] & kTop;
    std::uint32_t u = code != 0 ? static_cast<std::uint32_t>(code + base) << 20 : 0u;
    if (kSigned) u |= static_cast<std::uint32_t>(codes[i] & 0x80) << 24;
    wide[i] = float_from_bits(u);
  }
}

// Any block: some magnitudes may be below that of code 1, zero, infinite or NaN.
template <int kTop, bool kSigned>
inline void encode_any(const float* __restrict wide, const std::uint32_t* __restrict random, std::int32_t base, std::uint8_t* __restrict codes) {
  // A smaller magnitude becomes code 1 with probability magnitude / code 1. The products compared are exact.
  const std::int32_t lowest = (base + 1) << 20;
  const float lowest_value = float_from_bits(static_cast<std::uint32_t>(lowest));
  for (int i = 0; i < kBlock; ++i) {
    const std::uint32_t u = bits_from_float(wide[i]), noise = kSigned ? random[i] & 0xfffffu : random[i] >> 12;
    const std::int32_t magnitude = static_cast<std::int32_t>(u & 0x7fffffffu);
    std::int32_t code = static_cast<std::int32_t>((static_cast<std::uint32_t>(magnitude) + noise) >> 20) - base;
    code = code > kTop ? kTop : code;
    if (kSigned) {
      // Masks, not branches: a branch around floating-point operations keeps the loop from becoming vector code.
      const float drawn = static_cast<float>(static_cast<std::int32_t>(noise)) * lowest_value;
      const std::int32_t small = -static_cast<std::int32_t>(magnitude < lowest);
      const std::int32_t up = static_cast<std::int32_t>(float_from_bits(static_cast<std::uint32_t>(magnitude)) * 1048576.0f > drawn);
      code = (code & ~small) | (up & small);
      codes[i] = static_cast<std::uint8_t>(code | static_cast<std::int32_t>((u >> 24) & 0x80u));
    } else {
      code = code < 1 ? 1 : code;
      codes[i] = static_cast<std::uint8_t>(magnitude != 0 ? code : 0);
    }
  }
}

template <int kTop, bool kSigned>
inline float encode_block(const float* __restrict wide, const std::uint32_t* __restrict random, std::uint8_t* __restrict codes) {
  std::uint32_t twice_largest = 0, twice_smallest = ~0u;  // twice: without the sign
  for (int i = 0; i < kBlock; ++i) {
    const std::uint32_t twice = bits_from_float(wide[i]) << 1;
    twice_largest = std::max(twice_largest, twice);
    twice_smallest = std::min(twice_smallest, twice);
  }
  const std::uint32_t largest = twice_largest >> 1, smallest = twice_smallest >> 1;
  const std::uint32_t exponent = std::min((largest + 0xfffffu) >> 23, 255u);  // of the largest once rounded up
  const std::int32_t base = code_base<kTop>(exponent);
  if (largest < 0x7f800000u && smallest >= static_cast<std::uint32_t>(base + 1) << 20) {  // the usual block: all codes are 1..kTop
    for (int i = 0; i < kBlock; ++i) {
      const std::uint32_t noise = kSigned ? random[i] & 0xfffffu : random[i] >> 12;
      const std::uint32_t code = ((bits_from_float(wide[i]) + noise) >> 20) - static_cast<std::uint32_t>(base);  // the sign stands in bit 11
      codes[i] = static_cast<std::uint8_t>(kSigned ? (code & 0x7fu) | ((code >> 4) & 0x80u) : code);
    }
  } else {
    encode_any<kTop, kSigned>(wide, random, base, codes);
  }
  return float_from_bits(exponent << 23);
}

// The lines that a thread needs kAhead elements later, a unit's at a time: the processor's own prefetch sees one block's
// loads at a time and would leave memory idle, and more lines at once than a core can wait for would stall it.
constexpr std::int64_t kAhead = 1024;

template <class T>
FASTTRAIN_INLINE void prefetch_ahead(const T* block) {  // a number, not a pointer: it may lie beyond the array
  const std::uintptr_t next = reinterpret_cast<std::uintptr_t>(block) + kAhead * sizeof(T);
  for (std::size_t byte = 0; byte < kUnit * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(next + byte));
}

// One block of narrow moments, M their type. Units of 64 elements, so that the processor overlaps the multiplications of
// the random bits with the roots and divisions of the update.
template <bool kEma, bool kZero, class P, class M>
inline void run_block(const Item& item, const Philox& philox, std::int64_t first, P* __restrict p, P* __restrict g, P* __restrict e,
                      std::int16_t* __restrict remainder, M* __restrict narrow_m, M* __restrict narrow_v, float* scale_m, float* scale_v) {
  alignas(64) float m[kBlock], v[kBlock];
  alignas(64) std::uint32_t random[kBlock];
  constexpr bool kCoded = sizeof(M) == 1, kMaster = std::is_same_v<P, MasteredBfloat16>;
  if constexpr (kCoded) {
    decode_block<127, true>(narrow_m, *scale_m, m);
    decode_block<255, false>(narrow_v, *scale_v, v);
  }
  for (int at = 0; at < kBlock; at += kUnit) {
    prefetch_ahead(p + at);
    prefetch_ahead(g + at);
    prefetch_ahead(narrow_m + at);
    prefetch_ahead(narrow_v + at);
    random_unit(philox, first + at, random + at);
    if constexpr (!kCoded)
      for (int i = at; i < at + kUnit; ++i) { m[i] = widen(narrow_m[i]); v[i] = widen(narrow_v[i]); }
    update<kEma, kZero, P>(p + at, g + at, m + at, v + at, kEma ? e + at : e, kMaster ? remainder + at : nullptr, kUnit, item.factors);
    if constexpr (!kCoded) {
      round_unit<0>(m + at, random + at, narrow_m + at);
      round_unit<16>(v + at, random + at, narrow_v + at);
    }
  }
  if constexpr (kCoded) {
    *scale_m = encode_block<127, true>(m, random, narrow_m);
    *scale_v = encode_block<255, false>(v, random, narrow_v);
  }
}

template <bool kEma, bool kZero, class P, class M>
void run_blocks(const Item& item, std::int64_t begin, std::int64_t end) {
  P* p = static_cast<P*>(item.param);
  P* g = static_cast<P*>(item.grad);
  P* e = static_cast<P*>(item.ema);
  std::int16_t* r = item.remainder;  // null for other parameters, whose code does not look at it
  M* m = static_cast<M*>(item.exp_avg);
  M* v = static_cast<M*>(item.exp_avg_sq);
  const std::int64_t blocks = (item.numel + kBlock - 1) / kBlock;
  const Philox philox(item.randomness);
  std::int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock)
    run_block<kEma, kZero>(item, philox, item.offset + at, p + at, g + at, kEma ? e + at : e, r ? r + at : r, m + at, v + at, item.scales + at / kBlock,
                           item.scales + blocks + at / kBlock);
  if (at == end) return;
  // The last, partial block of a tensor runs padded: zeros stay zeros and take no part in a block's maximum.
  const std::size_t n = static_cast<std::size_t>(end - at);
  P p_pad[kBlock] = {}, g_pad[kBlock] = {}, e_pad[kBlock] = {};
  M m_pad[kBlock] = {}, v_pad[kBlock] = {};
  std::int16_t r_pad[kBlock] = {};
  const auto move = [n](auto* to, const auto* from) { std::memcpy(to, from, n * sizeof *from); };
  move(p_pad, p + at); move(g_pad, g + at); move(m_pad, m + at); move(v_pad, v + at);
  if (kEma) move(e_pad, e + at);
  if (r) move(r_pad, r + at);
  run_block<kEma, kZero>(item, philox, item.offset + at, p_pad, g_pad, e_pad, r_pad, m_pad, v_pad, item.scales + at / kBlock,
                         item.scales + blocks + at / kBlock);
  move(p + at, p_pad); move(g + at, g_pad); move(m + at, m_pad); move(v + at, v_pad);
  if (kEma) move(e + at, e_pad);
  if (r) move(r + at, r_pad);
}

template <bool kEma, bool kZero, class P>
void run_chunk(const Item& item, std::int64_t begin, std::int64_t end) {
  if (item.storage == Storage::bfloat16) return run_blocks<kEma, kZero, P, bfloat16>(item, begin, end);
  if (item.storage == Storage::int8) return run_blocks<kEma, kZero, P, std::uint8_t>(item, begin, end);
  P* p = static_cast<P*>(item.param);
  P* g = static_cast<P*>(item.grad);
  P* e = static_cast<P*>(item.ema);
  float* m = static_cast<float*>(item.exp_avg);
  float* v = static_cast<float*>(item.exp_avg_sq);
  std::int16_t* r = item.remainder;
  std::int64_t at = begin;
  for (; at + kUnit <= end; at += kUnit) {
    prefetch_ahead(p + at);
    prefetch_ahead(g + at);
    prefetch_ahead(m + at);
    prefetch_ahead(v + at);
    update<kEma, kZero, P>(p + at, g + at, m + at, v + at, kEma ? e + at : e, r ? r + at : r, kUnit, item.factors);
  }
  update<kEma, kZero, P>(p + at, g + at, m + at, v + at, kEma ? e + at : e, r ? r + at : r, end - at, item.factors);
}

inline void run_chunk(const Item& item, std::int64_t begin, std::int64_t end, bool zero) {
  const bool ema = item.ema != nullptr;
  const auto run = [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    if (ema) zero ? run_chunk<true, true, P>(item, begin, end) : run_chunk<true, false, P>(item, begin, end);
    else zero ? run_chunk<false, true, P>(item, begin, end) : run_chunk<false, false, P>(item, begin, end);
  };
  if (item.wide) run(static_cast<float*>(nullptr));
  else if (item.remainder) run(static_cast<MasteredBfloat16*>(nullptr));
  else run(static_cast<bfloat16*>(nullptr));
}

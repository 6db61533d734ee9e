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

// The lines that a thread needs kAhead elements later, those of `count` elements at a time: the processor's own prefetch
// sees one block's loads at a time and would leave memory idle, and more lines at once than a core can wait for would
// stall it.
constexpr std::int64_t kAhead = 1024;

template <int count, class T>
FASTTRAIN_INLINE void prefetch_ahead(const T* first) {  // a number, not a pointer: it may lie beyond the array
  const std::uintptr_t next = reinterpret_cast<std::uintptr_t>(first) + kAhead * sizeof(T);
  for (std::size_t byte = 0; byte < count * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(next + byte));
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
    prefetch_ahead<kSums>(x + i);
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

// The formula, of numbers or of vectors of them.
template <class F>
FASTTRAIN_INLINE void advance(F grad, F& m, F& v, const Factors& f) {
  grad = grad * f.multiplier;
  m = m + (grad - m) * f.weight1;
  v = v * f.beta2 + (grad * grad) * f.weight2;
}
template <class F>
FASTTRAIN_INLINE F stepped(F p, F m, F root_v, const Factors& f) {
  return p * f.decay - (m / (root_v * f.inverse_root2 + f.eps)) * f.step_size;
}

// `kEma` and `kZero` are compiled in: an element costs a few instructions, so a test would show.
template <bool kEma, bool kZero, class P>
FASTTRAIN_INLINE void update(P* __restrict p, P* __restrict g, float* __restrict m, float* __restrict v, P* __restrict e,
                   std::int16_t* __restrict remainder, std::int64_t n, const Factors& factors) {
  const Factors f = factors;
  for (std::int64_t i = 0; i < n; ++i) {
    float wide, moment1 = m[i], moment2 = v[i];
    if constexpr (std::is_same_v<P, MasteredBfloat16>) wide = join(p[i], remainder[i]);
    else wide = widen(p[i]);
    advance(widen(g[i]), moment1, moment2, f);
    wide = stepped(wide, moment1, root(moment2), f);
    P param;
    if constexpr (std::is_same_v<P, MasteredBfloat16>) remainder[i] = split(wide, param);
    else param = narrow<P>(wide);
    m[i] = moment1;
    v[i] = moment2;
    p[i] = param;
    if (kEma) e[i] = narrow<P>(widen(e[i]) + (widen(param) - widen(e[i])) * f.ema_weight);
    if (kZero) g[i] = narrow<P>(0.0f);
  }
}

// One block of narrow moments, M their type. Units, so that the processor overlaps the multiplications of the random
// bits with the roots and divisions of the update.
template <bool kEma, bool kZero, bool kZeroCodes, class P, class M>
inline void run_block(const Factors& factors, const Philox& philox, std::int64_t first, P* __restrict p, P* __restrict g, P* __restrict e,
                      std::int16_t* __restrict remainder, M* __restrict narrow_m, M* __restrict narrow_v, float* scale_m, float* scale_v) {
  constexpr bool kCoded = sizeof(M) == 1, kMaster = std::is_same_v<P, MasteredBfloat16>, kWide = sizeof(P) == 4;
  constexpr int kLanes = sizeof(Bits) / 4;
  const Factors f = factors;
  alignas(64) float m[kBlock], v[kBlock], wide_p[kUnit], wide_g[kUnit], roots[kUnit];
  alignas(64) std::uint32_t random[kBlock / 2];
  Bits largest_m{}, largest_v{};
  std::uint32_t base_m = 0, base_v = 0;
  if constexpr (kCoded) {
    base_m = static_cast<std::uint32_t>(code_base<127>(bits_from_float(*scale_m) >> 23));
    base_v = static_cast<std::uint32_t>(code_base<255>(bits_from_float(*scale_v) >> 23));
  }
  for (int unit = 0; unit < kBlock; unit += kUnit) {
    prefetch_ahead<kUnit>(p + unit);
    prefetch_ahead<kUnit>(g + unit);
    prefetch_ahead<kUnit>(narrow_m + unit);
    prefetch_ahead<kUnit>(narrow_v + unit);
    random_unit(philox, first + unit, random + unit / 2);
    float *unit_p = wide_p, *unit_g = wide_g;
    if constexpr (kWide) {
      unit_p = p + unit;
      unit_g = g + unit;
    } else {
      for (int i = 0; i < kUnit; ++i) {
        if constexpr (kMaster) wide_p[i] = join(p[unit + i], remainder[unit + i]);
        else wide_p[i] = widen(p[unit + i]);
        wide_g[i] = widen(g[unit + i]);
      }
    }
    FASTTRAIN_UNROLL(2)
    for (int i = 0; i < kUnit; i += kLanes) {
      Floats moment1, moment2;
      if constexpr (kCoded) {
        moment1 = decoded<127, kZeroCodes>(narrow_m + unit + i, base_m);
        moment2 = decoded<255, kZeroCodes>(narrow_v + unit + i, base_v);
      } else {
        moment1 = reinterpret_cast<Floats>(widened(&narrow_m[unit + i].bits) << 16);
        moment2 = reinterpret_cast<Floats>(widened(&narrow_v[unit + i].bits) << 16);
      }
      advance(load<Floats>(unit_g + i), moment1, moment2, f);
      store(roots + i, root(moment2));
      store(m + unit + i, moment1);
      store(v + unit + i, moment2);
      if constexpr (kWide && kZero) store(unit_g + i, Floats{});
      if constexpr (kCoded) {
        const Bits bits1 = reinterpret_cast<Bits>(moment1) & 0x7fffffffu, bits2 = reinterpret_cast<Bits>(moment2);
        largest_m = bits1 > largest_m ? bits1 : largest_m;
        largest_v = bits2 > largest_v ? bits2 : largest_v;
      }
    }
    // Apart from the roots: both in one chain would be longer than a processor looks ahead, and it would wait.
    FASTTRAIN_UNROLL(2)
    for (int i = 0; i < kUnit; i += kLanes)
      store(unit_p + i, stepped(load<Floats>(unit_p + i), load<Floats>(m + unit + i), load<Floats>(roots + i), f));
    for (int i = unit; i < unit + kUnit; ++i) {
      if constexpr (kMaster) remainder[i] = split(wide_p[i - unit], p[i]);
      else if constexpr (!kWide) p[i] = narrow<P>(wide_p[i - unit]);
    }
    for (int i = unit; i < unit + kUnit; ++i) {
      if constexpr (kEma) e[i] = narrow<P>(widen(e[i]) + (widen(p[i]) - widen(e[i])) * f.ema_weight);
      if constexpr (!kWide && kZero) g[i] = narrow<P>(0.0f);
    }
    if constexpr (!kCoded) {
      round_unit<false>(m + unit, random + unit / 2, narrow_m + unit);
      round_unit<true>(v + unit, random + unit / 2, narrow_v + unit);
    }
  }
  if constexpr (kCoded) encode_block(m, v, largest_m, largest_v, random, narrow_m, narrow_v, scale_m, scale_v);
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
  const auto run = [&](P* p, P* g, P* e, std::int16_t* r, M* m, M* v) {
    float *scale_m = item.scales + at / kBlock, *scale_v = scale_m + blocks;
    if constexpr (sizeof(M) == 1)
      if (any_zero(m, v)) return run_block<kEma, kZero, true>(item.factors, philox, item.offset + at, p, g, e, r, m, v, scale_m, scale_v);
    run_block<kEma, kZero, false>(item.factors, philox, item.offset + at, p, g, e, r, m, v, scale_m, scale_v);
  };
  for (; at + kBlock <= end; at += kBlock) run(p + at, g + at, kEma ? e + at : e, r ? r + at : r, m + at, v + at);
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
  run(p_pad, g_pad, e_pad, r_pad, m_pad, v_pad);
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
    prefetch_ahead<kUnit>(p + at);
    prefetch_ahead<kUnit>(g + at);
    prefetch_ahead<kUnit>(m + at);
    prefetch_ahead<kUnit>(v + at);
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

// AdamW's narrow moments: random bits, bfloat16 by stochastic rounding, and the eight-bit codes. Compiled once per
// instruction set: this file is included inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include
// guard. The specification is fasttrain/ops/_adamw_moments.py.

template <class T>
FASTTRAIN_INLINE T load(const void* from) {
  struct __attribute__((packed, may_alias)) Anywhere { T value; };
  return static_cast<const Anywhere*>(from)->value;
}
template <class T>
FASTTRAIN_INLINE void store(void* to, T x) {
  struct __attribute__((packed, may_alias)) Anywhere { T value; };
  static_cast<Anywhere*>(to)->value = x;
}

// Random bits: Philox4x32-7 (Salmon et al. 2011), 32 of them for elements i and i + 32 of each 64 of the tensor: word
// i / 8 of counter (element / 64) * 8 + i mod 8. See fasttrain/ops/_adamw_moments.py.
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

constexpr int kPairs = 32;  // of elements that share a word: its distance
constexpr int kUnit = std::max(2 * kPairs, 16 * Philox::kWidth);  // elements whose random bits come together

FASTTRAIN_INLINE void random_unit(const Philox& philox, std::int64_t first_element, std::uint32_t* __restrict out) {
  constexpr int kWidth = Philox::kWidth;
  for (int lane = 0; lane < kUnit / 8; lane += 2 * kWidth) {
    const std::uint64_t counter = static_cast<std::uint64_t>(first_element) / 8 + static_cast<std::uint64_t>(lane);
    Words words[2][4];  // of two vectors of counters, so that one's multiplications fill the other's waiting
    for (int half = 0; half < 2; ++half) {
      Words c0 = philox.lane + (counter + static_cast<std::uint64_t>(half * kWidth)), c1 = Words{} + (counter >> 32), c2 = philox.step, c3 = philox.parameter;
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
    for (int word = 0; word < 4; ++word) {
      if constexpr (kWidth < 8) store_low(words[0][word], words[1][word], out + lane + 8 * word);
      else if (word % 2 == 0)  // a vector of counters is those of 64 elements
        for (int half = 0; half < 2; ++half) store_low(words[half][word], words[half][word + 1], out + half * kPairs + 8 * word);
    }
  }
}

// The first moment of an element i < 32 takes the lowest bits of its word, the second one the highest; element i + 32's
// the other way round.
template <int kBits, bool kSecond, class B>
FASTTRAIN_INLINE B noise_of(B word, int element) {
  return (element / kPairs % 2 != 0) != kSecond ? word >> (32 - kBits) : word & ((1u << kBits) - 1);
}
FASTTRAIN_INLINE int word_of(int element) { return element / (2 * kPairs) * kPairs + element % kPairs; }

// bfloat16 with stochastic rounding: sixteen random bits are added below the kept ones, the carry is the rounding.
template <bool kSecond>
inline void round_unit(const float* __restrict wide, const std::uint32_t* __restrict random, bfloat16* __restrict out) {
  for (int at = 0; at < kUnit; at += kPairs)
    for (int i = 0; i < kPairs; ++i) {
      const std::uint32_t u = bits_from_float(wide[at + i]), word = random[word_of(at) + i];
      const std::int32_t magnitude = static_cast<std::int32_t>(u & 0x7fffffffu);  // AVX2 compares signed numbers only
      const std::uint32_t noise = magnitude < 0x7f800000 ? noise_of<16, kSecond>(word, at) : 0u;
      const std::uint32_t quiet = magnitude > 0x7f800000 ? 0x400000u : 0u;
      out[at + i].bits = static_cast<std::uint16_t>(((u + noise) | quiet) >> 16);
    }
}

// The eight-bit codes: see fasttrain/ops/_adamw_moments.py. kTop is the largest code of a magnitude: 127 for the first
// moment, where bit 7 is the sign and small values are rounded to zero or to code 1; 255 for the second, where what is
// not zero is at least code 1.
template <int kTop>
inline std::int32_t code_base(std::uint32_t exponent) { return std::max<std::int32_t>(static_cast<std::int32_t>(exponent << 3) + 7 - kTop, 0); }

// Where there is no code 0, whose value is 0, its test is left out.
template <int kTop, bool kZeros>
FASTTRAIN_INLINE Floats decoded(const std::uint8_t* codes, std::uint32_t base) {
  Bits bits;
  if constexpr (kTop == 127) bits = (widened_signed(codes) << 20 & 0x87ffffffu) + (base << 20);
  else bits = (widened(codes) + base) << 20;
  if constexpr (kZeros) bits = (widened(codes) & kTop) == 0 ? Bits{} : bits;
  return reinterpret_cast<Floats>(bits);
}

inline bool any_below(Codes codes, std::uint8_t limit) {
  std::uint64_t words[sizeof(Codes) / 8], any = 0;
  const auto below = codes < limit;
  std::memcpy(words, &below, sizeof words);
  for (const std::uint64_t word : words) any |= word;
  return any != 0;
}

inline bool any_zero(const std::uint8_t* codes_m, const std::uint8_t* codes_v) {
  Codes least = ~Codes{};
  for (std::size_t i = 0; i < kBlock; i += sizeof(Codes)) {
    const Codes m = load<Codes>(codes_m + i), v = load<Codes>(codes_v + i), twice = m + m;  // without the sign
    least = twice < least ? twice : least;
    least = v < least ? v : least;
  }
  return any_below(least, 1);
}

// Any block: some magnitudes may be below that of code 1, zero, infinite or NaN.
template <int kTop>
inline void encode_any(const float* __restrict wide, const std::uint32_t* __restrict random, std::int32_t base, std::uint8_t* __restrict codes) {
  // A smaller magnitude becomes code 1 with probability magnitude / code 1. The products compared are exact.
  const std::int32_t lowest = (base + 1) << 20;
  const float lowest_value = float_from_bits(static_cast<std::uint32_t>(lowest));
  std::uint32_t noises[kBlock];
  for (int i = 0; i < kBlock; ++i) noises[i] = noise_of<20, kTop == 255>(random[word_of(i)], i);
  for (int i = 0; i < kBlock; ++i) {
    const std::uint32_t u = bits_from_float(wide[i]), noise = noises[i];
    const std::int32_t magnitude = static_cast<std::int32_t>(u & 0x7fffffffu);
    std::int32_t code = static_cast<std::int32_t>((static_cast<std::uint32_t>(magnitude) + noise) >> 20) - base;
    code = code > kTop ? kTop : code;
    if (kTop == 127) {
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

// What the codes of a block of one moment have in common.
template <int kTop>
struct Scale {
  std::uint32_t largest, exponent, base;
  explicit Scale(Bits largest_bits) : largest(0) {
    for (std::size_t l = 0; l < sizeof(Bits) / 4; ++l) largest = std::max(largest, static_cast<std::uint32_t>(largest_bits[l]));
    exponent = std::min(((largest & 0x7fffffffu) + 0xfffffu) >> 23, 255u);  // of the largest magnitude once rounded up
    base = static_cast<std::uint32_t>(code_base<kTop>(exponent));
  }
  // All finite, no v with a sign, and none below code 1 before the noise: of m's, a code 1 may have come from below.
  bool holds(Codes least) const { return largest < 0x7f800000u && !any_below(least, kTop == 127 ? 2 : 1); }
  float value() const { return float_from_bits(exponent << 23); }
};

// `largest`: of the bits of all numbers, without m's signs.
FASTTRAIN_INLINE void encode_block(const float* __restrict m, const float* __restrict v, Bits largest_m, Bits largest_v, const std::uint32_t* __restrict random,
                         std::uint8_t* __restrict codes_m, std::uint8_t* __restrict codes_v, float* scale_m, float* scale_v) {
  constexpr int kLanes = sizeof(Bits) / 4;
  const Scale<127> of_m(largest_m);
  const Scale<255> of_v(largest_v);
  Codes least_m = ~Codes{}, least_v = ~Codes{};
  for (int unit = 0; unit < kBlock; unit += 2 * kPairs)
    FASTTRAIN_UNROLL(4)
    for (int at = 0; at < 2 * kPairs; at += 4 * kLanes) {
      Bits x[4], y[4];
      FASTTRAIN_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        const int element = at + i * kLanes;
        const Bits word = load<Bits>(random + word_of(unit) + element % kPairs);
        x[i] = load<Bits>(m + unit + element) + noise_of<20, false>(word, element);
        y[i] = load<Bits>(v + unit + element) + noise_of<20, true>(word, element);
      }
      store(codes_m + unit + at, narrowed<127>(x, of_m.base, least_m));
      store(codes_v + unit + at, narrowed<255>(y, of_v.base, least_v));
    }
  if (!of_m.holds(least_m)) encode_any<127>(m, random, static_cast<std::int32_t>(of_m.base), codes_m);
  if (!of_v.holds(least_v)) encode_any<255>(v, random, static_cast<std::int32_t>(of_v.base), codes_v);
  *scale_m = of_m.value();
  *scale_v = of_v.value();
}

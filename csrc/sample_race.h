// The race: logarithms, uniforms and quotients. Included as sample_rows.h says.

// Step 4.
inline Doubles log2_of(Doubles v) {
  constexpr double coefficients[] = {0.16972882833987804, 0.19235933878519512, 0.22195308321368668, 0.26230818925253880,
                                     0.32059889797532520, 0.41219858311113240, 0.57707801635558540, 0.96179669392597560,
                                     2.88539008177792680};
  const Words bits = reinterpret_cast<Words>(v);
  const Doubles m = reinterpret_cast<Doubles>((bits & 0x000fffffffffffffu) | 0x3fe0000000000000u);
  const Doubles e = reinterpret_cast<Doubles>((bits >> 52) | 0x4330000000000000u) - (4503599627370496.0 + 1022.0);
  const auto small = m < 0.7071067811865476;
  const Doubles mantissa = small ? m * 2.0 : m;
  const Doubles s = (mantissa - 1.0) / (mantissa + 1.0), z = s * s;
  Doubles series = Doubles{} + 0.15186263588304878;
  for (const double coefficient : coefficients) series = series * z + coefficient;
  return (small ? e - 1.0 : e) + s * series;
}

// Step 3 for `kCount` vectors of ids in the low halves of 64-bit lanes.
template <int kCount>
inline void philox_uniforms(Words (&ids)[kCount], std::uint32_t domain, std::uint64_t seed, std::uint64_t position, Doubles (&u)[kCount]) {
  Words c1[kCount], c2[kCount], c3[kCount];
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int i = 0; i < kCount; ++i) c1[i] = Words{} + domain, c2[i] = Words{} + (position & 0xffffffffu), c3[i] = Words{} + (position >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int i = 0; i < kCount; ++i) {
      const Words p0 = low_product(ids[i], 0xD2511F53u), p1 = low_product(c2[i], 0xCD9E8D57u);
      ids[i] = (p1 >> 32) ^ c1[i] ^ key0;
      c2[i] = (p0 >> 32) ^ c3[i] ^ key1;
      c1[i] = p1;
      c3[i] = p0;
    }
  for (int i = 0; i < kCount; ++i) {  // 52 bits as the fraction of a number in [2^52, 2^53); every step is exact
    const Words bits = (ids[i] & 0xffffffffu) << 20 | (c1[i] & 0xffffffffu) >> 12 | 0x4330000000000000u;
    u[i] = (reinterpret_cast<Doubles>(bits) - 4503599627370496.0) * 0x1p-52 + 0x1p-53;
  }
}

// Steps 3 to 5 for `count` ids, a multiple of 16: the quotients of the race, infinite where the weight is 0.
inline void race_quotients(const std::uint32_t* ids, const double* weights, std::int64_t count, std::uint32_t domain,
                           std::uint64_t seed, std::uint64_t position, double* quotients) {
  constexpr int kLanes = sizeof(Words) / 8;
  for (std::int64_t begin = 0; begin < count; begin += 2 * kLanes) {
    Words words[2];
    Doubles u[2], weight;
    for (int i = 0; i < 2; ++i)
      for (int lane = 0; lane < kLanes; ++lane) words[i][lane] = ids[begin + i * kLanes + lane];
    philox_uniforms(words, domain, seed, position, u);
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&weight, weights + begin + i * kLanes, sizeof weight);
      const Doubles quotient = -log2_of(u[i]) / weight;
      std::memcpy(quotients + begin + i * kLanes, &quotient, sizeof quotient);
    }
  }
}

// Index of the least quotient, the first of equals. Not negative, so they compare as integers.
inline std::int64_t first_least(const double* quotients, std::int64_t count) {
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t i = 0; i < count; ++i) least = std::min(least, std::bit_cast<std::int64_t>(quotients[i]));
  std::int64_t i = 0;
  while (std::bit_cast<std::int64_t>(quotients[i]) != least) ++i;
  return i;
}

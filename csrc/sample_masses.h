// Masses of tokens and maxima of groups. Included as sample_rows.h says.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kExactSum = 2048;  // elements whose masses float64 adds exactly, with room to spare

// Step 1.
template <class V>
struct MassOf {
  V largest, scale;
  MassOf(float max, float c) : largest(V::set(max)), scale(V::set(c)) {}
  // Several vectors in step: one alone is a chain of twenty dependent operations.
  template <int count>
  // Several vectors in step: one alone is a chain of twenty dependent operations. Inline, or they go through memory.
  [[gnu::always_inline]] void replace(V (&x)[count]) const {
    constexpr float coefficients[] = {0.0013398875f, 0.009618437f, 0.055503324f, 0.24022648f, 0.6931472f, 1.0f};
    V n[count], p[count];
    for (int i = 0; i < count; ++i) x[i] = V::max((x[i] - largest) * scale, V::set(-100.0f));
    for (int i = 0; i < count; ++i) n[i] = floor(x[i] + V::set(0.5f));
    for (int i = 0; i < count; ++i) x[i] = x[i] - n[i];
    for (int i = 0; i < count; ++i) p[i] = V::set(0.00015353362f);
    for (const float coefficient : coefficients)
      for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + V::set(coefficient);
    for (int i = 0; i < count; ++i) x[i] = floor(times_two_to(p[i], n[i] + V::set(40.0f)));
  }
  V operator()(V x) const {
    V one[1] = {x};
    replace(one);
    return one[0];
  }
};

constexpr int kInStep = 4;  // vectors; a group is a multiple of that many

template <class V, class T>
inline V load_n(const T* p, std::int64_t n) {
  return n >= V::width ? V::load(p) : V::load_part(p, static_cast<int>(n), kMinusInfinity);
}

// first, first + 1, ...
template <class V>
inline V lanes_from(float first) {
  alignas(64) static constexpr float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return V::load(lanes) + V::set(first);
}
// The first `count` lanes, or all.
template <class V>
inline Mask lanes_below(std::int64_t count) { return greater(V::set(static_cast<float>(count)), lanes_from<V>(0)); }

template <class V, class T>
[[gnu::noinline]] void load_rest(const T* p, std::int64_t n, V (&x)[kInStep]) {
  for (int i = 0; i < kInStep; ++i) x[i] = n > i * V::width ? load_n<V>(p + i * V::width, n - i * V::width) : V::set(kMinusInfinity);
}
template <class V, class T>
[[gnu::always_inline]] inline void load_in_step(const T* p, std::int64_t n, V (&x)[kInStep]) {
  if (n < kInStep * V::width) return load_rest<V>(p, n, x);
  for (int i = 0; i < kInStep; ++i) x[i] = V::load(p + i * V::width);
}

// The maximum of every group and of them all; NaN if one holds one.
template <class V, class T>
float group_maxima(const T* x, std::int64_t n, float* maxima) {
  Mask nan = greater(V::set(0), V::set(0));
  V row_max = V::set(kMinusInfinity);
  std::int64_t begin = 0;
  for (; begin + kGroup <= n; begin += kGroup) {
    V top[4] = {V::set(kMinusInfinity), V::set(kMinusInfinity), V::set(kMinusInfinity), V::set(kMinusInfinity)};
    for (std::int64_t i = begin; i < begin + kGroup; i += 4 * V::width) {
      const V a = V::load(x + i), b = V::load(x + i + V::width), c = V::load(x + i + 2 * V::width), d = V::load(x + i + 3 * V::width);
      nan = either(nan, either(unordered(a, b), unordered(c, d)));
      top[0] = V::max(top[0], a), top[1] = V::max(top[1], b), top[2] = V::max(top[2], c), top[3] = V::max(top[3], d);
    }
    const V group = V::max(V::max(top[0], top[1]), V::max(top[2], top[3]));
    row_max = V::max(row_max, group);
    *maxima++ = group.max();
  }
  if (begin < n) {
    V group = V::set(kMinusInfinity);
    for (std::int64_t i = begin; i < n; i += V::width) {
      const V a = load_n<V>(x + i, n - i);
      nan = either(nan, unordered(a, a));
      group = V::max(group, a);
    }
    row_max = V::max(row_max, group);
    *maxima = group.max();
  }
  return count(nan) != 0 ? std::numeric_limits<float>::quiet_NaN() : row_max.max();
}

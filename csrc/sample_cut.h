// The search for the cut among listed tokens. Included as sample_rows.h says.

// Where the order of step 2 is cut: `kept` of the `equal` tokens whose logit is x stay, and all with a larger one.
struct Cut {
  float x;
  std::int64_t kept, equal;
};

template <class V>
std::int64_t sum_of(const float* ws, std::int64_t count) {
  std::int64_t sum = 0;
  for (std::int64_t begin = 0; begin < count; begin += kExactSum) {
    WideSum part = WideSum::zero();
    const std::int64_t end = std::min(count, begin + kExactSum);
    for (std::int64_t i = begin; i < end; i += V::width) part.add(keep(greater(load_n<V>(ws + i, end - i), V::set(0)), load_n<V>(ws + i, end - i)));
    sum += static_cast<std::int64_t>(part.total());
  }
  return sum;
}

// About the logit above which, or up to which, a sample weighs `weight`, but not below `low`. Four vectors behind the
// sample are written.
template <class V, bool above>
float sample_quantile(List& sample, std::int64_t sampled, float weight, float low, float high) {
  for (int j = 0; j < 4; ++j) V::set(0).store(sample.w.data() + sampled + j * V::width);
  for (int step = 0; step < 12; ++step) {
    const float middle = static_cast<float>(0.5 * (double{low} + double{high}));
    const V at = V::set(middle);
    V sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    for (std::int64_t i = 0; i < sampled; i += 4 * V::width)
      for (int j = 0; j < 4; ++j) {
        const Mask larger = greater(V::load(sample.x.data() + i + j * V::width), at);
        sum[j] = sum[j] + keep(above ? larger : opposite(larger), V::load(sample.w.data() + i + j * V::width));
      }
    const float reached = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
    (above == (reached >= weight) ? low : high) = middle;
  }
  return low;
}

// Three times the deviation that the share above a logit has in a sample, at most: of the sum of squared weights, which is
// the square of `deviation` for a sample that weighs 1, the part above counts (1 - share)^2 fold and the rest share^2 fold.
inline float sample_slack(float share, float deviation) { return 3 * std::sqrt(std::max(share, 1 - share) * (1 - share)) * deviation; }

// Looks for the cut among the listed tokens, which all have low < x <= high; nothing is sorted.
template <class V>
class CutSearch {
 public:
  CutSearch(Scratch& scratch, std::int64_t size, float below, float top, float c) : s(scratch), num_listed(size), low(below), high(top), scale(c) {}

  // The cut that leaves `need` tokens, or tokens up to the one that brings their mass to `need`. The list is not changed.
  // The interval is halved around the cut, and after every few halvings, for weighing costs less than moving, what it
  // still holds is moved together. What is larger than those in x, w weighs `beyond`, what is larger than high `above` < need.
  template <bool by_mass>
  Cut find(std::int64_t need) {
    const float *xs = s.list.x.data(), *ws = s.list.w.data();
    std::int64_t size = num_listed, beyond = 0, above = 0;
    bool divisible = true;
    for (int step = 0; size > kFew && divisible;) {
      for (int i = 0; i < kHalvings && divisible; ++i, ++step) {
        float middle = static_cast<float>(0.5 * (double{low} + double{high}));
        if (by_mass && step == 0) middle = std::min(middle, low + 2 / scale);  // the list ends close below the cut
        if (step > 24) middle = middle_of_bits(low, high);  // logits that cluster around one value
        divisible = middle > low && middle < high;
        if (!divisible) break;
        const std::int64_t heavier = beyond + weight_above<by_mass>(xs, ws, size, middle);
        if (heavier >= need) low = middle;
        else high = middle, above = heavier;
      }
      size = move_inside<by_mass>(xs, ws, size);
      xs = s.other.x.data(), ws = s.other.w.data();
      beyond = above;
    }
    return cut_of_sorted<by_mass>(xs, ws, size, need - beyond);
  }

 private:
  Scratch& s;
  const std::int64_t num_listed;
  float low, high;
  const float scale;

  static constexpr std::int64_t kFew = 64;
  static constexpr int kHalvings = 3;

  // What the tokens with x > bound weigh, or how many they are.
  template <bool by_mass>
  static std::int64_t weight_above(const float* xs, const float* ws, std::int64_t size, float bound) {
    const V at = V::set(bound);
    std::int64_t weight = 0;
    for (std::int64_t begin = 0; begin < size; begin += kExactSum) {
      WideSum sum = WideSum::zero();
      const std::int64_t end = std::min(size, begin + kExactSum);
      for (std::int64_t i = begin; i < end; i += V::width) {
        Mask larger = greater(V::load(xs + i), at);
        if (i + V::width > end) larger = both(larger, lanes_below<V>(end - i));
        if constexpr (by_mass) sum.add(keep(larger, V::load(ws + i)));
        else weight += count(larger);
      }
      if constexpr (by_mass) weight += static_cast<std::int64_t>(sum.total());
    }
    return weight;
  }

  // Moves those with low < x <= high to s.other, where they may stand already: how many.
  template <bool by_mass>
  std::int64_t move_inside(const float* xs, const float* ws, std::int64_t size) {
    const V vlow = V::set(low), vhigh = V::set(high);
    float *to_x = s.other.x.data(), *to_w = s.other.w.data();
    std::int64_t to = 0;
    for (std::int64_t i = 0; i < size; i += V::width) {  // to <= i: what is overwritten has been read
      const V a = V::load(xs + i);
      Mask inside = both(greater(a, vlow), at_least(vhigh, a));
      if (i + V::width > size) inside = both(inside, lanes_below<V>(size - i));
      if (by_mass) compress(inside, V::load(ws + i), to_w + to);
      to += compress(inside, a, to_x + to);
    }
    return to;
  }

  static float middle_of_bits(float low, float high) {
    auto ordered = [](float f) { const std::int32_t i = std::bit_cast<std::int32_t>(f); return std::int64_t{i < 0 ? std::numeric_limits<std::int32_t>::min() - i : i}; };
    const std::int64_t middle = (ordered(low) + ordered(high)) >> 1;
    const std::int32_t i = static_cast<std::int32_t>(middle < 0 ? std::numeric_limits<std::int32_t>::min() - middle : middle);
    return std::bit_cast<float>(i);
  }

  // The end of the search among few tokens: each is compared with all, which is what vectors do well and sorting is not.
  // `size` is at most kFew.
  template <bool by_mass>
  static Cut cut_of_few(const float* xs, const float* ws, std::int64_t size, std::int64_t need) {
    for (std::int64_t i = 0; i < size; ++i) {
      const V at = V::set(xs[i]);
      std::int64_t num_larger = 0, num_least = 0;
      WideSum larger = WideSum::zero();
      for (std::int64_t j = 0; j < size; j += V::width) {
        const V a = load_n<V>(xs + j, size - j);
        const Mask beyond = greater(a, at);
        num_larger += count(beyond);
        num_least += count(at_least(a, at));
        if constexpr (by_mass) larger.add(keep(beyond, load_n<V>(ws + j, size - j)));
      }
      const std::int64_t above = by_mass ? static_cast<std::int64_t>(larger.total()) : num_larger;
      const std::int64_t each = by_mass ? static_cast<std::int64_t>(ws[i]) : 1, equal = num_least - num_larger;
      if (each > 0 && above < need && above + each * equal >= need) return {xs[i], (need - above + each - 1) / each, equal};
    }
    return {kMinusInfinity, 0, 0};  // not reached: they weigh at least `need`
  }

  // And among many: they have one logit, or nearly.
  template <bool by_mass>
  Cut cut_of_sorted(const float* xs, const float* ws, std::int64_t size, std::int64_t need) {
    if (size <= kFew) return cut_of_few<by_mass>(xs, ws, size, need);
    std::vector<std::pair<float, float>>& sorted = s.sorted;
    sorted.resize(static_cast<std::size_t>(size));
    for (std::int64_t i = 0; i < size; ++i) sorted[i] = {xs[i], by_mass ? ws[i] : 1.0f};
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    for (std::int64_t i = 0; i < size;) {
      std::int64_t equal = 1;
      while (i + equal < size && sorted[i + equal].first == sorted[i].first) ++equal;
      const std::int64_t each = by_mass ? static_cast<std::int64_t>(sorted[i].second) : 1;
      if (each > 0 && each * equal >= need) return {sorted[i].first, (need + each - 1) / each, equal};
      need -= each * equal;
      i += equal;
    }
    return {kMinusInfinity, 0, 0};  // not reached: all that is left weighs at least `need`
  }
};

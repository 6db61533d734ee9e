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

// About the logit above which, or up to which, a sample weighs `weight`, but not below `low`.
template <class V, bool above>
float sample_quantile(const List& sample, std::int64_t sampled, float weight, float low, float high) {
  for (int step = 0; step < 12; ++step) {
    const float middle = static_cast<float>(0.5 * (double{low} + double{high}));
    const V at = V::set(middle);
    V sum = V::set(0);
    for (std::int64_t i = 0; i < sampled; i += V::width) {
      const Mask larger = greater(V::load(sample.x.data() + i), at);
      sum = sum + keep(above ? larger : opposite(larger), V::load(sample.w.data() + i));
    }
    (above == (sum.sum() >= weight) ? low : high) = middle;
  }
  return low;
}

// Looks for the cut among the listed tokens, which all have low < x <= high and weigh `list_weight`; nothing is sorted.
template <class V>
class CutSearch {
 public:
  CutSearch(Scratch& scratch, std::int64_t size, std::int64_t weight, float below, float top, float c)
      : s(scratch), num_listed(size), list_weight(weight), low(below), high(top), scale(c) {}

  // The cut that leaves `need` tokens, or tokens up to the one that brings their mass to `need`. The list is not changed.
  // Invariant: all of x, w have low < x <= high, and what is larger than high weighs `above` < need.
  template <bool by_mass>
  Cut find(std::int64_t need) {
    const float *xs = s.list.x.data(), *ws = s.list.w.data();
    List *from = nullptr, *to = &s.other;
    std::int64_t size = num_listed, above = 0;
    if (size > kMany) {
      const Bracket bracket = by_mass ? bracket_cut<true>(need) : bracket_cut<false>(need);
      if (bracket.found) {
        low = bracket.low, high = bracket.high;
        above = bracket.above, size = bracket.size;
        from = &s.other, to = &s.rest;
        xs = from->x.data(), ws = from->w.data();
      }
    }
    for (int step = 0; size > kFew; ++step) {
      float middle = static_cast<float>(0.5 * (double{low} + double{high}));
      if (by_mass && step == 0) middle = std::min(middle, low + 2 / scale);  // the list ends close below the cut
      if (step > 40) middle = middle_of_bits(low, high);  // logits that cluster around one value
      if (!(middle > low && middle < high)) break;
      List* rest = from == nullptr ? &s.rest : from;  // in place: it shrinks towards its start
      std::int64_t up = 0, down = 0;
      const std::int64_t heavier = by_mass ? partition<true>(xs, ws, size, middle, *to, *rest, up, down)
                                           : partition<false>(xs, ws, size, middle, *to, *rest, up, down);
      if (above + heavier >= need) {
        low = middle;
        from = to;
        to = rest;
        size = up;
      } else {
        high = middle;
        above += heavier;
        from = rest;
        size = down;
      }
      xs = from->x.data();
      ws = from->w.data();
    }
    return by_mass ? cut_of_sorted<true>(xs, ws, size, need - above) : cut_of_sorted<false>(xs, ws, size, need - above);
  }

 private:
  Scratch& s;
  const std::int64_t num_listed, list_weight;
  float low, high;
  const float scale;

  static constexpr std::int64_t kFew = 64, kMany = 1 << 14, kSample = 1 << 11;

  // A narrow interval (low, high] around the cut, guessed from a sample of the list and verified by one pass over it, which
  // leaves the tokens inside in s.other. Not found where the sample's mass is that of a few tokens.
  struct Bracket {
    bool found;
    float low, high;
    std::int64_t above, size;  // what is larger than high weighs, and the tokens inside
  };

  template <bool by_mass>
  Bracket bracket_cut(std::int64_t need) {
    const float *xs = s.list.x.data(), *ws = s.list.w.data();
    float *sample_x = s.rest.x.data(), *sample_w = s.rest.w.data();
    std::int64_t sampled = 0;
    const std::int64_t stride = num_listed / kSample * V::width;
    float weight = 0, square = 0;
    for (std::int64_t i = 0; i + V::width <= num_listed; i += stride, sampled += V::width) {
      V::load(xs + i).store(sample_x + sampled);
      const V w = by_mass ? V::load(ws + i) * V::set(0x1p-40f) : V::set(1);
      w.store(sample_w + sampled);
      weight += w.sum();
      square += (w * w).sum();
    }
    if (weight * weight < 400 * square) return {};
    const float share = static_cast<float>(static_cast<double>(need) / static_cast<double>(by_mass ? list_weight : num_listed));
    const float slack = 3 * std::sqrt(square) / weight;
    const float from = sample_quantile<V, true>(s.rest, sampled, (share + slack) * weight, low, high);
    const float to = sample_quantile<V, true>(s.rest, sampled, (share - slack) * weight, low, high);
    const V vlow = V::set(from), vhigh = V::set(to);
    float *to_x = s.other.x.data(), *to_w = s.other.w.data();
    std::int64_t size = 0, above = 0, inside = 0;
    for (std::int64_t begin = 0; begin < num_listed; begin += kExactSum) {
      WideSum sum_above = WideSum::zero(), sum_inside = WideSum::zero();
      const std::int64_t end = std::min(num_listed, begin + kExactSum);
      for (std::int64_t i = begin; i < end; i += V::width) {
        const V a = load_n<V>(xs + i, end - i);
        const Mask larger = greater(a, vhigh), between = both(greater(a, vlow), opposite(larger));
        if constexpr (by_mass) {
          const V w = load_n<V>(ws + i, end - i);
          sum_above.add(keep(larger, w));
          sum_inside.add(keep(between, w));
          compress(between, w, to_w + size);
        } else {
          above += count(larger);
        }
        size += compress(between, a, to_x + size);
      }
      if constexpr (by_mass) {
        above += static_cast<std::int64_t>(sum_above.total());
        inside += static_cast<std::int64_t>(sum_inside.total());
      }
    }
    if constexpr (!by_mass) inside = size;
    return {above < need && above + inside >= need, from, to, above, size};
  }

  static float middle_of_bits(float low, float high) {
    auto ordered = [](float f) { const std::int32_t i = std::bit_cast<std::int32_t>(f); return std::int64_t{i < 0 ? std::numeric_limits<std::int32_t>::min() - i : i}; };
    const std::int64_t middle = (ordered(low) + ordered(high)) >> 1;
    const std::int32_t i = static_cast<std::int32_t>(middle < 0 ? std::numeric_limits<std::int32_t>::min() - middle : middle);
    return std::bit_cast<float>(i);
  }

  // Splits into x > middle and the rest, both in order, and returns what the former weigh.
  template <bool by_mass>
  static std::int64_t partition(const float* xs, const float* ws, std::int64_t size, float middle, List& above, List& below,
                                std::int64_t& up, std::int64_t& down) {
    const V at = V::set(middle);
    float *above_x = above.x.data(), *above_w = above.w.data(), *below_x = below.x.data(), *below_w = below.w.data();
    std::int64_t weight = 0;
    for (std::int64_t begin = 0; begin < size; begin += kExactSum) {
      WideSum sum = WideSum::zero();
      const std::int64_t end = std::min(size, begin + kExactSum);
      std::int64_t i = begin;
      for (; i + V::width <= end; i += V::width) {
        const V a = V::load(xs + i);
        const Mask larger = greater(a, at), smaller = opposite(larger);
        if constexpr (by_mass) {
          const V w = V::load(ws + i);
          sum.add(keep(larger, w));
          compress(larger, w, above_w + up);
          compress(smaller, w, below_w + down);
        }
        up += compress(larger, a, above_x + up);
        down += compress(smaller, a, below_x + down);
      }
      double tail = 0;
      for (; i < end; ++i) {
        const float a = xs[i], w = by_mass ? ws[i] : 0.0f;
        if (a > middle) {
          above_x[up] = a, above_w[up++] = w;
          tail += double{w};
        } else {
          below_x[down] = a, below_w[down++] = w;
        }
      }
      if constexpr (by_mass) weight += static_cast<std::int64_t>(sum.total() + tail);
    }
    return by_mass ? weight : up;
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

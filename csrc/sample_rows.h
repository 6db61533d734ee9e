// The row kernels of sample, written once over `Vec` and compiled once per instruction set: this file is included
// inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard. "Step n" is the specification's.
//
// A mass is at most 2^40 and has at most 24 significant bits, so a float holds it exactly, and float64 any sum of 2^12
// of them: all arithmetic on masses is vector arithmetic without rounding. Nothing is sorted. A first pass leaves
// the maximum of every group of ids; filters then look only at groups that can matter, gather the tokens that can
// matter side by side, and narrow an interval of logits around the cut until it is one value.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kExactSum = 2048;  // elements whose masses float64 adds exactly, with room to spare

// Step 1.
template <class V>
struct MassOf {
  V largest, scale;
  MassOf(float max, float c) : largest(V::set(max)), scale(V::set(c)) {}
  // Several vectors in step: one alone is a chain of twenty dependent operations.
  template <int count>
  void replace(V (&x)[count]) const {
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

template <class V, class T>
inline void load_in_step(const T* p, std::int64_t n, V (&x)[kInStep]) {
  for (int i = 0; i < kInStep; ++i) {
    if (n >= (i + 1) * V::width) x[i] = V::load(p + i * V::width);
    else x[i] = n > i * V::width ? load_n<V>(p + i * V::width, n - i * V::width) : V::set(kMinusInfinity);
  }
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

// Where the order of step 2 is cut: `kept` of the `equal` tokens whose logit is x stay, and all with a larger one.
struct Cut {
  float x;
  std::int64_t kept, equal;
};

template <class V, class T>
class Row {
 public:
  // What is done to every logit is divided among the crew. Sums of masses are exact, so nothing depends on how.
  Row(Scratch& scratch, Crew& crew) : s(scratch), crew(crew) {}

  Fault prepare(const T* row, std::int64_t size, const RowParameters& parameters) {
    x = row;
    n = size;
    num_groups = (n + kGroup - 1) / kGroup;
    s.reserve(n, num_groups);
    find_maxima();
    if (!(largest < std::numeric_limits<float>::infinity() && largest > kMinusInfinity))
      return largest != largest ? Fault::nan : largest > 0 ? Fault::infinity : Fault::nothing;
    alone = parameters.top_k == 1 ? first_of_largest() : -1;
    if (alone >= 0) return Fault::none;
    scale = parameters.scale;
    min_mass = parameters.min_mass;
    listed = false;
    cut = {kMinusInfinity, 0, 0};
    tie_group = tie_id = n;
    const bool by_rank = parameters.top_k > 0 && parameters.top_k < n, by_mass = parameters.top_p < 1;
    if (by_rank) keep_leading(parameters.top_k);
    if (by_mass) keep_share(parameters.top_p);
    if (listed && cut.kept < cut.equal) find_last_tie();
    weigh_groups();
    return Fault::none;
  }

  std::pair<std::int64_t, float> draw(std::uint64_t seed, std::uint64_t position) {
    if (alone >= 0) return {alone, 0.0f};
    race_quotients(s.race_ids.data(), s.race_weights.data(), padded(num_racing), 1, seed, position, s.quotients.data());
    const std::int64_t group = s.race_ids[first_least(s.quotients.data(), num_racing)];
    alignas(64) std::uint32_t ids[kGroup];
    alignas(64) double weights[kGroup];
    const std::int64_t count = weigh_members(group, ids, weights);
    race_quotients(ids, weights, padded(count), 0, seed, position, s.quotients.data());
    const std::int64_t winner = first_least(s.quotients.data(), count);
    const Doubles logs = log2_of(Doubles{weights[winner], static_cast<double>(total)});
    return {ids[winner], static_cast<float>((logs[0] - logs[1]) * 0.6931471805599453)};
  }

 private:
  Scratch& s;
  Crew& crew;
  const T* x = nullptr;
  std::int64_t n = 0, num_groups = 0, num_racing = 0;
  float largest = 0, scale = 0, min_mass = 0;
  std::int64_t alone = -1;  // the only survivor, if that is known
  bool listed = false;      // whether the candidates stand in s.list, group by group
  float list_bound = 0;     // no listed logit is smaller
  std::int64_t num_listed = 0, total = 0;
  std::int64_t num_live = 0;  // of the groups in s.live; where each starts in the list stands in s.segments
  Cut cut{};
  std::int64_t tie_group = 0, tie_id = 0;  // the last token that stays at the cut

  static std::int64_t padded(std::int64_t count) { return (count + 15) / 16 * 16; }
  std::int64_t group_end(std::int64_t group) const { return std::min(n, (group + 1) * kGroup); }

  // In how many parts `groups` groups are best done: a thread is worth waking for 2^14 logits.
  std::int64_t parts_of(std::int64_t groups) const { return std::clamp<std::int64_t>(groups / 64, 1, crew.size()); }
  template <class Work>  // work(part, first group, last group + 1)
  void in_parts(std::int64_t parts, std::int64_t groups, const Work& work) {
    if (parts == 1) return work(0, std::int64_t{0}, groups);
    crew.run([&](std::int64_t part) {
      if (part < parts) work(part, part * groups / parts, (part + 1) * groups / parts);
    });
  }

  void find_maxima() {
    float tops[kMostThreads];
    const std::int64_t parts = parts_of(num_groups);
    in_parts(parts, num_groups, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
      tops[part] = group_maxima<V>(x + begin * kGroup, std::min(n, end * kGroup) - begin * kGroup, s.maxima.data() + begin);
    });
    largest = tops[0];
    for (std::int64_t part = 1; part < parts; ++part)
      if (!(tops[part] <= largest) && largest == largest) largest = tops[part];  // NaN stays
  }

  // The groups with a logit of at least `bound`; without a branch, for which of them these are cannot be foretold.
  void find_live(float bound) {
    std::int64_t found = 0;
    for (std::int64_t group = 0; group < num_groups; ++group) {
      s.live[found] = static_cast<std::int32_t>(group);
      found += !(s.maxima[group] < bound);
    }
    num_live = found;
  }

  std::int64_t first_of_largest() const {
    std::int64_t group = 0;
    while (s.maxima[group] != largest) ++group;
    const V top = V::set(largest);
    for (std::int64_t i = group * kGroup;; i += V::width)
      if (count(at_least(load_n<V>(x + i, n - i), top)) != 0)
        for (;; ++i)
          if (element(x + i) == largest) return i;
  }

  // No token below has a mass of `mass` (at least 1), with some room for rounding.
  float lowest_logit_of_mass(double mass) const {
    const double t = std::log2(std::max(mass, 1.0)) - 40.0 - 0.01;
    return static_cast<float>(std::max(largest + t / scale, -double{std::numeric_limits<float>::max()}));
  }

  // Gathers the tokens with x >= bound into the list, in order of id.
  void gather(float bound) {
    s.reserve_lists(n);
    list_bound = bound;
    const V vbound = V::set(bound);
    float* xs = s.list.x.data();
    std::int64_t at = 0;
    find_live(bound);
    for (std::int64_t place = 0; place < num_live; ++place) {
      const std::int64_t group = s.live[place];
      s.segments[place] = static_cast<std::int32_t>(at);
      for (std::int64_t i = group * kGroup, end = group_end(group); i < end; i += kInStep * V::width) {
        V a[kInStep];
        load_in_step(x + i, end - i, a);
        const V most = V::max(V::max(a[0], a[1]), V::max(a[2], a[3]));
        if (count(at_least(most, vbound)) == 0) continue;  // most often: few tokens of a live group are listed
        for (int j = 0; j < kInStep; ++j) at += compress(at_least(a[j], vbound), a[j], xs + at);
      }
    }
    s.segments[num_live] = static_cast<std::int32_t>(at);
    listed = true;
    num_listed = at;
  }

  void weigh_list() {
    const MassOf<V> mass(largest, scale);
    for (std::int64_t i = 0; i < num_listed; i += V::width) mass(V::load(s.list.x.data() + i)).store(s.list.w.data() + i);
    total = sum_of(s.list.w.data(), num_listed);
  }

  // The same with masses, and in the same pass the mass of all tokens, listed or not. Each part gathers into a stretch of
  // its own, which is then moved to where the one before it ends.
  void gather_and_weigh_all(float bound) {
    s.reserve_lists(n);
    list_bound = bound;
    find_live(lowest_logit_of_mass(1));
    std::int64_t from[kMostThreads], counts[kMostThreads], totals[kMostThreads];
    const std::int64_t parts = parts_of(num_live);
    in_parts(parts, num_live, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
      from[part] = begin * kGroup + part * kSlack;
      std::tie(counts[part], totals[part]) = gather_and_weigh(begin, end, from[part], bound);
    });
    num_listed = total = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
      for (std::vector<float>* each : {&s.list.x, &s.list.w})
        std::memmove(each->data() + num_listed, each->data() + from[part], counts[part] * sizeof(float));
      for (std::int64_t place = part * num_live / parts; place < (part + 1) * num_live / parts; ++place)
        s.segments[place] += static_cast<std::int32_t>(num_listed - from[part]);
      num_listed += counts[part];
      total += totals[part];
    }
    s.segments[num_live] = static_cast<std::int32_t>(num_listed);
    listed = true;
  }

  // Lists from `first` on what the live groups [begin, end) hold: how many tokens, and the mass of all, listed or not.
  std::pair<std::int64_t, std::int64_t> gather_and_weigh(std::int64_t begin, std::int64_t end, std::int64_t first, float bound) {
    const V vbound = V::set(bound);
    const MassOf<V> mass(largest, scale);
    float *xs = s.list.x.data(), *ws = s.list.w.data();
    std::int64_t at = first, weight = 0;
    for (std::int64_t place = begin; place < end; ++place) {
      s.segments[place] = static_cast<std::int32_t>(at);
      WideSum sum = WideSum::zero();
      for (std::int64_t i = s.live[place] * kGroup, last = group_end(s.live[place]); i < last; i += kInStep * V::width) {
        V a[kInStep], w[kInStep];
        load_in_step(x + i, last - i, a);
        for (int j = 0; j < kInStep; ++j) w[j] = a[j];
        mass.replace(w);
        for (int j = 0; j < kInStep; ++j) {
          const Mask stays = at_least(a[j], vbound);
          sum.add(w[j]);
          compress(stays, w[j], ws + at);
          at += compress(stays, a[j], xs + at);
        }
      }
      weight += static_cast<std::int64_t>(sum.total());
    }
    return {at - first, weight};
  }

  static std::int64_t sum_of(const float* ws, std::int64_t count) {
    std::int64_t sum = 0;
    for (std::int64_t begin = 0; begin < count; begin += kExactSum) {
      WideSum part = WideSum::zero();
      const std::int64_t end = std::min(count, begin + kExactSum);
      for (std::int64_t i = begin; i < end; i += V::width) part.add(keep(greater(load_n<V>(ws + i, end - i), V::set(0)), load_n<V>(ws + i, end - i)));
      sum += static_cast<std::int64_t>(part.total());
    }
    return sum;
  }

  void keep_leading(std::int64_t k) {
    const float no_mass_below = lowest_logit_of_mass(1);
    float bound;
    if (k <= num_groups) {  // k tokens are as large as the k-th largest of the groups' maxima
      bound = bound_of_leading(s.maxima.data(), num_groups, no_mass_below, k);
    } else {  // a guess from one vector of each group
      s.reserve_lists(n);
      std::int64_t sampled = 0;
      for (std::int64_t i = 0; i + V::width <= n; i += kGroup, sampled += V::width) V::load(x + i).store(s.other.x.data() + sampled);
      const double expected = static_cast<double>(k) * static_cast<double>(sampled) / static_cast<double>(n);
      const std::int64_t enough = static_cast<std::int64_t>(expected + 4 * std::sqrt(expected) + 4);
      bound = bound_of_leading(s.other.x.data(), sampled, no_mass_below, enough);
    }
    gather(bound);
    if (num_listed < k && bound > no_mass_below) gather(bound = no_mass_below);
    if (num_listed > k) {
      cut = find_cut<false>(k);
      drop_below_cut();
    } else {  // whatever is not listed has no mass or is not among the first k
      cut = {bound, 0, 0};
    }
    weigh_list();
    if (cut.kept < cut.equal) {
      float w[V::width];
      MassOf<V>(largest, scale)(V::set(cut.x)).store(w);
      total -= (cut.equal - cut.kept) * static_cast<std::int64_t>(w[0]);
    }
  }

  // A value that at least k of these reach, and not many more; `low` if they are not that many.
  float bound_of_leading(const float* values, std::int64_t size, float low, std::int64_t k) const {
    float high = largest;
    for (int step = 0; step < 20; ++step) {
      const float middle = static_cast<float>(0.5 * (double{low} + double{high}));
      if (!(middle > low && middle < high)) break;
      const V at = V::set(middle);
      std::int64_t reached = 0;
      for (std::int64_t i = 0; i < size; i += V::width) reached += count(at_least(load_n<V>(values + i, size - i), at));
      (reached >= k ? low : high) = middle;
      if (reached >= k && reached <= k + k / 4) break;
    }
    return low;
  }

  // Removes what is smaller than the cut from the list. Equal ones stay, those too that top-k does not keep: they come
  // last in the order, so a share of the true total never reaches them.
  void drop_below_cut() {
    const V at_cut = V::set(cut.x);
    float* xs = s.list.x.data();
    std::int64_t to = 0, begin = 0;
    for (std::int64_t place = 0; place < num_live; ++place) {
      const std::int64_t end = s.segments[place + 1];
      s.segments[place] = static_cast<std::int32_t>(to);
      for (std::int64_t i = begin; i < end; i += V::width) {  // to <= i: what is overwritten has been read
        const V a = load_n<V>(xs + i, end - i);
        const Mask stays = at_least(a, at_cut);
        if (to + V::width <= end) {
          to += compress(stays, a, xs + to);
          continue;
        }
        float kept[V::width];  // a whole vector at `to` would reach into the next group
        const int num_kept = compress(stays, a, kept);
        std::copy_n(kept, num_kept, xs + to);
        to += num_kept;
      }
      begin = end;
    }
    s.segments[num_live] = static_cast<std::int32_t>(to);
    num_listed = to;
    list_bound = cut.x;
  }

  void keep_share(double p) {
    if (!listed) {
      const double least = mass_of_maxima();
      // Tokens whose mass is less than an n-th of the share to be dropped, less one, are surely dropped: all of them weigh
      // less than (1 - p) total - n, so the others reach `need`. The sum of the groups' maxima stands in for the total,
      // which is larger.
      const float sure = lowest_logit_of_mass((1 - p) * least / static_cast<double>(n) - 1);
      gather_and_weigh_all(num_groups < kSampledGroups ? sure : std::max(sure, likely_bound(p, least, sure)));
      if (list_bound > sure && sum_of(s.list.w.data(), num_listed) < share_of(total, p)) gather_and_weigh_all(sure);
    }
    cut = find_cut<true>(share_of(total, p));
  }

  static std::int64_t share_of(std::int64_t total, double p) {
    return std::min(total, std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(static_cast<double>(total) * p))));
  }

  double mass_of_maxima() const {
    const MassOf<V> mass(largest, scale);
    double sum = 0;
    for (std::int64_t group = 0; group < num_groups; group += V::width) {
      WideSum part = WideSum::zero();
      part.add(mass(load_n<V>(s.maxima.data() + group, num_groups - group)));
      sum += part.total();
    }
    return sum;
  }

  // What is below it probably weighs less than the share to be dropped, and not much less: a vector of some 200 groups is
  // looked at. A few tokens make most of the mass, and are hardly met in a sample; but they are maxima of their groups, which
  // weigh `least`. It is `low` where few are larger than that.
  float likely_bound(double p, double least, float low) {
    s.reserve_lists(n);
    const MassOf<V> mass(largest, scale);
    float *sample_x = s.rest.x.data(), *sample_w = s.rest.w.data();
    std::int64_t sampled = 0, larger = 0;
    V others = V::set(0);
    for (std::int64_t i = 0; i + V::width <= n; i += std::max<std::int64_t>(1, num_groups / 200) * kGroup, sampled += V::width) {
      const V a = V::load(x + i), w = mass(a) * V::set(0x1p-40f);
      larger += count(greater(a, V::set(low)));
      a.store(sample_x + sampled);
      w.store(sample_w + sampled);
      others = others + keep(greater(V::set(s.maxima[i / kGroup]), a), w);
    }
    if (16 * larger < sampled) return low;
    const double each = static_cast<double>(n) / static_cast<double>(sampled);
    const double dropped = 0.7 * (1 - p) * (least * 0x1p-40 + others.sum() * each);
    return sample_quantile<false>(static_cast<float>(dropped / each), sampled, low);
  }

  // The cut that leaves `need` tokens, or tokens up to the one that brings their mass to `need`. The list is not changed.
  // Invariant: all of x, w have low < x <= high, and what is larger than high weighs `above` < need.
  template <bool by_mass>
  Cut find_cut(std::int64_t need) {
    const float *xs = s.list.x.data(), *ws = s.list.w.data();
    List *from = nullptr, *to = &s.other;
    std::int64_t size = num_listed, above = 0;
    float low = std::nextafter(list_bound, kMinusInfinity), high = largest;
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

  static constexpr std::int64_t kFew = 64, kMany = 1 << 14, kSample = 1 << 11, kSampledGroups = 64;

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
    const float share = static_cast<float>(static_cast<double>(need) / static_cast<double>(by_mass ? total : num_listed));
    const float slack = 3 * std::sqrt(square) / weight;
    const float lowest = std::nextafter(list_bound, kMinusInfinity);
    const float low = sample_quantile<true>((share + slack) * weight, sampled, lowest);
    const float high = sample_quantile<true>((share - slack) * weight, sampled, lowest);
    const V vlow = V::set(low), vhigh = V::set(high);
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
    return {above < need && above + inside >= need, low, high, above, size};
  }

  // About the logit above which, or up to which, the sample in s.rest weighs `weight`, but not below `low`.
  template <bool above>
  float sample_quantile(float weight, std::int64_t sampled, float low) const {
    float high = largest;
    for (int step = 0; step < 12; ++step) {
      const float middle = static_cast<float>(0.5 * (double{low} + double{high}));
      const V at = V::set(middle);
      V sum = V::set(0);
      for (std::int64_t i = 0; i < sampled; i += V::width) {
        const Mask larger = greater(V::load(s.rest.x.data() + i), at);
        sum = sum + keep(above ? larger : opposite(larger), V::load(s.rest.w.data() + i));
      }
      (above == (sum.sum() >= weight) ? low : high) = middle;
    }
    return low;
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

  // Of the tokens equal to the cut only the first `kept` stay: the group and the id of the last of them.
  void find_last_tie() {
    std::int64_t left = cut.kept;
    const V at = V::set(cut.x);
    for (tie_group = 0;; ++tie_group) {
      std::int64_t here = 0;
      if (s.maxima[tie_group] >= cut.x)
        for (std::int64_t i = tie_group * kGroup, end = group_end(tie_group); i < end; i += V::width) {
          const V a = load_n<V>(x + i, end - i);
          here += count(both(at_least(a, at), at_least(at, a)));
        }
      if (here >= left) break;
      left -= here;
    }
    for (tie_id = tie_group * kGroup;; ++tie_id)
      if (element(x + tie_id) == cut.x && --left == 0) return;
  }

  // The groups that race: ids and masses of those with survivors, and the survivors' total.
  void weigh_groups() {
    if (!listed) find_live(std::max(cut.x, lowest_logit_of_mass(min_mass)));
    in_parts(listed && num_listed < kMany / 4 ? 1 : parts_of(num_live), num_live, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t place = begin; place < end; ++place)
        s.race_weights[place] = s.live[place] == tie_group ? weigh_tie_group() : listed ? weigh_listed(place) : weigh_group(s.live[place]);
    });
    num_racing = 0;
    total = 0;
    for (std::int64_t place = 0; place < num_live; ++place) {
      const double weight = s.race_weights[place];
      s.race_ids[num_racing] = static_cast<std::uint32_t>(s.live[place]);
      s.race_weights[num_racing] = weight;
      num_racing += weight > 0;
      total += static_cast<std::int64_t>(weight);
    }
    pad(s.race_ids.data(), s.race_weights.data(), num_racing);
  }

  double weigh_group(std::int64_t group) const {
    const MassOf<V> mass(largest, scale);
    const V vmin = V::set(std::max(min_mass, 1.0f));
    WideSum sum = WideSum::zero();
    for (std::int64_t i = group * kGroup, end = group_end(group); i < end; i += kInStep * V::width) {
      V w[kInStep];
      load_in_step(x + i, end - i, w);
      mass.replace(w);
      for (int j = 0; j < kInStep; ++j) sum.add(keep(at_least(w[j], vmin), w[j]));
    }
    return sum.total();
  }

  double weigh_listed(std::int64_t place) const {
    const float *xs = s.list.x.data(), *ws = s.list.w.data();
    const V vmin = V::set(std::max(min_mass, 1.0f)), vcut = V::set(cut.x);
    const bool ties_stay = s.live[place] < tie_group;
    WideSum sum = WideSum::zero();
    for (std::int64_t i = s.segments[place], end = s.segments[place + 1]; i < end; i += V::width) {
      const V a = load_n<V>(xs + i, end - i), w = load_n<V>(ws + i, end - i);
      const Mask beyond = ties_stay ? at_least(a, vcut) : greater(a, vcut);
      sum.add(keep(both(beyond, at_least(w, vmin)), w));
    }
    return sum.total();
  }

  double weigh_tie_group() const {
    alignas(64) std::uint32_t ids[kGroup];
    alignas(64) double weights[kGroup];
    double weight = 0;
    for (std::int64_t i = weigh_members(tie_group, ids, weights); i-- > 0;) weight += weights[i];
    return weight;
  }

  // The survivors of one group, padded for the race.
  std::int64_t weigh_members(std::int64_t group, std::uint32_t* ids, double* weights) const {
    const MassOf<V> mass(largest, scale);
    const float floor_mass = std::max(min_mass, 1.0f);
    std::int64_t count = 0;
    for (std::int64_t i = group * kGroup, end = group_end(group); i < end; i += V::width) {
      const V a = load_n<V>(x + i, end - i);
      float logit[V::width], w[V::width];
      a.store(logit);
      mass(a).store(w);
      const int lanes = static_cast<int>(std::min<std::int64_t>(V::width, end - i));
      for (int lane = 0; lane < lanes; ++lane) {
        ids[count] = static_cast<std::uint32_t>(i + lane);
        weights[count] = double{w[lane]};
        count += w[lane] >= floor_mass && (logit[lane] > cut.x || (logit[lane] == cut.x && i + lane <= tie_id));
      }
    }
    pad(ids, weights, count);
    return count;
  }

  static void pad(std::uint32_t* ids, double* weights, std::int64_t count) {
    for (std::int64_t i = count; i < padded(count); ++i) ids[i] = 0, weights[i] = 0;
  }
};

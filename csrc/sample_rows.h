// The row kernels of sample, written once over `Vec` and compiled once per instruction set: this file is included
// inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard. "Step n" is the specification's.
//
// A mass is at most 2^40 and has at most 24 significant bits, so a float holds it exactly, and float64 any sum of 2^12
// of them: all arithmetic on masses is vector arithmetic without rounding. Nothing is sorted. A first pass leaves
// the maximum of every group of ids; filters then look only at groups that can matter, gather the tokens that can
// matter side by side, and narrow an interval of logits around the cut until it is one value.

#include "sample_masses.h"
#include "sample_race.h"
#include "sample_cut.h"

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
  static constexpr std::int64_t kSampledGroups = 64, kManyListed = 1 << 12;
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
    total = sum_of<V>(s.list.w.data(), num_listed);
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

  CutSearch<V> search_list() { return {s, num_listed, total, std::nextafter(list_bound, kMinusInfinity), largest, scale}; }

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
      cut = search_list().template find<false>(k);
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
      if (list_bound > sure && sum_of<V>(s.list.w.data(), num_listed) < share_of(total, p)) gather_and_weigh_all(sure);
    }
    cut = search_list().template find<true>(share_of(total, p));
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
    return sample_quantile<V, false>(s.rest, sampled, static_cast<float>(dropped / each), low, largest);
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
    in_parts(listed && num_listed < kManyListed ? 1 : parts_of(num_live), num_live, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
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

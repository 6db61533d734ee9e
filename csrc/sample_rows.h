// The row kernels of sample, written once over `Vec` and compiled once per instruction set: this file is included
// inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard. "Step n" is the specification's.
//
// A mass is at most 2^40 and has at most 24 significant bits, so a float holds it exactly, and float64 any sum of 2^12
// of them: all arithmetic on masses is vector arithmetic without rounding. The row is not sorted. A first pass leaves
// the maximum of every group of ids; filters then look only at groups that can matter, list the tokens that can
// matter side by side, and narrow an interval of logits around the cut until it is one value. What is larger than the
// listed tokens is only summed, and a list of few tokens is ranked at once.

#include "sample_masses.h"
#include "sample_race.h"
#include "sample_cut.h"
#include "sample_few.h"

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
    std::fill_n(s.maxima.begin() + num_groups, kPad, kMinusInfinity);
    scale = parameters.scale;
    min_mass = parameters.min_mass;
    listed = false;
    cut = {kMinusInfinity, 0, 0};
    tie_group = tie_id = n;
    s.few.count = 0;
    const std::int64_t k = parameters.top_k < n ? parameters.top_k : 0;
    if (k > 1 && k <= std::min(kFewLeading, num_groups)) find_maxima_and_leading(k);
    else find_maxima();
    if (!is_finite(largest)) return largest != largest ? Fault::nan : largest > 0 ? Fault::infinity : Fault::nothing;
    alone = parameters.top_k == 1 ? first_of_largest() : -1;
    if (alone >= 0) return Fault::none;
    if (k > 0) {
      if (!listed) gather_leading(k);
      if (k <= kFewLeading && num_listed <= kMostFew) {
        keep_few(k, parameters.top_p);
        return Fault::none;
      }
      keep_leading(k);
    }
    if (parameters.top_p < 1) keep_share(parameters.top_p);
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
    const std::int64_t count = s.few.count > 0 ? find_few(group, ids, weights) : weigh_members(group, ids, weights);
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
  float list_bound = 0, list_top = 0;  // of the listed logits none is smaller or larger
  std::int64_t num_listed = 0, total = 0;
  std::int64_t list_weight = 0, above_weight = 0;  // masses of what is listed, and of what is larger and therefore is not
  std::int64_t num_live = 0;  // of the groups in s.live; where each starts in the list stands in s.segments
  Cut cut{};
  std::int64_t tie_group = 0, tie_id = 0;  // the last token that stays at the cut

  static constexpr std::int64_t kSampledGroups = 64, kManyListed = 1 << 12, kFewLeading = 128;

  // What one thread lists: stretches of s.list, and of s.live and what stands beside it.
  struct Part {
    std::int64_t first, num_listed, first_live, num_live;
    std::int64_t weight, list_weight, above_weight;
  };
  std::array<Part, kMostThreads> stretches;

  static bool is_finite(float top) { return top < std::numeric_limits<float>::infinity() && top > kMinusInfinity; }
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
  // The same with two works: nobody begins the second before everybody has done the first.
  template <class First, class Second>
  void in_two_steps(std::int64_t parts, std::int64_t groups, const First& first, const Second& second) {
    if (parts == 1) return first(0, std::int64_t{0}, groups), second(0, std::int64_t{0}, groups);
    crew.run([&](std::int64_t part) {
      const std::int64_t begin = part * groups / parts, end = (part + 1) * groups / parts;
      if (part < parts) first(part, begin, end);
      crew.meet();
      if (part < parts) second(part, begin, end);
    });
  }

  void find_maxima() {
    std::array<float, kMostThreads> tops;
    const std::int64_t parts = parts_of(num_groups);
    in_parts(parts, num_groups, [&](std::int64_t part, std::int64_t begin, std::int64_t end) { tops[part] = maxima_of(begin, end); });
    largest = largest_of(tops, parts);
  }

  // Each thread lists from the groups that it has just read, as soon as everybody's maxima are known.
  void find_maxima_and_leading(std::int64_t k) {
    std::array<float, kMostThreads> tops, bounds;
    s.reserve_lists(n);
    const std::int64_t parts = parts_of(num_groups);
    auto maxima = [&](std::int64_t part, std::int64_t begin, std::int64_t end) { tops[part] = maxima_of(begin, end); };
    auto leading = [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
      const float top = largest_of(tops, parts);
      if (!is_finite(top)) return;
      // k tokens are as large as the k-th largest of the groups' maxima; whatever is smaller than `low` has no mass.
      const float low = lowest_logit_of_mass(1, top, scale);
      bounds[part] = bound_of_leading(s.maxima.data(), num_groups, low, top, k);
      gather_part<true>(part, begin, end, bounds[part]);
    };
    in_two_steps(parts, num_groups, maxima, leading);
    largest = largest_of(tops, parts);
    if (is_finite(largest)) join<true>(parts, bounds[0]);
  }

  float maxima_of(std::int64_t begin, std::int64_t end) {
    return group_maxima<V>(x + begin * kGroup, std::min(n, end * kGroup) - begin * kGroup, s.maxima.data() + begin);
  }

  static float largest_of(const std::array<float, kMostThreads>& tops, std::int64_t parts) {
    float top = tops[0];
    for (std::int64_t part = 1; part < parts; ++part)
      if (!(tops[part] <= top) && top == top) top = tops[part];  // NaN stays
    return top;
  }

  // Those of the groups with a logit of at least `bound`, from s.live[begin] on: how many. Without a branch, for which of
  // them these are cannot be foretold.
  std::int64_t find_live(std::int64_t begin, std::int64_t end, float bound) {
    std::int64_t found = begin;
    for (std::int64_t group = begin; group < end; ++group) {
      s.live[found] = static_cast<std::int32_t>(group);
      found += !(s.maxima[group] < bound);
    }
    return found - begin;
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
  static float lowest_logit_of_mass(double mass, float largest, float scale) {
    const double t = std::log2(std::max(mass, 1.0)) - 40.0 - 0.01;
    return static_cast<float>(std::max(largest + t / scale, -double{std::numeric_limits<float>::max()}));
  }
  float lowest_logit_of_mass(double mass) const { return lowest_logit_of_mass(mass, largest, scale); }

  void prefetch_group(std::int64_t group) const {
    for (std::int64_t i = group * kGroup, last = group_end(group); i < last; i += 64 / sizeof(T)) __builtin_prefetch(x + i);
  }

  // Lists the tokens of the groups [begin, end) with x >= bound, in order of id, and where in its group each stands.
  template <bool with_places>
  void gather_part(std::int64_t part, std::int64_t begin, std::int64_t end, float bound) {
    const V vbound = V::set(bound);
    float *xs = s.list.x.data(), *places = s.list.w.data();
    const std::int64_t first = begin * kGroup + part * kSlack, num_live = find_live(begin, end, bound);
    std::int64_t at = first;
    for (std::int64_t place = begin; place < begin + num_live; ++place) {
      const std::int64_t start = s.live[place] * kGroup, last = group_end(s.live[place]);
      s.segments[place] = static_cast<std::int32_t>(at);
      s.race_weights[place] = 0;
      if (place + 1 < begin + num_live) prefetch_group(s.live[place + 1]);
      for (std::int64_t i = start; i < last; i += kInStep * V::width) {
        V a[kInStep];
        load_in_step(x + i, last - i, a);
        const V most = V::max(V::max(a[0], a[1]), V::max(a[2], a[3]));
        if (count(at_least(most, vbound)) == 0) continue;  // most often: few tokens of a live group are listed
        for (int j = 0; j < kInStep; ++j) {
          const Mask stays = at_least(a[j], vbound);
          if (with_places) compress(stays, lanes_from<V>(static_cast<float>(i - start + j * V::width)), places + at);
          at += compress(stays, a[j], xs + at);
        }
      }
    }
    stretches[part] = {first, at - first, begin, num_live, 0, 0, 0};
  }

  // Puts what the parts have listed side by side.
  template <bool with_w>
  void join(std::int64_t parts, float bound) {
    listed = true;
    list_bound = bound;
    list_top = largest;
    num_listed = num_live = total = list_weight = above_weight = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
      const Part& from = stretches[part];
      std::memmove(s.list.x.data() + num_listed, s.list.x.data() + from.first, from.num_listed * sizeof(float));
      if (with_w) std::memmove(s.list.w.data() + num_listed, s.list.w.data() + from.first, from.num_listed * sizeof(float));
      for (std::int64_t i = 0; i < from.num_live; ++i) {
        s.live[num_live + i] = s.live[from.first_live + i];
        s.segments[num_live + i] = s.segments[from.first_live + i] + static_cast<std::int32_t>(num_listed - from.first);
        s.race_weights[num_live + i] = s.race_weights[from.first_live + i];
      }
      num_listed += from.num_listed;
      num_live += from.num_live;
      total += from.weight;
      list_weight += from.list_weight;
      above_weight += from.above_weight;
    }
    s.segments[num_live] = static_cast<std::int32_t>(num_listed);
  }

  template <bool with_places>
  void gather(float bound) {
    s.reserve_lists(n);
    const std::int64_t parts = parts_of(num_groups);
    in_parts(parts, num_groups, [&](std::int64_t part, std::int64_t begin, std::int64_t end) { gather_part<with_places>(part, begin, end, bound); });
    join<with_places>(parts, bound);
  }

  // Lists at least the first k tokens, or all that have a mass.
  void gather_leading(std::int64_t k) {
    const float no_mass_below = lowest_logit_of_mass(1);
    float bound;
    if (k <= num_groups) {
      bound = bound_of_leading(s.maxima.data(), num_groups, no_mass_below, largest, k);
    } else {  // a guess from one vector of each group
      s.reserve_lists(n);
      std::int64_t sampled = 0;
      for (std::int64_t i = 0; i + V::width <= n; i += kGroup, sampled += V::width) V::load(x + i).store(s.other.x.data() + sampled);
      const double expected = static_cast<double>(k) * static_cast<double>(sampled) / static_cast<double>(n);
      const std::int64_t enough = static_cast<std::int64_t>(expected + 4 * std::sqrt(expected) + 4);
      bound = bound_of_leading(s.other.x.data(), sampled, no_mass_below, largest, enough);
    }
    const auto list = [&](float from) { k <= kFewLeading ? gather<true>(from) : gather<false>(from); };
    list(bound);
    if (num_listed < k && bound > no_mass_below) list(no_mass_below);
  }

  void keep_leading(std::int64_t k) {
    if (num_listed > k) {
      cut = search_list().template find<false>(k);
      drop_below_cut();
    } else {  // whatever is not listed has no mass or is not among the first k
      cut = {list_bound, 0, 0};
    }
    const MassOf<V> mass(largest, scale);
    for (std::int64_t i = 0; i < num_listed; i += V::width) mass(V::load(s.list.x.data() + i)).store(s.list.w.data() + i);
    total = sum_of<V>(s.list.w.data(), num_listed);
    if (cut.kept < cut.equal) {
      float w[V::width];
      mass(V::set(cut.x)).store(w);
      total -= (cut.equal - cut.kept) * static_cast<std::int64_t>(w[0]);
    }
  }

  CutSearch<V> search_list() { return {s, num_listed, std::nextafter(list_bound, kMinusInfinity), list_top, scale}; }

  // A value that at least k of these reach, and not many more; `low` if they are not that many. -inf fills the last vector.
  static float bound_of_leading(const float* values, std::int64_t size, float low, float high, std::int64_t k) {
    for (int step = 0; step < 20; ++step) {
      const float middle = static_cast<float>(0.5 * (double{low} + double{high}));
      if (!(middle > low && middle < high)) break;
      const V at = V::set(middle);
      std::int64_t reached = 0;
      for (std::int64_t i = 0; i < size; i += V::width) reached += count(at_least(V::load(values + i), at));
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
        const V a = V::load(xs + i);
        const Mask stays = both(at_least(a, at_cut), lanes_below<V>(end - i));
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
      const Span sure{lowest_logit_of_mass((1 - p) * least / static_cast<double>(n) - 1), largest};
      const Span likely = num_groups < kSampledGroups ? sure : likely_span(p, least, sure.low);
      weigh_and_list(likely);
      const std::int64_t need = share_of(total, p);
      if (!(above_weight < need && above_weight + list_weight >= need)) weigh_and_list(sure);
    }
    cut = search_list().template find<true>(share_of(total, p) - above_weight);
  }

  // Logits low <= x <= high, among which the cut is looked for.
  struct Span {
    float low, high;
  };

  void weigh_and_list(Span span) {
    s.reserve_lists(n);
    const std::int64_t parts = parts_of(num_groups);
    in_parts(parts, num_groups, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
      span.high < largest ? weigh_part<true>(part, begin, end, span) : weigh_part<false>(part, begin, end, span);
    });
    join<true>(parts, span.low);
    list_top = span.high;
  }

  // Masses of the tokens of the groups [begin, end): those inside the span are listed; of those above it the sum is
  // left for each group, and of all of them one sum.
  template <bool with_above>
  void weigh_part(std::int64_t part, std::int64_t begin, std::int64_t end, Span span) {
    const V low = V::set(span.low), high = V::set(span.high);
    const MassOf<V> mass(largest, scale);
    float *xs = s.list.x.data(), *ws = s.list.w.data();
    const std::int64_t first = begin * kGroup + part * kSlack, num_live = find_live(begin, end, lowest_logit_of_mass(1));
    std::int64_t at = first, weight = 0, above_weight = 0;
    for (std::int64_t place = begin; place < begin + num_live; ++place) {
      s.segments[place] = static_cast<std::int32_t>(at);
      WideSum all = WideSum::zero(), above = WideSum::zero();
      for (std::int64_t i = s.live[place] * kGroup, last = group_end(s.live[place]); i < last; i += kInStep * V::width) {
        V a[kInStep], w[kInStep];
        load_in_step(x + i, last - i, a);
        for (int j = 0; j < kInStep; ++j) w[j] = a[j];
        mass.replace(w);
        for (int j = 0; j < kInStep; ++j) {
          Mask stays = at_least(a[j], low);
          all.add(w[j]);
          if constexpr (with_above) {
            const Mask larger = greater(a[j], high);
            above.add(keep(larger, w[j]));
            stays = both(stays, opposite(larger));
          }
          at += compress(stays, a[j], xs + at);
        }
      }
      weight += static_cast<std::int64_t>(all.total());
      s.race_weights[place] = with_above ? above.total() : 0.0;
      above_weight += static_cast<std::int64_t>(s.race_weights[place]);
    }
    for (std::int64_t i = first; i < at; i += kInStep * V::width) {  // few: cheaper than moving all masses together
      V w[kInStep];
      load_in_step(xs + i, at - i, w);
      mass.replace(w);
      for (int j = 0; j < kInStep && i + j * V::width < at; ++j) w[j].store(ws + i + j * V::width);
    }
    stretches[part] = {first, at - first, begin, num_live, weight, sum_of<V>(ws + first, at - first), above_weight};
  }

  static std::int64_t share_of(std::int64_t total, double p) {
    return std::min(total, std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(static_cast<double>(total) * p))));
  }

  double mass_of_maxima() const {
    const MassOf<V> mass(largest, scale);
    double sum = 0;
    for (std::int64_t group = 0; group < num_groups; group += V::width) {
      WideSum part = WideSum::zero();
      part.add(mass(V::load(s.maxima.data() + group)));
      sum += part.total();
    }
    return sum;
  }

  // Where the cut probably lies, by a vector of some 200 groups. Where the mass is spread over many tokens these tell its share
  // above each logit well enough to bound the cut from both sides. Where a few tokens make most of it these are hardly met;
  // but they are maxima of their groups, which weigh `least`: then what is below `low` probably weighs less than the share
  // to be dropped, and not much less. `low` stays where few are larger than that.
  Span likely_span(double p, double least, float low) {
    s.reserve_lists(n);
    const MassOf<V> mass(largest, scale);
    float *sample_x = s.other.x.data(), *sample_w = s.other.w.data();
    std::int64_t sampled = 0, larger = 0;
    V others = V::set(0), all = V::set(0), squares = V::set(0);
    for (std::int64_t i = 0; i + V::width <= n; i += std::max<std::int64_t>(1, num_groups / 200) * kGroup, sampled += V::width) {
      const V a = V::load(x + i), w = mass(a) * V::set(0x1p-40f);
      larger += count(greater(a, V::set(low)));
      a.store(sample_x + sampled);
      w.store(sample_w + sampled);
      all = all + w;
      squares = squares + w * w;
      others = others + keep(greater(V::set(s.maxima[i / kGroup]), a), w);
    }
    if (16 * larger < sampled) return {low, largest};
    const float weight = all.sum(), deviation = std::sqrt(squares.sum()) / weight;
    if (deviation < 0.05f && min_mass <= 1) {  // a min-p would have to be asked of every token above the span
      const float share = static_cast<float>(p), slack = sample_slack(share, deviation);
      const float from = sample_quantile<V, true>(s.other, sampled, (share + slack) * weight, low, largest);
      return {from, share > slack ? sample_quantile<V, true>(s.other, sampled, (share - slack) * weight, low, largest) : largest};
    }
    const double each = static_cast<double>(n) / static_cast<double>(sampled);
    const double dropped = 0.7 * (1 - p) * (least * 0x1p-40 + others.sum() * each);
    return {sample_quantile<V, false>(s.other, sampled, static_cast<float>(dropped / each), low, largest), largest};
  }

  // Of the tokens equal to the cut only the first `kept` stay: the group and the id of the last of them.
  void find_last_tie() {
    const float* xs = s.list.x.data();
    const V at = V::set(cut.x);
    std::int64_t left = cut.kept, i = 0;
    for (int here; (here = count(both(at_least(V::load(xs + i), at), at_least(at, V::load(xs + i))))) < left; i += V::width) left -= here;
    while (xs[i] != cut.x || --left > 0) ++i;
    const auto place = std::upper_bound(s.segments.begin(), s.segments.begin() + num_live, i) - s.segments.begin() - 1;
    tie_group = s.live[place];
    left = std::count(xs + s.segments[place], xs + i + 1, cut.x);
    tie_id = tie_group * kGroup;
    while (element(x + tie_id) != cut.x || --left > 0) ++tie_id;
  }

  // The groups that race: ids and masses of those with survivors, and the survivors' total.
  void weigh_groups() {
    if (!listed) num_live = find_live(0, num_groups, lowest_logit_of_mass(min_mass));
    in_parts(listed && num_listed < kManyListed ? 1 : parts_of(num_live), num_live, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t place = begin; place < end; ++place)
        s.race_weights[place] = s.live[place] == tie_group ? weigh_tie_group() : listed ? s.race_weights[place] + weigh_listed(place) : weigh_group(s.live[place]);
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
      const V a = V::load(xs + i), w = V::load(ws + i);
      const Mask beyond = both(ties_stay ? at_least(a, vcut) : greater(a, vcut), lanes_below<V>(end - i));
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

  // All of step 2 for a list of at most kMostFew tokens, by their ranks.
  void keep_few(std::int64_t k, double p) {
    alignas(64) float ranks[kMostFew + kSlack], masses[kMostFew + kSlack], in_order[kMostFew];
    const MassOf<V> mass(largest, scale);
    float* xs = s.list.x.data();
    V::set(kMinusInfinity).store(xs + num_listed);
    rank_all<V>(xs, num_listed, ranks);
    for (std::int64_t i = 0; i < num_listed; i += V::width) mass(V::load(xs + i)).store(masses + i);
    for (std::int64_t i = 0; i < num_listed; ++i) in_order[static_cast<int>(ranks[i])] = masses[i];
    std::int64_t kept = std::min(k, num_listed);
    if (p < 1) kept = leading_share(in_order, kept, p);
    const float floor_mass = std::max(min_mass, 1.0f);
    std::int64_t count = 0;
    for (std::int64_t place = 0; place < num_live; ++place)
      for (std::int64_t i = s.segments[place]; i < s.segments[place + 1]; ++i) {
        s.few.ids[count] = static_cast<std::uint32_t>(s.live[place] * kGroup + static_cast<std::int64_t>(s.list.w[i]));
        s.few.weights[count] = double{masses[i]};
        count += static_cast<std::int64_t>(ranks[i]) < kept && masses[i] >= floor_mass;
      }
    s.few.count = count;
    num_racing = total = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t group = s.few.ids[i] / kGroup;
      const bool first = num_racing == 0 || s.race_ids[num_racing - 1] != group;
      s.race_ids[num_racing - !first] = group;
      s.race_weights[num_racing - !first] = (first ? 0 : s.race_weights[num_racing - 1]) + s.few.weights[i];
      num_racing += first;
      total += static_cast<std::int64_t>(s.few.weights[i]);
    }
    pad(s.race_ids.data(), s.race_weights.data(), num_racing);
  }

  // How many of these masses, in the order of step 2, top-p leaves.
  static std::int64_t leading_share(const float* masses, std::int64_t count, double p) {
    std::int64_t total = 0, before = 0, kept = 0;
    for (std::int64_t i = 0; i < count; ++i) total += static_cast<std::int64_t>(masses[i]);
    for (const std::int64_t need = share_of(total, p); kept < count && before < need; ++kept) before += static_cast<std::int64_t>(masses[kept]);
    return kept;
  }

  // The survivors of one group, padded for the race.
  std::int64_t find_few(std::int64_t group, std::uint32_t* ids, double* weights) const {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < s.few.count; ++i) {
      ids[count] = s.few.ids[i];
      weights[count] = s.few.weights[i];
      count += s.few.ids[i] / kGroup == group;
    }
    pad(ids, weights, count);
    return count;
  }

  // The same where they are not known one by one.
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

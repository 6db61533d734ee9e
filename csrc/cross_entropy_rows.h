// The row kernels of cross_entropy, written once over `Vec` and compiled once per instruction set: this file is
// included inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard.
//
// A row is read from memory once. It is walked in blocks that fit the first-level cache; each block is exponentiated
// against the running maximum of its time, the results stay in a row-sized scratch (second-level cache), and the
// change of reference is one factor per block when the gradient is written. A large gradient leaves by streaming stores,
// which do not read the line they replace, a pair of vectors for each pair read of the *next* row: memory that reads and
// writes at once moves a third more than memory that takes turns. It may be written over the logits: what is needed of
// a logit after that (the target's) is read before.

constexpr std::int64_t kBlock = 2048;

struct Scratch {
  void* exps = nullptr;           // one row of Real
  std::vector<double> reference;  // per block: the maximum its exponentials were taken against
  std::size_t bytes = 0;
  ~Scratch() { std::free(exps); }
  template <class Real>
  Real* row(std::int64_t V) {
    const std::size_t want = static_cast<std::size_t>(V + 64) * sizeof(Real);
    if (want > bytes) {
      std::free(exps);
      bytes = 0;
      exps = std::aligned_alloc(64, (want + 63) / 64 * 64);
      if (exps == nullptr) throw std::bad_alloc();
      bytes = want;
    }
    reference.resize(static_cast<std::size_t>(V / kBlock + 2));
    return static_cast<Real*>(exps);
  }
};

template <class V>
struct Softcap {
  using real = typename V::real;
  V cap, inverse;
  explicit Softcap(double c) : cap(V::set(static_cast<real>(c))), inverse(V::set(static_cast<real>(c > 0 ? 1.0 / c : 0))) {}
  V apply(V x) const { return cap * (x * inverse).tanh(); }
  V slope(V x) const { const V t = (x * inverse).tanh(); return V::set(1) - t * t; }  // d apply / dx
};

// exp for arguments that are at most 0 up to rounding.
template <class V>
inline V exp_of(V x) { return (x * V::set(static_cast<typename V::real>(1.4426950408889634074))).exp2_nonpositive(); }

// f(offset, count): whole vectors, then one partial vector.
template <class V, class F>
inline void for_vectors(std::int64_t begin, std::int64_t end, F&& f) {
  std::int64_t i = begin;
  for (; i + V::width <= end; i += V::width) f(i, V::width);
  if (i < end) f(i, static_cast<int>(end - i));
}

template <class V, class T>
inline V load_n(const T* p, int n, typename V::real fill) { return n == V::width ? V::load(p) : V::load_part(p, n, fill); }

// Stores may be streamed only from an aligned address; the first `peel` elements of the row get it there.
template <class V, class T>
inline std::int64_t peel_to_alignment(const T* p, std::int64_t count) {
  constexpr std::size_t bytes = V::width * sizeof(T);
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(p) % bytes;
  return misaligned == 0 ? 0 : std::min<std::int64_t>(count, static_cast<std::int64_t>((bytes - misaligned) / sizeof(T)));
}

struct RowStats {
  double max;       // of the capped logits
  double sum_rest;  // sum of exp(x - max) over every class but the target
  double sum_x;     // sum of the capped logits (label smoothing only)
};

// One block of a row: its exponentials against `ref`, kept if asked for, and their sum.
template <class V, bool kSoftcap, bool kSum, bool kKeep, class T>
struct BlockSums {
  using real = typename V::real;
  const T* x;
  real* exps;
  const Softcap<V>& softcap;
  double sum_exp = 0, sum_x = 0;

  template <class Writer>
  void add(std::int64_t begin, std::int64_t end, real ref, Writer& behind) {
    const V vref = V::set(ref);
    V total0 = V::set(0), total1 = V::set(0), plain = V::set(0);
    std::int64_t i = begin;
    for (; i + 2 * V::width <= end; i += 2 * V::width) {
      for (std::size_t line = 0; line < 2 * V::width * sizeof(T); line += 64)  // into the first level only: used at once
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + 2 * kBlock) + line, 0, 0);
      V a = V::load(x + i), b = V::load(x + i + V::width);
      if (kSoftcap) { a = softcap.apply(a); b = softcap.apply(b); }
      if (kSum) plain = plain + (a + b);
      a = exp_of(a - vref);
      b = exp_of(b - vref);
      if (kKeep) { a.store(exps + i); b.store(exps + i + V::width); }
      total0 = total0 + a;
      total1 = total1 + b;
      behind.pair();
    }
    for_vectors<V>(i, end, [&](std::int64_t j, int k) {
      V a = load_n<V>(x + j, k, real(0));
      if (kSoftcap) a = softcap.apply(a);
      const V e = exp_of(a - vref);
      if (kKeep) { if (k == V::width) e.store(exps + j); else e.store_part(exps + j, k); }
      if (k == V::width) { total0 = total0 + e; if (kSum) plain = plain + a; return; }
      real lanes[V::width], values[V::width];  // the lanes past the end must stay out of both sums
      e.store(lanes);
      a.store(values);
      for (int l = 0; l < k; ++l) { sum_exp += lanes[l]; if (kSum) sum_x += values[l]; }
    });
    sum_exp += static_cast<double>((total0 + total1).sum());
    if (kSum) sum_x += static_cast<double>(plain.sum());
  }
};

template <class V, class T>
typename V::real block_maximum(const T* x, std::int64_t begin, std::int64_t end) {
  const V lowest = V::set(-std::numeric_limits<typename V::real>::infinity());
  V top0 = lowest, top1 = lowest;
  std::int64_t i = begin;
  for (; i + 2 * V::width <= end; i += 2 * V::width) {
    top0 = V::max(top0, V::load(x + i));
    top1 = V::max(top1, V::load(x + i + V::width));
  }
  for_vectors<V>(i, end, [&](std::int64_t j, int k) {
    top0 = V::max(top0, load_n<V>(x + j, k, -std::numeric_limits<typename V::real>::infinity()));
  });
  return V::max(top0, top1).max();
}

// The first (and only) read of a row. With `exps` it leaves exp(x - reference[block]) there. The target y is summed by
// nobody: 1 - p_y is then sum_rest / (sum_rest + e_y), without the cancellation that costs a sure model its digits.
// `behind` writes an earlier row's gradient meanwhile.
template <class V, bool kSoftcap, bool kSum, bool kKeep, class T, class Writer>
RowStats reduce_row(const T* x, std::int64_t n, std::int64_t y, std::int64_t peel, const Softcap<V>& softcap,
                    typename V::real* exps, double* reference, Writer& behind) {
  using real = typename V::real;
  constexpr real kLowest = -std::numeric_limits<real>::infinity();
  real running_max = kLowest;
  BlockSums<V, kSoftcap, kSum, kKeep, T> sums{x, exps, softcap};
  std::int64_t block = 0;
  for (std::int64_t begin = 0; begin < n; ++block) {
    const std::int64_t end = std::min(n, (begin == 0 ? peel : begin) + kBlock);
    real block_max = block_maximum<V>(x, begin, end);
    if (kSoftcap) block_max = softcap.apply(V::set(block_max)).first();  // monotonic: the cap of the maximum
    const real previous = running_max;
    running_max = block_max > running_max ? block_max : running_max;
    if (running_max != previous && sums.sum_exp != 0) sums.sum_exp *= std::exp(double(previous) - running_max);
    // All -inf so far: any finite reference gives zeros; -inf itself would give NaN.
    const real ref = running_max == kLowest ? real(0) : running_max;
    if (kKeep) reference[block] = running_max == kLowest ? kLowest : ref;  // -inf: a factor of 0, whatever lse is
    behind.open();
    if (y >= begin && y < end) {
      sums.add(begin, y, ref, behind);
      sums.add(y + 1, end, ref, behind);
    } else {
      sums.add(begin, end, ref, behind);
    }
    behind.close();
    begin = end;
  }
  behind.finish();
  return {double(running_max), sums.sum_exp, sums.sum_x};
}

// Writes the gradient of a row whose lse is known, a block or less at a time:
//   g = (scale * p - shift) * slope;  p = exps * exp(reference - lse), or exp(x - lse) where the row is read again.
template <class V, bool kSoftcap, bool kStream, bool kFromExps, class T>
struct GradientWriter {
  using real = typename V::real;
  T* g;
  const T* x;
  std::int64_t n, peel;
  Softcap<V> softcap;
  const real* exps;
  const double* reference;
  double lse, scale;
  V vshift, vlse, factor;
  T *target, target_gradient;  // target: null where it is another shard's
  std::int64_t block = 0, next = 0, end = 0;  // the open block's rest is [next, end)

  V value(std::int64_t i, int k) const {
    V p = V::set(0), logit = V::set(0);
    if constexpr (kSoftcap || !kFromExps) logit = load_n<V>(x + i, k, real(0));
    if constexpr (kFromExps) p = load_n<V>(exps + i, k, real(0));
    else p = exp_of((kSoftcap ? softcap.apply(logit) : logit) - vlse);
    V out = p * factor - vshift;
    if constexpr (kSoftcap) out = out * softcap.slope(logit);
    return out;
  }
  void one(std::int64_t i) const {
    if (kStream) value(i, V::width).stream(g + i);
    else value(i, V::width).store(g + i);
  }
  bool open() {
    if (next >= n) return false;
    end = std::min(n, peel + (block + 1) * kBlock);
    factor = V::set(static_cast<real>(kFromExps ? scale * std::exp(reference[block] - lse) : scale));
    if (block == 0 && peel > 0) {
      for_vectors<V>(0, peel, [&](std::int64_t j, int k) { value(j, k).store_part(g + j, k); });
      next = peel;
    }
    ++block;
    return true;
  }
  void pair() {
    if (next + 2 * V::width > end) return;
    one(next);
    one(next + V::width);
    next += 2 * V::width;
  }
  void close() {
    for (; next + V::width <= end; next += V::width) one(next);
    if (next < end) value(next, static_cast<int>(end - next)).store_part(g + next, static_cast<int>(end - next));
    next = end;
  }
  void finish() {
    while (open()) close();
    if (target != nullptr) *target = target_gradient;
  }
};

struct NoWriter {
  void open() {}
  void pair() {}
  void close() {}
  void finish() {}
};

template <class T>
inline double element(const T* p) {
  if constexpr (std::is_floating_point_v<T>) return *p;
  else return to_float(*p);
}
template <class T>
inline T element_from(double x) {
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(x);
  else if constexpr (std::is_same_v<T, bfloat16>) return to_bfloat16(static_cast<float>(x));
  else return to_float16(static_cast<float>(x));
}

template <class V, bool kSoftcap, class T>
struct RowKernel {
  using real = typename V::real;
  template <bool kStream, bool kFromExps> using Writer = GradientWriter<V, kSoftcap, kStream, kFromExps, T>;
  const Problem& problem;
  Softcap<V> softcap;
  explicit RowKernel(const Problem& p) : problem(p), softcap(p.softcap) {}

  struct Summary { double lse, logit_y, rest; };  // rest = 1 - p_y

  const T* logits(std::int64_t row) const { return static_cast<const T*>(problem.logits) + row * problem.row_stride; }
  T* gradient(std::int64_t row) const { return static_cast<T*>(problem.gradient) + row * problem.V; }
  std::int64_t peel(std::int64_t row) const { return problem.stream ? peel_to_alignment<V>(gradient(row), problem.V) : 0; }

  bool holds_target(std::int64_t row) const { return problem.targets[row] >= 0 && problem.targets[row] < problem.V; }

  // By the same instructions as in the sums, so that one class alone costs exactly 0.
  double capped(const T* x) const {
    if constexpr (!kSoftcap) return element(x);
    else return static_cast<double>(softcap.apply(V::load_part(x, 1, 0)).first());
  }

  // gap = x_y - lse <= 0 comes from the caller, as exact as it can have it.
  double loss(double lse, double gap, double sum) const {
    const double smoothing = problem.label_smoothing;
    double value = (1 - smoothing) * -gap + problem.z_loss * lse * lse;
    if (smoothing > 0) value += smoothing * (lse - sum / static_cast<double>(problem.all_classes));
    return value;
  }

  T target_gradient(const Summary& s, double row_scale) const {
    const double smoothing = problem.label_smoothing;
    double value = -s.rest + 2 * problem.z_loss * s.lse * (1 - s.rest) + smoothing - smoothing / static_cast<double>(problem.all_classes);
    if (kSoftcap) { const double t = std::tanh(s.logit_y / problem.softcap); value *= 1 - t * t; }
    return element_from<T>(row_scale * value);
  }

  bool ignored(std::int64_t row, bool with_gradient) const {
    if (problem.targets[row] != problem.ignore_index) return false;
    if (with_gradient) std::memset(static_cast<void*>(gradient(row)), 0, problem.V * sizeof(T));
    return true;
  }

  // Reads the row, sets its loss and lse, and leaves its exponentials in `scratch` if they are to be kept.
  template <bool kKeep, class Behind>
  Summary read(std::int64_t row, Scratch* scratch, Behind& behind) const {
    const T* x = logits(row);
    const std::int64_t n = problem.V, y = problem.targets[row], start = kKeep ? peel(row) : 0;
    real* exps = kKeep ? scratch->row<real>(n) : nullptr;
    double* reference = kKeep ? scratch->reference.data() : nullptr;
    const RowStats stats = problem.label_smoothing > 0
        ? reduce_row<V, kSoftcap, true, kKeep>(x, n, y, start, softcap, exps, reference, behind)
        : reduce_row<V, kSoftcap, false, kKeep>(x, n, y, start, softcap, exps, reference, behind);
    // NaN for a row that is all -inf, +inf somewhere, or NaN somewhere, as the formula gives it.
    const double x_y = capped(x + y), e_y = std::exp(x_y - stats.max), total = stats.sum_rest + e_y;
    const double lse = stats.max + std::log(total);
    const double gap = x_y == stats.max ? -std::log1p(stats.sum_rest) : x_y - lse;
    problem.set_row(row, loss(lse, gap, stats.sum_x + (problem.label_smoothing > 0 ? x_y : 0)), lse);
    return {lse, element(x + y), stats.sum_rest / total};
  }

  template <bool kStream, bool kFromExps>
  Writer<kStream, kFromExps> writer(std::int64_t row, const Summary& s, const Scratch* scratch) const {
    const double row_scale = problem.row_scale(row);
    const double shift = row_scale * problem.label_smoothing / static_cast<double>(problem.all_classes);
    T* g = gradient(row);
    const bool here = holds_target(row);
    return {g, logits(row), problem.V, peel(row), softcap,
            kFromExps ? static_cast<const real*>(scratch->exps) : nullptr, kFromExps ? scratch->reference.data() : nullptr,
            s.lse, row_scale * (1 + 2 * problem.z_loss * s.lse), V::set(static_cast<real>(shift)),
            V::set(static_cast<real>(s.lse)), V::set(0), here ? g + problem.targets[row] : nullptr,
            here ? target_gradient(s, row_scale) : T{}};
  }

  void forward(RowQueue& queue) const {
    NoWriter nothing;
    queue.each([&](std::int64_t row) {
      if (ignored(row, false)) problem.set_row(row, 0.0, 0.0);
      else read<false>(row, nullptr, nothing);
    });
  }

  // Loss and gradient. The gradient of a row is written while the thread's next row is read.
  template <bool kStream>
  void fused(RowQueue& queue, Scratch (&scratch)[2]) const {
    std::optional<Writer<kStream, true>> behind;
    NoWriter nothing;
    int turn = 0;
    queue.each([&](std::int64_t row) {
      if (ignored(row, true)) return problem.set_row(row, 0.0, 0.0);
      Scratch* mine = &scratch[turn];
      const Summary s = behind ? read<true>(row, mine, *behind) : read<true>(row, mine, nothing);
      behind.reset();
      auto own = writer<kStream, true>(row, s, mine);
      if (!kStream) return own.finish();
      behind.emplace(own);
      turn ^= 1;
    });
    if (behind) behind->finish();
  }

  template <bool kStream>
  void backward(RowQueue& queue) const {
    queue.each([&](std::int64_t row) {
      if (ignored(row, true)) return;
      const double lse = problem.lse[row];
      if (!holds_target(row)) return writer<kStream, false>(row, {lse, 0, 0}, nullptr).finish();
      const T* target = logits(row) + problem.targets[row];
      writer<kStream, false>(row, {lse, element(target), -std::expm1(capped(target) - lse)}, nullptr).finish();
    });
  }

  // What a shard knows of its rows. Unlike a whole row, a shard may be all -inf: its log-sum-exp is then -inf, not NaN.
  void statistics(RowQueue& queue) const {
    NoWriter nothing;
    queue.each([&](std::int64_t row) {
      problem.lse[row] = problem.target_logits[row] = problem.logit_sums[row] = 0;
      if (ignored(row, false)) return;
      const T* x = logits(row);
      const bool here = holds_target(row);
      const std::int64_t y = here ? problem.targets[row] : -1;
      const RowStats stats = problem.label_smoothing > 0
          ? reduce_row<V, kSoftcap, true, false>(x, problem.V, y, 0, softcap, nullptr, nullptr, nothing)
          : reduce_row<V, kSoftcap, false, false>(x, problem.V, y, 0, softcap, nullptr, nullptr, nothing);
      const double x_y = here ? capped(x + y) : 0;
      const double e_y = !here || x_y == -std::numeric_limits<double>::infinity() ? 0 : std::exp(x_y - stats.max);
      problem.lse[row] = stats.max + std::log(stats.sum_rest + e_y);
      problem.target_logits[row] = x_y;
      if (problem.label_smoothing > 0) problem.logit_sums[row] = stats.sum_x + x_y;
    });
  }
};

template <class V, class T>
void run_rows(const Problem& problem, Pass pass, RowQueue& queue) {
  static thread_local Scratch scratch[2];  // one row each; kept, since a fresh one costs its page faults again
  auto run = [&](const auto& kernel) {
    if (pass == Pass::forward) kernel.forward(queue);
    else if (pass == Pass::statistics) kernel.statistics(queue);
    else if (pass == Pass::fused && problem.stream) kernel.template fused<true>(queue, scratch);
    else if (pass == Pass::fused) kernel.template fused<false>(queue, scratch);
    else if (problem.stream) kernel.template backward<true>(queue);
    else kernel.template backward<false>(queue);
  };
  if (problem.softcap > 0) run(RowKernel<V, true, T>(problem));
  else run(RowKernel<V, false, T>(problem));
}

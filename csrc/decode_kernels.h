// The arithmetic of decoding, written once over `Vec` and compiled once per instruction set: this file is included
// inside namespaces fasttrain::{scalar,avx2,avx512} and therefore has no include guard.
//
// Every product is one routine, `tile`: M rows of x times P panels of a matrix. A panel holds kPanel outputs side by
// side for one input after the other, so that a product reads its matrix as one stream and needs no sums across lanes.
// Each output is one chain of fused multiply-adds over its inputs in order, whatever M is: a token's numbers do not
// depend on how many tokens are computed with it. Keys and values are kept as panels too, and attention is two products.

constexpr int kVecs = kPanel / Vec::width;  // vectors in one row of a panel
// Most rows at a time: accumulators, one weight and one input fit the registers.
constexpr int kMostRows = Vec::width == 16 ? 12 : Vec::width == 8 ? 3 : 1;

// How far ahead of use a panel is asked for. The hardware's own prefetchers stop at every 4 KiB.
constexpr std::int64_t kPrefetchBytes = 4096;

// How a panel stores its weights, read `kStep` inputs at a time. Integers: decode_integer_kernels.h.
struct Float32Panel {
  static constexpr int kStep = 1, kBytes = 4;
  static void load(const unsigned char* w, std::int64_t k, int v, Vec (&out)[kStep]) {
    out[0] = Vec::load(reinterpret_cast<const float*>(w) + k * kPanel + v * Vec::width);
  }
};
struct Float16Panel {
  static constexpr int kStep = 1, kBytes = 2;
  static void load(const unsigned char* w, std::int64_t k, int v, Vec (&out)[kStep]) {
    out[0] = Vec::load(reinterpret_cast<const float16*>(w) + k * kPanel + v * Vec::width);
  }
};
struct BFloat16Panel {  // two inputs of an output side by side: widening them is a shift and a mask
  static constexpr int kStep = 2, kBytes = 2;
  static void load(const unsigned char* w, std::int64_t k, int v, Vec (&out)[kStep]) {
    Vec::load_pairs(reinterpret_cast<const bfloat16*>(w) + k * kPanel + 2 * v * Vec::width, out[0], out[1]);
  }
};

// y (M, ldy) = or += x times P panels. `kFetch`: they come from memory, not from a cache that an earlier tile left them in.
template <class F, int M, int P, bool kFetch>
void tile(const unsigned char* w, std::size_t panel_bytes, std::int64_t inputs, const float* x, std::ptrdiff_t ldx, float* y, std::ptrdiff_t ldy,
          bool add) {
  constexpr int kLines = kPanel * F::kBytes * F::kStep / 64;  // of the cache, in a step
  Vec total[M][P * kVecs];
  FASTTRAIN_UNROLL(16)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < P * kVecs; ++v) total[m][v] = Vec::set(0);
  for (std::int64_t k = 0; k < inputs; k += F::kStep) {
    if constexpr (kFetch) {
      std::size_t ahead = k * kPanel * F::kBytes + kPrefetchBytes;
      if (P > 1 && ahead >= panel_bytes) ahead += (P - 1) * panel_bytes;  // the panels beside are being read already
      FASTTRAIN_UNROLL(8)
      for (int line = 0; line < P * kLines; ++line) __builtin_prefetch(w + line / kLines * panel_bytes + ahead + line % kLines * 64);
    }
    Vec weight[P * kVecs][F::kStep];
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < P * kVecs; ++v) F::load(w + (v / kVecs) * panel_bytes, k, v % kVecs, weight[v]);
    FASTTRAIN_UNROLL(2)
    for (int s = 0; s < F::kStep; ++s) {
      FASTTRAIN_UNROLL(16)
      for (int m = 0; m < M; ++m) {
        const Vec input = Vec::set(x[m * ldx + k + s]);
        FASTTRAIN_UNROLL(64)
        for (int v = 0; v < P * kVecs; ++v) total[m][v] = Vec::fma(weight[v][s], input, total[m][v]);
      }
    }
  }
  FASTTRAIN_UNROLL(16)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < P * kVecs; ++v) {
      float* to = y + m * ldy + v * Vec::width;
      (add ? Vec::load(to) + total[m][v] : total[m][v]).store(to);
    }
}

// The rest of a batch, of 1 .. M rows, in one tile.
template <class F, int P, int M>
void last_rows(int rows, const unsigned char* w, std::size_t panel_bytes, std::int64_t inputs, const float* x, std::ptrdiff_t ldx, float* y,
               std::ptrdiff_t ldy, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return tile<F, M, P, true>(w, panel_bytes, inputs, x, ldx, y, ldy, add);
    last_rows<F, P, M - 1>(rows, w, panel_bytes, inputs, x, ldx, y, ldy, add);
  }
}

// Where registers are few, a batch takes kDepth inputs of a panel at a time: they stay in the L1 cache for all its rows,
// and the next come from memory while they are in use. Up to kTallRows rows go together, of half a panel if they are more
// than kMostRows, so that their sums, the weights and an input fit the registers.
constexpr bool kByDepth = Vec::width == 8;
constexpr std::int64_t kDepth = 64, kDepthRows = 48;
constexpr int kTallRows = 6;

// total (M, kPanel) += M rows times V vectors of `depth` inputs. Fetches what is `ahead`, `pace` bytes for two vectors.
template <class F, int M, int V>
FASTTRAIN_INLINE void depth_tile(const unsigned char* w, std::int64_t depth, const float* x, std::ptrdiff_t ldx, float* total,
                                 const unsigned char* ahead, std::int64_t pace) {
  Vec sum[M][V];
  FASTTRAIN_UNROLL(8)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < V; ++v) sum[m][v] = Vec::load(total + m * kPanel + v * Vec::width);
  FASTTRAIN_UNROLL(1)
  for (std::int64_t k = 0; k < depth; k += F::kStep) {
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < V; v += 2, ahead += pace) __builtin_prefetch(ahead);
    Vec weight[V][F::kStep];
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < V; ++v) F::load(w, k, v, weight[v]);
    FASTTRAIN_UNROLL(2)
    for (int s = 0; s < F::kStep; ++s) {
      FASTTRAIN_UNROLL(8)
      for (int m = 0; m < M; ++m) {
        const Vec input = Vec::set(x[m * ldx + k + s]);
        FASTTRAIN_UNROLL(8)
        for (int v = 0; v < V; ++v) sum[m][v] = Vec::fma(weight[v][s], input, sum[m][v]);
      }
    }
  }
  FASTTRAIN_UNROLL(8)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < V; ++v) sum[m][v].store(total + m * kPanel + v * Vec::width);
}

template <class F, int M>
void depth_rows(int rows, const unsigned char* w, std::int64_t depth, const float* x, std::ptrdiff_t ldx, float* total, const unsigned char* ahead,
                std::int64_t pace) {
  if constexpr (M > 0) {
    if (rows < M) return depth_rows<F, M - 1>(rows, w, depth, x, ldx, total, ahead, pace);
    constexpr int V = M > kMostRows ? kVecs / 2 : kVecs;
    for (int v = 0; v < kVecs; v += V, ahead += kDepth / F::kStep * (V / 2) * pace)
      depth_tile<F, M, V>(w + v * Vec::width * F::kBytes * F::kStep, depth, x, ldx, total + v * Vec::width, ahead, pace);
  }
}

// y (rows, ldy) = or += x times one panel.
template <class F>
void multiply_by_depth(const Matrix& matrix, const unsigned char* w, const Rows& x, std::int64_t rows, float* y, std::ptrdiff_t ldy, bool add) {
  for (std::int64_t begin = 0; begin < rows; begin += kDepthRows) {
    const std::int64_t count = std::min(kDepthRows, rows - begin), tiles = (count + kTallRows - 1) / kTallRows;
    constexpr std::int64_t kBytes = kDepth * kPanel * F::kBytes;
    const std::int64_t fetched = begin == 0 ? kBytes / tiles : 0, pace = fetched * F::kStep / (kDepth * kVecs / 2);
    alignas(64) float total[kDepthRows * kPanel];
    std::fill_n(total, count * kPanel, 0.0f);
    for (std::int64_t k = 0; k < matrix.padded_inputs; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, matrix.padded_inputs - k);
      const unsigned char* at = w + k * kPanel * F::kBytes;
      for (std::int64_t t = 0; t < tiles; ++t) {  // of equal rows, but for one
        const std::int64_t m = count * t / tiles, end = count * (t + 1) / tiles;
        depth_rows<F, kTallRows>(static_cast<int>(end - m), at, depth, x.values + (begin + m) * x.stride + k, x.stride, total + m * kPanel,
                                 at + kBytes + t * fetched, pace);
      }
    }
    for (std::int64_t m = 0; m < count; ++m)
      for (int v = 0; v < kVecs; ++v) {
        float* to = y + (begin + m) * ldy + v * Vec::width;
        const Vec sum = Vec::load(total + m * kPanel + v * Vec::width);
        (add ? Vec::load(to) + sum : sum).store(to);
      }
  }
}

// y (rows, ldy) = or += x times panels [first, last) of a matrix.
template <class F>
void multiply(const Matrix& matrix, std::int64_t first, std::int64_t last, const Rows& inputs, std::int64_t rows, float* y, std::ptrdiff_t ldy,
              bool add) {
  const float* x = inputs.values;
  const std::ptrdiff_t ldx = inputs.stride;
  constexpr int kPairRows = kMostRows / 2 > 0 ? kMostRows / 2 : 1;
  for (std::int64_t panel = first; panel < last;) {
    const unsigned char* w = matrix.weights.get<unsigned char>() + panel * matrix.panel_bytes;
    float* out = y + panel * kPanel;
    if (rows <= kPairRows && panel + 2 <= last) {  // two panels at a time: more chains in flight
      last_rows<F, 2, kPairRows>(static_cast<int>(rows), w, matrix.panel_bytes, matrix.padded_inputs, x, ldx, out, ldy, add);
      panel += 2;
      continue;
    }
    if constexpr (kByDepth)
      if (rows > kMostRows) {
        multiply_by_depth<F>(matrix, w, inputs, rows, out, ldy, add);
        ++panel;
        continue;
      }
    std::int64_t m = 0;
    for (; m + kMostRows <= rows; m += kMostRows) {
      const auto full = m == 0 ? &tile<F, kMostRows, 1, true> : &tile<F, kMostRows, 1, false>;
      full(w, 0, matrix.padded_inputs, x + m * ldx, ldx, out + m * ldy, ldy, add);
    }
    last_rows<F, 1, kMostRows - 1>(static_cast<int>(rows - m), w, 0, matrix.padded_inputs, x + m * ldx, ldx, out + m * ldy, ldy, add);
    ++panel;
  }
}

// `out` = x / sqrt(mean(x^2) + eps) * weight over n values.
void normalize(const float* x, const float* weight, std::int64_t n, float eps, float* out) {
  Vec squares = Vec::set(0);
  std::int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) {
    const Vec a = Vec::load(x + i);
    squares = Vec::fma(a, a, squares);
  }
  if (i < n) {
    const Vec a = Vec::load_part(x + i, static_cast<int>(n - i), 0);
    squares = Vec::fma(a, a, squares);
  }
  const Vec scale = Vec::set(1.0f / std::sqrt(squares.sum() / static_cast<float>(n) + eps));
  for (i = 0; i + Vec::width <= n; i += Vec::width) (Vec::load(weight + i) * (Vec::load(x + i) * scale)).store(out + i);
  for (; i < n; ++i) out[i] = weight[i] * (x[i] * scale.first());
}

// gate = silu(gate) * up; n is a multiple of the vector's width.
void gate(float* gates, const float* ups, std::int64_t n) {
  const Vec one = Vec::set(1), zero = Vec::set(0);
  for (std::int64_t i = 0; i < n; i += Vec::width) {
    const Vec g = Vec::load(gates + i);
    (g / (one + (zero - g).exp()) * Vec::load(ups + i)).store(gates + i);
  }
}

// One chunk of kChunk positions for `rows` queries: their unnormalised outputs, largest scores and sums of exponentials.
// Query i sees the positions up to last_seen[i]. Keys are panels of positions, values panels of head elements.
template <class F>
void attend(const HeadCache& cache, std::int64_t chunk, const float* queries, int rows, const std::int64_t* last_seen, float scale,
            float* out, float* maxima, float* sums) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const std::int64_t begin = chunk * kChunk, E = cache.padded_size;
  alignas(64) float scores[kMostQueries * kChunk];
  std::int64_t most = 0;
  for (int i = 0; i < rows; ++i) most = std::max(most, std::min<std::int64_t>(kChunk, last_seen[i] + 1 - begin));
  const std::size_t block_bytes = static_cast<std::size_t>(E) * kPanel * cache.element_bytes;
  for (std::int64_t block = 0; block * kPanel < most; ++block) {
    const unsigned char* keys = cache.keys + (begin / kPanel + block) * block_bytes;
    int i = 0;
    for (; i + kMostRows <= rows; i += kMostRows)
      tile<F, kMostRows, 1, false>(keys, 0, E, queries + i * E, E, scores + i * kChunk + block * kPanel, kChunk, false);
    last_rows<F, 1, kMostRows - 1>(rows - i, keys, 0, E, queries + i * E, E, scores + i * kChunk + block * kPanel, kChunk, false);
  }
  for (int i = 0; i < rows; ++i) {
    float* s = scores + i * kChunk;
    const std::int64_t seen = std::clamp<std::int64_t>(last_seen[i] + 1 - begin, 0, kChunk);
    std::fill(s + seen, s + kChunk, kNothing);
    Vec largest = Vec::set(kNothing);
    for (std::int64_t j = 0; j < kChunk; j += Vec::width) largest = Vec::max(largest, Vec::load(s + j));
    maxima[i] = largest.max() * scale;
    const Vec top = Vec::set(maxima[i]), factor = Vec::set(scale);
    Vec sum = Vec::set(0);
    for (std::int64_t j = 0; j < kChunk; j += Vec::width) {
      const Vec p = (Vec::load(s + j) * factor - top).exp();
      sum = sum + p;
      p.store(s + j);
    }
    sums[i] = sum.sum();
    if (seen == 0) std::fill(s, s + kChunk, 0.0f), sums[i] = 0;  // -inf less -inf is no number
  }
  for (std::int64_t slice = 0; slice * kPanel < E; ++slice) {
    const unsigned char* values = cache.values + (slice * cache.capacity + begin) * kPanel * cache.element_bytes;
    int i = 0;
    for (; i + kMostRows <= rows; i += kMostRows)
      tile<F, kMostRows, 1, false>(values, 0, most, scores + i * kChunk, kChunk, out + i * E + slice * kPanel, E, false);
    last_rows<F, 1, kMostRows - 1>(rows - i, values, 0, most, scores + i * kChunk, kChunk, out + i * E + slice * kPanel, E, false);
  }
}

// Joins one query's chunks: out[0..n) from parts, chunk c standing at parts + c * stride.
void join(const float* parts, std::ptrdiff_t stride, const float* maxima, const float* sums, std::ptrdiff_t statistics_stride,
          std::int64_t chunks, std::int64_t n, float* out) {
  float largest = maxima[0], total = 0;
  for (std::int64_t c = 1; c < chunks; ++c) largest = std::max(largest, maxima[c * statistics_stride]);
  for (std::int64_t c = 0; c < chunks; ++c) total += std::exp(maxima[c * statistics_stride] - largest) * sums[c * statistics_stride];
  for (std::int64_t c = 0; c < chunks; ++c) {
    const float share = std::exp(maxima[c * statistics_stride] - largest) / total;
    const float* part = parts + c * stride;
    for (std::int64_t i = 0; i < n; ++i) out[i] = c == 0 ? part[i] * share : out[i] + part[i] * share;
  }
}

// Without those of integers.
Kernels float_kernels() {
  return {
      {&multiply<Float32Panel>, &multiply<BFloat16Panel>, nullptr, nullptr}, nullptr,
      &normalize, &gate, &attend<Float32Panel>, &attend<Float16Panel>, &join};
}

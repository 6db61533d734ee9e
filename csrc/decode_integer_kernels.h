// Products of 8-bit and 4-bit weights with inputs in 16 bits, written over `Vec`, `Quads` and `PairProducts` and compiled
// like decode_kernels.h, after it; once more where the CPU sums two products in one instruction (VNNI).
//
// Inputs are rounded once a pass, with a scale for each group of weights, and so finely that what is lost is what the
// weights lost (to 8 bits would cost four times the perplexity). That is a function of the row alone, the sums of a group
// are exact, and one chain of fused multiply-adds joins the groups in order: a token's numbers depend neither on its
// batchmates nor on the threads.

// Most rows at a time: their sums, the weights of one panel against a quad of inputs, and that quad fit the registers.
constexpr int kMostIntegerRows = Vec::width == 8 ? 2 : kMostRows;
static_assert(kRowBlock % kMostIntegerRows == 0);

// Weights w = d (u - 128): four inputs of an output side by side. `factors` are those against the n-th quad of inputs.
struct Int8Products {
  static constexpr int kGroup = static_cast<int>(kInt8Group), kStep = 4, kQuads = 2;
  static constexpr bool kMinima = false;
  template <int kQuad>
  static Quads factors(Quads four) { return four.fields<8 * kQuad, 8>(); }
};

// Weights w = d n + m, n in 0 .. 15: four inputs of an output in the low halves of four bytes, the next four in the high
// ones.
struct Int4Products {
  static constexpr int kGroup = static_cast<int>(kInt4Group), kStep = 8, kQuads = 4;
  static constexpr bool kMinima = true;
  template <int kQuad>
  static Quads factors(Quads eight) { return eight.fields<kQuad % 2 * 8 + kQuad / 2 * 4, 4>(); }
};

constexpr int kStepBytes = kPanel * 4;

// Adds a group's products of the n-th quad of each step. The quads come one after the other, with the group in the L1
// cache: together, their factors and the sums would not fit the registers.
template <class F, int M, int P, bool kFetch, int kQuad>
FASTTRAIN_INLINE void quad_products(const unsigned char* at, const unsigned char* w, std::size_t panel_bytes,
                                    const unsigned char*& inputs, std::int64_t count, Quads (&sum)[M][P * kVecs]) {
  constexpr int kLines = kStepBytes / 64;
  for (int step = 0; step < F::kGroup / F::kStep; ++step, at += kStepBytes, inputs += count * 4) {
    if constexpr (kFetch) {
      std::size_t ahead = at - w + kPrefetchBytes;
      if (P > 1 && ahead >= panel_bytes) ahead += (P - 1) * panel_bytes;  // the panels beside are being read already
      FASTTRAIN_UNROLL(8)
      for (int line = 0; line < P * kLines; ++line) __builtin_prefetch(w + line / kLines * panel_bytes + ahead + line % kLines * 64);
    }
    Quads weight[P * kVecs];
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < P * kVecs; ++v) weight[v] = F::template factors<kQuad>(Quads::load(at + (v / kVecs) * panel_bytes + v % kVecs * 4 * Vec::width));
    FASTTRAIN_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      const Quads input = Quads::spread(inputs + m * 4);
      FASTTRAIN_UNROLL(64)
      for (int v = 0; v < P * kVecs; ++v) sum[m][v] = PairProducts::plus(sum[m][v], weight[v], input);
    }
  }
}

// y (M, ldy) = or += rows [row, row + M) of a block times P panels. `kFetch` as in decode_kernels.h.
template <class F, int M, int P, bool kFetch>
void integer_tile(const Matrix& matrix, std::int64_t panel, const RowBlock& x, std::int64_t row, float* y, std::ptrdiff_t ldy, bool add_to) {
  constexpr int kPanelVecs = P * kVecs;
  const unsigned char* w = matrix.weights.get<unsigned char>() + panel * matrix.panel_bytes;
  const bfloat16* scales = matrix.scales.get<bfloat16>() + panel * matrix.panel_scales;
  const unsigned char* inputs = x.values + row * 4;
  Vec total[M][kPanelVecs];
  FASTTRAIN_UNROLL(16)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < kPanelVecs; ++v) total[m][v] = Vec::set(0);
  for (std::int64_t group = 0; group * F::kGroup < matrix.padded_inputs; ++group) {
    const std::int64_t first = group * x.count + row;
    Quads sum[M][kPanelVecs];
    FASTTRAIN_UNROLL(16)
    for (int m = 0; m < M; ++m)
      FASTTRAIN_UNROLL(64)
      for (int v = 0; v < kPanelVecs; ++v) sum[m][v] = Quads::set(x.offsets[first + m]);
    const unsigned char* at = w + group * (F::kGroup / F::kStep) * kStepBytes;
    quad_products<F, M, P, kFetch, 0>(at, w, matrix.panel_bytes, inputs, x.count, sum);
    quad_products<F, M, P, false, 1>(at, w, matrix.panel_bytes, inputs, x.count, sum);
    if constexpr (F::kQuads == 4) {
      quad_products<F, M, P, false, 2>(at, w, matrix.panel_bytes, inputs, x.count, sum);
      quad_products<F, M, P, false, 3>(at, w, matrix.panel_bytes, inputs, x.count, sum);
    }
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < kPanelVecs; ++v) {
      const bfloat16* of_group = scales + (v / kVecs) * matrix.panel_scales + group * (F::kMinima ? 2 : 1) * kPanel + (v % kVecs) * Vec::width;
      const Vec scale = Vec::load(of_group);
      FASTTRAIN_UNROLL(16)
      for (int m = 0; m < M; ++m) {
        total[m][v] = Vec::fma(sum[m][v].to_float() * Vec::set(x.scales[first + m]), scale, total[m][v]);
        if constexpr (F::kMinima) total[m][v] = Vec::fma(Vec::set(x.sums[first + m]), Vec::load(of_group + kPanel), total[m][v]);
      }
    }
  }
  FASTTRAIN_UNROLL(16)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(64)
    for (int v = 0; v < kPanelVecs; ++v) {
      float* to = y + m * ldy + v * Vec::width;
      (add_to ? Vec::load(to) + total[m][v] : total[m][v]).store(to);
    }
}

// Where registers are few, rows of a batch go a group of weights at a time: it stays in the L1 cache for all of them, and
// the next groups come from memory while it is in use. Most rows and vectors of a panel at a time: their sums, the
// weights against one input, and that input fit the registers.
constexpr bool kByGroups = Vec::width == 8;
constexpr int kGroupRows = 4, kGroupVecs = 2;
static_assert(kRowBlock % kGroupRows == 0);

// sum (M, kGroupVecs) += the products of one step with the n-th quad of its inputs.
template <class F, int M, int kQuad>
FASTTRAIN_INLINE void step_products(const unsigned char* at, const unsigned char* inputs, Quads (&sum)[M][kGroupVecs]) {
  Quads weight[kGroupVecs];
  FASTTRAIN_UNROLL(8)
  for (int v = 0; v < kGroupVecs; ++v) weight[v] = F::template factors<kQuad>(Quads::load(at + v * 4 * Vec::width));
  FASTTRAIN_UNROLL(8)
  for (int m = 0; m < M; ++m) {
    const Quads input = Quads::spread(inputs + m * 4);
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < kGroupVecs; ++v) sum[m][v] = PairProducts::plus(sum[m][v], weight[v], input);
  }
}

// total (M, kPanel) += M rows times kGroupVecs vectors of a group; `first` is where their scales stand.
template <class F, int M>
void group_tile(const unsigned char* at, const bfloat16* scales, const unsigned char* inputs, const RowBlock& x, std::int64_t first, float* total) {
  constexpr int kSteps = F::kGroup / F::kStep;
  const std::int64_t stride = x.count * 4, quad = kSteps * stride;
  Quads sum[M][kGroupVecs];
  FASTTRAIN_UNROLL(8)
  for (int m = 0; m < M; ++m)
    FASTTRAIN_UNROLL(8)
    for (int v = 0; v < kGroupVecs; ++v) sum[m][v] = Quads::set(x.offsets[first + m]);
  FASTTRAIN_UNROLL(1)
  for (int step = 0; step < kSteps; ++step, at += kStepBytes, inputs += stride) {
    step_products<F, M, 0>(at, inputs, sum);
    step_products<F, M, 1>(at, inputs + quad, sum);
    if constexpr (F::kQuads == 4) {
      step_products<F, M, 2>(at, inputs + 2 * quad, sum);
      step_products<F, M, 3>(at, inputs + 3 * quad, sum);
    }
  }
  FASTTRAIN_UNROLL(8)
  for (int v = 0; v < kGroupVecs; ++v) {
    const Vec scale = Vec::load(scales + v * Vec::width);
    FASTTRAIN_UNROLL(8)
    for (int m = 0; m < M; ++m) {
      float* to = total + m * kPanel + v * Vec::width;
      Vec t = Vec::fma(sum[m][v].to_float() * Vec::set(x.scales[first + m]), scale, Vec::load(to));
      if constexpr (F::kMinima) t = Vec::fma(Vec::set(x.sums[first + m]), Vec::load(scales + kPanel + v * Vec::width), t);
      t.store(to);
    }
  }
}

template <class F, int M>
void last_group_rows(int rows, const unsigned char* at, const bfloat16* scales, const unsigned char* inputs, const RowBlock& x, std::int64_t first,
                     float* total) {
  if constexpr (M > 0) {
    if (rows == M) return group_tile<F, M>(at, scales, inputs, x, first, total);
    last_group_rows<F, M - 1>(rows, at, scales, inputs, x, first, total);
  }
}

// y (rows, ldy) = or += x times one panel.
template <class F>
void multiply_by_groups(const Matrix& matrix, std::int64_t panel, const Rows& x, std::int64_t rows, float* y, std::ptrdiff_t ldy, bool add_to) {
  constexpr int kGroupBytes = F::kGroup / F::kStep * kStepBytes;
  const unsigned char* w = matrix.weights.get<unsigned char>() + panel * matrix.panel_bytes;
  const bfloat16* scales = matrix.scales.get<bfloat16>() + panel * matrix.panel_scales;
  for (std::int64_t begin = 0; begin < rows; begin += kRowBlock) {
    const RowBlock block = x.block(begin, rows, matrix);
    const std::int64_t tiles = (block.count + kGroupRows - 1) / kGroupRows * (kVecs / kGroupVecs);
    const std::int64_t lines = begin == 0 ? (kGroupBytes / 64 + tiles - 1) / tiles : 0;  // that each tile asks for
    alignas(64) float total[kRowBlock * kPanel] = {};
    for (std::int64_t group = 0; group * F::kGroup < matrix.padded_inputs; ++group) {
      const unsigned char *at = w + group * kGroupBytes, *ahead = at + kPrefetchBytes;
      const unsigned char* inputs = block.values + group * (F::kGroup / 2) * block.count * 4;
      const bfloat16* of_group = scales + group * (F::kMinima ? 2 : 1) * kPanel;
      for (int v = 0; v < kVecs; v += kGroupVecs)
        for (std::int64_t m = 0; m < block.count; m += kGroupRows) {
          for (std::int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead);
          const int count = static_cast<int>(std::min<std::int64_t>(kGroupRows, block.count - m));
          last_group_rows<F, kGroupRows>(count, at + v * 4 * Vec::width, of_group + v * Vec::width, inputs + m * 4, block, group * block.count + m,
                                         total + m * kPanel + v * Vec::width);
        }
    }
    for (std::int64_t m = 0; m < block.count; ++m)
      for (int v = 0; v < kVecs; ++v) {
        float* to = y + (begin + m) * ldy + v * Vec::width;
        const Vec t = Vec::load(total + m * kPanel + v * Vec::width);
        (add_to ? Vec::load(to) + t : t).store(to);
      }
  }
}

template <class F, int P, int M>
void last_integer_rows(int rows, const Matrix& matrix, std::int64_t panel, const RowBlock& x, std::int64_t row, float* y, std::ptrdiff_t ldy,
                       bool add_to) {
  if constexpr (M > 0) {
    if (rows == M) return integer_tile<F, M, P, true>(matrix, panel, x, row, y, ldy, add_to);
    last_integer_rows<F, P, M - 1>(rows, matrix, panel, x, row, y, ldy, add_to);
  }
}

// y (rows, ldy) = or += x times panels [first, last) of a matrix.
template <class F>
void multiply_integers(const Matrix& matrix, std::int64_t first, std::int64_t last, const Rows& x, std::int64_t rows, float* y, std::ptrdiff_t ldy,
                       bool add_to) {
  constexpr int kPairRows = kMostIntegerRows / 2 > 0 ? kMostIntegerRows / 2 : 1;
  for (std::int64_t panel = first; panel < last;) {
    float* out = y + panel * kPanel;
    if (rows <= kPairRows && panel + 2 <= last) {  // two panels at a time: more chains in flight
      last_integer_rows<F, 2, kPairRows>(static_cast<int>(rows), matrix, panel, x.block(0, rows, matrix), 0, out, ldy, add_to);
      panel += 2;
      continue;
    }
    if constexpr (kByGroups)
      if (rows > kMostIntegerRows) {
        multiply_by_groups<F>(matrix, panel++, x, rows, out, ldy, add_to);
        continue;
      }
    for (std::int64_t begin = 0; begin < rows; begin += kRowBlock) {
      const RowBlock block = x.block(begin, rows, matrix);
      std::int64_t m = 0;
      for (; m + kMostIntegerRows <= block.count; m += kMostIntegerRows) {
        const auto full = begin + m == 0 ? &integer_tile<F, kMostIntegerRows, 1, true> : &integer_tile<F, kMostIntegerRows, 1, false>;
        full(matrix, panel, block, m, out + (begin + m) * ldy, ldy, add_to);
      }
      last_integer_rows<F, 1, kMostIntegerRows - 1>(static_cast<int>(block.count - m), matrix, panel, block, m, out + (begin + m) * ldy, ldy, add_to);
    }
    ++panel;
  }
}

// Rounds groups [first, last) of a row to 16 bits: q = round(x / scale), scale = max |x| / 32512 of the group: 15 bits and
// a half, so that the sum of a group fits in 32. NaN and infinities make the scale NaN, so that they are seen in what is
// computed.
template <class F>
void quantize_row(const float* x, std::int64_t first, std::int64_t last, const RowBlock& out, std::int64_t row) {
  constexpr int kGroup = F::kGroup, kSteps = kGroup / F::kStep;
  constexpr float kMost = 32512;
  static_assert(kGroup * 255.0 * kMost + 128.0 * kGroup * kMost < 2147483648.0);
  const std::int64_t stride = out.count * 4;
  unsigned char* to = out.values + row * 4 + first * (kGroup / 2) * stride;
  for (std::int64_t group = first; group < last; ++group) {
    const float* from = x + group * kGroup;
    Vec largest = Vec::set(0), odd = Vec::set(0), sum = Vec::set(0);
    for (int i = 0; i < kGroup; i += Vec::width) {
      const Vec a = Vec::load(from + i);
      largest = Vec::max(largest, magnitude(a));
      odd = odd + (a - a);  // 0 of a number
    }
    const float most = largest.max(), strange = odd.sum();
    const bool usable = most > 1e-30f && strange == 0;  // below: nothing that a sum would feel, and the inverse overflows
    alignas(64) std::int16_t rounded[kGroup] = {};
    if (usable) {
      const Vec inverse = Vec::set(kMost / most);
      for (int i = 0; i < kGroup; i += Vec::width) {
        const Vec q = round(Vec::load(from + i) * inverse);
        q.store(rounded + i);
        sum = sum + q;
      }
    }
    for (int step = 0; step < kSteps; ++step)
      for (int quad = 0; quad < F::kQuads; quad += 2) {  // of four inputs the first and third, the second and fourth: as the fields of weights are
        std::uint64_t four;
        std::memcpy(&four, rounded + step * F::kStep + quad * 2, 8);
        const std::uint64_t odd_ones = four >> 16;
        const std::uint32_t pairs[] = {static_cast<std::uint32_t>((four & 0xffff) | (odd_ones & 0xffff0000u)),
                                       static_cast<std::uint32_t>((odd_ones & 0xffff) | (odd_ones >> 16 & 0xffff0000u))};
        std::memcpy(to + (quad * kSteps + step) * stride, pairs, 4);
        std::memcpy(to + ((quad + 1) * kSteps + step) * stride, pairs + 1, 4);
      }
    to += kGroup / 2 * stride;
    const std::int64_t at = group * out.count + row;
    out.scales[at] = (usable ? most / kMost : 0.0f) + strange;
    out.offsets[at] = F::kMinima ? 0 : -128 * static_cast<std::int32_t>(sum.sum());
    out.sums[at] = out.scales[at] * sum.sum();
  }
}

void quantize(const float* x, const Matrix& matrix, const RowBlock& out, std::int64_t row, std::int64_t first_group, std::int64_t last_group) {
  if (matrix.format == WeightFormat::int8) quantize_row<Int8Products>(x, first_group, last_group, out, row);
  else quantize_row<Int4Products>(x, first_group, last_group, out, row);
}

Kernels with_integers(Kernels table) {
  table.multiply[static_cast<int>(WeightFormat::int8)] = &multiply_integers<Int8Products>;
  table.multiply[static_cast<int>(WeightFormat::int4)] = &multiply_integers<Int4Products>;
  table.quantize = &quantize;
  return table;
}

// A block of a float32 matrix product, written once over `Vec` and compiled once per instruction set: this file is
// included inside namespaces fasttrain::{scalar,avx2} and therefore has no include guard.
//
// The scheme is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008) and of BLIS: a
// block of `a` lies packed in the second-level cache, a panel of `b` in the first, and the innermost loop keeps a tile
// of the result in registers. Other than there, a panel of `b` is packed when its turn comes and used at once by the
// whole block: what it is packed from may be tens of megabytes, and is read once.

constexpr std::int64_t kTileRows = 6;
constexpr std::int64_t kTileColumns = 2 * Vec::width;

// What is left of a tile at the edge, and where it goes.
struct Target {
  float* c;
  std::int64_t stride, rows, columns;
  const float* bias;  // of these columns, or null
  bool add;
};

// a: (depth, 6), b: (depth, kTileColumns), both packed. The loops are unrolled so that the tile stays in registers.
inline void multiply_tile(std::int64_t depth, const float* a, const float* b, const Target& to) {
  Vec tile[kTileRows][2];
  const bool whole = to.rows == kTileRows && to.columns == kTileColumns;
  if (whole)
    for (std::int64_t i = 0; i < kTileRows; ++i) __builtin_prefetch(to.c + i * to.stride, 1);
  FASTTRAIN_UNROLL(6)
  for (int i = 0; i < kTileRows; ++i) tile[i][0] = tile[i][1] = Vec::set(0);
  for (std::int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns) {
    const Vec b0 = Vec::load(b), b1 = Vec::load(b + Vec::width);
    FASTTRAIN_UNROLL(6)
    for (int i = 0; i < kTileRows; ++i) {
      const Vec factor = Vec::set(a[i]);
      tile[i][0] = Vec::fma(factor, b0, tile[i][0]);
      tile[i][1] = Vec::fma(factor, b1, tile[i][1]);
    }
  }
  if (whole) {
    const Vec bias0 = to.bias == nullptr ? Vec::set(0) : Vec::load(to.bias);
    const Vec bias1 = to.bias == nullptr ? Vec::set(0) : Vec::load(to.bias + Vec::width);
    FASTTRAIN_UNROLL(6)
    for (int i = 0; i < kTileRows; ++i) {
      float* c = to.c + i * to.stride;
      tile[i][0] = tile[i][0] + (to.add ? Vec::load(c) : bias0);
      tile[i][1] = tile[i][1] + (to.add ? Vec::load(c + Vec::width) : bias1);
      tile[i][0].store(c);
      tile[i][1].store(c + Vec::width);
    }
    return;
  }
  float values[kTileRows][kTileColumns];
  FASTTRAIN_UNROLL(6)
  for (int i = 0; i < kTileRows; ++i) tile[i][0].store(values[i]), tile[i][1].store(values[i] + Vec::width);
  for (std::int64_t i = 0; i < to.rows; ++i)
    for (std::int64_t j = 0; j < to.columns; ++j) {
      float* c = to.c + i * to.stride + j;
      *c = values[i][j] + (to.add ? *c : to.bias == nullptr ? 0.0f : to.bias[j]);
    }
}

// Rows of a beyond the last repeat it: their results are thrown away. `to` has kSlack values more than the block.
constexpr std::int64_t kSlack = 8;
constexpr std::int64_t kAhead = 4;  // columns that are fetched ahead: they lie in different pages, where the processor does not

// a's rows lie in memory one after the other: panels of 6 rows x depth, each (depth, 6).
inline void pack_rows(const float* a, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* to) {
  for (std::int64_t row = 0; row < rows; row += kTileRows, to += kTileRows * depth) {
    const float* from[8];
    for (std::int64_t i = 0; i < 8; ++i) from[i] = a + std::min(row + std::min(i, kTileRows - 1), rows - 1) * stride;
    std::int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
      if (k % 16 == 0)
        for (std::int64_t i = 0; i < kTileRows; ++i) __builtin_prefetch(from[i] + kTileRows * stride + k);
      transpose_8x8(from, k, to + k * kTileRows, kTileRows);  // each overwrites two of the next
    }
    for (; k < depth; ++k)
      for (std::int64_t i = 0; i < kTileRows; ++i) to[k * kTileRows + i] = from[i][k];
  }
}

// a's columns lie in memory one after the other, `stride` apart: the same panels.
inline void pack_columns(const float* a, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* to) {
  const std::int64_t whole = rows / kTileRows, rest = rows % kTileRows;
  for (std::int64_t k = 0; k < depth; ++k, to += kTileRows) {
    const float* from = a + k * stride;
    for (std::int64_t line = 0; line < rows; line += 16) __builtin_prefetch(from + kAhead * stride + line);
    for (std::int64_t i = 0; i < whole; ++i)
      std::memcpy(to + i * kTileRows * depth, from + i * kTileRows, kTileRows * sizeof(float));
    for (std::int64_t i = 0; rest > 0 && i < kTileRows; ++i)
      to[whole * kTileRows * depth + i] = from[whole * kTileRows + std::min(i, rest - 1)];
  }
}

// (depth, kTileColumns) of b whose rows lie one after the other in memory.
inline void pack_panel_of_rows(const float* b, std::int64_t stride, std::int64_t columns, std::int64_t depth, float* to) {
  if (columns < kTileColumns) std::memset(to, 0, depth * kTileColumns * sizeof(float));
  for (std::int64_t k = 0; k < depth; ++k, b += stride, to += kTileColumns) {
    for (std::int64_t line = 0; line < kTileColumns; line += 16) __builtin_prefetch(b + kTileColumns + line);  // the next panel's
    if (columns < kTileColumns) std::memcpy(to, b, columns * sizeof(float));
    else Vec::load(b).store(to), Vec::load(b + Vec::width).store(to + Vec::width);
  }
}

// The same of b whose columns lie one after the other.
inline void pack_panel_of_columns(const float* b, std::int64_t stride, std::int64_t columns, std::int64_t depth, float* to) {
  for (std::int64_t first = 0; first < kTileColumns; first += 8) {
    const std::int64_t count = std::min<std::int64_t>(8, kTileColumns - first);
    const float* from[8];
    for (std::int64_t j = 0; j < 8; ++j) from[j] = b + std::min(first + j, columns - 1) * stride;
    std::int64_t k = 0;
    if (count == 8)
      for (; k + 8 <= depth; k += 8) {
        if (k % 16 == 0)
          for (std::int64_t j = 0; j < 8; ++j) __builtin_prefetch(from[j] + kTileColumns * stride + k);
        transpose_8x8(from, k, to + k * kTileColumns + first, kTileColumns);
      }
    for (; k < depth; ++k)
      for (std::int64_t j = 0; j < count; ++j) to[k * kTileColumns + first + j] = from[j][k];
  }
}

// c (+)= a @ b (+ bias) for one part of the result, over the whole depth.
inline void multiply_part(const Product& p, const Part& part, float* packed_a, float* packed_b) {
  const std::int64_t rows = part.rows(), depths = (p.depth + kDepth - 1) / kDepth;
  const std::int64_t step = depths == 0 ? 1 : ((p.depth + depths - 1) / depths + 7) / 8 * 8;
  for (std::int64_t first = 0; first < p.depth; first += step) {
    const std::int64_t depth = std::min(step, p.depth - first);
    const float* a = p.a + part.row * p.a_row + first * p.a_column;
    if (p.a_column == 1) pack_rows(a, p.a_row, rows, depth, packed_a);
    else pack_columns(a, p.a_column, rows, depth, packed_a);
    for (std::int64_t column = part.column; column < part.column_end; column += kTileColumns) {
      const std::int64_t columns = std::min(kTileColumns, part.column_end - column);
      const float* b = p.b + first * p.b_row + column * p.b_column;
      if (p.b_column == 1) pack_panel_of_rows(b, p.b_row, columns, depth, packed_b);
      else pack_panel_of_columns(b, p.b_column, columns, depth, packed_b);
      const bool begun = p.add || first > 0;
      const float* bias = p.bias == nullptr || begun ? nullptr : p.bias + column;
      for (std::int64_t row = 0; row < rows; row += kTileRows)
        multiply_tile(depth, packed_a + row * depth, packed_b,
                      {p.c + (part.row + row) * p.c_row + column, p.c_row, std::min(kTileRows, rows - row), columns, bias, begun});
    }
  }
}

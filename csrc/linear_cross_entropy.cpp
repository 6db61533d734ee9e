// linear_cross_entropy for CPUs in C++: the memory that the chunks are computed in, and what gradient filtering needs
// beside matrix products. The row kernel that turns a chunk of logits into its gradient is cross_entropy's
// (fasttrain::cross_entropy_fused_); the rule of the filter stands in fasttrain/ops/_gradient_filter.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "half_types.h"
#include "huge_pages.h"
#include "isa.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty_matrix(const Tensor& like, std::int64_t rows, std::int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "empty_matrix: got ", rows, " x ", columns);
  return empty_on_huge_pages(like, rows, columns);
}

inline float magnitude(float x) { return std::fabs(x); }
inline double magnitude(double x) { return std::fabs(x); }
inline float magnitude(bfloat16 x) { return std::fabs(to_float(x)); }
inline float magnitude(float16 x) { return std::fabs(to_float(x)); }

constexpr std::int64_t kTile = 512;  // columns looked at together: a tile of a block of rows stays in the L2 cache

}  // namespace
}  // namespace fasttrain

namespace fasttrain::scalar { namespace {
#include "live_block.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fasttrain::avx2 { namespace {
#include "live_block.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace fasttrain::avx512 { namespace {
#include "live_block.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

Tensor indices(const Tensor& like, const std::vector<std::uint8_t>& alive) {
  const std::int64_t count = std::count(alive.begin(), alive.end(), std::uint8_t{1});
  Tensor found = torch::stable::new_empty(like, {count}, ScalarType::Long);
  std::int64_t* at = static_cast<std::int64_t*>(found.mutable_data_ptr());
  for (std::size_t i = 0; i < alive.size(); ++i)
    if (alive[i]) *at++ = static_cast<std::int64_t>(i);
  return found;
}

template <class Block>
std::tuple<Tensor, Tensor, Tensor> live_block_of(const Tensor& z, const Tensor& scale, double eps) {
  const std::int64_t n = z.size(0), V = z.size(1);
  Block block{n, V, z.stride(0), static_cast<const typename Block::Element*>(z.const_data_ptr()), {}, {}, {}, {}, {}};
  const std::int64_t stride = scale.dim() == 0 ? 0 : scale.stride(0);
  for (std::int64_t i = 0; i < n; ++i) {
    const double factor = scale.scalar_type() == ScalarType::Double
                              ? static_cast<const double*>(scale.const_data_ptr())[i * stride]
                              : static_cast<const float*>(scale.const_data_ptr())[i * stride];
    block.limits.push_back(static_cast<typename Block::Real>(eps * std::fabs(factor)));
  }
  block.column_alive.resize(V);
  block.row_alive.resize(block.tiles() * n);
  block.dead.resize(block.tiles() * n);
  block.all.resize(block.tiles() * n);
  torch::stable::parallel_for(0, block.tiles(), 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<typename Block::Real> seen(n * kTile);
    for (std::int64_t tile = begin; tile < end; ++tile) block.look_at(tile, seen.data());
  });
  std::vector<std::uint8_t> row_alive(n);
  Tensor skipped = torch::stable::new_empty(z, {n}, ScalarType::Double);
  double* left_out = static_cast<double*>(skipped.mutable_data_ptr());
  for (std::int64_t i = 0; i < n; ++i) {
    double dead = 0, all = 0;
    for (std::int64_t tile = 0; tile < block.tiles(); ++tile) {
      row_alive[i] |= block.row_alive[tile * n + i];
      dead += block.dead[tile * n + i];
      all += block.all[tile * n + i];
    }
    left_out[i] = row_alive[i] ? dead : all;
  }
  return {indices(z, row_alive), indices(z, block.column_alive), skipped};
}

template <class F>
auto dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    default: return f(float16{});
  }
}

void check_matrix(const char* name, const Tensor& z) {
  const ScalarType dtype = z.scalar_type();
  STD_TORCH_CHECK(z.dim() == 2 && (z.size(1) <= 1 || z.stride(1) == 1), name, ": rows must be contiguous");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half, name, ": must be float32, float64, bfloat16 or float16");
}

const std::int64_t* check_ids(const char* name, const Tensor& ids, std::int64_t size) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), name,
                  ": must be contiguous int64");
  const std::int64_t* p = static_cast<const std::int64_t*>(ids.const_data_ptr());
  for (std::int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < size, name, "[", i, "] is ", p[i], ", not in [0, ", size, ")");
  return p;
}

// (live rows, live columns, sum of magnitudes left out of each row) of a gradient z (n, V) multiplied by scale, 0-d or (n,).
std::tuple<Tensor, Tensor, Tensor> live_block(const Tensor& z, const Tensor& scale, double eps) {
  check_matrix("live_block: z", z);
  STD_TORCH_CHECK(scale.dim() == 0 || (scale.dim() == 1 && scale.size(0) == z.size(0)),
                  "live_block: scale must be one value, or one for each row");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float || scale.scalar_type() == ScalarType::Double,
                  "live_block: scale must be float32 or float64");
  return dispatch(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
#if defined(__x86_64__)
    if (current_isa() == Isa::avx512) return live_block_of<avx512::Block<T>>(z, scale, eps);
    if (current_isa() == Isa::avx2) return live_block_of<avx2::Block<T>>(z, scale, eps);
#endif
    return live_block_of<scalar::Block<T>>(z, scale, eps);
  });
}

// z[rows][:, columns], contiguous.
Tensor take(const Tensor& z, const Tensor& rows, const Tensor& columns) {
  check_matrix("take: z", z);
  const std::int64_t r = rows.numel(), c = columns.numel();
  const std::int64_t *row = check_ids("take: rows", rows, z.size(0)), *column = check_ids("take: columns", columns, z.size(1));
  Tensor taken = torch::stable::new_empty(z, {r, c});
  dispatch(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(z.const_data_ptr());
    T* to = static_cast<T*>(taken.mutable_data_ptr());
    const std::int64_t stride = z.stride(0);
    torch::stable::parallel_for(0, r, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        for (std::int64_t j = 0; j < c; ++j) to[i * c + j] = from[row[i] * stride + column[j]];
    });
  });
  return taken;
}

// total[ids] += part, ids all different.
void add_rows_(Tensor total, const Tensor& ids, const Tensor& part) {
  check_matrix("add_rows_: total", total);
  check_matrix("add_rows_: part", part);
  STD_TORCH_CHECK(part.size(0) == ids.numel() && part.size(1) == total.size(1) && part.scalar_type() == total.scalar_type(),
                  "add_rows_: part must have a row for each id, and total's type");
  const std::int64_t* id = check_ids("add_rows_: ids", ids, total.size(0));
  dispatch(total.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_floating_point_v<T>) {
      T* to = static_cast<T*>(total.mutable_data_ptr());
      const T* from = static_cast<const T*>(part.const_data_ptr());
      const std::int64_t D = total.size(1), to_stride = total.stride(0), from_stride = part.stride(0);
      torch::stable::parallel_for(0, ids.numel(), 64, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
          for (std::int64_t j = 0; j < D; ++j) to[id[i] * to_stride + j] += from[i * from_stride + j];
      });
    } else {
      STD_TORCH_CHECK(false, "add_rows_: must be float32 or float64");
    }
  });
}

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) {
  m.impl("empty_matrix", TORCH_BOX(&fasttrain::empty_matrix));
  m.impl("live_block", TORCH_BOX(&fasttrain::live_block));
  m.impl("take", TORCH_BOX(&fasttrain::take));
  m.impl("add_rows_", TORCH_BOX(&fasttrain::add_rows_));
}

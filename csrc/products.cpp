// Float32 matrix products for CPUs: c (+)= a @ b + bias. Which processors they are for, and why, stands in
// fasttrain/products.py: none that computes 512 bits at once, so there is no kernel for AVX-512. The result does not depend
// on the number of threads: no element is summed by two of them.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "inlining.h"
#include "isa.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// c (rows, columns) = a (rows, depth) @ b (depth, columns); c's columns follow each other in memory, and a's and b's in
// one of the two directions.
struct Product {
  std::int64_t rows, columns, depth;
  const float *a, *b, *bias;
  float* c;
  std::int64_t a_row, a_column, b_row, b_column, c_row;
  bool add;
};

struct Part {
  std::int64_t row, row_end, column, column_end;
  std::int64_t rows() const { return row_end - row; }
};

constexpr std::int64_t kDepth = 256;      // of a packed block: 16 columns of b take 16 KiB of the first-level cache
constexpr std::int64_t kBlockRows = 240;  // of a packed block: 240 KiB, about half of a second-level cache
constexpr std::int64_t kBlockColumns = 1024;
constexpr std::int64_t kSlab = 4096;      // of the depth: what all threads read of b meanwhile stays in the third-level cache
constexpr std::int64_t kWidestTile = 16;  // columns

}  // namespace
}  // namespace fasttrain

#include "simd_scalar.h"
namespace fasttrain::scalar { namespace {
#include "product_blocks.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
namespace fasttrain::avx2 { namespace {
#include "product_blocks.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// A thread's own, for as long as it lives.
float* workspace() {
  constexpr std::int64_t kValues = (kBlockRows + kWidestTile) * kDepth + 8;  // as packing wants behind the block
  thread_local std::unique_ptr<float, Free> memory;
  if (memory == nullptr) memory.reset(static_cast<float*>(std::aligned_alloc(64, (kValues * sizeof(float) + 63) / 64 * 64)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory.get();
}

void multiply(Isa isa, const Product& product, const Part& part) {
  float *packed_b = workspace(), *packed_a = packed_b + kWidestTile * kDepth;
#if defined(__x86_64__)
  if (isa != Isa::scalar) return avx2::multiply_part(product, part, packed_a, packed_b);
#endif
  scalar::multiply_part(product, part, packed_a, packed_b);
}

std::int64_t part_of(std::int64_t size, std::int64_t parts, std::int64_t unit) {
  return ((size + parts - 1) / parts + unit - 1) / unit * unit;
}

// Every thread takes parts of the result until none is left: the cores of a shared machine are not equally fast.
void multiply_in_parts(Isa isa, const Product& p, std::int64_t threads, std::int64_t least_parts) {
  constexpr std::int64_t kRowUnit = 6, kColumnUnit = kWidestTile;
  std::int64_t down = (p.rows + kBlockRows - 1) / kBlockRows, across = (p.columns + kBlockColumns - 1) / kBlockColumns;
  while (down * across < least_parts && threads > 1) {
    const std::int64_t height = p.rows / down, width = p.columns / across;
    if (height < 8 * kRowUnit && width < 4 * kColumnUnit) break;
    if (height >= width || width < 4 * kColumnUnit) ++down;
    else ++across;
  }
  const std::int64_t height = part_of(p.rows, down, kRowUnit), width = part_of(p.columns, across, kColumnUnit);
  down = (p.rows + height - 1) / height;
  across = (p.columns + width - 1) / width;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, std::min(threads, down * across), 1, [&](std::int64_t, std::int64_t) {
    try {  // an exception must not leave the parallel region
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < down * across;) {
        const std::int64_t row = i % down * height, column = i / down * width;  // those that share b's columns in a row
        multiply(isa, p, {row, std::min(row + height, p.rows), column, std::min(column + width, p.columns)});
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "product: no memory for the packed blocks of a thread");
}

void check(const char* name, const Tensor& t, std::int64_t rows, std::int64_t columns) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "product: ", name, " must be float32");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "product: ", name, " must be (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(t.stride(0) == 1 || t.stride(1) == 1, "product: ", name, " must have its rows or its columns in one piece each");
}

// out (m, n) = a (m, k) @ b (k, n) + bias (n,), or out += a @ b.
void product_(Tensor out, const Tensor& a, const Tensor& b, std::optional<Tensor> bias, bool add) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "product: a and b must be matrices");
  const std::int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  check("a", a, m, k);
  check("b", b, k, n);
  check("out", out, m, n);
  STD_TORCH_CHECK(out.stride(1) == 1 || n == 1, "product: out's rows must be in one piece each");
  STD_TORCH_CHECK(!bias.has_value() || (!add && bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous() &&
                                        bias->scalar_type() == ScalarType::Float),
                  "product: bias must be contiguous float32 of (", n, "), and goes with no sum");
  if (m == 0 || n == 0) return;
  Product p{m, n, k, static_cast<const float*>(a.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()),
            bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
            static_cast<float*>(out.mutable_data_ptr()), a.stride(0), a.stride(1), b.stride(0), b.stride(1), out.stride(0), add};
  STD_TORCH_CHECK(k > 0, "product: a has no columns; the product is that of nothing");
  const std::int64_t threads = torch::stable::get_num_threads();
  for (std::int64_t first = 0; first < k; first += kSlab) {
    Product slab = p;
    slab.depth = std::min(kSlab, k - first);
    slab.a += first * p.a_column;
    slab.b += first * p.b_row;
    slab.add = add || first > 0;
    multiply_in_parts(current_isa(), slab, threads, k > kSlab ? threads : 2 * threads);
  }
}

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) { m.impl("product_", TORCH_BOX(&fasttrain::product_)); }

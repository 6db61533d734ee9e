// cross_entropy for CPUs: fasttrain::cross_entropy_{forward,fused,fused_,backward}, whose schemas and formula stand in
// fasttrain/ops/cross_entropy.py, and its two halves for rows that are cut over processes, cross_entropy_shard_{statistics,
// gradient,gradient_}: fasttrain/ops/_shard_rows.py. This file validates, allocates, and gives rows to threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
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

struct Problem {
  std::int64_t N, V, row_stride;  // logits (N, V), last dimension contiguous
  const void* logits;
  const std::int64_t* targets;  // (N,)
  std::int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  void* gradient = nullptr;    // (N, V) contiguous, the logits' type; may be the logits themselves
  bool stream = false;         // the gradient is larger than the caches
  bool float64 = false;
  void* losses = nullptr;      // (N,) float32, or float64 for float64 logits
  double* lse = nullptr;             // (N,)
  const void* row_scales = nullptr;  // the gradient is that of sum(row_scales * losses)
  std::int64_t row_scales_stride = 0;
  std::int64_t all_classes = 0;     // V, or that of all shards together: what label smoothing spreads over
  double* target_logits = nullptr;  // (N,) statistics only: capped; 0 where the target is another shard's
  double* logit_sums = nullptr;     // (N,) statistics only: of the capped logits; 0 without label smoothing

  void set_row(std::int64_t row, double loss, double row_lse) const {
    if (float64) static_cast<double*>(losses)[row] = loss;
    else static_cast<float*>(losses)[row] = static_cast<float>(loss);
    lse[row] = row_lse;
  }
  double row_scale(std::int64_t row) const {
    const std::int64_t i = row * row_scales_stride;
    return float64 ? static_cast<const double*>(row_scales)[i] : static_cast<const float*>(row_scales)[i];
  }
};

enum class Pass { forward, fused, backward, statistics };

// Threads take rows in small groups: ignored rows cost nothing, so equal shares would not be equal work, and the rows of a
// group follow each other in memory, so that the prefetch at the end of one fetches the next.
struct RowQueue {
  std::int64_t rows, group;
  std::atomic<std::int64_t> next{0};
  template <class F>
  void each(F&& f) {
    for (std::int64_t row; (row = next.fetch_add(group, std::memory_order_relaxed)) < rows;)
      for (const std::int64_t last = std::min(rows, row + group); row < last; ++row) f(row);
  }
};

}  // namespace
}  // namespace fasttrain

#include "simd_scalar.h"
namespace fasttrain::scalar { namespace {
#include "cross_entropy_rows.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
namespace fasttrain::avx2 { namespace {
#include "cross_entropy_rows.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
namespace fasttrain::avx512 { namespace {
#include "cross_entropy_rows.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

template <class T>
void run_rows(Isa isa, const Problem& problem, Pass pass, RowQueue& queue) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512::run_rows<avx512::Vec, T>(problem, pass, queue);
  if (isa == Isa::avx2) return avx2::run_rows<avx2::Vec, T>(problem, pass, queue);
#endif
  scalar::run_rows<scalar::Vec, T>(problem, pass, queue);
}

void run(const Problem& problem, Pass pass, ScalarType dtype) {
  const Isa isa = current_isa();
  std::atomic<bool> out_of_memory{false};
  const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), std::max<std::int64_t>(problem.N, 1));
  RowQueue queue{problem.N, std::clamp<std::int64_t>(problem.N / (threads * 16), 1, 8)};
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      try {  // an exception must not leave the parallel region
        switch (dtype) {
          case ScalarType::Float: run_rows<float>(isa, problem, pass, queue); break;
          case ScalarType::BFloat16: run_rows<bfloat16>(isa, problem, pass, queue); break;
          case ScalarType::Half: run_rows<float16>(isa, problem, pass, queue); break;
          default: scalar::run_rows<scalar::VecF64, double>(problem, pass, queue);
        }
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streaming stores are weakly ordered
  });
  STD_TORCH_CHECK(!out_of_memory, "cross_entropy: no memory for two rows of ", problem.V, " values per thread");
}

// shard: a target outside of [0, V) is another shard's.
Problem make_problem(const Tensor& logits, const Tensor& targets, std::int64_t ignore_index, double label_smoothing,
                     double z_loss, double softcap, bool shard = false) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 2, "cross_entropy: logits must be (N, V), got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0), "cross_entropy: targets must be (N,)");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(),
                  "cross_entropy: targets must be contiguous int64");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double, "cross_entropy: logits must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1 || logits.size(0) == 0, "cross_entropy: logits' last dimension must be contiguous");
  Problem p{};
  p.N = logits.size(0);
  p.V = p.all_classes = logits.size(1);
  p.row_stride = logits.stride(0);
  p.logits = logits.const_data_ptr();
  p.targets = targets.const_data_ptr<std::int64_t>();
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  p.float64 = dtype == ScalarType::Double;
  for (std::int64_t row = 0; row < p.N && !shard; ++row) {
    const std::int64_t y = p.targets[row];
    STD_TORCH_CHECK(y == ignore_index || (y >= 0 && y < p.V), "cross_entropy: targets[", row, "] is ", y,
                    ", which is neither ignore_index (", ignore_index, ") nor in [0, ", p.V, ")");
  }
  return p;
}

bool larger_than_caches(const Tensor& t) { return t.numel() * static_cast<std::int64_t>(t.element_size()) >= (8 << 20); }

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& targets, std::int64_t ignore_index,
                                                 double label_smoothing, double z_loss, double softcap) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap);
  const ScalarType out = p.float64 ? ScalarType::Double : ScalarType::Float;
  Tensor losses = torch::stable::new_empty(logits, {p.N}, out), lse = torch::stable::new_empty(logits, {p.N}, ScalarType::Double);
  p.losses = losses.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<double>();
  run(p, Pass::forward, logits.scalar_type());
  return {losses, lse};
}

// scale: one value, or one for each row.
std::tuple<Tensor, Tensor> run_fused(Problem& p, const Tensor& logits, const Tensor& scale, const Tensor& gradient) {
  const ScalarType out = p.float64 ? ScalarType::Double : ScalarType::Float;
  const bool per_row = scale.dim() == 1 && scale.size(0) == p.N;
  STD_TORCH_CHECK((per_row || scale.numel() == 1) && scale.scalar_type() == out,
                  "cross_entropy: scale must be one value, or one for each row, of the loss's type");
  Tensor losses = torch::stable::new_empty(logits, {p.N}, out), lse = torch::stable::new_empty(logits, {p.N}, ScalarType::Double);
  p.row_scales = scale.const_data_ptr();
  p.row_scales_stride = per_row ? scale.stride(0) : 0;
  p.losses = losses.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<double>();
  p.gradient = gradient.mutable_data_ptr();
  run(p, Pass::fused, logits.scalar_type());
  return {losses, lse};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fused(const Tensor& logits, const Tensor& targets, const Tensor& scale,
                                                       std::int64_t ignore_index, double label_smoothing, double z_loss,
                                                       double softcap) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap);
  Tensor gradient = empty_on_huge_pages(logits, p.N, p.V);
  p.stream = larger_than_caches(gradient);
  auto [losses, lse] = run_fused(p, logits, scale, gradient);
  return {losses, lse, gradient};
}

// Writes the gradient over the logits. Plain stores: each line is in cache from having been read.
std::tuple<Tensor, Tensor> cross_entropy_fused_(Tensor logits, const Tensor& targets, const Tensor& scale,
                                                std::int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap);
  STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy_fused_: logits must be contiguous");
  return run_fused(p, logits, scale, logits);
}

Tensor cross_entropy_backward(const Tensor& grad_losses, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                              std::int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap);
  const ScalarType out = p.float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad_losses.dim() == 1 && grad_losses.size(0) == p.N && grad_losses.scalar_type() == out,
                  "cross_entropy: grad_losses must be (N,) of the loss's type");
  STD_TORCH_CHECK(lse.dim() == 1 && lse.size(0) == p.N && lse.scalar_type() == ScalarType::Double && lse.is_contiguous(),
                  "cross_entropy: lse must be (N,) as the forward returned it");
  Tensor gradient = empty_on_huge_pages(logits, p.N, p.V);
  p.lse = static_cast<double*>(lse.data_ptr());
  p.row_scales = grad_losses.const_data_ptr();
  p.row_scales_stride = grad_losses.stride(0);
  p.gradient = gradient.mutable_data_ptr();
  p.stream = larger_than_caches(gradient);
  run(p, Pass::backward, logits.scalar_type());
  return gradient;
}

// (3, N) float64: log-sum-exp, the target's logit, the sum of the logits.
Tensor cross_entropy_shard_statistics(const Tensor& logits, const Tensor& targets, std::int64_t ignore_index,
                                      double label_smoothing, double z_loss, double softcap) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap, true);
  Tensor statistics = torch::stable::new_empty(logits, {3, p.N}, ScalarType::Double);
  p.lse = statistics.mutable_data_ptr<double>();
  p.target_logits = p.lse + p.N;
  p.logit_sums = p.target_logits + p.N;
  run(p, Pass::statistics, logits.scalar_type());
  return statistics;
}

// lse, scale: (N,). lse is that of the whole rows, and so is all_classes.
void write_shard_gradient(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& scale,
                          std::int64_t all_classes, std::int64_t ignore_index, double label_smoothing, double z_loss,
                          double softcap, const Tensor& gradient, bool stream) {
  Problem p = make_problem(logits, targets, ignore_index, label_smoothing, z_loss, softcap, true);
  const ScalarType out = p.float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == p.N && scale.scalar_type() == out,
                  "cross_entropy_shard_gradient: scale must be (N,) of the loss's type");
  STD_TORCH_CHECK(lse.dim() == 1 && lse.size(0) == p.N && lse.scalar_type() == ScalarType::Double && lse.is_contiguous(),
                  "cross_entropy_shard_gradient: lse must be (N,) contiguous float64");
  p.all_classes = all_classes;
  p.lse = static_cast<double*>(lse.data_ptr());
  p.row_scales = scale.const_data_ptr();
  p.row_scales_stride = scale.stride(0);
  p.gradient = gradient.mutable_data_ptr();
  p.stream = stream;
  run(p, Pass::backward, logits.scalar_type());
}

Tensor cross_entropy_shard_gradient(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& scale,
                                    std::int64_t all_classes, std::int64_t ignore_index, double label_smoothing,
                                    double z_loss, double softcap) {
  Tensor gradient = empty_on_huge_pages(logits, logits.size(0), logits.size(1));
  write_shard_gradient(logits, targets, lse, scale, all_classes, ignore_index, label_smoothing, z_loss, softcap, gradient,
                       larger_than_caches(gradient));
  return gradient;
}

void cross_entropy_shard_gradient_(Tensor logits, const Tensor& targets, const Tensor& lse, const Tensor& scale,
                                   std::int64_t all_classes, std::int64_t ignore_index, double label_smoothing,
                                   double z_loss, double softcap) {
  STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy_shard_gradient_: logits must be contiguous");
  write_shard_gradient(logits, targets, lse, scale, all_classes, ignore_index, label_smoothing, z_loss, softcap, logits,
                       false);
}

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fasttrain::cross_entropy_forward));
  m.impl("cross_entropy_fused", TORCH_BOX(&fasttrain::cross_entropy_fused));
  m.impl("cross_entropy_fused_", TORCH_BOX(&fasttrain::cross_entropy_fused_));
  m.impl("cross_entropy_backward", TORCH_BOX(&fasttrain::cross_entropy_backward));
  m.impl("cross_entropy_shard_statistics", TORCH_BOX(&fasttrain::cross_entropy_shard_statistics));
  m.impl("cross_entropy_shard_gradient", TORCH_BOX(&fasttrain::cross_entropy_shard_gradient));
  m.impl("cross_entropy_shard_gradient_", TORCH_BOX(&fasttrain::cross_entropy_shard_gradient_));
}

// linear_cross_entropy for CPUs has two parts in C++: the row kernel that turns a chunk of logits into its gradient in
// place, which is cross_entropy's (fasttrain::cross_entropy_fused_), and the memory that the chunks are computed in.

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "huge_pages.h"

namespace fasttrain {
namespace {

torch::stable::Tensor empty_matrix(const torch::stable::Tensor& like, std::int64_t rows, std::int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "empty_matrix: got ", rows, " x ", columns);
  return empty_on_huge_pages(like, rows, columns);
}

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) { m.impl("empty_matrix", TORCH_BOX(&fasttrain::empty_matrix)); }

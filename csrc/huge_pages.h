// Large fresh tensors on 2 MiB pages: faulted in 4 KiB at a time, a fresh tensor costs more than the arithmetic in it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fasttrain {

inline void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = 2u << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (bytes >= 2 * kHugePage && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised, of `like`'s type and device.
inline torch::stable::Tensor empty_on_huge_pages(const torch::stable::Tensor& like, std::int64_t rows, std::int64_t columns) {
  torch::stable::Tensor fresh = torch::stable::new_empty(like, {rows, columns});
  advise_huge_pages(fresh.mutable_data_ptr(), static_cast<std::size_t>(fresh.numel()) * fresh.element_size());
  return fresh;
}

}  // namespace fasttrain

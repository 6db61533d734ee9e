// AdamW for CPUs: fasttrain::adamw_norm and adamw_update. The schemas and the formula stand in fasttrain/ops; this file
// validates, cuts all tensors into chunks, and gives the chunks to threads in one parallel region: small tensors cost
// what their bytes cost.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "half_types.h"
#include "isa.h"

// What runs once for each 64 elements: a call costs its constants anew.
#define FASTTRAIN_INLINE inline __attribute__((always_inline))

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kUnit = 64;    // elements whose random bits come together
constexpr int kBlock = 256;  // of the eight-bit moments: one scale each
constexpr std::int64_t kChunk = 16384;  // elements a thread takes at a time; a multiple of kBlock

enum class Storage { float32, bfloat16, int8 };

struct MasteredBfloat16 { std::uint16_t bits; };  // its float32 master's lower half lies in a second array

struct Factors {  // of one tensor in this step
  float multiplier, decay, weight1, beta2, weight2, eps, step_size, inverse_root2, ema_weight;
};

struct Randomness {
  std::uint64_t seed;
  std::uint32_t step, parameter;
};

struct Item {
  void *param, *grad, *exp_avg, *exp_avg_sq, *ema;
  std::int16_t* remainder;  // lower halves of a bfloat16 parameter's float32 master, or null
  float* scales;  // int8: (2, blocks), of exp_avg and of exp_avg_sq
  std::int64_t numel, offset;
  Storage storage;
  bool wide;  // the parameter is float32, else bfloat16
  Factors factors;
  Randomness randomness;
};

struct Chunk {
  std::int32_t tensor;
  std::int64_t begin, end;
};

}  // namespace
}  // namespace fasttrain

// Per instruction set: lanes of 64 bits, the product of their low halves with a constant, and storing these halves.
namespace fasttrain::scalar { namespace {
typedef std::uint64_t Words __attribute__((vector_size(16)));
#if defined(__SSE2__)
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
}
#else
inline Words low_product(Words a, std::uint32_t b) { return (a & 0xffffffffu) * b; }
#endif
inline void store_low(Words a, std::uint32_t* to) { for (int l = 0; l < 2; ++l) to[l] = static_cast<std::uint32_t>(a[l]); }
#include "adamw_blocks.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fasttrain::avx2 { namespace {
typedef std::uint64_t Words __attribute__((vector_size(32)));
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
inline void store_low(Words a, std::uint32_t* to) {
  const __m256i even = _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(a), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(even));
}
#include "adamw_blocks.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace fasttrain::avx512 { namespace {
typedef std::uint64_t Words __attribute__((vector_size(64)));
inline Words low_product(Words a, std::uint32_t b) {
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
inline void store_low(Words a, std::uint32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(reinterpret_cast<__m512i>(a)));
}
#include "adamw_blocks.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

void run_chunk(Isa isa, const Item& item, std::int64_t begin, std::int64_t end, bool zero) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512::run_chunk(item, begin, end, zero);
  if (isa == Isa::avx2) return avx2::run_chunk(item, begin, end, zero);
#endif
  scalar::run_chunk(item, begin, end, zero);
}

template <class T>
double sum_of_squares(Isa isa, const T* x, std::int64_t n) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512::sum_of_squares(x, n);
  if (isa == Isa::avx2) return avx2::sum_of_squares(x, n);
#endif
  return scalar::sum_of_squares(x, n);
}

std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<Chunk> chunks;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const std::int64_t numel = tensors[t].numel();
    for (std::int64_t begin = 0; begin < numel; begin += kChunk)
      chunks.push_back({static_cast<std::int32_t>(t), begin, std::min(begin + kChunk, numel)});
  }
  return chunks;
}

// f(chunk index) for every chunk; threads take runs of neighbours, as long as that leaves enough runs to share out: the
// runs from the first to the last, or the other way round, a run itself always forwards, as processors prefetch best.
template <bool kLastFirst, class F>
void for_chunks(std::int64_t count, F&& f) {
  std::atomic<std::int64_t> next{0};
  const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), std::max<std::int64_t>(count, 1));
  const std::int64_t run = std::clamp<std::int64_t>(count / (16 * threads), 1, 16);
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < count;) {
        const std::int64_t size = std::min(run, count - i), first = kLastFirst ? count - i - size : i;
        for (std::int64_t j = first; j < first + size; ++j) f(j);
      }
  });
}

// The sums of the chunks are added in their order: the norm does not depend on the number of threads.
Tensor adamw_norm(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "adamw_norm: no gradients");
  for (const Tensor& grad : grads)
    STD_TORCH_CHECK(grad.is_contiguous() && (grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::BFloat16),
                    "adamw_norm: gradients must be contiguous float32 or bfloat16");
  const Isa isa = current_isa();
  const std::vector<Chunk> chunks = chunks_of(grads);
  std::vector<const void*> data;
  std::vector<bool> wide;
  for (const Tensor& grad : grads) {
    data.push_back(grad.const_data_ptr());
    wide.push_back(grad.scalar_type() == ScalarType::Float);
  }
  std::vector<double> sums(chunks.size());
  // The last first: the update, which starts at the front, finds there what was read last in the cache.
  for_chunks<true>(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
    const Chunk& c = chunks[i];
    const void* x = data[c.tensor];
    sums[i] = wide[c.tensor] ? sum_of_squares(isa, static_cast<const float*>(x) + c.begin, c.end - c.begin)
                             : sum_of_squares(isa, static_cast<const bfloat16*>(x) + c.begin, c.end - c.begin);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

struct Terms {  // one row of the argument `terms`
  double lr, beta1, beta2, eps, weight_decay, sign, ema_weight;
};

Factors factors_of(const Terms& t, double step, double multiplier) {
  const double correction1 = 1 - std::pow(t.beta1, step), correction2 = 1 - std::pow(t.beta2, step);
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(multiplier) * f(t.sign), f(1 - t.lr * t.weight_decay), f(1 - t.beta1), f(t.beta2), f(1 - t.beta2), f(t.eps),
          f(t.lr / correction1), f(1 / std::sqrt(correction2)), f(t.ema_weight)};
}

float value_of(const std::optional<Tensor>& scalar, float otherwise, const char* name) {
  if (!scalar.has_value()) return otherwise;
  STD_TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == ScalarType::Float, "adamw_update: ", name, " must be one float32 value");
  return *scalar->const_data_ptr<float>();
}

void zero(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors)
    if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());  // not at nullptr
}

void check_lengths(std::size_t count, const std::vector<const std::vector<Tensor>*>& lists) {
  for (const auto* list : lists)
    STD_TORCH_CHECK(list->size() == count || (list->empty() && list == lists.back()), "adamw_update: lists of ", count, " and ", list->size(), " tensors");
}

Item make_item(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& scales,
               const Tensor* ema, const Tensor* remainder) {
  const ScalarType type = param.scalar_type(), moments = exp_avg.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "adamw_update: parameters must be float32 or bfloat16");
  const std::int64_t numel = param.numel(), blocks = (numel + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(grad.scalar_type() == type && exp_avg_sq.scalar_type() == moments && (ema == nullptr || ema->scalar_type() == type),
                  "adamw_update: a parameter, its gradient and its average must share a type, and so must the moments");
  for (const Tensor* tensor : {&param, &grad, &exp_avg, &exp_avg_sq, ema})
    STD_TORCH_CHECK(tensor == nullptr || (tensor->is_contiguous() && tensor->numel() == numel),
                    "adamw_update: a parameter's tensors must be contiguous and of one size");
  Item item{};
  if (moments == ScalarType::Float) item.storage = Storage::float32;
  else if (moments == ScalarType::BFloat16) item.storage = Storage::bfloat16;
  else item.storage = Storage::int8;
  if (item.storage == Storage::int8) {
    STD_TORCH_CHECK(moments == ScalarType::Byte && scales.numel() == 2 * blocks && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(),
                    "adamw_update: moments must be float32, bfloat16, or uint8 codes with (2, blocks) float32 scales");
    item.scales = static_cast<float*>(scales.mutable_data_ptr());
  }
  item.param = param.mutable_data_ptr();
  item.grad = grad.mutable_data_ptr();
  item.exp_avg = exp_avg.mutable_data_ptr();
  item.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  item.ema = ema == nullptr ? nullptr : ema->mutable_data_ptr();
  if (remainder != nullptr && remainder->numel() > 0) {
    STD_TORCH_CHECK(type == ScalarType::BFloat16 && remainder->scalar_type() == ScalarType::Short && remainder->numel() == numel && remainder->is_contiguous(),
                    "adamw_update: a remainder must be int16, contiguous, and of the size of its bfloat16 parameter");
    item.remainder = static_cast<std::int16_t*>(remainder->mutable_data_ptr());
  }
  item.numel = numel;
  item.wide = type == ScalarType::Float;
  return item;
}

void adamw_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
                  const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& scales, const std::vector<Tensor>& steps,
                  const std::vector<Tensor>& emas, const std::vector<Tensor>& remainders, const Tensor& terms, const Tensor& places, const std::optional<Tensor>& multiplier,
                  const std::optional<Tensor>& skip, std::int64_t seed, bool zero_grads) {
  const std::size_t count = params.size();
  check_lengths(count, {&grads, &exp_avgs, &exp_avg_sqs, &scales, &steps, &emas});
  check_lengths(count, {&params, &remainders});
  STD_TORCH_CHECK(terms.dim() == 2 && terms.size(1) == 7 && terms.scalar_type() == ScalarType::Double && terms.is_contiguous(),
                  "adamw_update: terms must be (groups, 7) float64");
  STD_TORCH_CHECK(places.dim() == 2 && places.size(0) == static_cast<std::int64_t>(count) && places.size(1) == 3 &&
                      places.scalar_type() == ScalarType::Long && places.is_contiguous(), "adamw_update: places must be (tensors, 3) int64");
  const float scale = value_of(multiplier, 1.0f, "multiplier");
  const bool skipped = value_of(skip, 0.0f, "skip") != 0.0f;
  const std::int64_t* place = places.const_data_ptr<std::int64_t>();
  std::vector<Item> items;
  items.reserve(count);
  Factors factors{};
  std::int64_t group = -1;
  float step = -1;
  for (std::size_t t = 0; t < count; ++t, place += 3) {
    items.push_back(make_item(params[t], grads[t], exp_avgs[t], exp_avg_sqs[t], scales[t], emas.empty() ? nullptr : &emas[t],
                              remainders.empty() ? nullptr : &remainders[t]));
    STD_TORCH_CHECK(place[0] >= 0 && place[0] < terms.size(0) && place[2] % kBlock == 0, "adamw_update: places[", t, "] names no group, or an offset that is no multiple of ", kBlock);
    STD_TORCH_CHECK(steps[t].numel() == 1 && steps[t].scalar_type() == ScalarType::Float, "adamw_update: steps must be () float32");
    const float next = *steps[t].const_data_ptr<float>() + 1;
    if (place[0] != group || next != step) {  // two powers for each group, not for each tensor
      group = place[0];
      step = next;
      Terms row;
      std::memcpy(&row, terms.const_data_ptr<double>() + 7 * group, sizeof row);
      factors = factors_of(row, step, scale);
    }
    items[t].factors = factors;
    items[t].offset = place[2];
    items[t].randomness = {static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(next), static_cast<std::uint32_t>(place[1])};
  }
  if (skipped) {
    if (zero_grads) zero(grads);
    return;
  }
  for (const Tensor& tensor : steps) *static_cast<float*>(tensor.mutable_data_ptr()) += 1;
  const Isa isa = current_isa();
  const std::vector<Chunk> chunks = chunks_of(params);
  for_chunks<false>(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
    const Chunk& c = chunks[i];
    run_chunk(isa, items[c.tensor], c.begin, c.end, zero_grads);
  });
}

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) {
  m.impl("adamw_norm", TORCH_BOX(&fasttrain::adamw_norm));
  m.impl("adamw_update", TORCH_BOX(&fasttrain::adamw_update));
}

// AdamW for CPUs: fasttrain::adamw_norm and adamw_update. The schemas and the formula stand in fasttrain/ops; this file
// validates, cuts all tensors into chunks, and gives the chunks to threads in one parallel region: small tensors cost
// what their bytes cost.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "adamw.h"
#include "adamw_lanes.h"
#include "half_types.h"
#include "inlining.h"
#include "isa.h"
#include "words.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  float* step;
  std::int64_t numel, offset, group;
  std::uint32_t number;  // among the optimizer's parameters
  Storage storage;
  bool wide;  // the parameter is float32, else bfloat16
  Factors factors;  // these two: of the step that runs
  Randomness randomness;
};

struct Chunk {
  std::int32_t tensor;
  std::int64_t begin, end;
};

}  // namespace
}  // namespace fasttrain

namespace fasttrain::scalar { namespace {
#include "adamw_narrow.h"
#include "adamw_blocks.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fasttrain::avx2 { namespace {
#include "adamw_narrow.h"
#include "adamw_blocks.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace fasttrain::avx512 { namespace {
#include "adamw_narrow.h"
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

std::vector<Chunk> chunks_of(const std::vector<Item>& items) {
  std::vector<Chunk> chunks;
  for (std::size_t t = 0; t < items.size(); ++t)
    for (std::int64_t begin = 0; begin < items[t].numel; begin += kChunk)
      chunks.push_back({static_cast<std::int32_t>(t), begin, std::min(begin + kChunk, items[t].numel)});
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

// Of all gradients. The sums of the chunks are added in their order: it does not depend on the number of threads.
float norm_of(const std::vector<Item>& items, const std::vector<Chunk>& chunks) {
  const Isa isa = current_isa();
  std::vector<double> sums(chunks.size());
  // The last first: the update, which starts at the front, finds there what was read last in the cache.
  for_chunks<true>(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
    const Chunk& c = chunks[i];
    const void* x = items[c.tensor].grad;
    sums[i] = items[c.tensor].wide ? sum_of_squares(isa, static_cast<const float*>(x) + c.begin, c.end - c.begin)
                                   : sum_of_squares(isa, static_cast<const bfloat16*>(x) + c.begin, c.end - c.begin);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return static_cast<float>(std::sqrt(total));
}

struct Terms {  // of one parameter group: a row of the argument `terms`
  double lr, beta1, beta2, eps, weight_decay, sign, ema_weight;
};

Factors factors_of(const Terms& t, double step, double multiplier) {
  const double correction1 = 1 - std::pow(t.beta1, step), correction2 = 1 - std::pow(t.beta2, step);
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(multiplier) * f(t.sign), f(1 - t.lr * t.weight_decay), f(1 - t.beta1), f(t.beta2), f(1 - t.beta2), f(t.eps),
          f(t.lr / correction1), f(1 / std::sqrt(correction2)), f(t.ema_weight)};
}

// Counts the step and does it.
void update_all(std::vector<Item>& items, const std::vector<Chunk>& chunks, const std::vector<Terms>& terms, float multiplier,
                std::int64_t seed, bool zero_grads) {
  Factors factors{};
  std::int64_t group = -1;
  float step = -1;
  for (Item& item : items) {
    const float next = *item.step += 1;
    if (item.group != group || next != step) {  // two powers for each group, not for each tensor
      group = item.group;
      step = next;
      factors = factors_of(terms[static_cast<std::size_t>(group)], step, multiplier);
    }
    item.factors = factors;
    item.randomness = {static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(next), item.number};
  }
  const Isa isa = current_isa();
  for_chunks<false>(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
    const Chunk& c = chunks[i];
    run_chunk(isa, items[c.tensor], c.begin, c.end, zero_grads);
  });
}

void zero(const std::vector<Item>& items) {
  for (const Item& item : items)
    if (item.numel > 0) std::memset(item.grad, 0, static_cast<std::size_t>(item.numel) * (item.wide ? 4 : 2));  // not at nullptr
}

// One parameter's tensors; the optional ones are null.
struct Tensors {
  const Tensor &param, &grad, &exp_avg, &exp_avg_sq, &scales, &step;
  const Tensor *ema, *remainder;
};

// Writes types, sizes and addresses into the item. Returns what is wrong with the tensors, or null.
const char* describe(const Tensors& t, Item& item) {
  const ScalarType type = t.param.scalar_type(), moments = t.exp_avg.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16) return "parameters must be float32 or bfloat16";
  const std::int64_t numel = t.param.numel(), blocks = (numel + kBlock - 1) / kBlock;
  if (t.grad.scalar_type() != type || t.exp_avg_sq.scalar_type() != moments || (t.ema != nullptr && t.ema->scalar_type() != type))
    return "a parameter, its gradient and its average must share a type, and so must the moments";
  for (const Tensor* tensor : {&t.param, &t.grad, &t.exp_avg, &t.exp_avg_sq, t.ema})
    if (tensor != nullptr && !(tensor->is_contiguous() && tensor->numel() == numel && tensor->is_cpu()))
      return "a parameter's tensors must be contiguous, of one size and on the CPU";
  if (t.step.numel() != 1 || t.step.scalar_type() != ScalarType::Float || !t.step.is_cpu()) return "steps must be () float32";
  item.scales = nullptr;
  if (moments == ScalarType::Float) item.storage = Storage::float32;
  else if (moments == ScalarType::BFloat16) item.storage = Storage::bfloat16;
  else item.storage = Storage::int8;
  if (item.storage == Storage::int8) {
    if (moments != ScalarType::Byte || t.scales.numel() != 2 * blocks || t.scales.scalar_type() != ScalarType::Float || !t.scales.is_contiguous() || !t.scales.is_cpu())
      return "moments must be float32, bfloat16, or uint8 codes with (2, blocks) float32 scales";
    item.scales = static_cast<float*>(t.scales.mutable_data_ptr());
  }
  item.remainder = nullptr;
  if (t.remainder != nullptr && t.remainder->numel() > 0) {
    if (type != ScalarType::BFloat16 || t.remainder->scalar_type() != ScalarType::Short || t.remainder->numel() != numel || !t.remainder->is_contiguous() || !t.remainder->is_cpu())
      return "a remainder must be int16, contiguous, and of the size of its bfloat16 parameter";
    item.remainder = static_cast<std::int16_t*>(t.remainder->mutable_data_ptr());
  }
  item.param = t.param.mutable_data_ptr();
  item.grad = t.grad.mutable_data_ptr();
  item.exp_avg = t.exp_avg.mutable_data_ptr();
  item.exp_avg_sq = t.exp_avg_sq.mutable_data_ptr();
  item.ema = t.ema == nullptr ? nullptr : t.ema->mutable_data_ptr();
  item.step = static_cast<float*>(t.step.mutable_data_ptr());
  item.numel = numel;
  item.wide = type == ScalarType::Float;
  return nullptr;
}

// The parallel lists of the ops' arguments, of all parameters.
struct Lists {
  std::vector<Tensor> params, exp_avgs, exp_avg_sqs, scales, steps, emas, remainders;

  Tensors of(std::size_t t, const Tensor& grad) const {
    return {params[t], grad, exp_avgs[t], exp_avg_sqs[t], scales[t], steps[t], emas.empty() ? nullptr : &emas[t], remainders.empty() ? nullptr : &remainders[t]};
  }
};

void check_lengths(const Lists& lists) {
  const std::size_t count = lists.params.size();
  for (const auto* list : {&lists.exp_avgs, &lists.exp_avg_sqs, &lists.scales, &lists.steps, &lists.emas, &lists.remainders})
    STD_TORCH_CHECK(list->size() == count || (list->empty() && (list == &lists.emas || list == &lists.remainders)),
                    "adamw: lists of ", count, " and ", list->size(), " tensors");
}

// `places`: (tensors, 3) int64: group, number of the parameter, offset in the whole parameter.
std::vector<Item> items_at(const Tensor& places, std::size_t count) {
  STD_TORCH_CHECK(places.dim() == 2 && places.size(0) == static_cast<std::int64_t>(count) && places.size(1) == 3 &&
                      places.scalar_type() == ScalarType::Long && places.is_contiguous(), "adamw: places must be (tensors, 3) int64");
  const std::int64_t* place = places.const_data_ptr<std::int64_t>();
  std::vector<Item> items(count);
  for (Item& item : items) {
    STD_TORCH_CHECK(place[0] >= 0 && place[2] % kBlock == 0, "adamw: places name no group, or an offset that is no multiple of ", kBlock);
    item.group = place[0];
    item.number = static_cast<std::uint32_t>(place[1]);
    item.offset = place[2];
    place += 3;
  }
  return items;
}

Tensor adamw_norm(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "adamw_norm: no gradients");
  std::vector<Item> items(grads.size());
  for (std::size_t t = 0; t < grads.size(); ++t) {
    STD_TORCH_CHECK(grads[t].is_contiguous() && (grads[t].scalar_type() == ScalarType::Float || grads[t].scalar_type() == ScalarType::BFloat16),
                    "adamw_norm: gradients must be contiguous float32 or bfloat16");
    items[t].grad = const_cast<void*>(grads[t].const_data_ptr());
    items[t].wide = grads[t].scalar_type() == ScalarType::Float;
    items[t].numel = grads[t].numel();
  }
  Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  *norm.mutable_data_ptr<float>() = norm_of(items, chunks_of(items));
  return norm;
}

float value_of(const std::optional<Tensor>& scalar, float otherwise, const char* name) {
  if (!scalar.has_value()) return otherwise;
  STD_TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == ScalarType::Float, "adamw_update: ", name, " must be one float32 value");
  return *scalar->const_data_ptr<float>();
}

void adamw_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
                  const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& scales, const std::vector<Tensor>& steps,
                  const std::vector<Tensor>& emas, const std::vector<Tensor>& remainders, const Tensor& terms, const Tensor& places, const std::optional<Tensor>& multiplier,
                  const std::optional<Tensor>& skip, std::int64_t seed, bool zero_grads) {
  const Lists lists{params, exp_avgs, exp_avg_sqs, scales, steps, emas, remainders};
  check_lengths(lists);
  STD_TORCH_CHECK(grads.size() == params.size(), "adamw: lists of ", params.size(), " and ", grads.size(), " tensors");
  STD_TORCH_CHECK(terms.dim() == 2 && terms.size(1) == 7 && terms.scalar_type() == ScalarType::Double && terms.is_contiguous(),
                  "adamw_update: terms must be (groups, 7) float64");
  std::vector<Terms> rows(static_cast<std::size_t>(terms.size(0)));
  if (!rows.empty()) std::memcpy(rows.data(), terms.const_data_ptr<double>(), rows.size() * sizeof(Terms));
  std::vector<Item> items = items_at(places, params.size());
  const float scale = value_of(multiplier, 1.0f, "multiplier");
  const bool skipped = value_of(skip, 0.0f, "skip") != 0.0f;
  for (std::size_t t = 0; t < items.size(); ++t) {
    const char* problem = describe(lists.of(t, grads[t]), items[t]);
    STD_TORCH_CHECK(problem == nullptr, "adamw_update: ", problem);
    STD_TORCH_CHECK(items[t].group < terms.size(0), "adamw_update: places[", t, "] names no group");
  }
  if (!skipped) update_all(items, chunks_of(items), rows, scale, seed, zero_grads);
  else if (zero_grads) zero(items);
}

#include "adamw_plan.h"

}  // namespace
}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) {
  m.impl("adamw_norm", TORCH_BOX(&fasttrain::adamw_norm));
  m.impl("adamw_update", TORCH_BOX(&fasttrain::adamw_update));
  m.impl("adamw_plan", TORCH_BOX(&fasttrain::adamw_plan));
  m.impl("adamw_bind", TORCH_BOX(&fasttrain::adamw_bind));
}

void fasttrain::bind_adamw_plan(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<AdamWPlan>(m, "AdamWPlan", "Tensors of an optimizer, held from step to step: see fasttrain/ops/_adamw_plan.py.")
      .def(py::init<>())
      .def_property_readonly("id", &AdamWPlan::id)
      .def("norm", &AdamWPlan::norm, py::call_guard<py::gil_scoped_release>())
      .def("update", &AdamWPlan::update, py::arg("terms"), py::arg("multiplier"), py::arg("seed"), py::arg("zero_grads"), py::call_guard<py::gil_scoped_release>())
      .def("zero", &AdamWPlan::zero, py::call_guard<py::gil_scoped_release>());
}

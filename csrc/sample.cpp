// sample for CPUs: fasttrain::sample and its variants. The schemas and the specification stand in fasttrain/ops/sample.py;
// this file validates, allocates, and gives rows to threads. A row needs no memory but its thread's scratch, which is kept.

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "half_types.h"
#include "isa.h"
#include "sample.h"
#include "thread_team.h"
#include "words.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kGroup = 256;
constexpr std::int64_t kMostThreads = 16;  // that do one row
constexpr std::int64_t kMostFew = 256;    // tokens that are compared each with all
constexpr std::int64_t kPad = 16;        // elements of the longest vector
constexpr std::int64_t kSlack = 64;      // elements behind a list, for vectors are stored whole

// Why a row has no distribution.
enum class Fault { none, nan, infinity, nothing };

// Step 0 and the parameters in the form that the specification uses.
struct RowParameters {
  float scale = 1;          // c of step 1
  std::int64_t top_k = 0;   // 0: off
  double top_p = 1;         // 1: off
  float min_mass = 0;       // 0: off; at most 24 significant bits, so exact
};

struct List {
  std::vector<float> x, w;
};

// What is left of a row where it is known token by token, in order of id.
struct FewTokens {
  std::int64_t count = 0;  // 0: it is not
  std::array<std::uint32_t, kMostFew + 1> ids;
  std::array<double, kMostFew + 1> weights;
};

struct Scratch {
  std::vector<float> maxima;                // (G + pad,)
  std::vector<std::int32_t> live, segments;  // (G + 1,): groups that matter, and where each starts in the list
  std::vector<std::uint32_t> race_ids;      // (G + pad,)
  std::vector<double> race_weights, quotients;
  List list, other;                         // (V + slack,) logits and masses side by side
  std::vector<std::pair<float, float>> sorted;
  FewTokens few;

  void reserve(std::int64_t n, std::int64_t groups) {
    if (static_cast<std::int64_t>(maxima.size()) >= groups + kPad) return;
    maxima.resize(groups + kPad);
    live.resize(groups + 1);
    segments.resize(groups + 1);
    race_ids.resize(groups + kPad);
    race_weights.resize(groups + kPad);
    quotients.resize(std::max(groups, kGroup) + kPad);
  }
  void reserve_lists(std::int64_t n) {
    const std::size_t size = static_cast<std::size_t>(n + kMostThreads * kSlack);
    if (list.x.size() >= size) return;
    for (List* each : {&list, &other}) {
      each->x.resize(size);
      each->w.resize(size);
    }
  }
};

// Threads that do together what one of them asks for, again and again within microseconds.
class Crew {
 public:
  explicit Crew(std::int64_t size) : team(static_cast<int>(size)) {}
  std::int64_t size() const { return team.size(); }

  // Once: runs `leader` on this thread; the others wait for its calls of run(). It must not throw.
  void led_by(const std::function<void()>& leader) {
    if (size() == 1) return leader();
    team.run([&](int i) {
      if (i != 0) return follow(i);
      leader();
      hand_out(nullptr);
    });
  }
  // Within the work of run(): nobody goes on before everybody is here.
  void meet() { team.barrier(); }
  // Within `leader`: work(i) for every i < size(), all of them at once. It does not wait for the others to begin.
  void run(const std::function<void(std::int64_t)>& work) {
    hand_out(&work);
    work(0);
    team.barrier();
  }

 private:
  void hand_out(const std::function<void(std::int64_t)>* next) {
    task = next;
    handed_out.fetch_add(1, std::memory_order_release);
    handed_out.notify_all();
  }
  void follow(int i) {
    for (std::uint32_t seen = 0;; ++seen) {
      ThreadTeam::wait_for_change(handed_out, seen);
      if (task == nullptr) return;
      (*task)(i);
      team.barrier();
    }
  }

  ThreadTeam team;
  const std::function<void(std::int64_t)>* task = nullptr;
  std::atomic<std::uint32_t> handed_out{0};  // tasks so far, the last included
};

inline float element(const float* p) { return *p; }
inline float element(const bfloat16* p) { return to_float(*p); }
inline float element(const float16* p) { return to_float(*p); }

}  // namespace
}  // namespace fasttrain

#include "simd_scalar.h"
namespace fasttrain::scalar { namespace {
#include "sample_rows.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
namespace fasttrain::avx2 { namespace {
#include "sample_rows.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
namespace fasttrain::avx512 { namespace {
#include "sample_rows.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

RowParameters parameters_of(const SampleSettings& settings) {
  const double t = double{settings.temperature};
  RowParameters p;
  p.scale = static_cast<float>(std::clamp(1.4426950408889634 / (t > 0 ? t : 1.0), 0x1p-64, 0x1p64));
  p.top_k = t > 0 ? settings.top_k : 1;
  p.top_p = double{settings.top_p};
  p.min_mass = static_cast<float>(std::ceil(double{settings.min_p} * 0x1p40));
  return p;
}

// One number for all rows, or one for each.
template <class Number>
struct Parameter {
  const char* name;
  Number number;
  const Number* rows = nullptr;
  std::int64_t stride = 0;

  Parameter(const char* what, Number value, const std::optional<Tensor>& tensor, std::int64_t batch) : name(what), number(value) {
    if (!tensor.has_value()) return;
    constexpr ScalarType dtype = std::is_same_v<Number, float> ? ScalarType::Float : ScalarType::Long;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == batch && tensor->scalar_type() == dtype, "sample: ", name,
                    " must be (", batch, ",) of ", dtype == ScalarType::Float ? "float32" : "int64");
    rows = static_cast<const Number*>(tensor->const_data_ptr());
    stride = tensor->stride(0);
  }
  Number operator[](std::int64_t row) const { return rows != nullptr ? rows[row * stride] : number; }
  bool shared() const { return rows == nullptr || stride == 0; }
  void check(std::int64_t batch, Number low, Number high) const {
    for (std::int64_t row = 0; row < (shared() ? std::min<std::int64_t>(batch, 1) : batch); ++row) {
      const Number value = (*this)[row];
      STD_TORCH_CHECK(value >= low && value <= high, "sample: ", name, " is ", value, " in row ", row, "; it must lie in [", low, ", ", high, "]");
    }
  }
};

struct Problem {
  std::int64_t B, V, row_stride;
  const void* logits;
  Parameter<float> temperature;
  Parameter<std::int64_t> top_k;
  Parameter<float> top_p, min_p;
  Parameter<std::int64_t> seed, position;
  std::int64_t* tokens;  // (B,)
  float* logprobs;       // (B,), or null
  std::atomic<std::int64_t> bad_row;  // the first; B if there is none

  RowParameters parameters(std::int64_t row) const {
    return parameters_of({temperature[row], top_k[row], top_p[row], min_p[row]});
  }
  // Every row is the same one and is filtered in the same way: only the draws differ.
  bool one_row() const {
    return B > 1 && row_stride == 0 && temperature.shared() && top_k.shared() && top_p.shared() && min_p.shared();
  }
};

template <template <class, class> class Row, class V>
std::int64_t draw_one(const float* logits, std::int64_t n, const RowParameters& parameters, std::uint64_t seed, std::uint64_t position) {
  static thread_local Scratch scratch;
  Crew alone(1);
  Row<V, float> row(scratch, alone);
  return row.prepare(logits, n, parameters) == Fault::none ? row.draw(seed, position).first : -1;
}

// Threads, or crews of them, take rows one by one: filters make rows unequal work.
template <template <class, class> class Row, class V, class T>
void draw_rows(Problem& problem, std::atomic<std::int64_t>& next, Crew& crew) {
  static thread_local Scratch scratch;
  Row<V, T> row(scratch, crew);
  bool ready = false;
  for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < problem.B;) {
    if (!ready || !problem.one_row()) {
      const T* x = static_cast<const T*>(problem.logits) + i * problem.row_stride;
      const Fault fault = row.prepare(x, problem.V, problem.parameters(i));
      if (fault != Fault::none) {
        std::int64_t first = problem.bad_row.load();
        while (i < first && !problem.bad_row.compare_exchange_weak(first, i)) {}
        continue;
      }
      ready = true;
    }
    const auto [token, logprob] = row.draw(static_cast<std::uint64_t>(problem.seed[i]), static_cast<std::uint64_t>(problem.position[i]));
    problem.tokens[i] = token;
    if (problem.logprobs != nullptr) problem.logprobs[i] = logprob;
  }
}

template <class T>
void draw_rows(Isa isa, Problem& problem, std::atomic<std::int64_t>& next, Crew& crew) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return draw_rows<avx512::Row, avx512::Vec, T>(problem, next, crew);
  if (isa == Isa::avx2) return draw_rows<avx2::Row, avx2::Vec, T>(problem, next, crew);
#endif
  draw_rows<scalar::Row, scalar::Vec, T>(problem, next, crew);
}

void run(Problem& problem, ScalarType dtype) {
  const Isa isa = current_isa();
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  auto draw = [&](Crew& crew) {
    try {  // an exception must not leave a parallel region
      if (dtype == ScalarType::Float) draw_rows<float>(isa, problem, next, crew);
      else if (dtype == ScalarType::BFloat16) draw_rows<bfloat16>(isa, problem, next, crew);
      else draw_rows<float16>(isa, problem, next, crew);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  };
  // Rows to threads where there are rows enough, else all threads to each row; a thread is worth waking for some twenty
  // microseconds of work.
  const std::int64_t available = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t drawing = std::min({available, problem.B, problem.B * problem.V >> 16});
  const std::int64_t per_row = std::min({available, problem.V >> 15, kMostThreads});
  if (2 * problem.B <= available && per_row > 1) {
    Crew crew(per_row);
    crew.led_by([&] { draw(crew); });
  } else if (drawing > 1) {
    torch::stable::parallel_for(0, drawing, 1, [&](std::int64_t, std::int64_t) {
      Crew alone(1);
      draw(alone);
    });
  } else {
    Crew alone(1);
    draw(alone);
  }
  STD_TORCH_CHECK(!out_of_memory, "sample: no memory for the scratch of one row of ", problem.V, " logits per thread");
  const std::int64_t bad = problem.bad_row.load();
  STD_TORCH_CHECK(bad == problem.B, "sample: row ", bad, " of the logits holds NaN, +inf or nothing but -inf; there is no "
                  "distribution to draw from");
}

// Not torch::stable::new_empty, which looks the op up by name: two of them cost more than a small row.
Tensor empty_vector(std::int64_t size, std::int32_t dtype) {
  const std::int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Tensors that take the place of the numbers, where they are given.
struct RowTensors {
  std::optional<Tensor> temperatures, top_ks, top_ps, min_ps, seeds, positions;
};

// The tokens, and into `logprobs`, which may be null, their log-probabilities.
Tensor draw_all(const Tensor& logits, const SampleSettings& numbers, std::int64_t seed, std::int64_t position, const RowTensors& given,
                std::optional<Tensor>* logprobs) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "sample: logits must be (B, V) with at least one token");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "sample: logits must be float32, bfloat16 or float16");
  const std::int64_t B = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(V == 1 || logits.stride(1) == 1, "sample: logits' last dimension must be contiguous");
  STD_TORCH_CHECK(V <= std::numeric_limits<std::int32_t>::max(), "sample: logits have ", V, " tokens; ids must fit in 32 bits");
  Tensor tokens = empty_vector(B, aoti_torch_dtype_int64());
  if (logprobs != nullptr) *logprobs = empty_vector(B, aoti_torch_dtype_float32());
  Problem p{B, V, logits.stride(0), logits.const_data_ptr(),
            {"temperature", numbers.temperature, given.temperatures, B}, {"top_k", numbers.top_k, given.top_ks, B},
            {"top_p", numbers.top_p, given.top_ps, B}, {"min_p", numbers.min_p, given.min_ps, B},
            {"seed", seed, given.seeds, B}, {"position", position, given.positions, B},
            tokens.mutable_data_ptr<std::int64_t>(), logprobs != nullptr ? (*logprobs)->mutable_data_ptr<float>() : nullptr, B};
  p.temperature.check(B, 0, std::numeric_limits<float>::max());
  for (const auto* whole : {&p.top_k, &p.seed, &p.position}) whole->check(B, 0, std::numeric_limits<std::int64_t>::max());
  for (const auto* share : {&p.top_p, &p.min_p}) share->check(B, 0, 1);
  run(p, dtype);
  return tokens;
}

SampleSettings settings_of(double temperature, std::int64_t top_k, double top_p, double min_p) {
  const SampleSettings settings{static_cast<float>(temperature), top_k, static_cast<float>(top_p), static_cast<float>(min_p)};
  STD_TORCH_CHECK(settings.temperature > 0 || !(temperature > 0), "sample: temperature is ", temperature, ", which is 0 in float32");
  return settings;
}

std::tuple<Tensor, Tensor> sample_rows(const Tensor& logits, double temperature, std::int64_t top_k, double top_p,
                                       double min_p, std::int64_t seed, std::int64_t position,
                                       const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
                                       const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps,
                                       const std::optional<Tensor>& seeds, const std::optional<Tensor>& positions) {
  std::optional<Tensor> logprobs;
  const RowTensors given{temperatures, top_ks, top_ps, min_ps, seeds, positions};
  Tensor tokens = draw_all(logits, settings_of(temperature, top_k, top_p, min_p), seed, position, given, &logprobs);
  return {tokens, *logprobs};
}

// The same with one number for all rows. Its own op because reading six absent tensors costs as much as a small row.
std::tuple<Tensor, Tensor> sample(const Tensor& logits, double temperature, std::int64_t top_k, double top_p, double min_p,
                                  std::int64_t seed, std::int64_t position) {
  std::optional<Tensor> logprobs;
  Tensor tokens = draw_all(logits, settings_of(temperature, top_k, top_p, min_p), seed, position, {}, &logprobs);
  return {tokens, *logprobs};
}

// Both without log-probabilities, which decoding does not ask for and which would be a tensor more to make.
Tensor sample_tokens(const Tensor& logits, double temperature, std::int64_t top_k, double top_p, double min_p, std::int64_t seed,
                     std::int64_t position, const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
                     const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps,
                     const std::optional<Tensor>& seeds, const std::optional<Tensor>& positions) {
  const RowTensors given{temperatures, top_ks, top_ps, min_ps, seeds, positions};
  return draw_all(logits, settings_of(temperature, top_k, top_p, min_p), seed, position, given, nullptr);
}

Tensor sample_tokens_by_numbers(const Tensor& logits, double temperature, std::int64_t top_k, double top_p, double min_p,
                                std::int64_t seed, std::int64_t position) {
  return draw_all(logits, settings_of(temperature, top_k, top_p, min_p), seed, position, {}, nullptr);
}

}  // namespace

std::int64_t draw_token(const float* logits, std::int64_t V, const SampleSettings& settings, std::uint64_t seed, std::uint64_t position) {
  const RowParameters parameters = parameters_of(settings);
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) return draw_one<avx512::Row, avx512::Vec>(logits, V, parameters, seed, position);
  if (current_isa() == Isa::avx2) return draw_one<avx2::Row, avx2::Vec>(logits, V, parameters, seed, position);
#endif
  return draw_one<scalar::Row, scalar::Vec>(logits, V, parameters, seed, position);
}

}  // namespace fasttrain

STABLE_TORCH_LIBRARY_IMPL(fasttrain, CPU, m) {
  m.impl("sample", TORCH_BOX(&fasttrain::sample));
  m.impl("sample_rows", TORCH_BOX(&fasttrain::sample_rows));
  m.impl("sample_tokens", TORCH_BOX(&fasttrain::sample_tokens));
  m.impl("sample_tokens_by_numbers", TORCH_BOX(&fasttrain::sample_tokens_by_numbers));
}

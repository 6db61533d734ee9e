// The kernels of the native decode session for each instruction set, and its weights: packing and 8-bit rounding.

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include <sys/mman.h>

#include "huge_pages.h"
#include "isa.h"

#include "simd_scalar.h"
namespace fasttrain::scalar { namespace {
#include "decode_kernels.h"
} }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
namespace fasttrain::avx2 { namespace {
#include "decode_kernels.h"
} }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
namespace fasttrain::avx512 { namespace {
#include "decode_kernels.h"
} }
#pragma GCC pop_options
#endif

namespace fasttrain {
namespace {

std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Reads one weight of a row, whatever the caller's tensor holds.
struct RowReader {
  const void* row = nullptr;  // nullptr: padding
  int kind = 0;               // 0 float32, 1 bfloat16, 2 float16
  float operator()(std::int64_t k) const {
    if (kind == 0) return static_cast<const float*>(row)[k];
    if (kind == 1) return to_float(static_cast<const bfloat16*>(row)[k]);
    return to_float(static_cast<const float16*>(row)[k]);
  }
};

std::vector<RowReader> readers(std::int64_t outputs, std::int64_t inputs, const std::vector<Source>& sources) {
  std::vector<RowReader> rows(padded(outputs, kPanel));
  for (const Source& source : sources) {
    const int kind = source.dtype == "float32" ? 0 : source.dtype == "bfloat16" ? 1 : source.dtype == "float16" ? 2 : -1;
    if (kind < 0) throw std::invalid_argument("weights are " + source.dtype + "; they must be float32, bfloat16 or float16");
    if (source.columns != inputs || source.first_output < 0 || source.first_output + source.rows > outputs)
      throw std::invalid_argument("a source does not fit its matrix");
    for (std::int64_t r = 0; r < source.rows; ++r)
      rows[source.first_output + r] = {reinterpret_cast<const char*>(source.address) + r * source.row_stride * (kind == 0 ? 4 : 2), kind};
  }
  return rows;
}

// One panel of a matrix from the rows that it holds.
void pack_float32(const RowReader* rows, std::int64_t inputs, float* out) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane)
    if (rows[lane].row != nullptr)
      for (std::int64_t k = 0; k < inputs; ++k) out[k * kPanel + lane] = rows[lane](k);
}

void pack_bfloat16(const RowReader* rows, std::int64_t inputs, bfloat16* out) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane)
    if (rows[lane].row != nullptr)
      for (std::int64_t k = 0; k < inputs; ++k) out[k / 2 * 2 * kPanel + 2 * lane + k % 2] = to_bfloat16(rows[lane](k));
}

// Symmetric: q = round(w / scale), scale = max |w| / 127 of the group, rounded to bfloat16 before it divides.
void pack_int8(const RowReader* rows, std::int64_t inputs, std::int8_t* out, bfloat16* scales) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane) {
    if (rows[lane].row == nullptr) continue;
    for (std::int64_t begin = 0; begin < inputs; begin += kScaleGroup) {
      const std::int64_t end = std::min(inputs, begin + kScaleGroup);
      float largest = 0;
      for (std::int64_t k = begin; k < end; ++k) largest = std::max(largest, std::fabs(rows[lane](k)));
      const bfloat16 scale = to_bfloat16(largest / 127.0f);
      scales[begin / kScaleGroup * kPanel + lane] = scale;
      const float inverse = to_float(scale) > 0 ? 1.0f / to_float(scale) : 0.0f;
      for (std::int64_t k = begin; k < end; ++k)
        out[k * kPanel + lane] = static_cast<std::int8_t>(std::clamp(std::nearbyint(rows[lane](k) * inverse), -127.0f, 127.0f));
    }
  }
}

Matrix pack(WeightFormat format, std::int64_t outputs, std::int64_t inputs, const std::vector<Source>& sources, ThreadTeam& team) {
  Matrix m;
  m.format = format;
  m.inputs = inputs;
  m.padded_inputs = padded(inputs, format == WeightFormat::int8 ? kScaleGroup : 2);
  const std::vector<RowReader> rows = readers(outputs, inputs, sources);
  m.panels = static_cast<std::int64_t>(rows.size()) / kPanel;
  const std::size_t element = format == WeightFormat::float32 ? 4 : format == WeightFormat::bfloat16 ? 2 : 1;
  m.panel_bytes = static_cast<std::size_t>(m.padded_inputs) * kPanel * element;
  m.weights = Buffer(m.panel_bytes * m.panels);
  if (format == WeightFormat::int8) {
    m.panel_scales = static_cast<std::size_t>(m.padded_inputs / kScaleGroup) * kPanel;
    m.scales = Buffer(m.panel_scales * m.panels * sizeof(bfloat16));
  }
  std::atomic<std::int64_t> next{0};
  team.run([&](int) {
    for (std::int64_t panel; (panel = next.fetch_add(1)) < m.panels;) {
      unsigned char* out = m.weights.get<unsigned char>() + panel * m.panel_bytes;
      const RowReader* first = rows.data() + panel * kPanel;
      if (format == WeightFormat::float32) pack_float32(first, inputs, reinterpret_cast<float*>(out));
      else if (format == WeightFormat::bfloat16) pack_bfloat16(first, inputs, reinterpret_cast<bfloat16*>(out));
      else pack_int8(first, inputs, reinterpret_cast<std::int8_t*>(out), m.scales.get<bfloat16>() + panel * m.panel_scales);
    }
  });
  return m;
}

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::float32;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  if (name == "int8") return WeightFormat::int8;
  throw std::invalid_argument("weights' format is '" + name + "'; it must be float32, bfloat16 or int8");
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    throw std::bad_alloc();
  }
  advise_huge_pages(data_, bytes);
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

const Kernels& decode_kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) return avx512::kernels();
  if (current_isa() == Isa::avx2) return avx2::kernels();
#endif
  return scalar::kernels();
}

DecoderWeights::DecoderWeights(DecoderShape given, const std::string& format_name, int threads)
    : shape(given), format(format_of(format_name)), layers(given.num_layers), team(std::max(1, threads)) {}

void DecoderWeights::set_matrix(const std::string& name, std::int64_t layer, std::int64_t outputs, std::int64_t inputs,
                                const std::vector<Source>& sources) {
  Matrix& matrix = name == "embedding" ? embedding_ : name == "head" ? head_ : name == "qkv" ? layers.at(layer).qkv
                   : name == "out" ? layers.at(layer).out : name == "gate_up" ? layers.at(layer).gate_up
                   : name == "down" ? layers.at(layer).down : throw std::invalid_argument("no matrix '" + name + "'");
  matrix = pack(format, outputs, inputs, sources, team);
}

void DecoderWeights::set_vector(const std::string& name, std::int64_t layer, std::vector<float> values) {
  std::vector<float>& vector = name == "final_norm" ? final_norm : name == "attention_norm" ? layers.at(layer).attention_norm
                               : name == "mlp_norm" ? layers.at(layer).mlp_norm : name == "qkv_bias" ? layers.at(layer).qkv_bias
                               : throw std::invalid_argument("no vector '" + name + "'");
  vector = std::move(values);
}

std::size_t DecoderWeights::bytes() const {
  auto of = [](const Matrix& m) { return m.weights.bytes() + m.scales.bytes(); };
  std::size_t sum = of(embedding_) + of(head_);
  for (const LayerWeights& layer : layers) sum += of(layer.qkv) + of(layer.out) + of(layer.gate_up) + of(layer.down);
  return sum;
}

void DecoderWeights::embed(std::int64_t token, float* out) const {
  const std::int64_t panel = token / kPanel, lane = token % kPanel;
  const unsigned char* w = embedding_.weights.get<unsigned char>() + panel * embedding_.panel_bytes;
  const bfloat16* scales = embedding_.scales.get<bfloat16>() + panel * embedding_.panel_scales;
  for (std::int64_t k = 0; k < shape.hidden_size; ++k) {
    if (format == WeightFormat::float32) out[k] = reinterpret_cast<const float*>(w)[k * kPanel + lane];
    else if (format == WeightFormat::bfloat16) out[k] = to_float(reinterpret_cast<const bfloat16*>(w)[k / 2 * 2 * kPanel + 2 * lane + k % 2]);
    else out[k] = static_cast<float>(reinterpret_cast<const std::int8_t*>(w)[k * kPanel + lane]) * to_float(scales[k / kScaleGroup * kPanel + lane]);
  }
}

}  // namespace fasttrain

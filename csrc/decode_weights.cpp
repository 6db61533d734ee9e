// The weights of the native decode session: packed in panels, rounded to 8 and 4 bits.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <stdexcept>
#include <utility>

#include <sys/mman.h>

#include "huge_pages.h"

namespace fasttrain {
namespace {

std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Where in its panel a weight stands: bytes of four inputs of an output side by side; of eight, if they are half bytes.
std::int64_t int8_place(std::int64_t k, std::int64_t lane) { return (k / 4 * kPanel + lane) * 4 + k % 4; }
std::int64_t int4_place(std::int64_t k, std::int64_t lane) { return (k / 8 * kPanel + lane) * 4 + k % 4; }

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

// w = scale (u - 128): u = 128 + round(w / scale), scale = max |w| / 127 of the group, rounded to bfloat16 before it
// divides. Four inputs of an output side by side.
void pack_int8(const RowReader* rows, std::int64_t inputs, unsigned char* out, bfloat16* scales) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane) {
    if (rows[lane].row == nullptr) continue;
    for (std::int64_t begin = 0; begin < inputs; begin += kInt8Group) {
      const std::int64_t end = std::min(inputs, begin + kInt8Group);
      float largest = 0;
      for (std::int64_t k = begin; k < end; ++k) largest = std::max(largest, std::fabs(rows[lane](k)));
      const bfloat16 scale = to_bfloat16(largest / 127.0f);
      scales[begin / kInt8Group * kPanel + lane] = scale;
      const float inverse = to_float(scale) > 0 ? 1.0f / to_float(scale) : 0.0f;
      for (std::int64_t k = begin; k < end; ++k)
        out[int8_place(k, lane)] = static_cast<unsigned char>(128 + static_cast<int>(std::clamp(std::nearbyint(rows[lane](k) * inverse), -127.0f, 127.0f)));
    }
  }
}

// A group in 4 bits: w = scale n + least, n in 0 .. 15. Of several widths of the scale, each with the least squares' scale
// and least value for the n that it gives, the one with the smallest sum of squared errors: on weights that were not in
// 4 bits before, that costs a fourth of the perplexity that the span of the group divided by 15 does.
struct Int4Group {
  bfloat16 scale, least;
  float error;
  unsigned char n[kInt4Group];
};

Int4Group rounded_int4(const float* w, std::int64_t count, float scale, float least) {
  Int4Group g{to_bfloat16(scale), to_bfloat16(least), 0, {}};
  const float step = to_float(g.scale), base = to_float(g.least), inverse = step > 0 ? 1.0f / step : 0.0f;
  float errors[kInt4Group];
  for (std::int64_t k = 0; k < count; ++k) {
    const int n = static_cast<int>(std::min(std::max((w[k] - base) * inverse, 0.0f), 15.0f) + 0.5f);
    g.n[k] = static_cast<unsigned char>(n);
    const float miss = step * static_cast<float>(n) + base - w[k];
    errors[k] = miss * miss;
  }
  for (std::int64_t k = 0; k < count; ++k) g.error += errors[k];
  return g;
}

Int4Group best_int4(const float* w, std::int64_t count) {
  const float low = *std::min_element(w, w + count), high = *std::max_element(w, w + count);
  Int4Group best = rounded_int4(w, count, (high - low) / 15.0f, low);
  auto try_group = [&](const Int4Group& g) { if (g.error < best.error) best = g; };
  for (int width = -6; width <= 6; ++width) {
    const Int4Group first = rounded_int4(w, count, (high - low) / (15.0f + 0.25f * static_cast<float>(width)), low);
    try_group(first);
    float n = 0, nn = 0, x = 0, nx = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      const float a = first.n[k];
      n += a, nn += a * a, x += w[k], nx += a * w[k];
    }
    const float size = static_cast<float>(count), spread = size * nn - n * n;
    if (spread > 0) try_group(rounded_int4(w, count, (size * nx - n * x) / spread, (nn * x - n * nx) / spread));
  }
  return best;
}

void pack_int4(const RowReader* rows, std::int64_t inputs, unsigned char* out, bfloat16* scales) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane) {
    if (rows[lane].row == nullptr) continue;
    for (std::int64_t begin = 0; begin < inputs; begin += kInt4Group) {
      const std::int64_t count = std::min(inputs - begin, kInt4Group);
      float w[kInt4Group];
      for (std::int64_t k = 0; k < count; ++k) w[k] = rows[lane](begin + k);
      const Int4Group group = best_int4(w, count);
      bfloat16* of_group = scales + begin / kInt4Group * 2 * kPanel + lane;
      of_group[0] = group.scale;
      of_group[kPanel] = group.least;
      for (std::int64_t k = 0; k < count; ++k) out[int4_place(begin + k, lane)] |= static_cast<unsigned char>(k % 8 < 4 ? group.n[k] : group.n[k] << 4);
    }
  }
}

Matrix pack(WeightFormat format, std::int64_t outputs, std::int64_t inputs, const std::vector<Source>& sources, ThreadTeam& team) {
  Matrix m;
  m.format = format;
  m.inputs = inputs;
  m.padded_inputs = padded(inputs, format == WeightFormat::int8 ? kInt8Group : format == WeightFormat::int4 ? kInt4Group : 2);
  const std::vector<RowReader> rows = readers(outputs, inputs, sources);
  m.panels = static_cast<std::int64_t>(rows.size()) / kPanel;
  const std::size_t weights = static_cast<std::size_t>(m.padded_inputs) * kPanel;
  m.panel_bytes = format == WeightFormat::float32 ? 4 * weights : format == WeightFormat::bfloat16 ? 2 * weights : format == WeightFormat::int8 ? weights : weights / 2;
  m.weights = Buffer(m.panel_bytes * m.panels);
  if (is_integer(format)) {
    m.panel_scales = format == WeightFormat::int8 ? weights / kInt8Group : 2 * weights / kInt4Group;
    m.scales = Buffer(m.panel_scales * m.panels * sizeof(bfloat16));
  }
  std::atomic<std::int64_t> next{0};
  team.run([&](int) {
    for (std::int64_t panel; (panel = next.fetch_add(1)) < m.panels;) {
      unsigned char* out = m.weights.get<unsigned char>() + panel * m.panel_bytes;
      bfloat16* scales = m.scales.get<bfloat16>() + panel * m.panel_scales;
      const RowReader* first = rows.data() + panel * kPanel;
      if (format == WeightFormat::float32) pack_float32(first, inputs, reinterpret_cast<float*>(out));
      else if (format == WeightFormat::bfloat16) pack_bfloat16(first, inputs, reinterpret_cast<bfloat16*>(out));
      else if (format == WeightFormat::int8) pack_int8(first, inputs, out, scales);
      else pack_int4(first, inputs, out, scales);
    }
  });
  return m;
}

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::float32;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  if (name == "int8") return WeightFormat::int8;
  if (name == "int4") return WeightFormat::int4;
  throw std::invalid_argument("weights' format is '" + name + "'; it must be float32, bfloat16, int8 or int4");
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

DecoderWeights::DecoderWeights(DecoderShape given, const std::string& format_name, int threads)
    : shape(given), format(format_of(format_name)), layers(given.num_layers), team(std::max(1, threads)) {}

void DecoderWeights::set_matrix(const std::string& name, std::int64_t layer, std::int64_t outputs, std::int64_t inputs,
                                const std::vector<Source>& sources) {
  Matrix& matrix = name == "embedding" ? embedding_ : name == "head" ? head_ : name == "qkv" ? layers.at(layer).qkv
                   : name == "out" ? layers.at(layer).out : name == "gate_up" ? layers.at(layer).gate_up
                   : name == "down" ? layers.at(layer).down : throw std::invalid_argument("no matrix '" + name + "'");
  // What tokens look like, coming in and going out, is worth 8 bits.
  const bool outer = &matrix == &embedding_ || &matrix == &head_;
  matrix = pack(outer && format == WeightFormat::int4 ? WeightFormat::int8 : format, outputs, inputs, sources, team);
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
    if (embedding_.format == WeightFormat::float32) out[k] = reinterpret_cast<const float*>(w)[k * kPanel + lane];
    else if (embedding_.format == WeightFormat::bfloat16) out[k] = to_float(reinterpret_cast<const bfloat16*>(w)[k / 2 * 2 * kPanel + 2 * lane + k % 2]);
    else out[k] = static_cast<float>(w[int8_place(k, lane)] - 128) * to_float(scales[k / kInt8Group * kPanel + lane]);
  }
}

}  // namespace fasttrain

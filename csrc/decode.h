// The native decode session: weights of a Llama-shaped decoder packed once, and texts being written with them.
//
// Shapes: M tokens in one pass, D hidden size, H query heads, K key/value heads, E head size, I width of the MLP, V
// vocabulary, L layers. A dimension that products run over is padded to kAlign with zeros, outputs to whole panels.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "half_types.h"
#include "sample.h"
#include "thread_team.h"

namespace fasttrain {

constexpr std::int64_t kPanel = 32;        // outputs side by side in a packed matrix
constexpr std::int64_t kInt8Group = 64;    // inputs that share a scale in 8 bits
constexpr std::int64_t kInt4Group = 32;    // inputs that share a scale and a least value in 4 bits
constexpr std::int64_t kRowBlock = 12;     // rows whose inputs in 16 bits stand interleaved
constexpr std::int64_t kAlign = 64;
constexpr std::int64_t kChunk = 128;       // positions that attention takes at a time, whatever the threads
constexpr int kMostQueries = 24;           // query rows in one unit of attention's work

// Zeroed memory on huge pages, given back when it goes.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  template <class T>
  T* get() const { return static_cast<T*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

enum class WeightFormat { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };
inline bool is_integer(WeightFormat format) { return format == WeightFormat::int8 || format == WeightFormat::int4; }

struct Matrix {
  WeightFormat format = WeightFormat::float32;
  std::int64_t inputs = 0, padded_inputs = 0, panels = 0;
  std::size_t panel_bytes = 0, panel_scales = 0;  // bytes of weights and number of scales in a panel
  Buffer weights, scales;                         // (panels, padded_inputs, kPanel); bfloat16 (panels, groups, kPanel)
};                                                // int4: two weights a byte; scales and least values in turn

// Up to kRowBlock rows of inputs in 16 bits, a scale for each group of the matrix's.
struct RowBlock {
  unsigned char* values;   // (padded inputs / 2, count, 2) 16 bits, a group after the other; decode_integer_kernels.h orders it
  float *scales, *sums;    // (groups, count); sums: the scale times the sum of the values
  std::int32_t* offsets;   // (groups, count): -128 times the sum of the values, for int8
  std::int64_t count;
};

// What a matrix is multiplied with: floats, or for integer weights these in 16 bits.
struct Rows {
  const float* values;
  std::ptrdiff_t stride;
  unsigned char* quantized = nullptr;

  static std::size_t quantized_bytes(std::int64_t rows, std::int64_t padded_inputs) { return rows * (2 * padded_inputs + 12 * padded_inputs / kInt4Group); }
  // The rows from `begin` (a multiple of kRowBlock) on, of `rows` in all.
  RowBlock block(std::int64_t begin, std::int64_t rows, const Matrix& matrix) const {
    const std::int64_t count = std::min(kRowBlock, rows - begin), groups = matrix.padded_inputs / kInt4Group;
    unsigned char* at = quantized + quantized_bytes(begin, matrix.padded_inputs);
    float* scales = reinterpret_cast<float*>(at + 2 * count * matrix.padded_inputs);
    return {at, scales, scales + groups * count, reinterpret_cast<std::int32_t*>(scales + 2 * groups * count), count};
  }
};

// Keys and values of one layer, text and head. Keys: (capacity / kPanel, E, kPanel); values: (E / kPanel, capacity, kPanel).
struct HeadCache {
  unsigned char *keys, *values;
  std::int64_t capacity, padded_size;
  std::size_t element_bytes;
};

struct Kernels {
  using Multiply = void (*)(const Matrix&, std::int64_t first, std::int64_t last, const Rows& x, std::int64_t rows, float* y,
                            std::ptrdiff_t ldy, bool add);
  using Attend = void (*)(const HeadCache&, std::int64_t chunk, const float* queries, int rows, const std::int64_t* last_seen,
                          float scale, float* out, float* maxima, float* sums);
  Multiply multiply[4];  // by WeightFormat
  void (*quantize)(const float* x, const Matrix&, const RowBlock& out, std::int64_t row, std::int64_t first_group, std::int64_t last_group);
  void (*normalize)(const float* x, const float* weight, std::int64_t n, float eps, float* out);
  void (*gate)(float* gates, const float* ups, std::int64_t n);
  Attend attend_float32, attend_float16;
  void (*join)(const float* parts, std::ptrdiff_t stride, const float* maxima, const float* sums, std::ptrdiff_t statistics_stride,
               std::int64_t chunks, std::int64_t n, float* out);
};

const Kernels& decode_kernels();  // of the instruction set in use

struct DecoderShape {
  std::int64_t vocab_size, num_layers, num_heads, num_kv_heads, head_size, hidden_size, intermediate_size;
  float norm_eps;
};

// Rows of a matrix where the caller's tensor holds them; `first_output` is where they stand in the packed matrix.
struct Source {
  std::uintptr_t address;
  std::string dtype;  // float32 | bfloat16 | float16
  std::int64_t rows, columns, row_stride, first_output;
};

struct LayerWeights {
  Matrix qkv, out, gate_up, down;
  std::vector<float> attention_norm, mlp_norm, qkv_bias;
};

// Read-only once filled; any number of sessions share it, one of them computing at a time.
class DecoderWeights {
 public:
  DecoderWeights(DecoderShape shape, const std::string& format, int threads);

  // `name` is qkv, out, gate_up or down with a layer, or embedding or head with -1.
  void set_matrix(const std::string& name, std::int64_t layer, std::int64_t outputs, std::int64_t inputs, const std::vector<Source>& sources);
  // attention_norm, mlp_norm or qkv_bias with a layer, or final_norm with -1.
  void set_vector(const std::string& name, std::int64_t layer, std::vector<float> values);

  std::size_t bytes() const;
  const Matrix& head() const { return head_.panels > 0 ? head_ : embedding_; }
  void embed(std::int64_t token, float* out) const;  // (D,)

  const DecoderShape shape;
  const WeightFormat format;
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;
  ThreadTeam team;
  std::mutex computing;

 private:
  Matrix embedding_, head_;
};

class DecodeSession {
 public:
  // Room for `rows` texts of up to `capacity` positions. `cosines`, `sines`: float32 (capacity, E / 2).
  DecodeSession(std::shared_ptr<DecoderWeights> weights, std::int64_t rows, std::int64_t capacity, std::uintptr_t cosines, std::uintptr_t sines);

  // Appends tokens to each live row (none to some, if none is wanted); then `logits` has one row (V,) for each live row,
  // after its last token, or with `every` one for each token in order.
  void extend(const std::vector<std::vector<std::int64_t>>& tokens, bool every);
  void copy_logits(std::uintptr_t address, std::int64_t rows, std::int64_t columns) const;
  void select(const std::vector<std::int64_t>& rows);  // the rows are now these; one may be taken several times
  void rewind(std::int64_t count);                     // forgets the last positions of every row
  std::vector<std::int64_t> lengths() const;

  // Draws a token for each live row, and so on for up to `rounds` rounds. The rows that drew an `end` token leave. A
  // callback gets each round's tokens and returns the positions of the rows that go on, or None for those that did not
  // end. Returns the tokens of each round.
  std::vector<std::vector<std::int64_t>> run(std::int64_t rounds, SampleSettings settings, const std::vector<std::uint64_t>& seeds,
                                             std::int64_t vocabulary, const std::vector<std::int64_t>& ends, const pybind11::object& callback);

 private:
  struct Row {
    std::int64_t slot, length;
    std::uint64_t seed;
  };
  // Consecutive tokens of one row in a pass.
  struct Run {
    std::int64_t slot, first_position, first_token, count;
  };

  void forward(const std::vector<std::vector<std::int64_t>>& tokens, bool every);
  void pass(const std::vector<Run>& runs, const std::vector<std::int64_t>& tokens, const std::vector<std::int64_t>& wanted, float* logits);
  void layer(int thread, std::int64_t index, const std::vector<Run>& runs, std::int64_t M);
  void attend_decoding(int thread, std::int64_t layer, const std::vector<Run>& runs);
  void attend_prompts(int thread, std::int64_t layer, const std::vector<Run>& runs);
  void write_cache(std::int64_t layer, std::int64_t token, std::int64_t slot, std::int64_t position, std::int64_t head);
  void load_queries(std::int64_t token, std::int64_t count, std::int64_t position, std::int64_t head, float* out) const;
  void rotate(const float* x, std::int64_t position, float* out) const;
  std::int64_t take_slot();
  void copy_cache(std::int64_t from, std::int64_t to, std::int64_t length);
  HeadCache cache(std::int64_t layer, std::int64_t slot, std::int64_t head) const;
  void reserve(std::int64_t M, std::int64_t chunks);
  Rows normalized(int thread, const float* weight, std::int64_t M, const Matrix& matrix);
  Rows prepared(int thread, const float* x, std::ptrdiff_t ldx, std::int64_t M, const Matrix& matrix);
  void quantize(const Rows& rows, std::int64_t M, const Matrix& matrix, int part, int parts) const;
  void multiply(int thread, const Matrix& matrix, const Rows& x, std::int64_t M, float* y, std::ptrdiff_t ldy, bool add) const;

  const std::shared_ptr<DecoderWeights> weights_;
  const Kernels* kernels_;
  const std::int64_t capacity_, padded_head_, own_rows_;
  const bool half_cache_;
  const std::size_t element_bytes_;
  std::vector<float> cosines_, sines_;
  struct Slot {
    Buffer keys, values;
    bool taken;
  };
  std::vector<Slot> slots_;  // one for each text that was ever live at a time
  std::vector<Row> rows_;
  std::int64_t drawn_ = 0;
  std::vector<std::vector<std::int64_t>> pending_;  // drawn, not read by the model yet
  std::vector<float> logits_;                       // (rows, padded V)
  std::int64_t num_logits_ = 0;                     // of them from the last forward

  // Workspace of one pass.
  std::int64_t reserved_tokens_ = 0;
  std::ptrdiff_t ld_hidden_, ld_qkv_, ld_attention_, ld_mlp_, ld_logits_;
  Buffer x_, normed_, qkv_, attention_, mlp_, wanted_, quantized_;
  std::size_t quantized_part_ = 0;  // bytes of a thread's own rows in `quantized_`
  std::vector<float> parts_, maxima_, sums_;
};

void bind_decode(pybind11::module_& m);

}  // namespace fasttrain

// The native decode session: texts, their caches, one pass through the layers, and the loop of passes and draws.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "decode.h"

namespace fasttrain {
namespace {

constexpr std::int64_t kPassTokens = 192;  // of a prompt in one pass: enough to be bound by arithmetic

// Rows that every thread prepares for itself, which saves barriers and other cores' cache lines. Among many threads a share
// of the work is the less.
constexpr std::int64_t own_rows(int threads) { return threads <= 4 ? kRowBlock : 4; }

std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Rows of padded width, and a little more: at a multiple of 4 KiB they would share few sets of the L1 cache.
std::ptrdiff_t leading_dimension(std::int64_t n) { return padded(n, kAlign) + 16; }

struct Range {
  std::int64_t begin, end;
};
Range share(std::int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

}  // namespace

DecodeSession::DecodeSession(std::shared_ptr<DecoderWeights> weights, std::int64_t rows, std::int64_t capacity, std::uintptr_t cosines,
                             std::uintptr_t sines)
    : weights_(std::move(weights)), kernels_(&decode_kernels()), capacity_(padded(capacity, kChunk)),
      padded_head_(padded(weights_->shape.head_size, kPanel)), own_rows_(own_rows(weights_->team.size())),
      half_cache_(weights_->format != WeightFormat::float32),
      element_bytes_(half_cache_ ? 2 : 4) {
  const DecoderShape& shape = weights_->shape;
  const std::size_t angles = static_cast<std::size_t>(capacity) * shape.head_size / 2;
  cosines_.assign(reinterpret_cast<const float*>(cosines), reinterpret_cast<const float*>(cosines) + angles);
  sines_.assign(reinterpret_cast<const float*>(sines), reinterpret_cast<const float*>(sines) + angles);
  for (std::int64_t row = 0; row < rows; ++row) rows_.push_back({take_slot(), 0, 0});
  ld_hidden_ = leading_dimension(shape.hidden_size);
  ld_qkv_ = leading_dimension((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size);
  ld_attention_ = leading_dimension(shape.num_heads * shape.head_size);
  ld_mlp_ = leading_dimension(2 * padded(shape.intermediate_size, kAlign));
  ld_logits_ = padded(shape.vocab_size, kPanel);
}

std::vector<std::int64_t> DecodeSession::lengths() const {
  std::vector<std::int64_t> all;
  for (std::size_t i = 0; i < rows_.size(); ++i) all.push_back(rows_[i].length);
  return all;
}

std::int64_t DecodeSession::take_slot() {
  for (std::size_t slot = 0; slot < slots_.size(); ++slot)
    if (!std::exchange(slots_[slot].taken, true)) return static_cast<std::int64_t>(slot);
  const DecoderShape& shape = weights_->shape;
  const std::size_t bytes = element_bytes_ * shape.num_layers * shape.num_kv_heads * capacity_ * padded_head_;
  slots_.push_back({Buffer(bytes), Buffer(bytes), true});
  return static_cast<std::int64_t>(slots_.size()) - 1;
}

void DecodeSession::copy_cache(std::int64_t from, std::int64_t to, std::int64_t length) {
  const DecoderShape& shape = weights_->shape;
  const std::size_t row = kPanel * element_bytes_;
  const std::int64_t blocks = padded(length, kPanel) / kPanel;
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer)
    for (std::int64_t head = 0; head < shape.num_kv_heads; ++head) {
      const HeadCache source = cache(layer, from, head), target = cache(layer, to, head);
      std::memcpy(target.keys, source.keys, blocks * padded_head_ * row);
      for (std::int64_t slice = 0; slice * kPanel < padded_head_; ++slice)
        std::memcpy(target.values + slice * capacity_ * row, source.values + slice * capacity_ * row, length * row);
    }
}

void DecodeSession::select(const std::vector<std::int64_t>& rows) {
  std::vector<Row> selected;
  std::vector<std::vector<std::int64_t>> pending;
  for (const std::int64_t row : rows) {
    selected.push_back(rows_.at(row));
    if (!pending_.empty()) pending.push_back(pending_.at(row));
  }
  for (Slot& slot : slots_) slot.taken = false;
  for (const Row& row : selected) slots_[row.slot].taken = true;
  for (std::size_t i = 0; i < selected.size(); ++i)
    for (std::size_t earlier = 0; earlier < i; ++earlier)
      if (rows[i] == rows[earlier]) {
        selected[i].slot = take_slot();
        copy_cache(selected[earlier].slot, selected[i].slot, selected[i].length);
        break;
      }
  if (num_logits_ == static_cast<std::int64_t>(rows_.size())) {  // what `run` draws from next
    std::vector<float> moved(rows.size() * ld_logits_);
    for (std::size_t i = 0; i < rows.size(); ++i) std::memcpy(moved.data() + i * ld_logits_, logits_.data() + rows[i] * ld_logits_, ld_logits_ * sizeof(float));
    std::swap(logits_, moved);
    num_logits_ = static_cast<std::int64_t>(rows.size());
  }
  rows_ = std::move(selected);
  pending_ = std::move(pending);
}

void DecodeSession::rewind(std::int64_t count) {
  if (!pending_.empty()) throw std::invalid_argument("rewind cannot follow run: tokens were drawn that the model has not read");
  for (const Row& row : rows_)
    if (count < 0 || count > row.length) throw std::invalid_argument("rewind got " + std::to_string(count) + " positions; a row has " + std::to_string(row.length));
  for (Row& row : rows_) row.length -= count;
}

void DecodeSession::copy_logits(std::uintptr_t address, std::int64_t rows, std::int64_t columns) const {
  float* out = reinterpret_cast<float*>(address);
  for (std::int64_t row = 0; row < rows; ++row) std::memcpy(out + row * columns, logits_.data() + row * ld_logits_, columns * sizeof(float));
}

void DecodeSession::extend(const std::vector<std::vector<std::int64_t>>& tokens, bool every) {
  pending_.clear();
  forward(tokens, every);
}

// Splits what is to be read into passes of at most kPassTokens tokens.
void DecodeSession::forward(const std::vector<std::vector<std::int64_t>>& tokens, bool every) {
  if (tokens.size() != rows_.size()) throw std::invalid_argument("extend needs tokens for each live row");
  std::int64_t num_logits = 0;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const std::int64_t count = static_cast<std::int64_t>(tokens[i].size());
    if (rows_[i].length + count > capacity_ || (rows_[i].length + count) * weights_->shape.head_size / 2 > static_cast<std::int64_t>(cosines_.size()))
      throw std::invalid_argument("a text outgrows the session's capacity");
    for (const std::int64_t token : tokens[i])
      if (token < 0 || token >= weights_->shape.vocab_size) throw std::invalid_argument("a token id lies outside of the vocabulary");
    num_logits += every ? count : 1;
  }
  if (static_cast<std::int64_t>(logits_.size()) < num_logits * ld_logits_) logits_.resize(num_logits * ld_logits_);
  num_logits_ = num_logits;
  const std::lock_guard<std::mutex> lock(weights_->computing);
  std::vector<Run> runs;
  std::vector<std::int64_t> ids, wanted;
  std::int64_t next_logits = 0;
  auto flush = [&] {
    if (ids.empty()) return;
    pass(runs, ids, wanted, logits_.data() + next_logits * ld_logits_);
    next_logits += static_cast<std::int64_t>(wanted.size());
    runs.clear(), ids.clear(), wanted.clear();
  };
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const std::int64_t count = static_cast<std::int64_t>(tokens[i].size());
    for (std::int64_t begin = 0; begin < count;) {
      const std::int64_t taken = std::min(count - begin, kPassTokens - static_cast<std::int64_t>(ids.size()));
      runs.push_back({rows_[i].slot, rows_[i].length, static_cast<std::int64_t>(ids.size()), taken});
      for (std::int64_t k = begin; k < begin + taken; ++k) {
        if (every || k + 1 == count) wanted.push_back(static_cast<std::int64_t>(ids.size()));
        ids.push_back(tokens[i][k]);
      }
      rows_[i].length += taken;
      begin += taken;
      if (static_cast<std::int64_t>(ids.size()) == kPassTokens) flush();
    }
  }
  flush();
}

void DecodeSession::reserve(std::int64_t M, std::int64_t chunks) {
  const DecoderShape& shape = weights_->shape;
  const int threads = weights_->team.size();
  if (M > reserved_tokens_) {
    reserved_tokens_ = M;
    x_ = Buffer(sizeof(float) * M * ld_hidden_);
    normed_ = Buffer(sizeof(float) * std::max<std::int64_t>(M, threads * own_rows_) * ld_hidden_);
    wanted_ = Buffer(sizeof(float) * M * ld_hidden_);
    qkv_ = Buffer(sizeof(float) * M * ld_qkv_);
    attention_ = Buffer(sizeof(float) * M * ld_attention_);
    mlp_ = Buffer(sizeof(float) * M * ld_mlp_);
    if (is_integer(weights_->format)) {
      const std::int64_t widest = std::max({ld_hidden_, ld_attention_, ld_mlp_ / 2});
      quantized_part_ = Rows::quantized_bytes(own_rows_, padded(widest, kAlign)) + 1024;  // no thread writes into another's lines
      quantized_ = Buffer(std::max<std::size_t>(Rows::quantized_bytes(M, padded(widest, kAlign)), threads * quantized_part_));
    }
  }
  // Either every (token, head, chunk), or what each thread works on.
  const std::size_t queries = std::max<std::size_t>(static_cast<std::size_t>(M <= threads * kMostQueries ? M * shape.num_heads : 0),
                                                    static_cast<std::size_t>(threads) * kMostQueries) * chunks;
  if (maxima_.size() < queries) {
    parts_.resize(queries * padded_head_);
    maxima_.resize(queries);
    sums_.resize(queries);
  }
}

// One pass of M tokens through the model; logits (wanted, padded V) of the tokens named in `wanted`.
void DecodeSession::pass(const std::vector<Run>& runs, const std::vector<std::int64_t>& tokens, const std::vector<std::int64_t>& wanted,
                         float* logits) {
  const std::int64_t M = static_cast<std::int64_t>(tokens.size()), N = static_cast<std::int64_t>(wanted.size());
  std::int64_t longest = 0;
  for (const Run& run : runs) longest = std::max(longest, run.first_position + run.count);
  reserve(M, (longest + kChunk - 1) / kChunk);
  const DecoderShape& shape = weights_->shape;
  ThreadTeam& team = weights_->team;
  float *x = x_.get<float>(), *rows = wanted_.get<float>();
  team.run([&](int thread) {
    const Range mine = share(M, thread, team.size());
    for (std::int64_t m = mine.begin; m < mine.end; ++m) weights_->embed(tokens[m], x + m * ld_hidden_);
    team.barrier();
    for (std::int64_t index = 0; index < shape.num_layers; ++index) layer(thread, index, runs, M);
    if (N == 0) return;
    const Range last = share(N, thread, team.size());
    for (std::int64_t i = last.begin; i < last.end; ++i)
      kernels_->normalize(x + wanted[i] * ld_hidden_, weights_->final_norm.data(), shape.hidden_size, shape.norm_eps, rows + i * ld_hidden_);
    team.barrier();
    multiply(thread, weights_->head(), prepared(thread, rows, ld_hidden_, N, weights_->head()), N, logits, ld_logits_, false);
  });
}

void DecodeSession::multiply(int thread, const Matrix& matrix, const Rows& x, std::int64_t M, float* y, std::ptrdiff_t ldy, bool add) const {
  const Range panels = share(matrix.panels, thread, weights_->team.size());
  kernels_->multiply[static_cast<int>(matrix.format)](matrix, panels.begin, panels.end, x, M, y, ldy, add);
}

// For a matrix of integers, a part of the groups of M rows in 16 bits: what a thread writes lies together.
void DecodeSession::quantize(const Rows& rows, std::int64_t M, const Matrix& matrix, int part, int parts) const {
  const Range groups = share(matrix.padded_inputs / (matrix.format == WeightFormat::int8 ? kInt8Group : kInt4Group), part, parts);
  for (std::int64_t m = 0; m < M; ++m) {
    const std::int64_t block = m / kRowBlock * kRowBlock;
    kernels_->quantize(rows.values + m * rows.stride, matrix, rows.block(block, M, matrix), m - block, groups.begin, groups.end);
  }
}

// Rows of x as `matrix` is multiplied with. Few rows every thread prepares for itself, of more a share and then waits.
Rows DecodeSession::prepared(int thread, const float* x, std::ptrdiff_t ldx, std::int64_t M, const Matrix& matrix) {
  const bool own = M <= own_rows_;
  const Rows rows{x, ldx, quantized_.get<unsigned char>() + (own ? thread * quantized_part_ : 0)};
  if (!is_integer(matrix.format)) return rows;
  quantize(rows, M, matrix, own ? 0 : thread, own ? 1 : weights_->team.size());
  if (!own) weights_->team.barrier();
  return rows;
}

Rows DecodeSession::normalized(int thread, const float* weight, std::int64_t M, const Matrix& matrix) {
  const DecoderShape& shape = weights_->shape;
  ThreadTeam& team = weights_->team;
  const bool own = M <= own_rows_;
  float* out = normed_.get<float>() + (own ? thread * own_rows_ * ld_hidden_ : 0);
  const Range mine = own ? Range{0, M} : share(M, thread, team.size());
  for (std::int64_t m = mine.begin; m < mine.end; ++m)
    kernels_->normalize(x_.get<float>() + m * ld_hidden_, weight, shape.hidden_size, shape.norm_eps, out + m * ld_hidden_);
  if (!own) team.barrier();
  return prepared(thread, out, ld_hidden_, M, matrix);
}

void DecodeSession::layer(int thread, std::int64_t index, const std::vector<Run>& runs, std::int64_t M) {
  const LayerWeights& w = weights_->layers[index];
  ThreadTeam& team = weights_->team;
  float *x = x_.get<float>(), *mlp = mlp_.get<float>();
  multiply(thread, w.qkv, normalized(thread, w.attention_norm.data(), M, w.qkv), M, qkv_.get<float>(), ld_qkv_, false);
  if (!w.qkv_bias.empty()) {
    const Range panels = share(w.qkv.panels, thread, team.size());
    const std::int64_t end = std::min<std::int64_t>(panels.end * kPanel, static_cast<std::int64_t>(w.qkv_bias.size()));
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t i = panels.begin * kPanel; i < end; ++i) qkv_.get<float>()[m * ld_qkv_ + i] += w.qkv_bias[i];
  }
  team.barrier();
  if (std::all_of(runs.begin(), runs.end(), [](const Run& run) { return run.count == 1; }) && M <= team.size() * kMostQueries)
    attend_decoding(thread, index, runs);
  else
    attend_prompts(thread, index, runs);
  team.barrier();
  multiply(thread, w.out, prepared(thread, attention_.get<float>(), ld_attention_, M, w.out), M, x, ld_hidden_, true);
  team.barrier();
  // A thread computes gate and up of the same units, so it can join them at once.
  const Rows normed = normalized(thread, w.mlp_norm.data(), M, w.gate_up);
  const std::int64_t half = w.gate_up.panels / 2;
  const Range units = share(half, thread, team.size());
  const auto product = kernels_->multiply[static_cast<int>(w.gate_up.format)];
  product(w.gate_up, units.begin, units.end, normed, M, mlp, ld_mlp_, false);
  product(w.gate_up, half + units.begin, half + units.end, normed, M, mlp, ld_mlp_, false);
  for (std::int64_t m = 0; m < M; ++m) {
    float* gates = mlp + m * ld_mlp_ + units.begin * kPanel;
    kernels_->gate(gates, gates + half * kPanel, (units.end - units.begin) * kPanel);
  }
  team.barrier();
  multiply(thread, w.down, prepared(thread, mlp, ld_mlp_, M, w.down), M, x, ld_hidden_, true);
  team.barrier();
}

HeadCache DecodeSession::cache(std::int64_t layer, std::int64_t slot, std::int64_t head) const {
  const std::size_t bytes = element_bytes_ * capacity_ * padded_head_;
  const std::size_t offset = (layer * weights_->shape.num_kv_heads + head) * bytes;
  return {slots_[slot].keys.get<unsigned char>() + offset, slots_[slot].values.get<unsigned char>() + offset, capacity_, padded_head_,
          element_bytes_};
}

// Turns the pairs (x_i, x_{i+E/2}) by the position's angles.
void DecodeSession::rotate(const float* x, std::int64_t position, float* out) const {
  const std::int64_t half = weights_->shape.head_size / 2;
  const float *c = cosines_.data() + position * half, *s = sines_.data() + position * half;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * c[i] - b * s[i];
    out[i + half] = b * c[i] + a * s[i];
  }
}

// The rotated queries of `count` tokens from `token` on for one key/value head: (count * group, padded E).
void DecodeSession::load_queries(std::int64_t token, std::int64_t count, std::int64_t position, std::int64_t head, float* out) const {
  const DecoderShape& shape = weights_->shape;
  const std::int64_t E = shape.head_size, group = shape.num_heads / shape.num_kv_heads;
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t g = 0; g < group; ++g) {
      const float* q = qkv_.get<float>() + (token + t) * ld_qkv_ + (head * group + g) * E;
      float* to = out + (t * group + g) * padded_head_;
      rotate(q, position + t, to);
      std::fill(to + E, to + padded_head_, 0.0f);
    }
}

void DecodeSession::write_cache(std::int64_t layer, std::int64_t token, std::int64_t slot, std::int64_t position, std::int64_t head) {
  const DecoderShape& shape = weights_->shape;
  const std::int64_t E = shape.head_size;
  const float* k = qkv_.get<float>() + token * ld_qkv_ + (shape.num_heads + head) * E;
  const float* v = k + shape.num_kv_heads * E;
  float rotated[512];
  rotate(k, position, rotated);
  const HeadCache to = cache(layer, slot, head);
  const std::int64_t key = position / kPanel * padded_head_ * kPanel + position % kPanel;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t value = (e / kPanel * capacity_ + position) * kPanel + e % kPanel;
    if (half_cache_) {
      reinterpret_cast<float16*>(to.keys)[key + e * kPanel] = to_float16(rotated[e]);
      reinterpret_cast<float16*>(to.values)[value] = to_float16(v[e]);
    } else {
      reinterpret_cast<float*>(to.keys)[key + e * kPanel] = rotated[e];
      reinterpret_cast<float*>(to.values)[value] = v[e];
    }
  }
}

// One token a row: the units of work are (row, head, chunk), so that one long text keeps every thread busy. The thread
// with a row's last chunk writes the new key and value: nobody else reads them.
void DecodeSession::attend_decoding(int thread, std::int64_t layer, const std::vector<Run>& runs) {
  const DecoderShape& shape = weights_->shape;
  ThreadTeam& team = weights_->team;
  const std::int64_t heads = shape.num_kv_heads, group = shape.num_heads / heads;
  const auto attend = half_cache_ ? kernels_->attend_float16 : kernels_->attend_float32;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
  alignas(64) float queries[kMostQueries * 512];
  std::int64_t unit = 0, at = 0;
  for (const Run& run : runs) unit += heads * (run.first_position / kChunk + 1);
  const Range mine = share(unit, thread, team.size());  // side by side, so that chunks are one stream of memory
  unit = 0;
  for (const Run& run : runs) {
    const std::int64_t chunks = run.first_position / kChunk + 1;
    for (std::int64_t head = 0; head < heads; ++head)
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk, ++unit, at += group) {
        if (unit < mine.begin || unit >= mine.end) continue;
        if (chunk + 1 == chunks) write_cache(layer, run.first_token, run.slot, run.first_position, head);
        load_queries(run.first_token, 1, run.first_position, head, queries);
        std::int64_t last_seen[kMostQueries];
        std::fill(last_seen, last_seen + group, run.first_position);
        attend(cache(layer, run.slot, head), chunk, queries, static_cast<int>(group), last_seen, scale,
               parts_.data() + at * padded_head_, maxima_.data() + at, sums_.data() + at);
      }
  }
  team.barrier();
  unit = 0, at = 0;
  for (const Run& run : runs) {
    const std::int64_t chunks = run.first_position / kChunk + 1;
    for (std::int64_t head = 0; head < heads; ++head, ++unit, at += chunks * group) {
      if (unit % team.size() != thread) continue;
      for (std::int64_t g = 0; g < group; ++g)
        kernels_->join(parts_.data() + (at + g) * padded_head_, group * padded_head_, maxima_.data() + at + g, sums_.data() + at + g, group,
                       chunks, shape.head_size, attention_.get<float>() + run.first_token * ld_attention_ + (head * group + g) * shape.head_size);
    }
  }
}

// Several tokens a row: first every key and value, then units of (some tokens, head), each with all its chunks.
void DecodeSession::attend_prompts(int thread, std::int64_t layer, const std::vector<Run>& runs) {
  const DecoderShape& shape = weights_->shape;
  ThreadTeam& team = weights_->team;
  const std::int64_t heads = shape.num_kv_heads, group = shape.num_heads / heads, together = kMostQueries / group;
  const auto attend = half_cache_ ? kernels_->attend_float16 : kernels_->attend_float32;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
  for (const Run& run : runs)
    for (std::int64_t t = 0; t < run.count; ++t)
      if ((run.first_token + t) % team.size() == thread)
        for (std::int64_t head = 0; head < heads; ++head) write_cache(layer, run.first_token + t, run.slot, run.first_position + t, head);
  team.barrier();
  alignas(64) float queries[kMostQueries * 512];
  const std::int64_t most_chunks = static_cast<std::int64_t>(maxima_.size()) / (team.size() * kMostQueries);
  const std::size_t mine = static_cast<std::size_t>(thread) * most_chunks * kMostQueries;
  float *parts = parts_.data() + mine * padded_head_, *maxima = maxima_.data() + mine, *sums = sums_.data() + mine;
  std::int64_t unit = 0;
  for (const Run& run : runs)
    for (std::int64_t begin = 0; begin < run.count; begin += together)
      for (std::int64_t head = 0; head < heads; ++head, ++unit) {
        if (unit % team.size() != thread) continue;
        const std::int64_t count = std::min(together, run.count - begin), position = run.first_position + begin;
        load_queries(run.first_token + begin, count, position, head, queries);
        std::int64_t last_seen[kMostQueries];
        for (std::int64_t i = 0; i < count * group; ++i) last_seen[i] = position + i / group;
        const std::int64_t chunks = (position + count - 1) / kChunk + 1;
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
          attend(cache(layer, run.slot, head), chunk, queries, static_cast<int>(count * group), last_seen, scale,
                 parts + chunk * kMostQueries * padded_head_, maxima + chunk * kMostQueries, sums + chunk * kMostQueries);
        for (std::int64_t i = 0; i < count * group; ++i)
          kernels_->join(parts + i * padded_head_, kMostQueries * padded_head_, maxima + i, sums + i, kMostQueries, last_seen[i] / kChunk + 1,
                         shape.head_size,
                         attention_.get<float>() + (run.first_token + begin + i / group) * ld_attention_ + (head * group + i % group) * shape.head_size);
      }
}

std::vector<std::vector<std::int64_t>> DecodeSession::run(std::int64_t rounds, SampleSettings settings, const std::vector<std::uint64_t>& seeds,
                                                          std::int64_t vocabulary, const std::vector<std::int64_t>& ends,
                                                          const pybind11::object& callback) {
  namespace py = pybind11;
  if (seeds.size() != rows_.size()) throw std::invalid_argument("run needs a seed for each live row");
  if (vocabulary < 1 || vocabulary > weights_->shape.vocab_size) throw std::invalid_argument("run draws from tokens that the model does not have");
  if (!rows_.empty() && pending_.empty() && num_logits_ != static_cast<std::int64_t>(rows_.size()))
    throw std::invalid_argument("run draws from the logits after each row's last token; extend without `every` makes them");
  for (std::size_t i = 0; i < rows_.size(); ++i) rows_[i].seed = seeds[i];
  std::vector<std::vector<std::int64_t>> all;
  auto looked = std::chrono::steady_clock::now();
  for (std::int64_t round = 0; round < rounds && !rows_.empty(); ++round) {
    if (!pending_.empty()) forward(std::exchange(pending_, {}), false);
    const std::int64_t B = static_cast<std::int64_t>(rows_.size());
    std::vector<std::int64_t> tokens(B), going;
    {
      const std::lock_guard<std::mutex> lock(weights_->computing);
      ThreadTeam& team = weights_->team;
      auto draw = [&](int thread) {
        for (std::int64_t i = thread; i < B; i += team.size())
          tokens[i] = draw_token(logits_.data() + i * ld_logits_, vocabulary, settings, rows_[i].seed, static_cast<std::uint64_t>(drawn_));
      };
      if (B > 1) team.run(draw);
      else tokens[0] = draw_token(logits_.data(), vocabulary, settings, rows_[0].seed, static_cast<std::uint64_t>(drawn_));
    }
    for (std::int64_t i = 0; i < B; ++i)
      if (tokens[i] < 0)
        throw std::invalid_argument("row " + std::to_string(i) + " of the logits holds NaN, +inf or nothing but -inf at new token " +
                                    std::to_string(drawn_) + "; there is no distribution to draw from");
    ++drawn_;
    for (std::int64_t i = 0; i < B; ++i)
      if (std::find(ends.begin(), ends.end(), tokens[i]) == ends.end()) going.push_back(i);
    const auto now = std::chrono::steady_clock::now();
    if (!callback.is_none()) {
      const py::gil_scoped_acquire gil;
      const py::object answer = callback(tokens);
      if (!answer.is_none()) going = answer.cast<std::vector<std::int64_t>>();
    } else if (now - looked > std::chrono::milliseconds(100)) {  // Ctrl-C must not wait for the end of the text
      looked = now;
      const py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    pending_.clear();
    for (const std::int64_t i : going) pending_.push_back({tokens.at(i)});
    if (going.size() < rows_.size()) {
      std::vector<Row> kept;
      for (const std::int64_t i : going) kept.push_back(rows_.at(i));
      rows_ = std::move(kept);
    }
    all.push_back(std::move(tokens));
  }
  return all;
}

void bind_decode(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<DecoderWeights, std::shared_ptr<DecoderWeights>>(m, "DecoderWeights", "Weights of a Llama-shaped decoder, packed for the CPU.")
      .def(py::init([](std::int64_t vocab_size, std::int64_t num_layers, std::int64_t num_heads, std::int64_t num_kv_heads,
                       std::int64_t head_size, std::int64_t hidden_size, std::int64_t intermediate_size, float norm_eps,
                       const std::string& format, int threads) {
             return std::make_shared<DecoderWeights>(
                 DecoderShape{vocab_size, num_layers, num_heads, num_kv_heads, head_size, hidden_size, intermediate_size, norm_eps}, format, threads);
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("num_layers"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_size"),
           py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("norm_eps"), py::arg("format"), py::arg("threads"))
      .def(
          "set_matrix",
          [](DecoderWeights& self, const std::string& name, std::int64_t layer, std::int64_t outputs, std::int64_t inputs,
             const std::vector<std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t>>& rows) {
            std::vector<Source> sources;
            for (const auto& [address, dtype, count, columns, stride, first] : rows) sources.push_back({address, dtype, count, columns, stride, first});
            const py::gil_scoped_release nogil;
            self.set_matrix(name, layer, outputs, inputs, sources);
          },
          py::arg("name"), py::arg("layer"), py::arg("outputs"), py::arg("inputs"), py::arg("sources"),
          "Packs a matrix from tensors in memory: (address, dtype, rows, columns, row stride, first output) each.")
      .def("set_vector", &DecoderWeights::set_vector, py::arg("name"), py::arg("layer"), py::arg("values"))
      .def_property_readonly("threads", [](const DecoderWeights& self) { return self.team.size(); })
      .def_property_readonly("bytes", &DecoderWeights::bytes, "Memory of the packed matrices.");
  py::class_<DecodeSession>(m, "DecodeSession", "Texts being written with DecoderWeights.")
      .def(py::init<std::shared_ptr<DecoderWeights>, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>(), py::arg("weights"),
           py::arg("rows"), py::arg("capacity"), py::arg("cosines"), py::arg("sines"))
      .def("extend", &DecodeSession::extend, py::arg("tokens"), py::arg("every") = false, py::call_guard<py::gil_scoped_release>(),
           "Appends tokens to each live row; logits after the last of each row, or after every one.")
      .def("copy_logits", &DecodeSession::copy_logits, py::arg("address"), py::arg("rows"), py::arg("columns"))
      .def("select", &DecodeSession::select, py::arg("rows"), py::call_guard<py::gil_scoped_release>(),
           "The rows are now these; one may be taken several times.")
      .def("rewind", &DecodeSession::rewind, py::arg("count"), "Forgets the last positions of every row.")
      .def_property_readonly("lengths", &DecodeSession::lengths)
      .def(
          "run",
          [](DecodeSession& self, std::int64_t rounds, float temperature, std::int64_t top_k, float top_p, float min_p,
             const std::vector<std::uint64_t>& seeds, std::int64_t vocabulary, const std::vector<std::int64_t>& ends, const py::object& callback) {
            const py::gil_scoped_release nogil;
            return self.run(rounds, {temperature, top_k, top_p, min_p}, seeds, vocabulary, ends, callback);
          },
          py::kw_only(), py::arg("rounds"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seeds"),
          py::arg("vocabulary"), py::arg("ends"), py::arg("callback"),
          "Draws and reads up to `rounds` tokens a row without the interpreter; returns the tokens of each round.");
}

}  // namespace fasttrain

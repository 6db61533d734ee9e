// Where the last tokens of a growing text stood before, for guessing how it goes on.
//
// One hash table holds, for every n-gram of shortest to longest tokens, where it last ended; a token enters longest -
// shortest + 1 of them, however long the text is. What is found is compared token by token, so a proposal is always a
// true repeat; two n-grams with one 64-bit hash only hide an older repeat.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fasttrain {

class NgramIndex {
 public:
  NgramIndex(std::int64_t shortest, std::int64_t longest) : shortest_(shortest), longest_(longest), table_(1024) {
    if (shortest < 1 || longest < shortest)
      throw std::invalid_argument("shortest=" + std::to_string(shortest) + " and longest=" + std::to_string(longest) + " must hold 1 <= shortest <= longest");
  }

  void extend(const std::vector<std::int64_t>& ids) {
    for (const std::int64_t id : ids) append(id);
  }

  std::vector<std::int64_t> continuation(std::int64_t count) const {
    std::vector<std::int64_t> tokens;
    if (matched_ >= shortest_)
      for (std::int64_t at = match_end_; at < size() && static_cast<std::int64_t>(tokens.size()) < count; ++at) tokens.push_back(ids_[at]);
    return tokens;
  }

  std::int64_t size() const { return static_cast<std::int64_t>(ids_.size()); }

 private:
  struct Entry {
    std::uint64_t hash = 0;
    std::int64_t end = 0;  // one past the n-gram's last token; 0: free
  };

  void append(std::int64_t id) {
    ids_.push_back(id);
    matched_ = 0;
    std::uint64_t hash = 0x9E3779B97F4A7C15u;
    for (std::int64_t n = 1; n <= longest_ && n <= size(); ++n) {
      hash = mixed(hash ^ static_cast<std::uint64_t>(ids_[size() - n]));
      if (n < shortest_) continue;
      Entry& entry = find(hash + static_cast<std::uint64_t>(n));
      const std::int64_t end = std::exchange(entry.end, size());
      if (end == 0) {
        ++used_;
      } else if (matched_ == (n == shortest_ ? 0 : n - 1) && repeats(end, n)) {
        matched_ = n;
        match_end_ = end;
      }
    }
    if (2 * used_ > static_cast<std::int64_t>(table_.size())) grow();
  }

  static std::uint64_t mixed(std::uint64_t x) {  // the finisher of SplitMix64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  }

  bool repeats(std::int64_t end, std::int64_t n) const {
    for (std::int64_t i = 1; i <= n; ++i)
      if (ids_[end - i] != ids_[size() - i]) return false;
    return true;
  }

  Entry& find(std::uint64_t hash) {
    std::size_t at = hash & (table_.size() - 1);
    while (table_[at].end != 0 && table_[at].hash != hash) at = (at + 1) & (table_.size() - 1);
    table_[at].hash = hash;
    return table_[at];
  }

  void grow() {
    std::vector<Entry> old(2 * table_.size());
    std::swap(old, table_);
    for (const Entry& entry : old)
      if (entry.end != 0) find(entry.hash).end = entry.end;
  }

  const std::int64_t shortest_, longest_;
  std::vector<std::int64_t> ids_;
  std::vector<Entry> table_;  // a power of two
  std::int64_t used_ = 0, matched_ = 0, match_end_ = 0;
};

inline void bind_ngram_index(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<NgramIndex>(m, "NgramIndex", "A growing text of token ids that knows where its last tokens stood before.")
      .def(py::init<std::int64_t, std::int64_t>(), py::arg("shortest"), py::arg("longest"))
      .def("extend", &NgramIndex::extend, py::arg("ids"), "Appends tokens.")
      .def("continuation", &NgramIndex::continuation, py::arg("count"),
           "Up to `count` tokens that came after the longest repeat of the text's end, of equally long ones the latest.")
      .def("__len__", &NgramIndex::size);
}

}  // namespace fasttrain

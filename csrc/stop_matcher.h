// Finds stop strings in a byte stream as it arrives, holding back only what may yet turn out to be one.
//
// Aho-Corasick over bytes: feeding costs amortised O(1) per byte whatever the number of stop strings. The stream ends
// at the first byte at which any stop string ends; if several end there, the longest of them is cut off. That rule does
// not depend on how the stream is split into pieces. Bytes rather than characters, because tokens split characters.
// fasttrain/text_stream.py holds the same machine in Python for installations without the extension; keep them alike.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fasttrain {

class StopMatcher {
 public:
  explicit StopMatcher(const std::vector<std::string>& stops) : nodes_(1) {
    for (const std::string& stop : stops) {
      if (stop.empty()) {
        throw std::invalid_argument("stops holds an empty string, which would match everywhere; leave it out");
      }
      insert(stop);
    }
    link();
  }

  // Takes the next bytes; returns those that are certainly no part of a stop string, and whether one was found.
  // After a match everything further is swallowed until reset().
  std::pair<std::string, bool> feed(std::string_view bytes) {
    if (matched_) return {std::string(), true};
    for (const char c : bytes) {
      held_.push_back(c);
      state_ = step(state_, static_cast<unsigned char>(c));
      const std::size_t length = nodes_[state_].match;
      if (length == 0) continue;
      // A match never reaches into emitted bytes: what is held is the longest suffix that starts any stop string.
      std::string out = held_.substr(0, held_.size() - length);
      held_.clear();
      matched_ = true;
      return {std::move(out), true};
    }
    const std::size_t safe = held_.size() - nodes_[state_].depth;
    std::string out = held_.substr(0, safe);
    held_.erase(0, safe);
    return {std::move(out), false};
  }

  // The stream is over: returns what was held back and is no stop string after all. Ready for a new stream then.
  std::string flush() {
    std::string out = std::move(held_);
    reset();
    return out;
  }

  void reset() {
    held_.clear();
    state_ = 0;
    matched_ = false;
  }

 private:
  struct Node {
    std::map<unsigned char, std::uint32_t> next;
    std::uint32_t fail = 0;   // the longest proper suffix of this prefix that is a prefix of a stop string too
    std::size_t depth = 0;    // bytes of this prefix
    std::size_t match = 0;    // bytes of the longest stop string that ends here, 0 if none does
  };

  void insert(const std::string& stop) {
    std::uint32_t at = 0;
    for (const char c : stop) {
      const unsigned char byte = static_cast<unsigned char>(c);
      const auto found = nodes_[at].next.find(byte);
      if (found != nodes_[at].next.end()) {
        at = found->second;
        continue;
      }
      const std::uint32_t added = static_cast<std::uint32_t>(nodes_.size());
      nodes_.emplace_back();
      nodes_[added].depth = nodes_[at].depth + 1;
      nodes_[at].next.emplace(byte, added);
      at = added;
    }
    nodes_[at].match = stop.size();
  }

  // Breadth first, so that a node's suffix, being shorter, is finished before it.
  void link() {
    std::queue<std::uint32_t> open;
    for (const auto& edge : nodes_[0].next) open.push(edge.second);
    while (!open.empty()) {
      const std::uint32_t at = open.front();
      open.pop();
      nodes_[at].match = std::max(nodes_[at].match, nodes_[nodes_[at].fail].match);
      for (const auto& edge : nodes_[at].next) {
        nodes_[edge.second].fail = step(nodes_[at].fail, edge.first);
        open.push(edge.second);
      }
    }
  }

  std::uint32_t step(std::uint32_t at, unsigned char byte) const {
    for (;;) {
      const auto found = nodes_[at].next.find(byte);
      if (found != nodes_[at].next.end()) return found->second;
      if (at == 0) return 0;
      at = nodes_[at].fail;
    }
  }

  std::vector<Node> nodes_;
  std::string held_;
  std::uint32_t state_ = 0;
  bool matched_ = false;
};

}  // namespace fasttrain

inline void bind_stop_matcher(pybind11::module_& m) {
  namespace py = pybind11;
  using fasttrain::StopMatcher;
  py::class_<StopMatcher>(m, "StopMatcher", "Finds stop strings in a byte stream as it arrives.")
      .def(py::init([](const std::vector<py::bytes>& stops) {
             // py::bytes, not std::string: a str would be accepted otherwise, silently encoded.
             return StopMatcher(std::vector<std::string>(stops.begin(), stops.end()));
           }),
           py::arg("stops"))
      .def(
          "feed",
          [](StopMatcher& self, const py::bytes& bytes) {
            auto [safe, matched] = self.feed(std::string_view(bytes));
            return py::make_tuple(py::bytes(safe), matched);
          },
          py::arg("bytes"), "Takes the next bytes; returns (bytes safe to emit, whether a stop string was found).")
      .def("flush", [](StopMatcher& self) { return py::bytes(self.flush()); },
           "Ends the stream: returns what was held back, and starts afresh.")
      .def("reset", &StopMatcher::reset, "Starts afresh, forgetting what was held back.");
}

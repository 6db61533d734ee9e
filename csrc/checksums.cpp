// Sums that change with every byte and its place: of all of some memory, or of an eighth of it at an eighth of the price.
//
// The eighth is one cache line in each block of eight, another one for each part: together the parts are everything, and
// a change that covers a block is in every one of them. Which line a block gives to a part is mixed, so that columns of
// a matrix do not hide between. No hash to trust against malice.

#include "checksums.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "thread_team.h"

namespace fasttrain {
namespace {

constexpr std::size_t kLine = 64, kParts = 8, kBlock = kLine * kParts;

// Sums of 64-bit words and of those sums, in eight lanes.
struct LineSum {
  std::uint64_t first[8] = {}, second[8] = {};
  void add(const unsigned char* data, std::size_t bytes) {
    std::uint64_t words[8] = {};
    std::memcpy(words, data, bytes);
    for (int i = 0; i < 8; ++i) {
      first[i] += words[i];
      second[i] += first[i];
    }
  }
};

std::uint64_t line_sum(const unsigned char* data, std::size_t bytes, int part) {
  LineSum sum;
  std::size_t at = 0;
  if (part < 0) {
    for (; at + kLine <= bytes; at += kLine) {
      __builtin_prefetch(data + at + 4096);
      sum.add(data + at, kLine);
    }
    if (at < bytes) sum.add(data + at, bytes - at);
  } else {
    const auto line_of = [&](std::size_t block) { return ((block / kBlock * 0x9E3779B97F4A7C15u >> 61) + part) % kParts * kLine; };
    for (; at < bytes; at += kBlock) {
      __builtin_prefetch(data + at + 16 * kBlock + line_of(at + 16 * kBlock));
      const std::size_t line = at + line_of(at);
      if (line < bytes) sum.add(data + line, std::min(kLine, bytes - line));
    }
  }
  std::uint64_t mixed = bytes;
  for (int i = 0; i < 8; ++i)
    for (const std::uint64_t word : {sum.first[i], sum.second[i]}) mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u + (mixed >> 29);
  return mixed;
}

// One sum for each piece of memory; threads take pieces of 1 MiB, so the sums do not depend on them.
std::vector<std::uint64_t> checksums(const std::vector<std::pair<std::uintptr_t, std::size_t>>& memory, int threads, int part) {
  constexpr std::size_t kPiece = 1u << 20;
  struct Piece {
    std::size_t owner, begin, bytes;
    std::uint64_t sum;
  };
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < memory.size(); ++i)
    for (std::size_t begin = 0; begin < memory[i].second; begin += kPiece) pieces.push_back({i, begin, std::min(kPiece, memory[i].second - begin), 0});
  ThreadTeam team(std::max(1, threads));
  team.run([&](int thread) {
    for (std::size_t i = pieces.size() * thread / team.size(); i < pieces.size() * (thread + 1) / team.size(); ++i)
      pieces[i].sum = line_sum(reinterpret_cast<const unsigned char*>(memory[pieces[i].owner].first) + pieces[i].begin, pieces[i].bytes, part);
  });
  std::vector<std::uint64_t> sums(memory.size(), 0);
  for (const Piece& piece : pieces) sums[piece.owner] = (sums[piece.owner] ^ piece.sum) * 0x9E3779B97F4A7C15u + piece.begin;
  return sums;
}

}  // namespace

void bind_checksums(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("checksums", &checksums, py::arg("memory"), py::arg("threads"), py::arg("part") = -1, py::call_guard<py::gil_scoped_release>(),
        "For each (address, bytes) a 64-bit sum that changes when the bytes do; with part 0 .. 7 of an eighth of the cache lines.");
}

}  // namespace fasttrain

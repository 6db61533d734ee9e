// Which columns and rows of a block of a gradient are alive, and what the others hold. Plain loops for the compiler to
// vectorise; included once for each instruction set, inside its namespace.

// A tile is read once into `seen`: rows that are a multiple of a page apart would push each other out of the caches.
template <class T>
struct Block {
  using Element = T;
  using Real = decltype(magnitude(T{}));

  std::int64_t n, V, row_stride;
  const T* z;
  std::vector<Real> limits;                   // (n,): below, or zero, is dead
  std::vector<std::uint8_t> column_alive;     // (V,)
  std::vector<std::uint8_t> row_alive;        // (tiles, n)
  std::vector<double> dead, all;              // (tiles, n): sums of magnitudes in dead and in all columns

  std::int64_t tiles() const { return (V + kTile - 1) / kTile; }

  // seen: kTile values for each row.
  void look_at(std::int64_t tile, Real* seen) {
    const std::int64_t first = tile * kTile, width = std::min(kTile, V - first);
    std::uint32_t lives[kTile] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      const T* row = z + i * row_stride + first;
      const Real limit = limits[i];
      std::uint32_t any = 0;
      for (std::int64_t j = 0; j < width; ++j) {
        const Real x = magnitude(row[j]);
        seen[i * kTile + j] = x;
        const std::uint32_t lives_here = !((x < limit) | (x == Real(0)));  // NaN lives
        lives[j] |= lives_here;
        any |= lives_here;
      }
      row_alive[tile * n + i] = static_cast<std::uint8_t>(any);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const Real* row = seen + i * kTile;
      constexpr int kLanes = 16;
      Real in_dead[kLanes] = {}, in_all[kLanes] = {};
      std::int64_t j = 0;
      for (; j + kLanes <= width; j += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
          const Real x = row[j + lane];
          in_all[lane] += x;
          in_dead[lane] += lives[j + lane] ? Real(0) : x;
        }
      for (; j < width; ++j) {
        const Real x = row[j];
        in_all[0] += x;
        in_dead[0] += lives[j] ? Real(0) : x;
      }
      double all = 0, part = 0;
      for (int lane = 0; lane < kLanes; ++lane) all += in_all[lane], part += in_dead[lane];
      dead[tile * n + i] = part;
      this->all[tile * n + i] = all;
    }
    for (std::int64_t j = 0; j < width; ++j) column_alive[first + j] = static_cast<std::uint8_t>(lives[j]);
  }
};

// The order of a few tokens. Included as sample_rows.h says.

// How many of x[begin, end) come before each token of a vector, by `before(one of them, its index)`.
template <class V, class Before>
inline V count_before(const float* x, std::int64_t begin, std::int64_t end, const Before& before) {
  const V one = V::set(1);
  V even = V::set(0), odd = V::set(0);
  std::int64_t j = begin;
  for (; j + 2 <= end; j += 2) {
    even = even + keep(before(V::set(x[j]), j), one);
    odd = odd + keep(before(V::set(x[j + 1]), j + 1), one);
  }
  if (j < end) even = even + keep(before(V::set(x[j]), j), one);
  return even + odd;
}

// The place of each of `count` tokens in the order of step 2, of equal ones the first first. Each is compared with all,
// which is what vectors do well and sorting is not. A whole vector is read at the end of x.
template <class V>
void rank_all(const float* x, std::int64_t count, float* ranks) {
  for (std::int64_t i = 0; i < count; i += V::width) {
    const V here = V::load(x + i), ids = lanes_from<V>(static_cast<float>(i));
    const std::int64_t end = std::min(count, i + V::width);
    const V earlier = count_before<V>(x, 0, i, [&](V a, std::int64_t) { return at_least(a, here); });
    const V beside = count_before<V>(x, i, end, [&](V a, std::int64_t j) {
      return either(greater(a, here), both(at_least(a, here), greater(ids, V::set(static_cast<float>(j)))));
    });
    const V later = count_before<V>(x, end, count, [&](V a, std::int64_t) { return greater(a, here); });
    (earlier + beside + later).store(ranks + i);
  }
}

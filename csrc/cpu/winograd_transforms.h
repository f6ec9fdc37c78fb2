// The transforms of Winograd's F(4, 3) along one axis, at the points 0, +-5/8, +-3/2 and infinity:
// the constants of the inputs' and outputs' are exact in float32, and the errors are less than half
// of those at 0, +-1, +-2 (Barabasz et al., arXiv 1803.10986).
//
// y = A^T [(G w) * (B^T x)] for x of 6, w of 3 and y of 4. With m(t) = t (t^2 - a^2)(t^2 - b^2),
// the row of B^T for a point p has the coefficients of m(t) / (t - p), that for infinity those of
// m; the row of G for p is (1, p, p^2) / m'(p); A has the powers of the points. The gradient of w
// is G^T [(A dy) * (B^T x)].
#pragma once

#include "vec.h"

namespace msd::MSD_ISA {

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kSum2 = kA2 + kB2, kProduct2 = kA2 * kB2;
// 1 / m'(p): of 0, of +-a, of +-b.
constexpr double kSlopeA = 2.0 * kA2 * (double{kA2} - kB2),
                 kSlopeB = 2.0 * kB2 * (double{kB2} - kA2);
constexpr float kG0 = static_cast<float>(1.0 / kProduct2);
constexpr float kGA = static_cast<float>(1.0 / kSlopeA), kGB = static_cast<float>(1.0 / kSlopeB);
constexpr float kGA1 = static_cast<float>(kA / kSlopeA), kGB1 = static_cast<float>(kB / kSlopeB);
constexpr float kGA2 = static_cast<float>(kA2 / kSlopeA), kGB2 = static_cast<float>(kB2 / kSlopeB);

MSD_INLINE Vec times(float factor, Vec v) { return broadcast(factor) * v; }
// factor v + more
MSD_INLINE Vec add_times(float factor, Vec v, Vec more) { return fma(broadcast(factor), v, more); }

// B^T x
MSD_INLINE void transform_inputs(const Vec (&x)[6], Vec (&to)[6]) {
  to[0] = add_times(kProduct2, x[0], add_times(-kSum2, x[2], x[4]));
  const Vec even_a = add_times(-kB2, x[2], x[4]), odd_a = add_times(-kB2, x[1], x[3]);
  to[1] = add_times(kA, odd_a, even_a);
  to[2] = add_times(-kA, odd_a, even_a);
  const Vec even_b = add_times(-kA2, x[2], x[4]), odd_b = add_times(-kA2, x[1], x[3]);
  to[3] = add_times(kB, odd_b, even_b);
  to[4] = add_times(-kB, odd_b, even_b);
  to[5] = add_times(kProduct2, x[1], add_times(-kSum2, x[3], x[5]));
}

// A^T m
MSD_INLINE void transform_products(const Vec (&m)[6], Vec (&to)[4]) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const Vec even_b = m[3] + m[4], odd_b = m[3] - m[4];
  to[0] = m[0] + even_a + even_b;
  to[1] = add_times(kA, odd_a, times(kB, odd_b));
  to[2] = add_times(kA2, even_a, times(kB2, even_b));
  to[3] = add_times(kA3, odd_a, add_times(kB3, odd_b, m[5]));
}

// G w
MSD_INLINE void transform_taps(const Vec (&w)[3], Vec (&to)[6]) {
  to[0] = times(kG0, w[0]);
  const Vec even_a = add_times(kGA2, w[2], times(kGA, w[0])), odd_a = times(kGA1, w[1]);
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  const Vec even_b = add_times(kGB2, w[2], times(kGB, w[0])), odd_b = times(kGB1, w[1]);
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = w[2];
}

// A dy
MSD_INLINE void transform_cotangents(const Vec (&dy)[4], Vec (&to)[6]) {
  to[0] = dy[0];
  const Vec even_a = add_times(kA2, dy[2], dy[0]);
  const Vec odd_a = add_times(kA3, dy[3], times(kA, dy[1]));
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  const Vec even_b = add_times(kB2, dy[2], dy[0]);
  const Vec odd_b = add_times(kB3, dy[3], times(kB, dy[1]));
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = dy[3];
}

// G^T u
MSD_INLINE void transform_gradients(const Vec (&u)[6], Vec (&to)[3]) {
  const Vec even_a = u[1] + u[2], odd_a = u[1] - u[2];
  const Vec even_b = u[3] + u[4], odd_b = u[3] - u[4];
  to[0] = add_times(kG0, u[0], add_times(kGA, even_a, times(kGB, even_b)));
  to[1] = add_times(kGA1, odd_a, times(kGB1, odd_b));
  to[2] = add_times(kGA2, even_a, add_times(kGB2, even_b, u[5]));
}

// transform(columns, ...) applied to every column of a square of pairs, then to every row of what
// that gives: store(row, column, value) takes the results. Each half of the pairs goes alone, as
// the registers hold no more: load(row, column, again) is called for each.
template <int from, int to, class Load, class Transform, class Store>
MSD_INLINE void transform_square(const Load& load, const Transform& transform, const Store& store) {
  Vec lo[to][from], hi[to][from];
  for (int j = 0; j < from; ++j) {
    Vec column[from], result[to];
    MSD_UNROLL
    for (int i = 0; i < from; ++i) column[i] = load(i, j, false).lo;
    transform(column, result);
    MSD_UNROLL
    for (int i = 0; i < to; ++i) lo[i][j] = result[i];
    MSD_UNROLL
    for (int i = 0; i < from; ++i) column[i] = load(i, j, true).hi;
    transform(column, result);
    MSD_UNROLL
    for (int i = 0; i < to; ++i) hi[i][j] = result[i];
  }
  for (int i = 0; i < to; ++i) {
    Vec low[to], high[to];
    transform(lo[i], low);
    transform(hi[i], high);
    MSD_UNROLL
    for (int j = 0; j < to; ++j) store(i, j, Pair{low[j], high[j]});
  }
}

}  // namespace msd::MSD_ISA

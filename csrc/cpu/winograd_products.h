// Products of matrices in tiles that stay in registers.
#pragma once

#include <utility>

#include "vec.h"

#if defined(__clang__)
#define MSD_UNROLL_ROWS _Pragma("unroll")
#elif defined(__GNUC__)
#define MSD_UNROLL_ROWS _Pragma("GCC unroll 16")
#else
#define MSD_UNROLL_ROWS
#endif

namespace msd::MSD_ISA {

// With two vectors of the second factor and one of the first, they fill the registers.
#if defined(__AVX512F__)
constexpr int kProductRows = 14;
#elif defined(__AVX2__)
constexpr int kProductRows = 6;
#else
constexpr int kProductRows = 4;
#endif

// How the element of the first factor for row i and summand r lies: in rows, or in columns.
enum class Order { kRows, kColumns };

// c[i][:] = sum over r of a(i, r) b[r][:], or that added to c, for so many rows of one pair of
// vectors. Each sum runs in the order of r in one accumulator, so that it depends on nothing else.
template <int rows, Order order>
void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                   int64_t c_stride, int64_t depth, bool add) {
  Pair sum[rows];
  MSD_UNROLL_ROWS
  for (int i = 0; i < rows; ++i) sum[i] = broadcast_pair(0.0f);
  for (int64_t r = 0; r < depth; ++r) {
    // What the next tile reads, which comes from a cache that all cores share.
    __builtin_prefetch(order == Order::kRows ? a + rows * a_stride + r * rows
                                             : b + (depth + r) * b_stride);
    const Pair factor = load_pair(b + r * b_stride);
    MSD_UNROLL_ROWS
    for (int i = 0; i < rows; ++i) {
      const float* element = order == Order::kRows ? a + i * a_stride + r : a + r * a_stride + i;
      sum[i] = fma(broadcast_pair(*element), factor, sum[i]);
    }
  }
  MSD_UNROLL_ROWS
  for (int i = 0; i < rows; ++i) {
    float* to = c + i * c_stride;
    store_pair(to, add ? load_pair(to) + sum[i] : sum[i]);
  }
}

using MultiplyTile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t,
                              int64_t, bool);

template <Order order, int... rows>
MSD_INLINE MultiplyTile tile_of(int64_t count, std::integer_sequence<int, rows...>) {
  static constexpr MultiplyTile kTiles[] = {multiply_tile<rows + 1, order>...};
  return kTiles[count - 1];
}

// Any number of rows, in tiles of equal height but for one row.
template <Order order>
MSD_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         float* c, int64_t c_stride, int64_t rows, int64_t depth, bool add) {
  const int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t height = rows / tiles + (tile < rows % tiles);
    const float* first = order == Order::kRows ? a + row * a_stride : a + row;
    tile_of<order>(height, std::make_integer_sequence<int, kProductRows>())(
        first, a_stride, b, b_stride, c + row * c_stride, c_stride, depth, add);
    row += height;
  }
}

}  // namespace msd::MSD_ISA

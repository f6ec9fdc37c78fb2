// From maps to the matrices of the points and back: what all passes of Winograd's convolutions
// share.
#pragma once

#include "vec.h"
#include "winograd_transforms.h"
#include "winograd_unit.h"

namespace msd::MSD_ISA {

MSD_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MSD_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether any of the numbers seen is larger than kLargestOrdinary, infinite or not a number. The
// bits of a positive float grow with it, and infinities and NaN have the largest.
class Outliers {
 public:
  __attribute__((always_inline)) void see(Pair v) {
    const Bits lo = (Bits)v.lo << 1, hi = (Bits)v.hi << 1;
    largest_ = lo > largest_ ? lo : largest_;
    largest_ = hi > largest_ ? hi : largest_;
  }
  __attribute__((always_inline)) bool found() const {
    bool found = false;
    for (int i = 0; i < kWidth; ++i) found |= largest_[i] > 2 * bits_of(kLargestOrdinary);
    return found;
  }

 private:
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
  Bits largest_ = {};
};

// What the pixels around a map read.
template <class T>
alignas(64) constexpr T kZeros[kMostChannels] = {};

// Where a tile's first output is.
struct TilePlace {
  int64_t sample, row, column;
};

MSD_INLINE TilePlace place_of(const TileGrid& grid, int64_t tile) {
  const int64_t local = tile % grid.tiles();
  return {tile / grid.tiles(), local / grid.columns * kTileSide, local % grid.columns * kTileSide};
}

// The addresses of the channels from `channel` on of the side x side pixels of the grid that begin
// `before` rows and columns before a tile.
template <class T, int side>
struct Window {
  const T* pixels[side][side];
  int64_t right, below;  // to the neighbours of which a mean is taken

  __attribute__((always_inline)) Window(const TileGrid& grid, Sampling sampling, SourceMap map,
                                        int64_t tile, int64_t before, int64_t channel) {
    const TilePlace place = place_of(grid, tile);
    const int shrunk = sampling == Sampling::kHalf, grown = sampling == Sampling::kMean;
    right = map.channels;
    below = ((grid.width >> shrunk) << grown) * right;
    const int64_t image = ((grid.height >> shrunk) << grown) * below;
    const T* x = static_cast<const T*>(map.data) + place.sample * image + channel;
    for (int i = 0; i < side; ++i) {
      const int64_t row = place.row - before + i;
      const bool inside = row >= 0 && row < grid.height;
      const T* line = inside ? x + ((row >> shrunk) << grown) * below : nullptr;
      for (int j = 0; j < side; ++j) {
        const int64_t column = place.column - before + j;
        const bool exists = inside && column >= 0 && column < grid.width;
        pixels[i][j] = exists ? line + ((column >> shrunk) << grown) * right : kZeros<T>;
      }
    }
  }

  template <class Access>
  __attribute__((always_inline)) Pair load(int i, int j, int64_t channel, Access access) const {
    return access.load(pixels[i][j] + channel);
  }

  template <class Access>
  __attribute__((always_inline)) Pair mean(int i, int j, int64_t channel, Access access) const {
    if (pixels[i][j] == kZeros<T>) return broadcast_pair(0.0f);
    const T* p = pixels[i][j] + channel;
    const Pair above = access.load(p) + access.load(p + right);
    return broadcast_pair(0.25f) *
           (above + (access.load(p + below) + access.load(p + below + right)));
  }
};

// To float32 elements in natural order.
template <class T>
MSD_INLINE void store_floats(float* to, Pair v, WholePair) {
  store_lanes<T>(to, v);
}
template <class T>
MSD_INLINE void store_floats(float* to, Pair v, PartialPair access) {
  float elements[kPair];
  store_lanes<T>(elements, v);
  __builtin_memcpy(to, elements, access.count * sizeof(float));
}

// Stores the 36 points of some channels of a tile, from `column` on.
template <class T, class Access>
MSD_INLINE auto point_store(const PointMatrices& matrices, float* row, int64_t column,
                            Access access) {
  float* to = row + column * matrices.pair_step;
  const int64_t stride = matrices.stride, next = kPair * matrices.pair_step;
  return [=](int i, int j, Pair v) {
    float* point = to + (6 * i + j) * stride;
    store_floats<T>(point, v, access);
    __builtin_prefetch(point + next, 1);  // of the next pair of vectors; the lines are far away
  };
}

// The transformed 6x6 inputs of a tile, `count` channels from `channel` on, to a row of matrices.
// The 4x4 pixels in the middle are this tile's own to look at: whether one is an outlier.
template <class T>
MSD_INLINE bool transform_source(const TileGrid& grid, Sampling sampling, SourceMap map,
                                 int64_t tile, int64_t channel, int64_t count,
                                 const PointMatrices& matrices, float* row) {
  const Window<T, 6> window(grid, sampling, map, tile, 1, channel);
  Outliers outliers;
  const auto transform = [&](const auto& load) {
    for_column_tiles<1>(count, [&](int64_t column, auto, auto access) {
      transform_square<6, 6>(
          [&](int i, int j, bool again) {
            const Pair v = load(i, j, column, access);
            if (!again && i >= 1 && i <= kTileSide && j >= 1 && j <= kTileSide) outliers.see(v);
            return v;
          },
          transform_inputs, point_store<T>(matrices, row, column, access));
    });
  };
  if (sampling == Sampling::kMean) {
    transform([&](int i, int j, int64_t c, auto access) { return window.mean(i, j, c, access); });
  } else {
    transform([&](int i, int j, int64_t c, auto access) { return window.load(i, j, c, access); });
  }
  return outliers.found();
}

// Several threads may report the same sample.
MSD_INLINE void report(uint8_t* outliers, int64_t sample) {
  __atomic_store_n(outliers + sample, 1, __ATOMIC_RELAXED);
}

}  // namespace msd::MSD_ISA

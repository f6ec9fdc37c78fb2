// GroupNorm on a matrix of `rows` rows, `stride` elements apart, and `columns` columns. A tile is
// some pairs of vectors wide and as high as the matrix; it holds its columns' parameters or sums in
// registers. Arrays of columns are float32 and padded.
#pragma once

#include "group_norm_unit.h"
#include "vec.h"

namespace msd::MSD_ISA {

// Sums run over so many rows before they are added to the column's.
constexpr int64_t kChunkRows = 64;
// The first sweep asks for data so many rows ahead.
constexpr int64_t kPrefetchRows = 32;

// (x - mean) gain + offset is z, or z kSiluScale where SiLU follows;
// dx = gain dz + constant + (x - mean) slope
struct ColumnParameters {
  bool uniform;  // one value for all columns
  const float *mean, *gain, *offset, *constant, *slope;

  // Those of the columns from `column` on.
  ColumnParameters from(int64_t column) const {
    const auto moved = [&](const float* values) {
      return values == nullptr || uniform ? values : values + column;
    };
    return {uniform, moved(mean), moved(gain), moved(offset), moved(constant), moved(slope)};
  }

  template <class T>
  __attribute__((always_inline)) Pair at(const float* values, int64_t column) const {
    return uniform ? broadcast_pair(*values) : load_lanes<T>(values + column);
  }

  template <class T, int n>
  __attribute__((always_inline)) void load(const float* values, int64_t column,
                                           Pair (&tile)[n]) const {
    MSD_UNROLL
    for (int i = 0; i < n; ++i) tile[i] = at<T>(values, column + i * kPair);
  }
};

// A column's mean is origin + mean; m2 is its sum of squared differences from it.
struct ColumnMoments {
  float *origin, *mean, *m2;
};

// Adds to the moments of `seen` rows those of `rows` further ones, with the mean shift + sum /
// rows.
template <class T>
MSD_INLINE void merge_chunk(ColumnMoments moments, int64_t seen, int64_t rows, Pair shift, Pair sum,
                            Pair squares) {
  const Pair mean = sum * broadcast_pair(1.0f / static_cast<float>(rows));
  const Pair m2 = clamp_negative(squares - sum * mean);
  if (seen == 0) {
    store_lanes<T>(moments.origin, shift);
    store_lanes<T>(moments.mean, mean);
    store_lanes<T>(moments.m2, m2);
    return;
  }
  const float part = static_cast<float>(rows) / static_cast<float>(seen + rows);
  const Pair old_mean = load_lanes<T>(moments.mean);
  const Pair difference = (shift - load_lanes<T>(moments.origin)) + mean - old_mean;
  const Pair spread = difference * difference * broadcast_pair(part * static_cast<float>(seen));
  store_lanes<T>(moments.mean, fma(difference, broadcast_pair(part), old_mean));
  store_lanes<T>(moments.m2, load_lanes<T>(moments.m2) + m2 + spread);
}

// Moments of the columns, by sums of differences from each chunk's first row. As that row is part
// of the chunk, the relative error of m2 stays below (1 + kChunkRows) roundings whatever the data.
template <class T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t columns,
                    ColumnMoments moments) {
  for (int64_t row = 0; row < rows; row += kChunkRows) {
    const int64_t chunk = rows - row < kChunkRows ? rows - row : kChunkRows;
    for_column_tiles<kWideTile>(columns, [=](int64_t column, auto pairs, auto access) {
      constexpr int n = decltype(pairs)::value;
      const T* first = x + row * stride + column;
      Pair shift[n], sum[n], squares[n];
      MSD_UNROLL
      for (int i = 0; i < n; ++i) {
        shift[i] = access.load(first + i * kPair);
        sum[i] = squares[i] = broadcast_pair(0.0f);
      }
      for (int64_t r = 1; r < chunk; ++r) {
        MSD_UNROLL
        for (int i = 0; i < n; ++i) {
          const T* here = first + r * stride + i * kPair;
          prefetch_pair(here + kPrefetchRows * stride);
          const Pair difference = access.load(here) - shift[i];
          sum[i] = sum[i] + difference;
          squares[i] = fma(difference, difference, squares[i]);
        }
      }
      MSD_UNROLL
      for (int i = 0; i < n; ++i) {
        const int64_t at = column + i * kPair;
        merge_chunk<T>({moments.origin + at, moments.mean + at, moments.m2 + at}, row, chunk,
                       shift[i], sum[i], squares[i]);
      }
    });
  }
}

// y = z or z sigmoid(z)
template <class T, bool kSilu>
void normalize(const T* x, T* y, int64_t stride, int64_t y_stride, int64_t rows, int64_t columns,
               ColumnParameters parameters) {
  for_column_tiles<kTile>(columns, [=](int64_t column, auto pairs, auto access) {
    constexpr int n = decltype(pairs)::value;
    Pair mean[n], gain[n], offset[n];
    parameters.load<T>(parameters.mean, column, mean);
    parameters.load<T>(parameters.gain, column, gain);
    parameters.load<T>(parameters.offset, column, offset);
    for (int64_t r = 0; r < rows; ++r) {
      const T* x_here = x + r * stride + column;
      T* y_here = y + r * y_stride + column;
      MSD_UNROLL
      for (int i = 0; i < n; ++i) {
        const Pair z = fma(access.load(x_here + i * kPair) - mean[i], gain[i], offset[i]);
        access.store(y_here + i * kPair, kSilu ? silu<T>(z) : z);
      }
    }
  });
}

template <class T>
MSD_INLINE void add_lanes(float* sums, Pair v) {
  store_lanes<T>(sums, load_lanes<T>(sums) + v);
}

// Adds to the columns' sums those of dz and of dz (x - mean) over at most kChunkRows rows. With
// kSilu, dz itself goes to `dz` unless that is null, in the order of the lanes.
template <class T, bool kSilu>
void add_gradient_sums(const T* x, const T* dy, int64_t stride, int64_t dy_stride, int64_t rows,
                       int64_t columns, ColumnParameters parameters, float* dz, int64_t dz_stride,
                       float* sums, float* moment_sums) {
  for_column_tiles<1>(columns, [=](int64_t column, auto, auto access) {
    const Pair mean = parameters.at<T>(parameters.mean, column);
    const Pair gain = parameters.at<T>(parameters.gain, column);
    const Pair offset = parameters.at<T>(parameters.offset, column);
    Pair sum = broadcast_pair(0.0f), moment = sum;
    for (int64_t r = 0; r < rows; ++r) {
      const T* x_here = x + r * stride + column;
      const T* dy_here = dy + r * dy_stride + column;
      prefetch_pair(x_here + kPrefetchRows * stride);
      prefetch_pair(dy_here + kPrefetchRows * dy_stride);
      const Pair difference = access.load(x_here) - mean;
      Pair gradient = access.load(dy_here);
      if (kSilu) {
        gradient = silu_gradient<T>(gradient, fma(difference, gain, offset));
        if (dz != nullptr) store_pair(dz + r * dz_stride + column, gradient);
      }
      sum = sum + gradient;
      moment = fma(gradient, difference, moment);
    }
    add_lanes<T>(sums + column, sum);
    add_lanes<T>(moment_sums + column, moment);
  });
}

// dx = gain dz + constant + (x - mean) slope, with dz as add_gradient_sums left it, or dy without
// kSilu.
template <class T, bool kSilu>
void input_gradient(const T* x, const T* dy, const float* dz, T* dx, int64_t stride,
                    int64_t dy_stride, int64_t dz_stride, int64_t rows, int64_t columns,
                    ColumnParameters parameters) {
  for_column_tiles<kTile>(columns, [=](int64_t column, auto pairs, auto access) {
    constexpr int n = decltype(pairs)::value;
    Pair mean[n], gain[n], constant[n], slope[n];
    parameters.load<T>(parameters.mean, column, mean);
    parameters.load<T>(parameters.gain, column, gain);
    parameters.load<T>(parameters.constant, column, constant);
    parameters.load<T>(parameters.slope, column, slope);
    for (int64_t r = 0; r < rows; ++r) {
      MSD_UNROLL
      for (int i = 0; i < n; ++i) {
        const int64_t at = r * stride + column + i * kPair;
        const Pair gradient = kSilu ? load_pair(dz + r * dz_stride + column + i * kPair)
                                    : access.load(dy + r * dy_stride + column + i * kPair);
        const Pair difference = access.load(x + at) - mean[i];
        access.store(dx + at, fma(gain[i], gradient, fma(difference, slope[i], constant[i])));
      }
    }
  });
}

}  // namespace msd::MSD_ISA

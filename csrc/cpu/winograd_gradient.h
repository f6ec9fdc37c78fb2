// The passes of a weight gradient: G^T [sum over tiles of (A dy A^T) (B^T x B)] G.
#pragma once

#include "transpose.h"
#include "winograd_maps.h"
#include "winograd_products.h"

namespace msd::MSD_ISA {

template <class T>
void gradient_sources(const GradientContext& context, const GradientPiece& piece,
                      const GradientPanel& panel, int64_t first, int64_t tiles) {
  const WeightGradientStage& stage = *piece.stage;
  const auto& [map, channel, joint, count] = panel.channels;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    if (transform_source<T>(context.grid, context.grid.sampling, stage.in[map], piece.first + tile,
                            channel, count, panel.matrices.row(tile), panel.matrices.stride)) {
      report(stage.outliers, (piece.first + tile) / context.grid.tiles());
    }
  }
}

template <class T>
void gradient_cotangents(const GradientContext& context, const GradientPiece& piece,
                         const GradientPanel& panel, int64_t first, int64_t tiles) {
  const WeightGradientStage& stage = *piece.stage;
  const int64_t stride = panel.matrices.stride;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    const Window<T, kTileSide> window(context.grid, Sampling::kSame, stage.cotangent,
                                      piece.first + tile, 0, panel.channels.channel);
    float* to = panel.matrices.row(tile);
    Outliers outliers;
    for_column_tiles<1>(panel.channels.count, [&](int64_t column, auto, auto access) {
      transform_square<4, 6>(
          [&](int i, int j) {
            const Pair v = window.load(i, j, column, access);
            outliers.see(v);
            return v;
          },
          transform_cotangents,
          [&](int i, int j, Pair v) {
            store_floats<T>(to + (6 * i + j) * stride + column, v, access);
          });
    });
    if (outliers.found()) report(stage.outliers, (piece.first + tile) / context.grid.tiles());
  }
}

// The 9 taps of `count` neighbouring channels, [9][a pair of channels]. They are transposed as
// integers; vectors may be written to any type.
MSD_INLINE void store_taps(const uint32_t* taps, int64_t count, bool add, float* gradient) {
  uint32_t bits[9 * kPair];
  float values[9 * kPair];
  interleave_planes(taps, kPair, 9, count, bits);
  __builtin_memcpy(values, bits, 9 * count * sizeof(float));
  for (int64_t i = 0; i < 9 * count; ++i) gradient[i] = add ? gradient[i] + values[i] : values[i];
}

inline void gradient_weights(const GradientPiece& piece, const GradientPanel& cotangents,
                             const GradientPanel& sources, float* scratch) {
  const WeightGradientStage& stage = *piece.stage;
  const PointMatrices& d = cotangents.matrices;
  const PointMatrices& v = sources.matrices;
  const int64_t rows = cotangents.channels.count, columns = sources.channels.count;
  const int64_t stride = d.width * v.width + kPointPadding;
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t column = 0; column < columns; column += kPair) {
      multiply<Order::kColumns>(
          d.data + point * d.stride, d.width, v.data + point * v.stride + column, v.width,
          scratch + point * stride + column, v.width, rows, piece.tiles, false);
    }
  }
  const int64_t channels = stage.in[0].channels + stage.in[1].channels;
  float* gradient =
      stage.gradient + (cotangents.channels.channel * channels + sources.channels.joint) * 9;
  for (int64_t row = 0; row < rows; ++row, gradient += channels * 9) {
    for (int64_t column = 0; column < columns; column += kPair) {
      const float* own = scratch + row * v.width + column;
      alignas(64) uint32_t taps[9 * kPair];
      transform_square<6, 3>([&](int i, int j) { return load_pair(own + (6 * i + j) * stride); },
                             transform_gradients,
                             [&](int i, int j, Pair u) {
                               store_pair(reinterpret_cast<float*>(taps) + (3 * i + j) * kPair, u);
                             });
      store_taps(taps, min_of(kPair, columns - column), piece.add, gradient + column * 9);
    }
  }
}

}  // namespace msd::MSD_ISA

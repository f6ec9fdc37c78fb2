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
                            channel, count, panel.matrices, panel.matrices.row(tile))) {
      report(stage.outliers, (piece.first + tile) / context.grid.tiles());
    }
  }
}

template <class T>
void gradient_cotangents(const GradientContext& context, const GradientPiece& piece,
                         const GradientPanel& panel, int64_t first, int64_t tiles) {
  const WeightGradientStage& stage = *piece.stage;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    const Window<T, kTileSide> window(context.grid, Sampling::kSame, stage.cotangent,
                                      piece.first + tile, 0, panel.channels.channel);
    Outliers outliers;
    for_column_tiles<1>(panel.channels.count, [&](int64_t column, auto, auto access) {
      transform_square<4, 6>(
          [&](int i, int j, bool again) {
            const Pair v = window.load(i, j, column, access);
            if (!again) outliers.see(v);
            return v;
          },
          transform_cotangents,
          point_store<T>(panel.matrices, panel.matrices.row(tile), column, access));
    });
    if (outliers.found()) report(stage.outliers, (piece.first + tile) / context.grid.tiles());
  }
}

MSD_INLINE void store_floats(const uint32_t* bits, int64_t count, bool add, float* to) {
  float values[9 * kPair];
  __builtin_memcpy(values, bits, count * sizeof(float));
  for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + values[i] : values[i];
}

// The 9 taps of `count` neighbouring channels, [9][a pair of channels], to a gradient's row of
// channels from `column` on. They are transposed as integers; vectors may be written to any type.
MSD_INLINE void store_taps(const uint32_t* taps, int64_t column, int64_t count, bool add,
                           bool channels_innermost, int64_t channels, float* row) {
  if (channels_innermost) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      store_floats(taps + tap * kPair, count, add, row + tap * channels + column);
    }
  } else {
    uint32_t bits[9 * kPair];
    interleave_planes(taps, kPair, 9, count, bits);
    store_floats(bits, 9 * count, add, row + 9 * column);
  }
}

// Tiles whose sums stay in registers: of this many, a pair's channels of both factors fit the first
// level's cache.
constexpr int64_t kSummedTiles = 128;

// Products [point][cotangents' channels][sources' channels] of two panels.
MSD_INLINE void multiply_panels(const GradientPanel& cotangents, const GradientPanel& sources,
                                int64_t tiles, float* products, int64_t stride) {
  const int64_t pair = tiles * kPair;  // floats of a pair's channels
  for (int64_t point = 0; point < kPoints; ++point) {
    const float* d = cotangents.matrices.data + point * cotangents.matrices.stride;
    for (int64_t row = 0; row < cotangents.channels.count; row += kPair, d += pair) {
      const int64_t rows = min_of(kPair, cotangents.channels.count - row);
      const float* v = sources.matrices.data + point * sources.matrices.stride;
      for (int64_t column = 0; column < sources.channels.count; column += kPair, v += pair) {
        float* to = products + point * stride + row * sources.width + column;
        for (int64_t tile = 0; tile < tiles; tile += kSummedTiles) {
          multiply<Order::kColumns>(d + tile * kPair, kPair, v + tile * kPair, kPair, to,
                                    sources.width, rows, min_of(kSummedTiles, tiles - tile),
                                    tile > 0);
        }
      }
    }
  }
}

inline void gradient_weights(const GradientPiece& piece, const GradientPanel& cotangents,
                             const GradientPanel& sources, float* scratch) {
  const WeightGradientStage& stage = *piece.stage;
  const int64_t rows = cotangents.channels.count, columns = sources.channels.count;
  const int64_t stride = cotangents.width * sources.width + kPointPadding;
  multiply_panels(cotangents, sources, piece.tiles, scratch, stride);
  const int64_t channels = stage.in[0].channels + stage.in[1].channels;
  float* gradient = stage.gradient + cotangents.channels.channel * channels * 9;
  for (int64_t row = 0; row < rows; ++row, gradient += channels * 9) {
    for (int64_t column = 0; column < columns; column += kPair) {
      const float* own = scratch + row * sources.width + column;
      alignas(64) uint32_t taps[9 * kPair];
      transform_square<6, 3>(
          [&](int i, int j, bool) { return load_pair(own + (6 * i + j) * stride); },
          transform_gradients,
          [&](int i, int j, Pair u) {
            store_pair(reinterpret_cast<float*>(taps) + (3 * i + j) * kPair, u);
          });
      store_taps(taps, sources.channels.joint + column, min_of(kPair, columns - column), piece.add,
                 stage.channels_innermost, channels, gradient);
    }
  }
}

}  // namespace msd::MSD_ISA

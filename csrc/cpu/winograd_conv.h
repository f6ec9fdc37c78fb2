// The passes of a convolution and of its input gradient, which is the convolution of the cotangent
// with mirrored weights whose channels have changed places.
#pragma once

#include "transpose.h"
#include "winograd_maps.h"
#include "winograd_products.h"

namespace msd::MSD_ISA {

// Summed channels whose taps are brought into order together.
constexpr int64_t kTapChannels = 8;
constexpr int64_t kTaps = 9;

template <class T>
void conv_inputs(const ConvContext& context, const ConvPiece& piece, int64_t first, int64_t tiles) {
  const ConvStage& stage = *piece.stage;
  // A cotangent lies as the grid does.
  const Sampling sampling = context.job->input_gradient ? Sampling::kSame : context.grid.sampling;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    bool outlier = false;
    for (int64_t start = 0, index = 0; start < piece.depth; start += piece.chunk, ++index) {
      const int64_t end = min_of(start + piece.chunk, piece.depth);
      const PointMatrices matrices = piece.matrices(index);
      int64_t joint = 0;
      for (const SourceMap& map : stage.in) {
        const int64_t from = max_of(start, joint), until = min_of(end, joint + map.channels);
        if (from < until) {
          outlier |=
              transform_source<T>(context.grid, sampling, map, piece.first + tile, from - joint,
                                  until - from, matrices, matrices.row(tile) + from - start);
        }
        joint += map.channels;
      }
    }
    if (outlier) report(stage.outliers, (piece.first + tile) / context.grid.tiles());
  }
}

// Taps of a pair's outputs, and how far apart those of neighbouring channels and of an output are.
template <class T>
struct Taps {
  T* data;
  int64_t channel_step, tap_step;

  const T* at(int64_t channel, int64_t tap) const {
    return data + channel * channel_step + tap * tap_step;
  }
};

// `rows` lines as columns that are a pair of vectors wide; what is not there is zero.
template <class T>
MSD_INLINE void pair_columns(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  if (rows >= kPair) {
    interleave_planes(from, stride, kPair, columns, to);
  } else {
    __builtin_memset(static_cast<void*>(to), 0, columns * kPair * sizeof(T));
    transpose_elements(from, stride, to, kPair, rows, columns);
  }
}

// The taps of a pair's outputs, from `output` on, and neighbouring channels that are summed over,
// from `channel` on; those of outputs that do not exist are zero.
template <class T>
MSD_INLINE Taps<T> load_taps(const ConvStage& stage, bool input_gradient, int64_t output,
                             int64_t outputs, int64_t channel, int64_t count, T* to) {
  const T* weight = static_cast<const T*>(stage.weight);
  const int64_t width = input_gradient ? stage.out[0].channels + stage.out[1].channels
                                       : stage.in[0].channels + stage.in[1].channels;
  // The taps of an output lie together in the forward, those of a summed channel in the gradient.
  if (!stage.channels_innermost && !input_gradient) {
    pair_columns(weight + (output * width + channel) * kTaps, width * kTaps, outputs, count * kTaps,
                 to);
    return {to, kTaps * kPair, kPair};
  }
  if (!stage.channels_innermost) {
    for (int64_t c = 0; c < count; ++c) {
      pair_columns(weight + ((channel + c) * width + output) * kTaps, kTaps, outputs, kTaps,
                   to + c * kTaps * kPair);
    }
    return {to, kTaps * kPair, kPair};
  }
  if (!input_gradient) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      pair_columns(weight + (output * kTaps + tap) * width + channel, width * kTaps, outputs, count,
                   to + tap * count * kPair);
    }
    return {to, kPair, count * kPair};
  }
  const int64_t existing = min_of(outputs, kPair);
  for (int64_t row = 0; row < count * kTaps; ++row) {
    const T* from = weight + (channel * kTaps + row) * width + output;
    __builtin_memcpy(static_cast<void*>(to + row * kPair), from, existing * sizeof(T));
    __builtin_memset(static_cast<void*>(to + row * kPair + existing), 0,
                     (kPair - existing) * sizeof(T));
  }
  return {to, kTaps * kPair, kPair};
}

// Weights [point][pair of outputs][channel][output] of a chunk of channels.
template <class T>
MSD_INLINE bool transform_weights(const ConvContext& context, const ConvTask& task, int64_t channel,
                                  int64_t count, float* to, int64_t stride) {
  const bool mirrored = context.job->input_gradient;
  // Transposed as integers; vectors may be read from any type.
  alignas(64) typename BitsOf<sizeof(T)>::type bits[kTapChannels * kTaps * kPair];
  Outliers outliers;
  for (int64_t output = 0; output < task.outputs.count; output += kPair) {
    float* panel = to + output * task.piece->chunk;
    for (int64_t block = 0; block < count; block += kTapChannels) {
      const int64_t channels = min_of(kTapChannels, count - block);
      const Taps<T> taps = load_taps(*task.piece->stage, mirrored, task.outputs.joint + output,
                                     task.outputs.count - output, channel + block, channels,
                                     reinterpret_cast<T*>(bits));
      for (int64_t c = 0; c < channels; ++c) {
        float* row = panel + (block + c) * kPair;
        transform_square<3, 6>(
            [&](int i, int j, bool again) {
              const int tap = 3 * i + j;
              const Pair v = load_pair(taps.at(c, mirrored ? 8 - tap : tap));
              if (!again) outliers.see(v);
              return v;
            },
            transform_taps,
            [&](int i, int j, Pair v) { store_lanes<T>(row + (6 * i + j) * stride, v); });
      }
    }
  }
  return outliers.found();
}

template <class T>
MSD_INLINE const T* at(const void* data, int64_t offset) {
  return data != nullptr ? static_cast<const T*>(data) + offset : nullptr;
}

// Stores those of a tile's 4x4 outputs that exist.
template <class T, class Access>
MSD_INLINE void store_outputs(const ConvContext& context, const ConvStage& stage, TilePlace place,
                              int64_t channel, Access access,
                              const Pair (&y)[kTileSide][kTileSide]) {
  const TileGrid& grid = context.grid;
  const TargetMap& out = stage.out[0];
  const T* bias = at<T>(stage.bias, channel);
  const T* sample_bias = at<T>(stage.sample_bias, place.sample * out.channels + channel);
  const T* residual = at<T>(stage.residual, channel);
  T* target = static_cast<T*>(out.data) + channel;
  const Pair zero = broadcast_pair(0.0f);
  const Pair channel_bias = bias != nullptr ? access.load(bias) : zero;
  const Pair own_bias = sample_bias != nullptr ? access.load(sample_bias) : zero;
  const int64_t height = min_of(kTileSide, grid.height - place.row);
  const int64_t width = min_of(kTileSide, grid.width - place.column);
  for (int64_t i = 0; i < height; ++i) {
    const int64_t row = (place.sample * grid.height + place.row + i) * grid.width + place.column;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t offset = (row + j) * out.channels;
      Pair v = y[i][j] + channel_bias + own_bias;
      if (residual != nullptr) v = v + access.load(residual + offset);
      access.store(target + offset, broadcast_pair(context.job->scale) * v);
    }
  }
}

// Stores the gradients of the pixels that a tile's 4x4 were sampled from.
template <class T, class Access>
MSD_INLINE void store_gradients(const TileGrid& grid, TargetMap out, TilePlace place,
                                int64_t channel, Access access,
                                const Pair (&y)[kTileSide][kTileSide]) {
  const int64_t height = min_of(kTileSide, grid.height - place.row);
  const int64_t width = min_of(kTileSide, grid.width - place.column);
  const int shrunk = grid.sampling == Sampling::kHalf, grown = grid.sampling == Sampling::kMean;
  const int64_t right = out.channels, below = ((grid.width >> shrunk) << grown) * right;
  const int64_t image = ((grid.height >> shrunk) << grown) * below;
  T* x = static_cast<T*>(out.data) + place.sample * image + channel;
  for (int64_t i = 0; i < height; i += 1 + shrunk) {
    for (int64_t j = 0; j < width; j += 1 + shrunk) {
      T* p = x + (((place.row + i) >> shrunk) << grown) * below +
             (((place.column + j) >> shrunk) << grown) * right;
      if (shrunk) {
        access.store(p, (y[i][j] + y[i][j + 1]) + (y[i + 1][j] + y[i + 1][j + 1]));
      } else if (grown) {
        const Pair quarter = broadcast_pair(0.25f) * y[i][j];
        for (T* each : {p, p + right, p + below, p + below + right}) access.store(each, quarter);
      } else {
        access.store(p, y[i][j]);
      }
    }
  }
}

template <class T>
MSD_INLINE void transform_outputs(const ConvContext& context, const ConvTask& task,
                                  const float* products, int64_t stride) {
  const ConvPiece& piece = *task.piece;
  const ConvStage& stage = *piece.stage;
  for (int64_t t = 0; t < task.tiles; ++t) {
    const TilePlace place = place_of(context.grid, piece.first + task.first + t);
    const float* own = products + t * task.width;
    for_column_tiles<1>(task.outputs.count, [&](int64_t column, auto, auto access) {
      Pair y[kTileSide][kTileSide];
      transform_square<6, 4>(
          [&](int i, int j, bool) { return load_lanes<T>(own + (6 * i + j) * stride + column); },
          transform_products, [&](int i, int j, Pair v) { y[i][j] = v; });
      const int64_t channel = task.outputs.channel + column;
      if (context.job->input_gradient) {
        store_gradients<T>(context.grid, stage.out[task.outputs.map], place, channel, access, y);
      } else {
        store_outputs<T>(context, stage, place, channel, access, y);
      }
    });
  }
}

template <class T>
void conv_outputs(const ConvContext& context, const ConvTask& task, ConvScratch scratch) {
  const ConvPiece& piece = *task.piece;
  const int64_t weight_stride = task.width * piece.chunk + kPointPadding;
  const int64_t product_stride = task.tiles * task.width + kPointPadding;
  bool outlier = false;
  for (int64_t start = 0, index = 0; start < piece.depth; start += piece.chunk, ++index) {
    const int64_t depth = min_of(piece.chunk, piece.depth - start);
    outlier |= transform_weights<T>(context, task, start, depth, scratch.weights, weight_stride);
    const float* inputs = piece.matrices(index).row(task.first);
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t output = 0; output < task.outputs.count; output += kPair) {
        multiply<Order::kRows>(inputs + point * piece.point_stride, piece.chunk,
                               scratch.weights + point * weight_stride + output * piece.chunk,
                               kPair, scratch.products + point * product_stride + output,
                               task.width, task.tiles, depth, index > 0);
      }
    }
  }
  transform_outputs<T>(context, task, scratch.products, product_stride);
  if (outlier) {
    for (int64_t s = 0; s < piece.stage->samples; ++s) report(piece.stage->outliers, s);
  }
}

}  // namespace msd::MSD_ISA

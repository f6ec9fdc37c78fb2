// What the scheduler of Winograd's convolutions and its compiled kernels share. Plain data only:
// the kernels' files are compiled for instruction sets that the processor may lack.
//
// A 3x3 convolution of a tile of 4x4 outputs reads 6x6 inputs. Both sides are transformed to 36
// points, at each of which the convolution is a product of matrices over the channels.
#pragma once

#include "scalar_types.h"
#include "winograd.h"

namespace msd {

constexpr int64_t kTileSide = 4;
constexpr int64_t kPoints = 36;
// Floats between the matrices of neighbouring points: three cache lines more than a matrix, so that
// those of 36 points do not fall into the same sets of a cache.
constexpr int64_t kPointPadding = 48;
// At most so many channels of a map are transformed at a time.
constexpr int64_t kMostChannels = 128;

// The convolved grid, cut into tiles; those at its end may reach over it.
struct TileGrid {
  int64_t height, width, rows, columns;
  Sampling sampling;

  int64_t tiles() const { return rows * columns; }
};

// Neighbouring channels of one of a stage's maps.
struct ChannelRange {
  int64_t map;      // 0 or 1
  int64_t channel;  // in that map
  int64_t joint;    // in both maps together
  int64_t count;
};

// 36 matrices with a row of channels per tile. Entries of a row that are a pair of vectors apart
// lie `pair_step` times that apart in memory.
struct PointMatrices {
  float* data;
  int64_t row_stride, pair_step, stride;

  float* row(int64_t tile) const { return data + tile * row_stride; }
};

// Some tiles of a stage, counted through its samples. The transformed channels lie in chunks:
// [chunk][point][tile][channels of a chunk].
struct ConvPiece {
  const ConvStage* stage;
  int64_t first, tiles;
  int64_t depth;         // channels that are summed over
  int64_t chunk;         // of them, in a chunk
  int64_t chunk_floats;  // of a chunk's matrices
  int64_t point_stride;
  float* inputs;

  PointMatrices matrices(int64_t index) const {
    return {inputs + index * chunk_floats, chunk, 1, point_stride};
  }
};

// Tiles [first, first + tiles) of a piece, and neighbouring output channels.
struct ConvTask {
  const ConvPiece* piece;
  int64_t first, tiles;
  ChannelRange outputs;
  int64_t width;  // floats of a row of products, whole pairs of vectors
};

struct ConvContext {
  const ConvJob* job;
  TileGrid grid;
};

// Transformed weights and products of a worker.
struct ConvScratch {
  float *weights, *products;
};

struct GradientPiece {
  const WeightGradientStage* stage;
  int64_t first, tiles;
  bool add;  // to what is there already
};

struct GradientContext {
  const WeightGradientJob* job;
  TileGrid grid;
};

// Channels of a stage's source or cotangent, and their matrices: [point][pair][tile][channel of the
// pair], so that what a product reads is contiguous.
struct GradientPanel {
  ChannelRange channels;
  int64_t width;  // channels that fill the pairs
  PointMatrices matrices;
};

struct WinogradKernels {
  int64_t pair;  // floats of a pair of vectors
  int64_t rows;  // of a tile of products in registers
  // Transforms tiles [first, first + tiles) of the piece.
  void (*conv_inputs)(const ConvContext&, const ConvPiece&, int64_t first, int64_t tiles);
  // Transforms the weights, multiplies, transforms and stores the outputs.
  void (*conv_outputs)(const ConvContext&, const ConvTask&, ConvScratch);
  void (*gradient_sources)(const GradientContext&, const GradientPiece&, const GradientPanel&,
                           int64_t first, int64_t tiles);
  void (*gradient_cotangents)(const GradientContext&, const GradientPiece&, const GradientPanel&,
                              int64_t first, int64_t tiles);
  // Multiplies the cotangents of a panel with the sources of another, and transforms the products.
  void (*gradient_weights)(const GradientPiece&, const GradientPanel& cotangents,
                           const GradientPanel& sources, float* scratch);
};

WinogradKernels winograd_kernels_avx512bf16(ElementType type);
WinogradKernels winograd_kernels_avx512(ElementType type);
WinogradKernels winograd_kernels_avx2(ElementType type);
WinogradKernels winograd_kernels_portable(ElementType type);

}  // namespace msd

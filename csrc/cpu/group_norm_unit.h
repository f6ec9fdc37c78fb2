// What the scheduler of GroupNorm and its compiled kernels share. Plain data only: the kernels'
// files are compiled for instruction sets that the processor may lack.
#pragma once

#include "group_norm.h"
#include "scalar_types.h"

namespace msd {

// Columns of a folded row are at most this many.
constexpr int64_t kMaxFoldedColumns = 1024;
// Arrays of columns are padded to a multiple of this, so that a vector may run over their end.
constexpr int64_t kColumnPadding = 32;

MSD_INLINE int64_t padded(int64_t columns) {
  return (columns + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
}

// `rows` rows of `fold` neighbouring pixels each, from pixel `pixel` of a plane on. Folding gives
// narrow planes rows that fill the vectors; row `row` is the first one, counted from the plane's.
struct Piece {
  int64_t pixel, rows, fold, row;
};

// Some groups of one sample: what is normalised independently of everything else. They lie in
// `planes` planes of `spatial` pixels with `plane_channels` neighbouring channels each: one plane
// of all channels in NHWC, one plane per channel in NCHW.
//
// Where there are two sources, these are the places of y and dy; the first `own_channels` of the
// channels lie in x, the others in skip.
struct Unit {
  int64_t x;          // offset of the first element
  int64_t planar_dy;  // the same in a planar dy
  int64_t planes, plane_channels, plane_stride, pixel_stride;
  int64_t spatial, channels, groups, group_channels;
  int64_t own_channels, own, own_stride, skip, skip_stride;  // offsets and strides of the sources
  int64_t channel, sample_channel, group;  // offsets of the first channel and group in their arrays
  const Piece* pieces;
  int64_t piece_count, plane_rows;

  int64_t items() const { return planes * piece_count; }
  int64_t elements() const { return channels * spatial; }
};

// The channels [channel, channel + channels) of a stage with `count` samples, to be summed over
// them.
struct ParameterBlock {
  int64_t count, channels, sample_stride, channel, sample_channel;
};

// The four steps of a pass over a unit, with `scratch` of scratch_floats(unit) floats: `prepare`
// once, `reduce` for every item (plane and piece), `combine` once, `map` for every item. Items are
// independent of each other.
template <class Job>
struct UnitPass {
  int64_t (*scratch_floats)(const Job&, const Unit&);
  void (*prepare)(const Job&, const Unit&, float* scratch);
  void (*reduce)(const Job&, const Unit&, float* scratch, int64_t item);
  void (*combine)(const Job&, const Unit&, float* scratch);
  void (*map)(const Job&, const Unit&, float* scratch, int64_t item);
};

struct GroupNormKernels {
  UnitPass<GroupNormForward> forward;
  UnitPass<GroupNormBackward> backward;
  void (*sum_parameter_gradients)(const GroupNormBackward&, const ParameterBlock&);
};

const GroupNormKernels& group_norm_kernels_avx512bf16(ElementType type);
const GroupNormKernels& group_norm_kernels_avx512(ElementType type);
const GroupNormKernels& group_norm_kernels_avx2(ElementType type);
const GroupNormKernels& group_norm_kernels_portable(ElementType type);

}  // namespace msd

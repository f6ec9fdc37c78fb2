// How GroupNorm is cut into blocks of threads. No CUDA in here: the plan is made and tested without
// a GPU.
//
// A unit is some neighbouring whole groups of one sample, and a share the part of its pixels that
// one block owns. In one pass, the shares of a unit are the blocks of a cluster, and each keeps its
// slab in shared memory between the sums and the result. In two passes the slab is read twice, and
// the sums go through device memory.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "../group_norm_job.h"
#include "device.h"

namespace msd::cuda {

constexpr int kThreads = 256;       // of every block, except for the sums over samples
constexpr int kLanes = 4;           // elements that a thread takes at a time
constexpr int kCopyBytes = 16;      // of the widest copy to shared memory
constexpr int kMaxCluster = 8;      // what every device with clusters can schedule
constexpr int kMaxStages = 16;      // of one launch; the parameters of a kernel are limited to 4 KB
constexpr int kMaxChannels = 2048;  // of one unit
constexpr int kMaxBlockGroups = 128;  // of one unit
constexpr int64_t kMaxPartPixels = 1 << 26;

// How the threads of a block share its slab, a matrix with a row per pixel (NHWC) or per channel
// (NCHW). A team of neighbouring threads takes vectors that lie side by side. Depends on the
// stage's own shape only, and so do the bits.
struct Geometry {
  int32_t channels;             // of a whole unit
  int32_t padded;               // channels, up to whole vectors
  int32_t vectors;              // per row
  int32_t lanes;                // threads of a team; a power of two in NCHW
  int32_t teams;                // teams that take part
  int32_t segments;             // pieces of a row that different teams take (NCHW)
  int32_t vectors_per_segment;  // (NCHW)
  int32_t parts;                // partial sums of a channel
  int32_t walks;                // times that a team goes over a part of the slab
  Divisor by_lanes, by_segments;

  static Geometry of(bool channels_last, int32_t unit_channels, int32_t part_pixels);
};

// The dynamic shared memory of a block: a header for what all threads know, slabs, arrays of
// floats. Offsets in bytes.
struct SharedLayout {
  static constexpr int32_t kHeader = 320;
  static constexpr int32_t kChannelArrays = 8;
  static constexpr int32_t kGroupArrays = 4;

  int32_t pitch;     // from one row of a slab to the next
  int32_t slab;      // from one slab to the next
  int32_t partials;  // two arrays [parts][padded],
  int32_t channels;  // kChannelArrays arrays [padded],
  int32_t groups;    // and kGroupArrays arrays [padded_groups]
  int32_t padded_groups;
  int64_t total;  // where this is no int32_t, the other fields mean nothing

  static SharedLayout of(const Geometry& geometry, bool channels_last, int64_t part_pixels,
                         int64_t block_groups, int slabs, int64_t element_bytes);
};

// One stage of a launch.
struct Stage {
  int64_t x;            // first element in x, y, dy, dx
  int64_t per_sample;   // first element in scale, shift, their gradients and the sums for those of
                        // weight and bias
  int64_t stats;        // first element in mean and rstd
  int32_t per_channel;  // first element in weight, bias and their gradients
  int32_t first_block;
  int32_t first_unit;
  int32_t samples;
  int32_t channels;
  int32_t groups;
  Divisor group_channels;
  int32_t block_groups;  // groups of a unit; the last one of a sample may have fewer
  int32_t blocks;        // units of a sample
  int32_t parts;         // shares of a unit: a power of two in one pass
  int32_t part_pixels;   // pixels of a share; the last one may have fewer
  int32_t width;         // bytes of an access to device memory: 16, 8, 4 or 2
  Geometry geometry;
  SharedLayout layout;
};

struct Stages {
  Stage stage[kMaxStages];
  int32_t count;
  int32_t cluster;  // blocks per cluster, a multiple of every stage's parts; 1 in two passes
  int64_t pixels;   // of a sample
};

// One launch, or the three of two passes.
struct GroupNormLaunch {
  Stages stages = {};
  bool one_pass = true;
  int64_t blocks = 0;
  int64_t units = 0;
  int64_t shared = 0;    // bytes per block
  int64_t partials = 0;  // pairs of floats per block that the second pass finds in the workspace
};

struct GroupNormPlan {
  std::vector<GroupNormLaunch> launches;
  // For the sums over samples: every stage, with a block per kParameterChannels channels.
  std::vector<Stages> parameters;
  int64_t sample_channels = 0;  // over all stages
  int64_t sample_groups = 0;
  int64_t partials = 0;  // pairs of floats of the workspace, for two passes

  // Pairs of floats behind those: what the second pass of the backward makes of them.
  int64_t lines() const { return partials > 0 ? sample_groups : 0; }
  // Floats of the workspace in all; `parameters`: gradients of weight or bias are wanted.
  int64_t workspace(bool backward, bool parameters) const {
    return 2 * (partials + (backward ? lines() : 0) + (parameters ? sample_channels : 0));
  }
};

// How one stage is cut.
struct StageCut {
  int64_t block_groups = 1, parts = 1, part_pixels = 1;
  bool one_pass = true;
  Geometry geometry = {};
  SharedLayout layout = {};
  double cycles = 0;  // estimated
};

constexpr int kParameterChannels = 32;

// A cut that is asked for, to measure it. No groups: the estimates decide; no parts: two passes.
struct ForcedCut {
  int64_t block_groups = 0, parts = 0;
};

// The cut that is asked for, or the one with the lowest estimate. Throws where it is impossible.
StageCut cut_stage(const GroupNormShape& shape, size_t stage, bool backward, const Device& device,
                   const ForcedCut& forced = {});
GroupNormPlan plan_group_norm(const GroupNormShape& shape, bool backward, const Device& device,
                              const ForcedCut& forced = {});

// The widest access that fits all rows of a stage in all of these buffers; those that are null do
// not count.
int access_width(const Stage& stage, int64_t pixels, bool channels_last, int element_bytes,
                 std::initializer_list<const void*> buffers);

}  // namespace msd::cuda

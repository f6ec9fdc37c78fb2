#pragma once

#include <cstdint>
#include <vector>

#include "group_norm_unit.h"

namespace msd {

// How one stage is cut into units and these into pieces: by its own shape only, so that results do
// not depend on the batch, the other stages or the number of threads.
struct StagePlan {
  int64_t count, channels, own_channels, groups, spatial;
  bool channels_last;
  int64_t block_groups;  // groups of a unit; the last one of a sample may have fewer
  int64_t blocks;        // units of a sample
  int64_t plane_rows;
  std::vector<Piece> pieces;
  int64_t x, own, skip, channel, sample_channel, group, first_unit;  // offsets of the stage

  int64_t units() const { return count * blocks; }
  Unit unit(int64_t index) const;
};

struct GroupNormPlan {
  std::vector<StagePlan> stages;
  int64_t units = 0, elements = 0, largest_unit = 0;

  // A unit takes about so many bytes of cache per element.
  GroupNormPlan(const GroupNormShape& shape, int64_t bytes_per_element);
  Unit unit(int64_t index) const;
};

}  // namespace msd

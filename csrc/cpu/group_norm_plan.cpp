#include "group_norm_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace msd {
namespace {

// A unit should stay in the second-level cache between its two sweeps. Where a sample is cut into
// units of neighbouring channels for that, every pixel is on another page or two: with many pixels
// the translation of addresses costs more than the cache saves.
constexpr int64_t kUnitBytes = 3 << 19;
constexpr int64_t kMostCutPixels = 1024;
constexpr int64_t kPieceElements = 1 << 15;
constexpr int64_t kPieceRows = 64;
constexpr int64_t kWantedColumns = 128;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many pixels per row as fill whole vectors, and several of them.
int64_t choose_fold(int64_t plane_channels, int64_t spatial) {
  int64_t fold = 1;
  const auto fills = [&] {
    const int64_t columns = fold * plane_channels;
    return columns % kColumnPadding == 0 && columns >= kWantedColumns;
  };
  while (!fills() && 2 * fold * plane_channels <= kMaxFoldedColumns && 2 * fold <= spatial) {
    fold *= 2;
  }
  return fold;
}

// Rows of `fold` pixels, then the pixels left over, in powers of two.
std::vector<Piece> cut_plane(int64_t plane_channels, int64_t spatial, int64_t fold) {
  const int64_t rows = spatial / fold;
  const int64_t fitting = kPieceElements / (fold * plane_channels) / kPieceRows * kPieceRows;
  const int64_t height = std::max(fitting, kPieceRows);
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < rows; row += height) {
    pieces.push_back({row * fold, std::min(height, rows - row), fold, row});
  }
  int64_t pixel = rows * fold;
  int64_t row = rows;
  for (int64_t rest = fold / 2; rest > 0; rest /= 2) {
    if (spatial - pixel < rest) continue;
    pieces.push_back({pixel, 1, rest, row++});
    pixel += rest;
  }
  return pieces;
}

// Groups per unit: whole vectors of channels in NHWC, and as many as the cache takes.
int64_t choose_block_groups(const StagePlan& stage, int64_t bytes_per_element) {
  if (stage.channels_last && stage.spatial > kMostCutPixels) return stage.groups;
  const int64_t channels = stage.channels / stage.groups;
  const int64_t step =
      stage.channels_last ? kColumnPadding / std::gcd(channels, kColumnPadding) : 1;
  const int64_t step_bytes = step * channels * stage.spatial * bytes_per_element;
  return std::min(stage.groups, step * std::max<int64_t>(1, kUnitBytes / step_bytes));
}

}  // namespace

Unit StagePlan::unit(int64_t index) const {
  const int64_t sample = index / blocks;
  const int64_t first_group = index % blocks * block_groups;
  const int64_t group_channels = channels / groups;
  const int64_t first_channel = first_group * group_channels;
  Unit unit;
  unit.spatial = spatial;
  unit.groups = std::min(block_groups, groups - first_group);
  unit.group_channels = group_channels;
  unit.channels = unit.groups * group_channels;
  unit.planes = channels_last ? 1 : unit.channels;
  unit.plane_channels = channels_last ? unit.channels : 1;
  unit.plane_stride = channels_last ? 0 : spatial;
  unit.pixel_stride = channels_last ? channels : 1;
  unit.x = x + sample * channels * spatial + first_channel * (channels_last ? 1 : spatial);
  unit.planar_dy = x + sample * channels * spatial + first_channel * spatial;
  unit.own_channels = std::clamp<int64_t>(own_channels - first_channel, 0, unit.channels);
  if (own_channels == channels) {
    unit.own = unit.x;
    unit.own_stride = unit.pixel_stride;
    unit.skip = unit.skip_stride = 0;
  } else {
    const int64_t skip_channels = channels - own_channels;
    const int64_t first_of_skip = std::max<int64_t>(first_channel - own_channels, 0);
    unit.own = own + sample * own_channels * spatial + std::min(first_channel, own_channels);
    unit.own_stride = own_channels;
    unit.skip = skip + sample * skip_channels * spatial + first_of_skip;
    unit.skip_stride = skip_channels;
  }
  unit.channel = channel + first_channel;
  unit.sample_channel = sample_channel + sample * channels + first_channel;
  unit.group = group + sample * groups + first_group;
  unit.pieces = pieces.data();
  unit.piece_count = static_cast<int64_t>(pieces.size());
  unit.plane_rows = plane_rows;
  return unit;
}

GroupNormPlan::GroupNormPlan(const GroupNormShape& shape, int64_t bytes_per_element) {
  int64_t own = 0, skip = 0, channel = 0, sample_channel = 0, group = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) {
    StagePlan stage;
    stage.count = shape.counts[s];
    stage.own_channels = shape.channels[s];
    stage.channels = shape.channels[s] + shape.skip_channels[s];
    stage.groups = shape.groups[s];
    stage.spatial = shape.spatial;
    stage.channels_last = shape.channels_last || shape.spatial == 1;
    stage.block_groups = choose_block_groups(stage, bytes_per_element);
    stage.blocks = divide_up(stage.groups, stage.block_groups);
    stage.x = elements;
    stage.own = own;
    stage.skip = skip;
    stage.channel = channel;
    stage.sample_channel = sample_channel;
    stage.group = group;
    stage.first_unit = units;
    const int64_t block_channels = stage.block_groups * (stage.channels / stage.groups);
    const int64_t width = stage.channels_last ? block_channels : 1;
    // Folding needs the pixels of a plane to lie next to each other.
    const bool dense = !stage.channels_last || stage.blocks == 1;
    const int64_t fold = dense ? choose_fold(width, stage.spatial) : 1;
    if (stage.own_channels != stage.channels &&
        (fold > 1 || stage.own_channels % kColumnPadding != 0)) {
      throw std::invalid_argument("group_norm: two sources need rows of whole vectors");
    }
    stage.pieces = cut_plane(width, stage.spatial, fold);
    stage.plane_rows = stage.pieces.back().row + stage.pieces.back().rows;
    own += stage.count * stage.own_channels * stage.spatial;
    skip += stage.count * (stage.channels - stage.own_channels) * stage.spatial;
    channel += stage.channels;
    sample_channel += stage.count * stage.channels;
    group += stage.count * stage.groups;
    elements += stage.count * stage.channels * stage.spatial;
    units += stage.units();
    if (stage.count > 0) largest_unit = std::max(largest_unit, block_channels * stage.spatial);
    stages.push_back(std::move(stage));
  }
}

Unit GroupNormPlan::unit(int64_t index) const {
  const auto after =
      std::upper_bound(stages.begin(), stages.end(), index,
                       [](int64_t i, const StagePlan& stage) { return i < stage.first_unit; });
  const StagePlan& stage = *(after - 1);
  return stage.unit(index - stage.first_unit);
}

}  // namespace msd

#include "group_norm_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace msd::cuda {
namespace {

// The cost model behind a cut. Estimates for Hopper, in bytes and cycles of a multiprocessor; only
// their ratios matter.
constexpr double kDeviceBytesPerCycle = 18;   // share of the device's memory bandwidth
constexpr double kBlockBytesPerCycle = 32;    // what a block alone can move
constexpr double kBlockOverheadBytes = 2048;  // could be moved while a block starts and sums up
constexpr double kClusterCycles = 700, kClusterRankCycles = 100;
constexpr double kLaunchCycles = 4000;
constexpr double kSector = 32;
// Blocks that reside on a multiprocessor overlap each other's phases.
constexpr double kOverlap[] = {0.55, 0.8, 0.93, 1.0};
constexpr int64_t kResidentForward = 4, kResidentBackward = 3;  // as the registers allow
// Two passes: shares are dealt until every multiprocessor has this many, unless they get too small.
constexpr int64_t kSharesPerMultiprocessor = 8;
constexpr int64_t kSmallestShareBytes = 16 << 10;

int64_t element_bytes(ElementType type) { return type == ElementType::kFloat ? 4 : 2; }

int32_t narrowed(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("group_norm: " + std::to_string(value) +
                             " samples, channels or blocks are too many for one launch");
  }
  return static_cast<int32_t>(value);
}

// The ways to cut one stage.
class Candidate {
 public:
  Candidate(const GroupNormShape& shape, size_t stage, bool backward, const Device& device)
      : channels_last_(shape.channels_last),
        backward_(backward),
        device_(device),
        bytes_(element_bytes(shape.type)),
        samples_(shape.counts[stage]),
        groups_(shape.groups[stage]),
        group_channels_(shape.channels[stage] / shape.groups[stage]),
        pixels_(shape.spatial) {}

  StageCut one_pass(int64_t block_groups, int64_t parts) const {
    StageCut cut = {block_groups, parts, part_pixels(parts), true};
    cut.cycles = kImpossible;
    if (cut.part_pixels > kMaxPartPixels || (parts - 1) * cut.part_pixels >= pixels_) return cut;
    arrange_threads(cut);
    const int64_t shared = cut.layout.total;
    const int64_t fit = device_.shared_per_multiprocessor / (shared + device_.reserved_per_block);
    if (shared > device_.shared_per_block || fit < 1) return cut;
    const int64_t resident = std::min(fit, backward_ ? kResidentBackward : kResidentForward);
    const double cluster = parts > 1 ? kClusterCycles + kClusterRankCycles * parts : 0;
    cut.cycles = cluster + alone(cut) + together(cut) / kOverlap[resident - 1];
    return cut;
  }

  StageCut two_passes(int64_t block_groups) const {
    const int64_t unit_bytes = block_groups * group_channels_ * pixels_ * bytes_;
    const int64_t enough =
        ceil_div(kSharesPerMultiprocessor * device_.multiprocessors, units(block_groups));
    const int64_t most = std::max<int64_t>(1, unit_bytes / kSmallestShareBytes);
    const int64_t least = ceil_div(pixels_, kMaxPartPixels);
    const int64_t wanted = std::max(least, std::min(enough, most));
    StageCut cut = {block_groups, 1, part_pixels(wanted), false};
    cut.parts = ceil_div(pixels_, cut.part_pixels);
    arrange_threads(cut);
    cut.cycles = kImpossible;
    if (cut.layout.total > device_.shared_per_block) return cut;
    const double again = (slabs() + 1.0 + slabs()) / (slabs() + 1.0);
    cut.cycles = 2 * kLaunchCycles + again * (alone(cut) + together(cut));
    return cut;
  }

  bool feasible(int64_t block_groups) const {
    return block_groups <= kMaxBlockGroups && block_groups * group_channels_ <= kMaxChannels;
  }
  int64_t groups() const { return groups_; }

  static constexpr double kImpossible = std::numeric_limits<double>::infinity();

 private:
  int slabs() const { return backward_ ? 2 : 1; }
  int64_t units(int64_t block_groups) const { return samples_ * ceil_div(groups_, block_groups); }

  // Rows of NCHW slabs begin at whole copies.
  int64_t part_pixels(int64_t parts) const {
    const int64_t share = ceil_div(pixels_, parts);
    return channels_last_ ? share : round_up(share, kCopyBytes / bytes_);
  }

  void arrange_threads(StageCut& cut) const {
    cut.geometry = Geometry::of(channels_last_, narrowed(cut.block_groups * group_channels_),
                                narrowed(cut.part_pixels));
    cut.layout = SharedLayout::of(cut.geometry, channels_last_, cut.part_pixels, cut.block_groups,
                                  cut.one_pass ? slabs() : 0, bytes_);
  }

  double moved(const StageCut& cut) const {
    const int64_t pixels = std::min(cut.part_pixels, pixels_);
    return static_cast<double>((slabs() + 1) * cut.block_groups * group_channels_ * pixels *
                               bytes_);
  }
  double alone(const StageCut& cut) const { return moved(cut) / kBlockBytesPerCycle; }
  double together(const StageCut& cut) const {
    const double bytes = moved(cut);
    const double blocks = static_cast<double>(units(cut.block_groups) * cut.parts);
    const double rate =
        kDeviceBytesPerCycle * static_cast<double>(std::max<int64_t>(1, device_.multiprocessors));
    return blocks * (bytes + kBlockOverheadBytes) / (rate * run_efficiency(cut));
  }

  // Short runs of neighbouring bytes waste parts of sectors and of the memory's bursts. The other
  // part is mostly wanted by another block at about the same time, so it is lost only in part.
  double run_efficiency(const StageCut& cut) const {
    const int64_t unit_channels = cut.block_groups * group_channels_;
    const bool whole = channels_last_ ? cut.block_groups >= groups_ : cut.parts == 1;
    if (whole) return 1;
    const double run =
        static_cast<double>((channels_last_ ? unit_channels : cut.part_pixels) * bytes_);
    const int64_t stride = (channels_last_ ? groups_ * group_channels_ : pixels_) * bytes_;
    const bool aligned = static_cast<int64_t>(run) % 32 == 0 && stride % 32 == 0;
    const double sectors = aligned ? run : run + kSector;
    const double burst = run >= 128 ? 1.0 : run >= 64 ? 0.92 : 0.8;
    return burst * (1 + run / sectors) / 2;
  }

  bool channels_last_, backward_;
  const Device& device_;
  int64_t bytes_, samples_, groups_, group_channels_, pixels_;
};

// One group of a unit, two, four and so on, and all of a sample.
std::vector<int64_t> block_group_choices(const Candidate& candidate) {
  std::vector<int64_t> choices;
  for (int64_t b = 1; b < candidate.groups() && candidate.feasible(b); b *= 2) choices.push_back(b);
  if (candidate.feasible(candidate.groups())) choices.push_back(candidate.groups());
  return choices;
}

// The stages with their offsets, not cut yet.
std::vector<Stage> lay_out(const GroupNormShape& shape, GroupNormPlan& plan) {
  std::vector<Stage> stages;
  int64_t x = 0, channel = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) {
    Stage stage = {};
    stage.x = x;
    stage.per_sample = plan.sample_channels;
    stage.stats = plan.sample_groups;
    stage.per_channel = narrowed(channel);
    stage.samples = narrowed(shape.counts[s]);
    stage.channels = narrowed(shape.channels[s]);
    stage.groups = narrowed(shape.groups[s]);
    stage.group_channels = Divisor::of(static_cast<uint32_t>(stage.channels / stage.groups));
    stages.push_back(stage);
    x += shape.counts[s] * shape.channels[s] * shape.spatial;
    channel += shape.channels[s];
    plan.sample_channels += shape.counts[s] * shape.channels[s];
    plan.sample_groups += shape.counts[s] * shape.groups[s];
  }
  return stages;
}

// Numbers blocks and units. Clusters belong to one stage each.
void number_blocks(GroupNormLaunch& launch) {
  Stages& stages = launch.stages;
  stages.cluster = 1;
  for (int s = 0; launch.one_pass && s < stages.count; ++s) {
    stages.cluster = std::max(stages.cluster, stages.stage[s].parts);
  }
  for (int s = 0; s < stages.count; ++s) {
    Stage& stage = stages.stage[s];
    stage.first_block = narrowed(launch.blocks);
    stage.first_unit = narrowed(launch.units);
    const int64_t units = static_cast<int64_t>(stage.samples) * stage.blocks;
    launch.units += units;
    launch.blocks += round_up<int64_t>(units * stage.parts, stages.cluster);
  }
  narrowed(launch.blocks);
}

// Adds a stage to the last launch of its kind, or to a new one.
void add_stage(std::vector<GroupNormLaunch>& launches, Stage stage, const StageCut& cut,
               int64_t pixels, bool backward) {
  stage.block_groups = narrowed(cut.block_groups);
  stage.blocks = narrowed(ceil_div<int64_t>(stage.groups, cut.block_groups));
  stage.parts = narrowed(cut.parts);
  stage.part_pixels = narrowed(cut.part_pixels);
  stage.geometry = cut.geometry;
  stage.layout = cut.layout;
  const auto open = std::find_if(launches.begin(), launches.end(), [&](const auto& launch) {
    return launch.one_pass == cut.one_pass && launch.stages.count < kMaxStages;
  });
  GroupNormLaunch& launch = open != launches.end() ? *open : launches.emplace_back();
  launch.one_pass = cut.one_pass;
  launch.stages.pixels = pixels;
  launch.stages.stage[launch.stages.count++] = stage;
  launch.shared = std::max(launch.shared, cut.layout.total);
  const int64_t unit_channels = cut.geometry.channels;
  launch.partials = std::max(launch.partials, backward ? unit_channels : cut.block_groups);
}

// Tables for the sums over samples.
std::vector<Stages> parameter_tables(const std::vector<Stage>& all) {
  std::vector<Stages> tables;
  int64_t blocks = 0;
  for (size_t s = 0; s < all.size(); ++s) {
    if (s % kMaxStages == 0) {
      tables.push_back({});
      blocks = 0;
    }
    Stages& stages = tables.back();
    Stage& stage = stages.stage[stages.count++];
    stage = all[s];
    stage.first_block = narrowed(blocks);
    stage.blocks = ceil_div(stage.channels, kParameterChannels);
    blocks += stage.blocks;
  }
  return tables;
}

}  // namespace

Geometry Geometry::of(bool channels_last, int32_t unit_channels, int32_t part_pixels) {
  Geometry g = {};
  g.channels = unit_channels;
  g.padded = round_up(unit_channels, kLanes);
  g.vectors = ceil_div(channels_last ? unit_channels : part_pixels, kLanes);
  if (channels_last) {
    g.lanes = std::min(g.vectors, kThreads);
    g.teams = std::min(kThreads / g.lanes, part_pixels);
    g.segments = 1;
    g.vectors_per_segment = g.vectors;
    g.parts = g.teams;
    g.walks = ceil_div(g.vectors, g.lanes);
  } else {
    g.lanes = 1;
    while (g.lanes < 32 && g.lanes < g.vectors) g.lanes *= 2;
    g.teams = kThreads / g.lanes;
    const int32_t wanted =
        std::min(std::max(g.teams / unit_channels, 1), ceil_div(g.vectors, g.lanes));
    g.vectors_per_segment = round_up(ceil_div(g.vectors, wanted), g.lanes);
    g.segments = ceil_div(g.vectors, g.vectors_per_segment);
    g.parts = g.segments;
    g.walks = ceil_div(g.channels * g.segments, g.teams);
  }
  g.by_lanes = Divisor::of(static_cast<uint32_t>(g.lanes));
  g.by_segments = Divisor::of(static_cast<uint32_t>(g.segments));
  return g;
}

SharedLayout SharedLayout::of(const Geometry& geometry, bool channels_last, int64_t part_pixels,
                              int64_t block_groups, int slabs, int64_t element_bytes) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t pitch = round_up<int64_t>(geometry.vectors * kLanes * element_bytes, kCopyBytes);
  const int64_t slab = slabs == 0 ? 0 : pitch * (channels_last ? part_pixels : geometry.channels);
  const int64_t partials = kHeader + slabs * slab;
  const int64_t channels = partials + 2 * kFloat * geometry.parts * geometry.padded;
  const int64_t groups = channels + kChannelArrays * kFloat * geometry.padded;
  const int64_t padded_groups = round_up<int64_t>(block_groups, 4);
  const int64_t total = groups + kGroupArrays * kFloat * padded_groups;
  const auto low = [](int64_t value) { return static_cast<int32_t>(value); };
  return {low(slabs == 0 ? 0 : pitch), low(slab), low(partials), low(channels), low(groups),
          low(padded_groups),          total};
}

StageCut cut_stage(const GroupNormShape& shape, size_t stage, bool backward, const Device& device,
                   const ForcedCut& forced) {
  const Candidate candidate(shape, stage, backward, device);
  StageCut best;
  best.cycles = Candidate::kImpossible;
  const auto consider = [&](const StageCut& cut) {
    if (cut.cycles < best.cycles) best = cut;
  };
  const int64_t most_parts = device.clusters ? kMaxCluster : 1;
  for (const int64_t block_groups : block_group_choices(candidate)) {
    if (forced.block_groups != 0 && forced.block_groups != block_groups) continue;
    for (int64_t parts = 1; parts <= most_parts; parts *= 2) {
      if (forced.block_groups != 0 && forced.parts != parts) continue;
      consider(candidate.one_pass(block_groups, parts));
    }
    if (forced.parts == 0) consider(candidate.two_passes(block_groups));
  }
  if (best.cycles == Candidate::kImpossible) {
    throw std::runtime_error("group_norm: " + std::to_string(shape.channels[stage]) +
                             " channels in " + std::to_string(shape.groups[stage]) + " groups: " +
                             (forced.block_groups != 0 ? "the cut that is asked for is impossible"
                                                       : "at most " + std::to_string(kMaxChannels) +
                                                             " channels per group are served"));
  }
  return best;
}

GroupNormPlan plan_group_norm(const GroupNormShape& shape, bool backward, const Device& device,
                              const ForcedCut& forced) {
  GroupNormPlan plan;
  const std::vector<Stage> all = lay_out(shape, plan);
  plan.parameters = parameter_tables(all);
  for (size_t s = 0; s < all.size(); ++s) {
    if (all[s].samples == 0) continue;
    const StageCut cut = cut_stage(shape, s, backward, device, forced);
    add_stage(plan.launches, all[s], cut, shape.spatial, backward);
  }
  for (GroupNormLaunch& launch : plan.launches) {
    number_blocks(launch);
    if (!launch.one_pass) {
      plan.partials = std::max(plan.partials, launch.blocks * launch.partials);
    }
  }
  return plan;
}

int access_width(const Stage& stage, int64_t pixels, bool channels_last, int element_bytes,
                 std::initializer_list<const void*> buffers) {
  const int64_t unit_channels = stage.geometry.channels;
  const int64_t row = channels_last ? stage.channels : pixels;
  const int64_t begin = channels_last ? unit_channels : stage.part_pixels;
  uint64_t bits = static_cast<uint64_t>((row | begin) * element_bytes) | kCopyBytes;
  for (const void* buffer : buffers) {
    if (buffer != nullptr) {
      bits |= reinterpret_cast<uintptr_t>(buffer) + static_cast<uint64_t>(stage.x * element_bytes);
    }
  }
  return static_cast<int>(bits & (~bits + 1));  // the lowest bit
}

}  // namespace msd::cuda

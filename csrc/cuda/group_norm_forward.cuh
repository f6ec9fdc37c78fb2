// The forward pass of GroupNorm: moments around a pivot, then the result.
#pragma once

#include "group_norm_share.cuh"

namespace msd::cuda {

struct ForwardArguments {
  Stages stages;
  GroupNormForward job;
  // Two passes: (mean - pivot, m2) of every group of a share, `stride` pairs per share.
  float2* partials;
  int64_t stride;
};

// What the arrays of shared memory hold.
enum ForwardChannels { kPivot, kMean, kM2, kSlope, kOffset };
enum ForwardGroups {
  kMoments,
  kGroupMean = kMoments + 2,
  kGroupRstd
};  // kMoments: pairs (mean - pivot, m2)

// A mean relative to the pivot of its group, and the sum of squared differences from it.
struct Moments {
  float mean, m2;
};

// Moments of each of a vector's elements over the vectors of a walk. They are merged from chunks of
// vectors, whose sums are of differences from the chunk's first one: as that is one of n, the
// relative error of a chunk's m2 is below n + 1 roundings whatever the data.
struct WalkMoments {
  static constexpr int kChunk = 8;

  Four mean = {}, m2 = {};  // means are relative to the origin
  int count = 0;            // vectors so far
  int more = 0;             // of the elements, that are in one vector more

  __device__ float count_of(int j) const { return static_cast<float>(count + (j < more ? 1 : 0)); }

  __device__ void add_chunk(const Four& pivot, const Four& sum, const Four& squares, int n,
                            const Four& origin) {
    const float each = fast_reciprocal(static_cast<float>(n));
    const float weight = static_cast<float>(n) * fast_reciprocal(static_cast<float>(count + n));
    const float spread = weight * static_cast<float>(count);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float shift = sum[j] * each;
      const float rounded_m2 = fmaf(-sum[j], shift, squares[j]);
      const float chunk_m2 = rounded_m2 < 0.0f ? 0.0f : rounded_m2;  // a NaN stays one
      const float difference = (pivot[j] - origin[j]) + shift - mean[j];
      mean[j] = fmaf(difference, weight, mean[j]);
      m2[j] += fmaf(spread * difference, difference, chunk_m2);
    }
    count += n;
  }

  // The first `valid` elements of a last vector.
  __device__ void add_rest(const Four& values, int valid, const Four& origin) {
    const float weight = fast_reciprocal(static_cast<float>(count + 1));
    const float spread = weight * static_cast<float>(count);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (j >= valid) break;
      const float difference = (values[j] - origin[j]) - mean[j];
      mean[j] = fmaf(difference, weight, mean[j]);
      m2[j] = fmaf(spread * difference, difference, m2[j]);
    }
    more = valid;
  }
};

template <bool kStaged, class T, bool kChannelsLast>
__device__ WalkMoments moments_of_walk(const Block<T, kChannelsLast>& block, const Walk& walk,
                                       const T* x, const Four& origin) {
  constexpr int kAhead = kBatch<T, kStaged, 1>;
  auto cursor = block.template cursor<kStaged>(0, x, walk);
  // Elements beyond a row's end would spoil the row's sums; those of columns that are none are
  // ignored.
  const bool check_end = !kChannelsLast && walk.count > 0;
  const int valid = check_end ? walk.valid(walk.count - 1, block.tile) : kLanes;
  const int whole = walk.count - (valid < kLanes ? 1 : 0);
  WalkMoments moments;
  while (moments.count < whole) {
    const int n = smaller(WalkMoments::kChunk, whole - moments.count);
    const Four pivot = unpack<T>(cursor.load(0));
    Four sum = {}, squares = {};
    for (int i = 0; i < n; i += kAhead) {
      Words<T> batch[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k < n) batch[k] = cursor.load(k);
      }
      cursor.advance(smaller(kAhead, n - i));
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k >= n) break;
        const Four values = unpack<T>(batch[k]);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const float difference = values[j] - pivot[j];
          sum[j] += difference;
          squares[j] = fmaf(difference, difference, squares[j]);
        }
      }
    }
    moments.add_chunk(pivot, sum, squares, n, origin);
  }
  if (whole < walk.count) moments.add_rest(unpack<T>(cursor.load(0)), valid, origin);
  return moments;
}

// Merges the moments of a team that has walked over a part of a row, in all of its threads. The
// whole warp must call.
template <class T>
__device__ Moments merge_team(const Block<T, false>& block, const Walk& walk,
                              const WalkMoments& moments) {
  const int lanes = block.geometry().lanes;
  float total = 0;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) total = fmaf(moments.count_of(j), moments.mean[j], total);
  const int pixels = block.part_pixels(larger(walk.part, 0));
  const float mean = sum_of_lanes(total, lanes) / static_cast<float>(larger(pixels, 1));
  float m2 = 0;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    const float difference = moments.mean[j] - mean;
    m2 += fmaf(moments.count_of(j) * difference, difference, moments.m2[j]);
  }
  return {mean, sum_of_lanes(m2, lanes)};
}

// Fills the partial sums of every channel.
template <bool kStaged, class T, bool kChannelsLast>
__device__ void sum_moments(const Block<T, kChannelsLast>& block,
                            const Team<T, kChannelsLast>& team, const T* x) {
  for (int number = 0; number < team.walks(); ++number) {
    const Walk walk = team.walk(number);
    const bool inside = walk.part >= 0;
    const Four origin = inside ? of_channels<kChannelsLast>(block.channels(kPivot), walk) : Four{};
    const WalkMoments moments = moments_of_walk<kStaged>(block, walk, x, origin);
    float* means = block.partials(0) + walk.part * block.geometry().padded + walk.channel;
    float* m2s = block.partials(1) + walk.part * block.geometry().padded + walk.channel;
    if constexpr (kChannelsLast) {
      if (!inside) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        means[j] = moments.mean[j];
        m2s[j] = moments.m2[j];
      }
    } else {
      const Moments merged = merge_team(block, walk, moments);
      if (!inside || !team.is_first_lane()) continue;
      *means = merged.mean;
      *m2s = merged.m2;
    }
  }
}

// Merges the parts of every channel.
template <class T, bool kChannelsLast>
__device__ void merge_channels(const Block<T, kChannelsLast>& block) {
  const PartPixels<kChannelsLast> pixels = block.part_pixels;
  const int parts = block.geometry().parts, padded = block.geometry().padded;
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    const float* means = block.partials(0) + c;
    const float* m2s = block.partials(1) + c;
    float mean = 0, m2 = 0;
#pragma unroll 4
    for (int t = 0; t < parts; ++t) {
      mean = fmaf(static_cast<float>(pixels(t)), means[t * padded], mean);
    }
    mean /= static_cast<float>(larger(block.share.pixels, 1));
#pragma unroll 4
    for (int t = 0; t < parts; ++t) {
      const float difference = means[t * padded] - mean;
      m2 += fmaf(static_cast<float>(pixels(t)) * difference, difference, m2s[t * padded]);
    }
    block.channels(kMean)[c] = mean;
    block.channels(kM2)[c] = m2;
  }
}

// Merges the channels of every group; a warp takes a group. No barrier within.
template <class T, bool kChannelsLast>
__device__ void merge_groups(const Block<T, kChannelsLast>& block) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int width = block.unit().group_channels();
  const float pixels = static_cast<float>(block.share.pixels);
  for (int g = warp; g < block.unit().groups; g += kThreads / 32) {
    const float* means = block.channels(kMean) + g * width;
    const float* m2s = block.channels(kM2) + g * width;
    float sum = 0, m2 = 0;
    for (int c = lane; c < width; c += 32) sum += means[c];
    const float mean = sum_of_lanes(sum) / static_cast<float>(width);
    for (int c = lane; c < width; c += 32) {
      const float difference = means[c] - mean;
      m2 += fmaf(pixels * difference, difference, m2s[c]);
    }
    m2 = sum_of_lanes(m2);
    if (lane == 0) block.group_pairs(kMoments)[g] = {mean, m2};
  }
}

__device__ inline float rstd_of(float m2, const Unit& unit, int64_t pixels, float eps) {
  const float count = static_cast<float>(unit.group_channels()) * static_cast<float>(pixels);
  const float variance = m2 / count;
  // Where squares overflowed, the variance is infinite; its rstd of 0 would hide that.
  return 1.0f / sqrtf(variance + eps) + (variance - variance);
}

// The moments of a group over all shares of its unit, which are the blocks of the cluster from rank
// `leader` on.
__device__ inline Moments merge_shares(const Share& share, const float2* own, uint32_t leader) {
  const int parts = share.unit.stage.parts;
  if (parts == 1) return {own->x, own->y};
  float2 moments[kMaxCluster];
#pragma unroll
  for (int r = 0; r < kMaxCluster; ++r) {
    if (r < parts) moments[r] = read_remote(own, leader + r);
  }
  float mean = 0, m2 = 0;
#pragma unroll
  for (int r = 0; r < kMaxCluster; ++r) {
    if (r < parts) mean = fmaf(static_cast<float>(share.pixels_of(r)), moments[r].x, mean);
  }
  mean /= static_cast<float>(share.total_pixels);
  const float width = static_cast<float>(share.unit.group_channels());
#pragma unroll
  for (int r = 0; r < kMaxCluster; ++r) {
    if (r >= parts) break;
    const float difference = moments[r].x - mean;
    const float count = width * static_cast<float>(share.pixels_of(r));
    m2 += fmaf(count * difference, difference, moments[r].y);
  }
  return {mean, m2};
}

// The statistics of all groups; every block of a unit computes them, the first one writes them.
template <class T, bool kChannelsLast>
__device__ void finish_groups(const Block<T, kChannelsLast>& block, const ForwardArguments& a) {
  const Share& share = block.share;
  const Unit& unit = share.unit;
  const uint32_t leader = blockIdx.x % a.stages.cluster - share.part;
  for (int g = threadIdx.x; g < unit.groups; g += kThreads) {
    const Moments moments = merge_shares(share, block.group_pairs(kMoments) + g, leader);
    const float mean = block.channels(kPivot)[g * unit.group_channels()] + moments.mean;
    const float rstd = rstd_of(moments.m2, unit, share.total_pixels, a.job.eps);
    block.groups(kGroupMean)[g] = mean;
    block.groups(kGroupRstd)[g] = rstd;
    if (share.part == 0) {
      a.job.mean[unit.per_group(g)] = mean;
      a.job.rstd[unit.per_group(g)] = rstd;
    }
  }
}

// What the means of a group are relative to: the median of three of its elements, as a single one
// may be far from the mean.
template <class T, bool kChannelsLast>
__device__ float pivot_of(const T* x, const Unit& unit, int64_t pixels, int g) {
  const int width = unit.group_channels();
  const int64_t first = unit.channel + g * width;
  const int64_t sample = unit.stage.x + unit.sample * pixels * unit.stage.channels;
  const auto at = [&](int64_t channel, int64_t pixel) {
    return to_float(x[sample + (kChannelsLast ? pixel * unit.stage.channels + channel
                                              : channel * pixels + pixel)]);
  };
  const float a = at(first, pixels / 4);
  const float b = at(first + width / 2, pixels / 2);
  const float c = at(first + width - 1, pixels - 1 - pixels / 4);
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

// What each channel needs besides its elements: the pivot of its group, and its parameters.
template <class T, bool kChannelsLast>
__device__ void load_pivots(const Block<T, kChannelsLast>& block, const T* x) {
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    const int g = block.unit().group_of(c);
    block.channels(kPivot)[c] =
        pivot_of<T, kChannelsLast>(x, block.unit(), block.share.total_pixels, g);
  }
}

template <class T, bool kChannelsLast>
__device__ void load_affine(const Block<T, kChannelsLast>& block, const Affine& affine) {
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    const ChannelAffine channel = ChannelAffine::of<T>(affine, block.unit(), c);
    block.channels(kSlope)[c] = channel.slope();
    block.channels(kOffset)[c] = channel.offset();
  }
}

// z = (x - mean) slope + offset of every channel, from its group's statistics.
template <class T, bool kChannelsLast>
__device__ void finish_channels(const Block<T, kChannelsLast>& block) {
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    const int g = block.unit().group_of(c);
    block.channels(kMean)[c] = block.groups(kGroupMean)[g];
    block.channels(kSlope)[c] *= block.groups(kGroupRstd)[g];
  }
}

template <bool kStaged, class T, bool kChannelsLast>
__device__ void normalize(const Block<T, kChannelsLast>& block, const Team<T, kChannelsLast>& team,
                          const GroupNormForward& job) {
  constexpr int kAhead = kBatch<T, kStaged, 1>;
  for (int number = 0; number < team.walks(); ++number) {
    const Walk walk = team.walk(number);
    if (walk.count == 0) continue;
    const Four mean = of_channels<kChannelsLast>(block.channels(kMean), walk);
    const Four slope = of_channels<kChannelsLast>(block.channels(kSlope), walk);
    const Four offset = of_channels<kChannelsLast>(block.channels(kOffset), walk);
    auto x = block.template cursor<kStaged>(0, static_cast<const T*>(job.x), walk);
    auto y = block.output(static_cast<T*>(job.y), walk);
    for (int i = 0; i < walk.count; i += kAhead) {
      Words<T> batch[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k < walk.count) batch[k] = x.load(k);
      }
      x.advance(kAhead);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k >= walk.count) break;
        Four z = unpack<T>(batch[k]);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) z[j] = fmaf(z[j] - mean[j], slope[j], offset[j]);
        if (job.silu) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) z[j] *= sigmoid(z[j]);
        }
        y.store(z);
        y.advance(1);
      }
    }
  }
}

// One pass: a cluster keeps a unit in the shared memory of its blocks. Reads x once, writes y, mean
// and rstd once.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 4) void group_norm_forward_kernel(
    const __grid_constant__ ForwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  const Team<T, kChannelsLast> team(block);
  const T* x = static_cast<const T*>(a.job.x);
  const bool clustered = a.stages.cluster > 1;
  const bool exists = block.unit().exists;
  if (exists) {
    block.start_copies(x);
    load_pivots(block, x);
    load_affine(block, a.job.affine);
    wait_for_copies();
    __syncthreads();
    sum_moments<true>(block, team, x);
    __syncthreads();
    merge_channels(block);
    __syncthreads();
    merge_groups(block);
  }
  if (clustered) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (exists) finish_groups(block, a);
  // No block may end while another one still reads its sums.
  if (clustered) cluster_arrive_relaxed();
  if (exists) {
    __syncthreads();
    finish_channels(block);
    __syncthreads();
    normalize<true>(block, team, a.job);
  }
  if (clustered) cluster_wait();
}

// Two passes, the sums: a block reads its share of x and writes the moments of its groups.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 3) void group_norm_forward_sums_kernel(
    const __grid_constant__ ForwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  const T* x = static_cast<const T*>(a.job.x);
  load_pivots(block, x);
  __syncthreads();
  sum_moments<false>(block, Team<T, kChannelsLast>(block), x);
  __syncthreads();
  merge_channels(block);
  __syncthreads();
  merge_groups(block);
  __syncthreads();
  for (int g = threadIdx.x; g < block.unit().groups; g += kThreads) {
    a.partials[blockIdx.x * a.stride + g] = block.group_pairs(kMoments)[g];
  }
}

// Two passes, in between: a block per unit, a warp per group. Merges the shares' moments into mean
// and rstd.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads) void group_norm_forward_finish_kernel(
    const __grid_constant__ ForwardArguments a) {
  const Stage& stage = stage_of(a.stages, &Stage::first_unit, blockIdx.x);
  const int number = blockIdx.x - stage.first_unit;
  const Unit unit(stage, number);
  const int64_t first_share = stage.first_block + static_cast<int64_t>(number) * stage.parts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto pixels_of = [&](int part) {
    const int64_t begin = static_cast<int64_t>(part) * stage.part_pixels;
    return static_cast<float>(smaller<int64_t>(a.stages.pixels - begin, stage.part_pixels));
  };
  for (int g = warp; g < unit.groups; g += kThreads / 32) {
    const float2* shares = a.partials + first_share * a.stride + g;
    float sum = 0, m2 = 0;
    for (int r = lane; r < stage.parts; r += 32) {
      sum = fmaf(pixels_of(r), shares[r * a.stride].x, sum);
    }
    const float mean = sum_of_lanes(sum) / static_cast<float>(a.stages.pixels);
    for (int r = lane; r < stage.parts; r += 32) {
      const float2 moments = shares[r * a.stride];
      const float difference = moments.x - mean;
      const float count = static_cast<float>(unit.group_channels()) * pixels_of(r);
      m2 += fmaf(count * difference, difference, moments.y);
    }
    m2 = sum_of_lanes(m2);
    if (lane == 0) {
      const T* x = static_cast<const T*>(a.job.x);
      const float pivot = pivot_of<T, kChannelsLast>(x, unit, a.stages.pixels, g);
      a.job.mean[unit.per_group(g)] = pivot + mean;
      a.job.rstd[unit.per_group(g)] = rstd_of(m2, unit, a.stages.pixels, a.job.eps);
    }
  }
}

// Two passes, the result: a block reads its share of x again and writes that of y.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 3) void group_norm_forward_map_kernel(
    const __grid_constant__ ForwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  load_affine(block, a.job.affine);
  for (int g = threadIdx.x; g < block.unit().groups; g += kThreads) {
    block.groups(kGroupMean)[g] = a.job.mean[block.unit().per_group(g)];
    block.groups(kGroupRstd)[g] = a.job.rstd[block.unit().per_group(g)];
  }
  __syncthreads();
  finish_channels(block);
  __syncthreads();
  normalize<false>(block, Team<T, kChannelsLast>(block), a.job);
}

}  // namespace msd::cuda

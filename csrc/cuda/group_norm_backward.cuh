// The backward pass of GroupNorm. With d = x - mean, P = sum of dz and Q = sum of dz xhat of a
// channel, and A = weight gain:
//   dx = rstd (A dz - mean_group(A P) - xhat mean_group(A Q)) = slope dz + constant + linear d
//   dshift = P,  dscale = weight Q + bias P;  dbias and dweight add up gain P and gain Q over the
//   samples.
#pragma once

#include "group_norm_share.cuh"

namespace msd::cuda {

struct BackwardArguments {
  Stages stages;
  GroupNormBackward job;
  // Two passes: (P, Q / rstd) of every channel of a share, `stride` pairs per share, and
  // (constant, linear) of every sample and group.
  float2* partials;
  int64_t stride;
  float2* group_lines;
};

// What the arrays of shared memory hold.
enum BackwardChannels {
  kChannelMean,
  kChannelSlope,
  kChannelOffset,
  kChannelFactor,  // A
  kChannelSums,    // pairs (P, Q / rstd) of this share
  kChannelConstant = kChannelSums + 2,
  kChannelLinear,
};
enum BackwardGroups { kRstd, kLines };  // pairs (constant, linear)

// The cotangent in front of the activation: dy s (1 + z (1 - s)) with s = sigmoid(z).
__device__ __forceinline__ float before_silu(float dy, float z) {
  const float s = sigmoid(z);
  return dy * fmaf(z * s, 1.0f - s, s);
}

// The parameters of a walk's vectors, and what becomes of x and dy: d = x - mean and dz.
struct Columns {
  Four mean, slope, offset;

  template <class T, bool kChannelsLast>
  __device__ Columns(const Block<T, kChannelsLast>& block, const Walk& walk)
      : mean(of_channels<kChannelsLast>(block.channels(kChannelMean), walk)),
        slope(of_channels<kChannelsLast>(block.channels(kChannelSlope), walk)),
        offset(of_channels<kChannelsLast>(block.channels(kChannelOffset), walk)) {}

  __device__ __forceinline__ void differentiate(Four& x, Four& dy, bool silu) const {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) x[j] -= mean[j];
    if (silu) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        dy[j] = before_silu(dy[j], fmaf(x[j], slope[j], offset[j]));
      }
    }
  }
};

// Calls body(i, d, dz) for every vector of a walk.
template <bool kStaged, class T, bool kChannelsLast, class Body>
__device__ __forceinline__ void for_each_vector(const Block<T, kChannelsLast>& block,
                                                const Walk& walk, const Columns& columns,
                                                const GroupNormBackward& job, const Body& body) {
  constexpr int kAhead = kBatch<T, kStaged, 2>;
  auto x = block.template cursor<kStaged>(0, static_cast<const T*>(job.x), walk);
  auto dy = block.template cursor<kStaged>(1, static_cast<const T*>(job.dy), walk);
  for (int i = 0; i < walk.count; i += kAhead) {
    Words<T> x_ahead[kAhead], dy_ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= walk.count) break;
      x_ahead[k] = x.load(k);
      dy_ahead[k] = dy.load(k);
    }
    x.advance(kAhead);
    dy.advance(kAhead);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= walk.count) break;
      Four d = unpack<T>(x_ahead[k]), dz = unpack<T>(dy_ahead[k]);
      columns.differentiate(d, dz, job.silu);
      body(i + k, d, dz);
    }
  }
}

// Fills the partial sums of every channel.
template <bool kStaged, class T, bool kChannelsLast>
__device__ void sum_gradients(const Block<T, kChannelsLast>& block,
                              const Team<T, kChannelsLast>& team, const GroupNormBackward& job) {
  for (int number = 0; number < team.walks(); ++number) {
    const Walk walk = team.walk(number);
    Four p = {}, q = {};
    if (walk.count > 0) {
      const Columns columns(block, walk);
      for_each_vector<kStaged>(
          block, walk, columns, job, [&](int i, const Four& d, const Four& dz) {
            // Elements beyond a row's end would spoil the row's sums; those of columns that are
            // none are ignored.
            const int valid = kChannelsLast ? kLanes : walk.valid(i, block.tile);
#pragma unroll
            for (int j = 0; j < kLanes; ++j) {
              if (j < valid) {
                p[j] += dz[j];
                q[j] = fmaf(dz[j], d[j], q[j]);
              }
            }
          });
    }
    const int at = walk.part * block.geometry().padded + walk.channel;
    float* p_parts = block.partials(0) + at;
    float* q_parts = block.partials(1) + at;
    if constexpr (kChannelsLast) {
      if (walk.part < 0) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        p_parts[j] = p[j];
        q_parts[j] = q[j];
      }
    } else {
#pragma unroll
      for (int j = 1; j < kLanes; ++j) {
        p[0] += p[j];
        q[0] += q[j];
      }
      const float row_p = sum_of_lanes(p[0], block.geometry().lanes);
      const float row_q = sum_of_lanes(q[0], block.geometry().lanes);
      if (walk.part < 0 || !team.is_first_lane()) continue;
      *p_parts = row_p;
      *q_parts = row_q;
    }
  }
}

// Adds up the parts of every channel.
template <class T, bool kChannelsLast>
__device__ void merge_parts(const Block<T, kChannelsLast>& block) {
  const int parts = block.geometry().parts, padded = block.geometry().padded;
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    float p = 0, q = 0;
#pragma unroll 4
    for (int t = 0; t < parts; ++t) {
      p += block.partials(0)[t * padded + c];
      q += block.partials(1)[t * padded + c];
    }
    block.channel_pairs(kChannelSums)[c] = {p, q};
  }
}

// The sums of every channel over the shares of the unit, the blocks of the cluster from rank
// `leader` on, become (P, Q) in the first part's place.
template <class T, bool kChannelsLast>
__device__ void merge_shares(const Block<T, kChannelsLast>& block, uint32_t leader) {
  const Unit& unit = block.unit();
  const int parts = unit.stage.parts;
  for (int c = threadIdx.x; c < unit.channels; c += kThreads) {
    const float2* own = block.channel_pairs(kChannelSums) + c;
    float2 sums = *own;
    if (parts > 1) {
      float2 others[kMaxCluster];
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (r < parts) others[r] = read_remote(own, leader + r);
      }
      sums = others[0];
#pragma unroll
      for (int r = 1; r < kMaxCluster; ++r) {
        if (r >= parts) break;
        sums.x += others[r].x;
        sums.y += others[r].y;
      }
    }
    block.partials(0)[c] = sums.x;
    block.partials(1)[c] = sums.y * block.groups(kRstd)[unit.group_of(c)];
  }
}

// (constant, linear) of a group whose channels' P, Q and A are given. The whole warp must call.
__device__ inline float2 line_of_group(const float* p, const float* q, const float* factor,
                                       int width, int64_t pixels, float rstd) {
  float sum_p = 0, sum_q = 0;
  for (int c = threadIdx.x % 32; c < width; c += 32) {
    sum_p = fmaf(factor[c], p[c], sum_p);
    sum_q = fmaf(factor[c], q[c], sum_q);
  }
  const float scale = -rstd / (static_cast<float>(width) * static_cast<float>(pixels));
  return {scale * sum_of_lanes(sum_p), scale * rstd * sum_of_lanes(sum_q)};
}

template <class T, bool kChannelsLast>
__device__ void finish_lines(const Block<T, kChannelsLast>& block) {
  const Unit& unit = block.unit();
  for (int g = threadIdx.x / 32; g < unit.groups; g += kThreads / 32) {
    const int width = unit.group_channels();
    const int first = g * width;
    const float2 line = line_of_group(block.partials(0) + first, block.partials(1) + first,
                                      block.channels(kChannelFactor) + first, width,
                                      block.share.total_pixels, block.groups(kRstd)[g]);
    if (threadIdx.x % 32 == 0) block.group_pairs(kLines)[g] = line;
  }
}

template <class T, bool kChannelsLast>
__device__ void finish_channel_lines(const Block<T, kChannelsLast>& block) {
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    const float2 line = block.group_pairs(kLines)[block.unit().group_of(c)];
    block.channels(kChannelConstant)[c] = line.x;
    block.channels(kChannelLinear)[c] = line.y;
  }
}

template <bool kStaged, class T, bool kChannelsLast>
__device__ void input_gradient(const Block<T, kChannelsLast>& block,
                               const Team<T, kChannelsLast>& team, const GroupNormBackward& job) {
  for (int number = 0; number < team.walks(); ++number) {
    const Walk walk = team.walk(number);
    if (walk.count == 0) continue;
    const Columns columns(block, walk);
    const Four constant = of_channels<kChannelsLast>(block.channels(kChannelConstant), walk);
    const Four linear = of_channels<kChannelsLast>(block.channels(kChannelLinear), walk);
    auto dx = block.output(static_cast<T*>(job.dx), walk);
    for_each_vector<kStaged>(block, walk, columns, job, [&](int, const Four& d, const Four& dz) {
      Four values;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        values[j] = fmaf(columns.slope[j], dz[j], fmaf(linear[j], d[j], constant[j]));
      }
      dx.store(values);
      dx.advance(1);
    });
  }
}

// The statistics and parameters of the unit.
template <class T, bool kChannelsLast>
__device__ void load_parameters(const Block<T, kChannelsLast>& block,
                                const GroupNormBackward& job) {
  const Unit& unit = block.unit();
  for (int c = threadIdx.x; c < unit.channels; c += kThreads) {
    const ChannelAffine channel = ChannelAffine::of<T>(job.affine, unit, c);
    const int64_t group = unit.per_group(unit.group_of(c));
    block.channels(kChannelMean)[c] = job.mean[group];
    block.channels(kChannelSlope)[c] = channel.slope() * job.rstd[group];
    block.channels(kChannelOffset)[c] = channel.offset();
    block.channels(kChannelFactor)[c] = channel.slope();
  }
  for (int g = threadIdx.x; g < unit.groups; g += kThreads) {
    block.groups(kRstd)[g] = job.rstd[unit.per_group(g)];
  }
}

// What one sample contributes to the gradients of the parameters of channel c.
template <class T>
__device__ void write_sums(const GroupNormBackward& job, const Unit& unit, int c, float p,
                           float q) {
  const ChannelAffine channel = ChannelAffine::of<T>(job.affine, unit, c);
  const int64_t at = unit.per_sample(c);
  set_element<T>(job.dshift, at, p);
  set_element<T>(job.dscale, at, fmaf(channel.weight, q, channel.bias * p));
  if (job.dz_sums != nullptr) job.dz_sums[at] = channel.gain * p;
  if (job.dz_xhat_sums != nullptr) job.dz_xhat_sums[at] = channel.gain * q;
}

// One pass: a cluster keeps a unit of x and dy in the shared memory of its blocks. Reads both once,
// writes dx once.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 3) void group_norm_backward_kernel(
    const __grid_constant__ BackwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  const Team<T, kChannelsLast> team(block);
  const bool clustered = a.stages.cluster > 1;
  const bool exists = block.unit().exists;
  if (exists) {
    block.start_copies(static_cast<const T*>(a.job.x), static_cast<const T*>(a.job.dy));
    load_parameters(block, a.job);
    wait_for_copies();
    __syncthreads();
    sum_gradients<true>(block, team, a.job);
    __syncthreads();
    merge_parts(block);
  }
  if (clustered) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (exists) merge_shares(block, blockIdx.x % a.stages.cluster - block.share.part);
  // No block may end while another one still reads its sums.
  if (clustered) cluster_arrive_relaxed();
  if (exists) {
    __syncthreads();
    if (a.job.dx != nullptr) {
      finish_lines(block);
      __syncthreads();
      finish_channel_lines(block);
      __syncthreads();
      input_gradient<true>(block, team, a.job);
    }
    if (block.share.part == 0) {
      for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
        write_sums<T>(a.job, block.unit(), c, block.partials(0)[c], block.partials(1)[c]);
      }
    }
  }
  if (clustered) cluster_wait();
}

// Two passes, the sums: a block reads its share of x and dy and writes the sums of its channels.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 3) void group_norm_backward_sums_kernel(
    const __grid_constant__ BackwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  load_parameters(block, a.job);
  __syncthreads();
  sum_gradients<false>(block, Team<T, kChannelsLast>(block), a.job);
  __syncthreads();
  merge_parts(block);
  // Each thread writes the channels that it has merged itself.
  for (int c = threadIdx.x; c < block.unit().channels; c += kThreads) {
    a.partials[blockIdx.x * a.stride + c] = block.channel_pairs(kChannelSums)[c];
  }
}

// The shared memory of the kernel below: kThreads pairs of scratch; P, Q and A of `channels`
// channels.
constexpr int64_t backward_finish_bytes(int64_t channels) {
  return (2 * kThreads + 3 * channels) * static_cast<int64_t>(sizeof(float));
}

// Two passes, in between: a block per unit adds up the shares' sums.

template <class T>
__global__ __launch_bounds__(kThreads) void group_norm_backward_finish_kernel(
    const __grid_constant__ BackwardArguments a) {
  constexpr int kWarps = kThreads / 32;
  auto* scratch = reinterpret_cast<float2*>(shared_memory());
  auto* p = reinterpret_cast<float*>(scratch + kThreads);
  float* q = p + a.stride;
  float* factor = q + a.stride;
  const Stage& stage = stage_of(a.stages, &Stage::first_unit, blockIdx.x);
  const int number = blockIdx.x - stage.first_unit;
  const Unit unit(stage, number);
  const int64_t first_share = stage.first_block + static_cast<int64_t>(number) * stage.parts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = 0; first < unit.channels; first += 32) {
    const int c = first + lane;
    float2 sums = {0, 0};
    if (c < unit.channels) {
#pragma unroll 4
      for (int part = warp; part < stage.parts; part += kWarps) {
        const float2 share = a.partials[(first_share + part) * a.stride + c];
        sums.x += share.x;
        sums.y += share.y;
      }
    }
    scratch[threadIdx.x] = sums;
    __syncthreads();
    if (warp == 0 && c < unit.channels) {
      for (int w = 1; w < kWarps; ++w) {
        sums.x += scratch[w * 32 + lane].x;
        sums.y += scratch[w * 32 + lane].y;
      }
      const float rstd = a.job.rstd[unit.per_group(unit.group_of(c))];
      p[c] = sums.x;
      q[c] = sums.y * rstd;
      factor[c] = ChannelAffine::of<T>(a.job.affine, unit, c).slope();
      write_sums<T>(a.job, unit, c, p[c], q[c]);
    }
    __syncthreads();
  }
  if (a.job.dx == nullptr) return;
  for (int g = warp; g < unit.groups; g += kWarps) {
    const int c = g * unit.group_channels();
    const int64_t group = unit.per_group(g);
    const float2 line = line_of_group(p + c, q + c, factor + c, unit.group_channels(),
                                      a.stages.pixels, a.job.rstd[group]);
    if (lane == 0) a.group_lines[group] = line;
  }
}

// Two passes, the result: a block reads its share of x and dy again and writes that of dx.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, 3) void group_norm_backward_map_kernel(
    const __grid_constant__ BackwardArguments a) {
  const auto& block = Block<T, kChannelsLast>::make(a.stages);
  load_parameters(block, a.job);
  for (int g = threadIdx.x; g < block.unit().groups; g += kThreads) {
    block.group_pairs(kLines)[g] = a.group_lines[block.unit().per_group(g)];
  }
  __syncthreads();
  finish_channel_lines(block);
  __syncthreads();
  input_gradient<false>(block, Team<T, kChannelsLast>(block), a.job);
}

struct ParametersArguments {
  Stages stages;
  GroupNormBackward job;
};

constexpr int kParameterRows = 16;
constexpr int kParameterThreads = kParameterRows * kParameterChannels;

// A block adds up the samples of kParameterChannels channels of a stage, always in the same order;
// a stage without samples gets zeros.
template <class T>
__global__ __launch_bounds__(kParameterThreads) void group_norm_parameters_kernel(
    const __grid_constant__ ParametersArguments a) {
  auto* scratch = reinterpret_cast<float2*>(shared_memory());
  const Stage& stage = stage_of(a.stages, &Stage::first_block, blockIdx.x);
  const int lane = threadIdx.x % kParameterChannels, row = threadIdx.x / kParameterChannels;
  const int c = (blockIdx.x - stage.first_block) * kParameterChannels + lane;
  const bool inside = c < stage.channels;
  float2 sums = {0, 0};
#pragma unroll 4
  for (int64_t sample = row; inside && sample < stage.samples; sample += kParameterRows) {
    const int64_t at = stage.per_sample + sample * stage.channels + c;
    if (a.job.dz_xhat_sums != nullptr) sums.x += a.job.dz_xhat_sums[at];
    if (a.job.dz_sums != nullptr) sums.y += a.job.dz_sums[at];
  }
  scratch[threadIdx.x] = sums;
  __syncthreads();
  if (row != 0 || !inside) return;
  for (int r = 1; r < kParameterRows; ++r) {
    sums.x += scratch[r * kParameterChannels + lane].x;
    sums.y += scratch[r * kParameterChannels + lane].y;
  }
  set_element<T>(a.job.dweight, stage.per_channel + c, sums.x);
  set_element<T>(a.job.dbias, stage.per_channel + c, sums.y);
}

}  // namespace msd::cuda

// What the compiled kernels of FIR resampling compute, on packed stage batches, without PyTorch's
// types. Along each axis, with p = (L - 1) / 2 for L taps:
//   downward  y[i] = sum over t of taps[t] x[stride i + t - p], with zeros around x;  upward its
//   adjoint.
#pragma once

#include <cstdint>
#include <vector>

#include "group_norm_job.h"

namespace msd {

constexpr int kMaxTaps = 8;
constexpr int kMaxStride = 2;

struct ResampleShape {
  std::vector<int64_t> counts, channels;
  int64_t height = 0, width = 0, out_height = 0, out_width = 0;
  bool channels_last = true;
  ElementType type = ElementType::kFloat;
};

struct ResampleFilter {
  std::vector<double> taps;
  bool upward = false;
  int64_t stride = 1;
};

// One axis as every kernel walks it. Output position j, with j + shift = m phases + f, is the sum
// over k of weights[f][k] times the input at m step - back[f] + k, for k in [0, taps[f]). There is
// one phase, or there are two and the step is 1; phase 0 has the most taps.
struct ResampleAxis {
  int64_t in, out, phases, step, shift;
  int64_t taps[kMaxStride], back[kMaxStride];
  float weights[kMaxStride][kMaxTaps];
};

// Upward, output j takes those taps t for which j + p - t is a multiple of the stride.
inline ResampleAxis resample_axis(const ResampleFilter& filter, int64_t in, int64_t out) {
  const int64_t taps = static_cast<int64_t>(filter.taps.size());
  const int64_t padding = (taps - 1) / 2;
  ResampleAxis axis = {};
  axis.in = in;
  axis.out = out;
  axis.phases = filter.upward ? filter.stride : 1;
  axis.step = filter.upward ? 1 : filter.stride;
  axis.shift = filter.upward ? padding : 0;
  for (int64_t f = 0; f < axis.phases; ++f) {
    const int64_t count = (taps - f + axis.phases - 1) / axis.phases;
    axis.taps[f] = count;
    axis.back[f] = filter.upward ? count - 1 : padding;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t tap = filter.upward ? f + axis.phases * (count - 1 - k) : k;
      axis.weights[f][k] = static_cast<float>(filter.taps[tap]);
    }
  }
  return axis;
}

}  // namespace msd

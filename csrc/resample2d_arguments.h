// The arguments of the registered op of FIR resampling as a job, the same for the CPU and for CUDA.
#pragma once

#include <vector>

#include "op_arguments.h"
#include "resample2d_job.h"

namespace msd {

inline ResampleFilter resample_filter(const std::vector<double>& taps, bool upward,
                                      int64_t stride) {
  STD_TORCH_CHECK(!taps.empty() && taps.size() <= kMaxTaps, "resample2d: taps must be 1 to ",
                  kMaxTaps, ", got ", taps.size());
  STD_TORCH_CHECK(stride >= 1 && stride <= kMaxStride, "resample2d: stride must be 1 to ",
                  kMaxStride, ", got ", stride);
  return {taps, upward, stride};
}

// Pixels of all channels and samples of an image of such a size.
inline int64_t resample_elements(const ResampleShape& shape, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height >= 1 && width >= 1, "resample2d: sizes must be positive, got ", height,
                  " x ", width);
  const int64_t plane = checked_product(height, width);
  int64_t planes = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) {
    STD_TORCH_CHECK(shape.counts[s] >= 0 && shape.channels[s] >= 1,
                    "resample2d: counts=", shape.counts[s], " and channels=", shape.channels[s],
                    " of stage ", s, " must not be negative or zero");
    planes = checked_sum(planes, checked_product(shape.counts[s], shape.channels[s]));
  }
  return checked_product(planes, plane);
}

// Downward an axis of `fine` pixels becomes one of `coarse`, upward the reverse.
inline void check_resample_axis(const ResampleFilter& filter, int64_t in, int64_t out) {
  const int64_t taps = static_cast<int64_t>(filter.taps.size());
  const int64_t fine = filter.upward ? out : in, coarse = filter.upward ? in : out;
  const int64_t span = checked_sum(fine, (taps - 1) / 2 * 2 - taps);
  STD_TORCH_CHECK(span >= 0 && coarse == span / filter.stride + 1, "resample2d: sizes ", in,
                  " and ", out, " do not follow from each other with ", taps,
                  " taps and a stride of ", filter.stride);
}

inline ResampleShape resample_shape(const Tensor& x, const ResampleFilter& filter,
                                    const std::vector<int64_t>& counts,
                                    const std::vector<int64_t>& channels, int64_t height,
                                    int64_t width, int64_t out_height, int64_t out_width,
                                    bool channels_last, const Tensor& y) {
  const char* op = "resample2d";
  STD_TORCH_CHECK(channels.size() == counts.size(), op,
                  ": counts and channels need one entry per stage, got ", counts.size(), " and ",
                  channels.size());
  const ResampleShape shape = {counts,     channels,  height,        width,
                               out_height, out_width, channels_last, element_type(op, x)};
  check_contents(op, "x", x, resample_elements(shape, height, width), x.scalar_type());
  check_contents(op, "y", y, resample_elements(shape, out_height, out_width), x.scalar_type());
  check_same_device(op, "y", y, x);
  check_resample_axis(filter, height, out_height);
  check_resample_axis(filter, width, out_width);
  return shape;
}

}  // namespace msd

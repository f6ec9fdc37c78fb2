// What the scheduler of FIR resampling and its compiled kernels share. Plain data only: the
// kernels' files are compiled for instruction sets that the processor may lack.
#pragma once

#include "../resample2d_job.h"
#include "scalar_types.h"

namespace msd {

struct ResampleJob {
  const void* x;
  void* y;
  ResampleAxis rows, columns;
};

// Neighbouring rows of the output, counted through all images: samples in NHWC, planes in NCHW.
struct ResampleUnit {
  int64_t x, y;      // offsets of the first image
  int64_t channels;  // of a pixel: 1 in NCHW
  int64_t first, rows;
};

using ResampleKernel = void (*)(const ResampleJob&, const ResampleUnit&);

ResampleKernel resample2d_kernel_avx512bf16(ElementType type);
ResampleKernel resample2d_kernel_avx512(ElementType type);
ResampleKernel resample2d_kernel_avx2(ElementType type);
ResampleKernel resample2d_kernel_portable(ElementType type);

}  // namespace msd

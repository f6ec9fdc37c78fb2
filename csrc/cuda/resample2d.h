// The CUDA kernels of FIR resampling. No CUDA headers in here: the registration of the ops is
// compiled without them.
#pragma once

#include "../resample2d_job.h"

namespace msd::cuda {

// Starts the kernels on a stream of the device (a cudaStream_t), without waiting for anything. Both
// buffers are on that device and as large as the shape says. Throws std::runtime_error with CUDA's
// message.
void resample2d(const ResampleShape& shape, const ResampleFilter& filter, const void* x, void* y,
                int device, void* stream);

}  // namespace msd::cuda

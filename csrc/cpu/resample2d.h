// FIR resampling on the CPU, see resample2d_job.h.
#pragma once

#include "../resample2d_job.h"

namespace msd {

void resample2d(const ResampleShape& shape, const ResampleFilter& filter, const void* x, void* y);

}  // namespace msd

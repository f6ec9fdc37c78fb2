// Matrices transposed: NCHW maps as channels_last ones, and back.
#pragma once

#include <cstdint>

#include "../group_norm_job.h"

namespace msd {

struct Matrices {
  int64_t count, rows, columns;
};

// y [count, columns, rows] of x [count, rows, columns].
void exchange_axes(const Matrices& shape, ElementType type, const void* x, void* y);

}  // namespace msd

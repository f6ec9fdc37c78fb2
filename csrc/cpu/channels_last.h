#pragma once

#include <cstdint>

namespace msd {

// y[n][p][c] = x[n][c][p]: samples from NCHW to NHWC. Elements have 2 or 4 bytes.
void to_channels_last(const void* x, void* y, int64_t element_size, int64_t samples,
                      int64_t channels, int64_t pixels);

}  // namespace msd

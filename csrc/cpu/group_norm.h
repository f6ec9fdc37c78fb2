// GroupNorm with optional scale, shift and SiLU on the CPU.
#pragma once

#include "../group_norm_job.h"

namespace msd {

void group_norm_forward(const GroupNormShape& shape, const GroupNormForward& job);
void group_norm_backward(const GroupNormShape& shape, const GroupNormBackward& job);

}  // namespace msd

// The CUDA kernels of GroupNorm. No CUDA headers in here: the registration of the ops is compiled
// without them.
#pragma once

#include <memory>

#include "group_norm_plan.h"

namespace msd::cuda {

// The plan for a shape on a device, made once.
std::shared_ptr<const GroupNormPlan> group_norm_plan(const GroupNormShape& shape, bool backward,
                                                     int device, const ForcedCut& forced);

// Starts the kernels on a stream of the device (a cudaStream_t), without waiting for anything. All
// buffers are on that device and as large as the shape says; the workspace begins at a multiple of
// 8 bytes. Throws std::runtime_error with CUDA's message.
void group_norm_forward(const GroupNormShape& shape, const GroupNormPlan& plan,
                        const GroupNormForward& job, float* workspace, int device, void* stream);
void group_norm_backward(const GroupNormShape& shape, const GroupNormPlan& plan,
                         const GroupNormBackward& job, float* workspace, int device, void* stream);

}  // namespace msd::cuda

// The registered CUDA ops for CPU tensors, with the kernels in the emulator. The build renames the
// library, so that it may be loaded beside the real one.
#include "../../csrc/cuda_ops.cpp"

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_cuda, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("resample2d", TORCH_BOX(&resample2d));
}

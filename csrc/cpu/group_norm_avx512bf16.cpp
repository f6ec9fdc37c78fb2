#if defined(__x86_64__)

#define MSD_ISA avx512bf16
#include "group_norm_passes.h"

namespace msd {

const GroupNormKernels& group_norm_kernels_avx512bf16(ElementType type) {
  return avx512bf16::kernels_for(type);
}

}  // namespace msd

#endif

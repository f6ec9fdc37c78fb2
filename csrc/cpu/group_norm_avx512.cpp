#if defined(__x86_64__)

#define MSD_ISA avx512
#include "group_norm_passes.h"

namespace msd {

const GroupNormKernels& group_norm_kernels_avx512(ElementType type) {
  return avx512::kernels_for(type);
}

}  // namespace msd

#endif

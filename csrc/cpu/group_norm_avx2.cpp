#if defined(__x86_64__)

#define MSD_ISA avx2
#include "group_norm_passes.h"

namespace msd {

const GroupNormKernels& group_norm_kernels_avx2(ElementType type) {
  return avx2::kernels_for(type);
}

}  // namespace msd

#endif

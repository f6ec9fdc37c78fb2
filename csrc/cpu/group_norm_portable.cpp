#define MSD_ISA portable
#include "group_norm_passes.h"

namespace msd {

const GroupNormKernels& group_norm_kernels_portable(ElementType type) {
  return portable::kernels_for(type);
}

}  // namespace msd

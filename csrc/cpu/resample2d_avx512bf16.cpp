#if defined(__x86_64__)

#define MSD_ISA avx512bf16
#include "resample2d_passes.h"

namespace msd {

ResampleKernel resample2d_kernel_avx512bf16(ElementType type) {
  return avx512bf16::kernel_for(type);
}

}  // namespace msd

#endif

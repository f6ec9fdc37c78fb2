#if defined(__x86_64__)

#define MSD_ISA avx2
#include "resample2d_passes.h"

namespace msd {

ResampleKernel resample2d_kernel_avx2(ElementType type) { return avx2::kernel_for(type); }

}  // namespace msd

#endif

#if defined(__x86_64__)

#define MSD_ISA avx512
#include "resample2d_passes.h"

namespace msd {

ResampleKernel resample2d_kernel_avx512(ElementType type) { return avx512::kernel_for(type); }

}  // namespace msd

#endif

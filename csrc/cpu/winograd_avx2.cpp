#if defined(__x86_64__)

#define MSD_ISA avx2
#include "winograd_passes.h"

namespace msd {

WinogradKernels winograd_kernels_avx2(ElementType type) { return avx2::winograd_kernels_for(type); }

}  // namespace msd

#endif

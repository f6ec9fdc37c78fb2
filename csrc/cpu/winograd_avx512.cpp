#if defined(__x86_64__)

#define MSD_ISA avx512
#include "winograd_passes.h"

namespace msd {

WinogradKernels winograd_kernels_avx512(ElementType type) {
  return avx512::winograd_kernels_for(type);
}

}  // namespace msd

#endif

#if defined(__x86_64__)

#define MSD_ISA avx512bf16
#include "winograd_passes.h"

namespace msd {

WinogradKernels winograd_kernels_avx512bf16(ElementType type) {
  return avx512bf16::winograd_kernels_for(type);
}

}  // namespace msd

#endif

#define MSD_ISA portable
#include "winograd_passes.h"

namespace msd {

WinogradKernels winograd_kernels_portable(ElementType type) {
  return portable::winograd_kernels_for(type);
}

}  // namespace msd

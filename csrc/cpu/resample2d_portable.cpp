#define MSD_ISA portable
#include "resample2d_passes.h"

namespace msd {

ResampleKernel resample2d_kernel_portable(ElementType type) { return portable::kernel_for(type); }

}  // namespace msd

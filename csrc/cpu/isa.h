#pragma once

namespace msd {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this processor that the build has kernels for, capped by the
// environment variable MSD_KERNELS_CPU_ISA (avx512bf16, avx512, avx2 or portable) if that is set.
Isa cpu_isa();

const char* name(Isa isa);

}  // namespace msd

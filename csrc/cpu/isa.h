#pragma once

namespace msd {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this processor that the build has kernels for, capped by the
// environment variable MSD_KERNELS_CPU_ISA (avx512bf16, avx512, avx2 or portable) if that is set.
Isa cpu_isa();

const char* name(Isa isa);

// The build of a function for this processor: MSD_FOR_THIS_CPU(f) is one of f_avx512bf16, f_avx512,
// f_avx2 and f_portable, the only one that other processors than x86 have.
#if defined(__x86_64__)
template <class Function>
Function* for_this_cpu(Function* avx512bf16, Function* avx512, Function* avx2, Function* portable) {
  switch (cpu_isa()) {
    case Isa::kAvx512Bf16:
      return avx512bf16;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return portable;
  }
}
#define MSD_FOR_THIS_CPU(f) \
  (::msd::for_this_cpu(f##_avx512bf16, f##_avx512, f##_avx2, f##_portable))
#else
#define MSD_FOR_THIS_CPU(f) (f##_portable)
#endif

}  // namespace msd

// The passes of Winograd's convolutions for one instruction set.
#pragma once

#include "winograd_conv.h"
#include "winograd_gradient.h"

namespace msd::MSD_ISA {

template <class T>
WinogradKernels winograd_kernels_of() {
  return {kPair,           kProductRows,        conv_inputs<T>,
          conv_outputs<T>, gradient_sources<T>, gradient_cotangents<T>,
          gradient_weights};
}

MSD_INLINE WinogradKernels winograd_kernels_for(ElementType type) {
  return type == ElementType::kFloat  ? winograd_kernels_of<float>()
         : type == ElementType::kHalf ? winograd_kernels_of<Half>()
                                      : winograd_kernels_of<BFloat16>();
}

}  // namespace msd::MSD_ISA

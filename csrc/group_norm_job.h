// What the compiled kernels of GroupNorm compute, on packed stage batches, without PyTorch's types:
//   xhat = (x - mean) rstd,  z = (xhat weight + bias) (1 + scale) + shift,  y = z or z sigmoid(z).
#pragma once

#include <cstdint>
#include <vector>

namespace msd {

// By the codes of msd_kernels/runtime/extension.py.
enum class ElementType { kFloat, kBFloat16, kHalf };

// Elements of float32, or else of the type of x. No data: the default value everywhere.
struct ConstArray {
  const void* data = nullptr;
  bool is_float = true;
};
struct MutableArray {
  void* data = nullptr;
  bool is_float = true;
};

// Stage after stage; weight and bias have an element per channel, scale and shift one per sample
// and channel.
struct Affine {
  ConstArray weight, bias, scale, shift;
};

// A stage's channels are `channels` of x, then `skip_channels` of skip; groups may have both.
struct GroupNormShape {
  std::vector<int64_t> counts, channels, skip_channels, groups;
  int64_t spatial = 0;
  bool channels_last = true;
  ElementType type = ElementType::kFloat;

  bool has_skip() const {
    for (const int64_t channels : skip_channels) {
      if (channels != 0) return true;
    }
    return false;
  }
};

struct GroupNormForward {
  const void* x = nullptr;
  const void* skip = nullptr;
  Affine affine;
  float eps = 0;
  bool silu = false;
  void* y = nullptr;
  float* mean = nullptr;
  float* rstd = nullptr;
};

// A gradient without data is not wanted.
struct GroupNormBackward {
  const void* dy = nullptr;
  bool dy_planar = false;  // dy is NCHW although x is NHWC; the CPU's only, one stage
  const void* x = nullptr;
  const void* skip = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  Affine affine;
  bool silu = false;
  void* dx = nullptr;
  void* dskip = nullptr;
  MutableArray dweight, dbias, dscale, dshift;
  // Per sample and channel, for dweight and dbias: sum of dz and sum of dz xhat.
  float* dz_sums = nullptr;
  float* dz_xhat_sums = nullptr;
};

}  // namespace msd

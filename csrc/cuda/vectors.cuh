// Vectors of four elements, the activation types, sums over threads, and fast divisions.
#pragma once

#include <type_traits>

#include "device.h"
#include "ptx.cuh"

namespace msd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Four elements as they lie in memory, and as numbers.
template <class T>
using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
template <class T>
constexpr int kVectorBytes = 4 * sizeof(T);
struct Four {
  float at[4];

  __device__ float& operator[](int i) { return at[i]; }
  __device__ float operator[](int i) const { return at[i]; }
};

__device__ __forceinline__ float2 pair_to_floats(uint32_t bits, BFloat16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 pair_to_floats(uint32_t bits, Half) {
  return from_half_pair(bits);
}
__device__ __forceinline__ uint32_t pair_from_floats(float low, float high, BFloat16) {
  return to_bfloat16_pair(low, high);
}
__device__ __forceinline__ uint32_t pair_from_floats(float low, float high, Half) {
  return to_half_pair(low, high);
}

template <class T>
__device__ __forceinline__ Four unpack(Words<T> words) {
  if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
            __uint_as_float(words.w)};
  } else {
    const float2 low = pair_to_floats(words.x, T{});
    const float2 high = pair_to_floats(words.y, T{});
    return {low.x, low.y, high.x, high.y};
  }
}

template <class T>
__device__ __forceinline__ Words<T> pack(const Four& values) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  } else {
    return {pair_from_floats(values[0], values[1], T{}),
            pair_from_floats(values[2], values[3], T{})};
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
template <class T>
__device__ __forceinline__ float to_float(T value) {
  return pair_to_floats(value.bits, T{}).x;
}

__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
template <class T>
__device__ __forceinline__ void from_float(float value, T* out) {
  out->bits = static_cast<uint16_t>(pair_from_floats(value, 0.0f, T{}));
}

// A vector by accesses of at most `width` bytes, which divide its address. Of a vector at the end
// of a row, only the first `valid` elements are read, the others are 0; these end with a whole
// access.
template <class T>
__device__ __forceinline__ Words<T> load_vector(const T* address, int width, int valid) {
  if (width >= kVectorBytes<T>) return *reinterpret_cast<const Words<T>*>(address);
  if constexpr (sizeof(T) == 4) {
    const auto* bits = reinterpret_cast<const uint32_t*>(address);
    return {0 < valid ? bits[0] : 0, 1 < valid ? bits[1] : 0, 2 < valid ? bits[2] : 0,
            3 < valid ? bits[3] : 0};
  } else {
    const auto at = [&](int i) {
      return i < valid ? static_cast<uint32_t>(address[i].bits) << (i % 2 * 16) : 0;
    };
    return {at(0) | at(1), at(2) | at(3)};
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* address, const Four& values, int width, int valid) {
  if (width >= kVectorBytes<T>) {
    *reinterpret_cast<Words<T>*>(address) = pack<T>(values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) from_float(values[i], address + i);
  }
}

// 1 / (1 + exp(-z)): the error of z sigmoid(z) is below 3 float32 roundings of z. A NaN stays one.
__device__ __forceinline__ float sigmoid(float z) {
  return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z));
}

// The sum over `lanes` neighbouring threads of a warp, a power of two, in each of them. The whole
// warp must call.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// n / divisor, for n below 2^16.
__device__ __forceinline__ int quotient(int n, const Divisor& divisor) {
  const auto number = static_cast<uint32_t>(n);
  return static_cast<int>(divisor.reciprocal == 0 ? number : __umulhi(number, divisor.reciprocal));
}

}  // namespace msd::cuda

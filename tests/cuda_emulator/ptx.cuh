// Stands in for csrc/cuda/ptx.cuh. Asynchronous copies happen as late as they may.
#ifndef MSD_KERNELS_PTX_CUH
#define MSD_KERNELS_PTX_CUH

#include <cuda_runtime.h>

// The runs of a kernel, in emulator.cpp.
char* emulated_shared_memory();
void emulated_copy_async(void* shared, const void* global, int bytes);
void emulated_wait_for_copies();
void emulated_cluster_arrive();
void emulated_cluster_wait();
const void* emulated_remote(const void* shared, uint32_t rank);

namespace msd::cuda {

inline char* shared_memory() { return emulated_shared_memory(); }

template <int kBytes>
inline void copy_async(void* shared, const void* global) {
  emulated_copy_async(shared, global, kBytes);
}
inline void wait_for_copies() { emulated_wait_for_copies(); }
inline void cluster_arrive() { emulated_cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulated_cluster_arrive(); }
inline void cluster_wait() { emulated_cluster_wait(); }
inline float2 read_remote(const float2* shared, uint32_t rank) {
  return *static_cast<const float2*>(emulated_remote(shared, rank));
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline uint32_t rounded_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t rounded_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline float from_half(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, sizeof(half));
  return static_cast<float>(half);
}
inline uint32_t to_bfloat16_pair(float low, float high) {
  return rounded_to_bfloat16(low) | rounded_to_bfloat16(high) << 16;
}
inline uint32_t to_half_pair(float low, float high) {
  return rounded_to_half(low) | rounded_to_half(high) << 16;
}
inline float2 from_half_pair(uint32_t bits) { return {from_half(bits), from_half(bits >> 16)}; }

}  // namespace msd::cuda

#endif

// The instructions that CUDA C++ gives no name to, or a slower one. Everything else in this folder
// is plain C++: the tests compile it for the CPU with files of their own in the place of this one
// and of CUDA's headers (tests/cuda_emulator).
#ifndef MSD_KERNELS_PTX_CUH
#define MSD_KERNELS_PTX_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace msd::cuda {

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char msd_shared_memory[];
  return msd_shared_memory;
}

// Starts a copy from device to shared memory that passes no register. Both addresses are multiples
// of kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global),
                 "n"(kBytes)
                 : "memory");
  }
}

// Waits for the copies that this thread started. Other threads see them after a __syncthreads().
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// The barrier of a cluster's threads in two halves. What a thread wrote before it arrives, all see
// after they waited; if it only has read, a relaxed arrival spares it the wait for its own writes
// to device memory. Blocks that were launched without a cluster, as on architectures before 9.0,
// must not call these.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Reads what block `rank` of the cluster keeps at the same place of its shared memory.
__device__ __forceinline__ float2 read_remote(const float2* shared, uint32_t rank) {
  float2 value = *shared;
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{.reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [remote];}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return value;
}

// 2^x with a relative error of 2^-22; 0 instead of subnormal results.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x with a relative error of 2^-23; 0 for x beyond 2^126.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two 16-bit numbers in one word, the first one in the lower half. Conversions round to the
// nearest, ties to even.
__device__ __forceinline__ uint32_t to_bfloat16_pair(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ uint32_t to_half_pair(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float2 from_half_pair(uint32_t bits) {
  float2 value;
  asm("{.reg .f16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(bits));
  return value;
}

}  // namespace msd::cuda

#endif

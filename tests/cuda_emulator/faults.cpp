// Kernels that are wrong on purpose, to see that the emulator finds it.
#include <map>
#include <string>

#include "ptx.cuh"

namespace {

using msd::cuda::shared_memory;

struct Nothing {};

alignas(16) float global[64] = {1, 2, 3, 4};

float* shared() { return reinterpret_cast<float*>(shared_memory()); }

void barrier_for_some(Nothing) {
  if (threadIdx.x < 7) __syncthreads();
  if (threadIdx.x == 40) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void copy_without_wait(Nothing) { msd::cuda::copy_async<16>(shared(), global); }

void unaligned_copy(Nothing) {
  msd::cuda::copy_async<16>(shared(), global + 1);
  msd::cuda::wait_for_copies();
}

void copy_outside(Nothing) {
  msd::cuda::copy_async<16>(shared() + 64, global);
  msd::cuda::wait_for_copies();
}

void write_outside(Nothing) {
  if (threadIdx.x == 0) shared()[64] = 1;
}

void read_after_end(Nothing) {
  const auto* pair = reinterpret_cast<const float2*>(shared());
  msd::cuda::cluster_arrive();
  msd::cuda::cluster_wait();
  if (blockIdx.x == 1) {
    for (int i = 0; i < 3; ++i) __syncthreads();
    global[0] = msd::cuda::read_remote(pair, 0).x;
  }
}

void half_a_barrier(Nothing) { msd::cuda::cluster_arrive(); }

// Thread i reads what thread i + 1 writes.
void missing_barrier(Nothing) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  global[threadIdx.x] = shared()[(threadIdx.x + 1) % 32];
}

const std::map<std::string, void (*)(Nothing)> kKernels = {
    {"barrier for some", barrier_for_some}, {"copy without wait", copy_without_wait},
    {"unaligned copy", unaligned_copy},     {"copy outside", copy_outside},
    {"read after end", read_after_end},     {"half a barrier", half_a_barrier},
    {"missing barrier", missing_barrier},   {"write outside", write_outside},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulator_fault(const char* name) {
  const bool warp_alone = std::string(name) == "missing barrier";
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(warp_alone ? 32 : 64);
  config.dynamicSmemBytes = 256;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernels.at(name), Nothing());
  if (error != cudaSuccess) return cudaGetErrorString(error);
  static std::string result;
  result.clear();
  for (int i = 0; i < 4; ++i) result += std::to_string(global[i]) + " ";
  return result.c_str();
}

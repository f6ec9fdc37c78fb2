// The host side of every launch: what the device can do, errors, shared memory, clusters.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.h"

namespace msd::cuda {

// Throws what the caller is told when CUDA refuses something.
inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

// Makes a device the current one of this copy of CUDA's runtime. It is that of the caller's PyTorch
// already, so there is nothing to restore.
inline void use_device(const char* op, int device) { check(op, cudaSetDevice(device)); }

// The current device, asked once. `probe` is any kernel of the caller: clusters need code for 9.0
// or later.
inline Device current_device(const char* op, const void* probe) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  check(op, cudaGetDevice(&index));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(op, cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  cudaFuncAttributes code;
  check(op, cudaFuncGetAttributes(&code, probe));
  Device device;
  device.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  device.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.reserved_per_block = ask(cudaDevAttrReservedSharedMemoryPerBlock);
  device.clusters = ask(cudaDevAttrClusterLaunch) != 0 && code.ptxVersion >= 90;
  known[index] = device;
  return device;
}

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared = 0;   // bytes of dynamic shared memory per block
  int cluster = 1;      // blocks per cluster, a divisor of `blocks`
  bool cached = false;  // rather reads through a large L1 cache than have all shared memory
};

// Lets a kernel ask for all shared memory of the current device, once.
inline void allow_all_shared_memory(const char* op, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int index = 0, limit = 0;
  check(op, cudaGetDevice(&index));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({index, kernel}) != 0) return;
  check(op, cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared));
  allowed.insert({index, kernel});
}

// Starts a kernel that takes one struct, by value, on the current device. No blocks: nothing to do.
template <class Arguments>
void launch(const char* op, void (*kernel)(Arguments), const Grid& grid, cudaStream_t stream,
            const Arguments& arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > INT32_MAX) {
    throw std::runtime_error(
        std::string(op) + ": too large for one launch: " + std::to_string(grid.blocks) + " blocks");
  }
  if (!grid.cached) allow_all_shared_memory(op, reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace msd::cuda

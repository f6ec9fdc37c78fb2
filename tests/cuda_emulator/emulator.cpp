// Runs CUDA kernels on the CPU, one fiber per thread, and finds what a GPU would not tell: barriers
// that some threads never reach, asynchronous copies that nobody waited for, shared memory read
// after its block has ended, writes behind its end, unaligned copies. What is read behind its end
// is NaN. Fibers run in one order, the reverse or a random one: results that depend on it come from
// a missing barrier.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;
constexpr size_t kGuardBytes = 16 << 10;  // behind shared memory

struct Settings {
  int device = 0;
  std::map<cudaDeviceAttr, int> attributes;
  int order = 0;             // of threads: 0 forwards, 1 backwards, else random
  int64_t launches[2] = {};  // without and with clusters
} settings;

std::string last_error;

// Threads that wait until all of them have arrived.
struct Barrier {
  int expected = 0, arrived = 0;
  int64_t phase = 0;

  void arrive() {
    if (++arrived == expected) {
      arrived = 0;
      ++phase;
    }
  }
};

struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  int thread = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  int64_t waits_in_phase = 0;
  int64_t cluster_phase = -1;  // in which it arrived and has not waited yet
  int shuffles = 0;
  std::vector<PendingCopy> copies;

  bool blocked() const { return waits_for != nullptr && waits_for->phase == waits_in_phase; }
};

struct Warp {
  Barrier barrier;
  float values[2][kWarp];
};

struct Block {
  dim3 index;
  unsigned rank = 0;
  std::unique_ptr<uint4[]> shared;  // and the guard
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  int running = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

ucontext_t scheduler;
Fiber* current = nullptr;
Cluster* cluster = nullptr;
const std::function<void()>* thread_body = nullptr;

void switch_to_scheduler() { swapcontext(&current->context, &scheduler); }

[[noreturn]] void fail(const std::string& message) {
  if (last_error.empty()) {
    last_error = message + " (block " + std::to_string(current->block->index.x) + ", thread " +
                 std::to_string(current->thread) + ")";
  }
  for (;;) switch_to_scheduler();
}

void wait_for(const Barrier& barrier, int64_t phase) {
  current->waits_for = &barrier;
  current->waits_in_phase = phase;
  if (barrier.phase == phase) switch_to_scheduler();
  current->waits_for = nullptr;
}

void meet(Barrier& barrier) {
  const int64_t phase = barrier.phase;
  barrier.arrive();
  wait_for(barrier, phase);
}

void fiber_main() {
  for (;;) {
    (*thread_body)();
    if (!current->copies.empty()) fail("ends without waiting for its copies");
    if (current->cluster_phase >= 0) fail("ends between arriving at and waiting for the cluster");
    current->done = true;
    --current->block->running;
    switch_to_scheduler();
  }
}

// Fibers are kept from one cluster to the next.
std::vector<std::unique_ptr<Fiber>> fibers;

void make_fibers(size_t count) {
  while (fibers.size() < count) {
    auto made = std::make_unique<Fiber>();
    getcontext(&made->context);
    made->context.uc_stack.ss_sp = made->stack.get();
    made->context.uc_stack.ss_size = kStackBytes;
    made->context.uc_link = nullptr;
    makecontext(&made->context, fiber_main, 0);
    fibers.push_back(std::move(made));
  }
}

std::vector<int> thread_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  if (settings.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(settings.order));
  return order;
}

void resume(Fiber& next) {
  current = &next;
  threadIdx = dim3(next.thread);
  blockIdx = next.block->index;
  swapcontext(&scheduler, &next.context);
}

// Runs the threads of a cluster to their end, or until one fails or none can go on.
void run_cluster(Cluster& alive, int threads) {
  cluster = &alive;
  const int count = static_cast<int>(alive.blocks.size()) * threads;
  make_fibers(count);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.block = &alive.blocks[i / threads];
    fiber.thread = i % threads;
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.cluster_phase = -1;
    fiber.shuffles = 0;
  }
  const std::vector<int> order = thread_order(count);
  for (int left = count; left > 0;) {
    bool progress = false;
    for (const int i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.blocked()) continue;
      resume(fiber);
      progress = true;
      if (!last_error.empty()) return;
      if (fiber.done) --left;
    }
    if (!progress) {
      last_error = "some threads wait at a barrier that others never reach";
      return;
    }
  }
}

// Shared memory begins as NaN.
Cluster make_cluster(const cudaLaunchConfig_t& config, unsigned first, unsigned size) {
  const int threads = static_cast<int>(config.blockDim.x);
  Cluster made;
  made.barrier.expected = static_cast<int>(size) * threads;
  made.blocks.resize(size);
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = made.blocks[rank];
    block.index = dim3(first + rank);
    block.shared_bytes = config.dynamicSmemBytes;
    const size_t words = (block.shared_bytes + kGuardBytes + 15) / 16;
    block.shared = std::make_unique<uint4[]>(words);
    std::memset(block.shared.get(), 0xff, words * 16);
    block.barrier.expected = block.running = threads;
    block.warps.resize((threads + kWarp - 1) / kWarp);
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
  }
  return made;
}

bool guard_is_intact(const Block& block) {
  const auto* guard =
      reinterpret_cast<const unsigned char*>(block.shared.get()) + block.shared_bytes;
  return std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == 0xff; });
}

std::string refusal(const cudaLaunchConfig_t& config, unsigned cluster_size) {
  const auto limit = settings.attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin];
  if (config.dynamicSmemBytes > static_cast<size_t>(limit)) return "too much shared memory";
  if (config.blockDim.x == 0 || config.blockDim.x > 1024) return "wrong number of threads";
  if (config.blockDim.x % kWarp != 0) return "the emulator takes whole warps only";
  if (config.gridDim.x == 0 || config.gridDim.x % cluster_size != 0)
    return "wrong number of blocks";
  if (cluster_size > 1 && settings.attributes[cudaDevAttrClusterLaunch] == 0) return "no clusters";
  if (cluster_size > 8) return "cluster too large";
  return "";
}

}  // namespace

cudaError_t run_emulated(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned size = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  last_error = refusal(config, size);
  if (!last_error.empty()) return cudaErrorEmulated;
  thread_body = &body;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  ++settings.launches[size > 1];
  for (unsigned first = 0; first < config.gridDim.x; first += size) {
    Cluster alive = make_cluster(config, first, size);
    run_cluster(alive, static_cast<int>(config.blockDim.x));
    if (last_error.empty() &&
        !std::all_of(alive.blocks.begin(), alive.blocks.end(), guard_is_intact)) {
      last_error = "writes behind its shared memory";
    }
    if (!last_error.empty()) {
      fibers.clear();
      return cudaErrorEmulated;
    }
  }
  return cudaSuccess;
}

void __syncthreads() { meet(current->block->barrier); }

float __shfl_xor_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu) fail("the emulator knows full warps only");
  Warp& warp = current->block->warps[current->thread / kWarp];
  const int lane = current->thread % kWarp;
  float* values = warp.values[current->shuffles++ % 2];
  values[lane] = value;
  meet(warp.barrier);
  return values[lane ^ distance];
}

char* emulated_shared_memory() { return reinterpret_cast<char*>(current->block->shared.get()); }

void emulated_copy_async(void* shared, const void* global, int bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const char* begin = emulated_shared_memory();
  const auto offset = static_cast<char*>(shared) - begin;
  if (!aligned(shared) || !aligned(global)) fail("unaligned copy");
  if (offset < 0 || offset + bytes > static_cast<int64_t>(current->block->shared_bytes)) {
    fail("copy to the outside of shared memory");
  }
  current->copies.push_back({shared, global, bytes});
}

void emulated_wait_for_copies() {
  for (const PendingCopy& copy : current->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  current->copies.clear();
}

void emulated_cluster_arrive() {
  if (settings.attributes[cudaDevAttrClusterLaunch] == 0) fail("no clusters");
  if (current->cluster_phase >= 0) fail("arrives twice at the cluster's barrier");
  current->cluster_phase = cluster->barrier.phase;
  cluster->barrier.arrive();
}

void emulated_cluster_wait() {
  if (current->cluster_phase < 0) fail("waits for the cluster without having arrived");
  wait_for(cluster->barrier, current->cluster_phase);
  current->cluster_phase = -1;
}

const void* emulated_remote(const void* shared, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail("no such block in the cluster");
  const Block& other = cluster->blocks[rank];
  if (other.running == 0) fail("reads the shared memory of a block that has ended");
  const auto offset = static_cast<const char*>(shared) - emulated_shared_memory();
  return reinterpret_cast<const char*>(other.shared.get()) + offset;
}

const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }
cudaError_t cudaGetDevice(int* device) {
  *device = settings.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = settings.attributes[attribute];
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// What the tests set and ask, through ctypes.
extern "C" {

__attribute__((visibility("default"))) void emulator_configure(int device, int multiprocessors,
                                                               int shared_per_block, int clusters,
                                                               int order) {
  constexpr int kReserved = 1024;
  settings.device = device;
  settings.order = order;
  settings.attributes = {
      {cudaDevAttrMultiProcessorCount, multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared_per_block + kReserved},
      {cudaDevAttrReservedSharedMemoryPerBlock, kReserved},
      {cudaDevAttrClusterLaunch, clusters},
  };
  settings.launches[0] = settings.launches[1] = 0;
}

// Launches since the last call of emulator_configure.
__attribute__((visibility("default"))) int64_t emulator_launches(int with_clusters) {
  return settings.launches[with_clusters];
}
}

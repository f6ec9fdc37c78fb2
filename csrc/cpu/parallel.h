#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace msd {

inline void check_torch(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("PyTorch's threads failed, see above");
}

// Threads that a job of so many elements is worth.
inline int64_t useful_threads(int64_t elements) {
  constexpr int64_t kElementsPerThread = 8192;
  uint32_t threads = 0;
  check_torch(torch_get_num_threads(&threads));
  return std::clamp<int64_t>(elements / kElementsPerThread, 1, threads);
}

// f(i) for every i in [0, count), by at most `threads` threads: each takes the next i when it has
// finished one. Which thread runs which i differs from run to run.
template <class F>
void for_each_dynamic(int64_t count, int64_t threads, const F& f) {
  struct Shared {
    std::atomic<int64_t> next;
    int64_t count;
    const F& f;

    void work() {
      for (int64_t i = next++; i < count; i = next++) f(i);
    }
  } shared{{0}, count, f};
  threads = std::min(threads, count);
  if (threads <= 1) {
    shared.work();
  } else {
    const auto work = [](int64_t, int64_t, void* of) { static_cast<Shared*>(of)->work(); };
    check_torch(torch_parallel_for(0, threads, 1, work, &shared));
  }
}

}  // namespace msd

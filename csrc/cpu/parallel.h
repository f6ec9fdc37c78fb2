#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace msd {

// PyTorch's threads, by the part of its stable ABI that is C.
inline void check_torch(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("PyTorch's threads failed, see above");
}

inline int64_t get_num_threads() {
  uint32_t threads = 0;
  check_torch(torch_get_num_threads(&threads));
  return threads;
}

// f(begin, end) for parts of [0, count).
template <class F>
void parallel_for(int64_t count, const F& f) {
  const auto call = [](int64_t begin, int64_t end, void* on) {
    (*static_cast<const F*>(on))(begin, end);
  };
  check_torch(torch_parallel_for(0, count, 1, call, const_cast<F*>(&f)));
}

// Threads that a job of so many elements is worth.
inline int64_t useful_threads(int64_t elements) {
  constexpr int64_t kElementsPerThread = 8192;
  const int64_t threads = get_num_threads();
  return std::clamp<int64_t>(elements / kElementsPerThread, 1, threads);
}

// f(i, worker) for every i in [0, count), by at most `threads` threads: each takes the next i when
// it has finished one. Which thread runs which i differs from run to run. No two threads are the
// same worker of [0, threads) at a time.
template <class F>
void for_each_by_worker(int64_t count, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i, worker);
  };
  threads = std::min(threads, count);
  if (threads <= 1) {
    work(0, 1);
  } else {
    parallel_for(threads, work);
  }
}

// f(i) for every i in [0, count), as for_each_by_worker.
template <class F>
void for_each_dynamic(int64_t count, int64_t threads, const F& f) {
  for_each_by_worker(count, threads, [&](int64_t i, int64_t) { f(i); });
}

}  // namespace msd

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace msd {

// Threads that a job of so many elements is worth.
inline int64_t useful_threads(int64_t elements) {
  constexpr int64_t kElementsPerThread = 8192;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(elements / kElementsPerThread, 1, threads);
}

// f(i) for every i in [0, count), by at most `threads` threads: each takes the next i when it has
// finished one. Which thread runs which i differs from run to run.
template <class F>
void for_each_dynamic(int64_t count, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  };
  threads = std::min(threads, count);
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

}  // namespace msd

#pragma once

#include <cstdint>
#include <tuple>

// For functions that both the host and the device call; their files need no CUDA compiler.
#if defined(__CUDACC__)
#define MSD_HOST_DEVICE __host__ __device__
#else
#define MSD_HOST_DEVICE
#endif

namespace msd::cuda {

// What a plan may count on. Sizes in bytes.
struct Device {
  int64_t multiprocessors = 0;
  int64_t shared_per_block = 0;           // the most that one block may ask for
  int64_t shared_per_multiprocessor = 0;  // for all blocks that reside there,
  int64_t reserved_per_block = 0;         // each of which takes this much on top
  bool clusters = false;

  bool operator<(const Device& other) const { return fields() < other.fields(); }

 private:
  std::tuple<int64_t, int64_t, int64_t, int64_t, bool> fields() const {
    return {multiprocessors, shared_per_block, shared_per_multiprocessor, reserved_per_block,
            clusters};
  }
};

template <class Integer>
MSD_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <class Integer>
MSD_HOST_DEVICE constexpr Integer round_up(Integer a, Integer multiple) {
  return ceil_div(a, multiple) * multiple;
}

template <class Number>
MSD_HOST_DEVICE constexpr Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <class Number>
MSD_HOST_DEVICE constexpr Number larger(Number a, Number b) {
  return a < b ? b : a;
}

// What a division by `value` becomes on the device: a multiplication with 2^32 / value, rounded up.
// Exact for numbers below 2^16 if value is, too.
struct Divisor {
  uint32_t value = 1;
  uint32_t reciprocal = 0;  // 0 for value = 1

  static Divisor of(uint32_t value) {
    return {value,
            value > 1 ? static_cast<uint32_t>(((uint64_t{1} << 32) + value - 1) / value) : 0};
  }
};

}  // namespace msd::cuda

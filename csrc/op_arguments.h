// What the registrations of the CPU and of the CUDA kernels check of an op's arguments. The ops of
// msd_kernels/ops check all of it with better messages; this guards against accesses out of bounds
// by whoever calls the registered ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "group_norm_job.h"

namespace msd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "msd_kernels: size ", a, " x ", b,
                  " does not fit 64 bits");
  return product;
}

inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum = 0;
  STD_TORCH_CHECK(!__builtin_add_overflow(a, b, &sum), "msd_kernels: size ", a, " + ", b,
                  " does not fit 64 bits");
  return sum;
}

// Whether the elements lie without gaps in the order of the dimensions, or with the channels
// (dimension 1) last. A flat tensor holds them in either order.
inline bool is_dense(const Tensor& tensor, bool channels_last) {
  const int64_t dims = tensor.dim();
  if (!channels_last || dims < 3) return tensor.is_contiguous();
  int64_t expected = 1;
  const auto follows = [&](int64_t d) {
    const bool fits = tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
    return fits;
  };
  bool dense = follows(1);
  for (int64_t d = dims - 1; d >= 2; --d) dense = follows(d) && dense;
  return (follows(0) && dense) || tensor.numel() == 0;
}

inline void check_contents(const char* op, const char* name, const Tensor& tensor, int64_t elements,
                           ScalarType type, bool channels_last = false) {
  STD_TORCH_CHECK(is_dense(tensor, channels_last), op, ": ", name, " must be contiguous",
                  channels_last ? ", channels last" : "");
  STD_TORCH_CHECK(tensor.numel() == elements, op, ": ", name, " has ", tensor.numel(),
                  " elements, expected ", elements);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// The dispatcher has chosen the kernel by the device of one of the tensors.
inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& x) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(), op, ": ",
      name, " must be on the device of x");
}

inline ElementType element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace msd

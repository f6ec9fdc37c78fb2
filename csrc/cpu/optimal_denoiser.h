// What the optimal denoiser does to a block of the data besides the two matrix products, in
// float64.
#pragma once

#include <cstdint>

namespace msd {

// By the codes of msd_kernels/runtime/extension.py.
enum class DataType { kFloat, kBFloat16, kHalf, kUint8, kDouble };

// centred [rows, dim] = step data + shift, half_norms [rows] = |centred|^2 / 2.
struct CentreJob {
  const void* data = nullptr;  // [rows, dim] of `type`
  DataType type = DataType::kFloat;
  int64_t rows = 0, dim = 0;
  const double* shift = nullptr;  // [dim]
  double step = 1;
  double* centred = nullptr;
  double* half_norms = nullptr;
};

// One step of the online softmax, for every query on its own: with score = (product - half_norm)
// precision and the peak raised to the largest score so far, overwrites the products with
// exp(score - peak) and adds them and their squares to the sums. `rescale` tells what sums relative
// to the peak before must be multiplied with; those in `sums` already are.
struct SoftmaxJob {
  int64_t batch = 0, rows = 0;
  double* products = nullptr;          // [batch, rows]
  const double* half_norms = nullptr;  // [rows]
  const double* precision = nullptr;   // [batch]
  double* peak = nullptr;              // [batch]
  double* sums = nullptr;              // [2, batch]
  double* rescale = nullptr;           // [batch]
};

void optimal_denoiser_centre(const CentreJob& job);
void optimal_denoiser_update_softmax(const SoftmaxJob& job);

}  // namespace msd

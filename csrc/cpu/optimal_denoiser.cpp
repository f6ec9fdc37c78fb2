#include "optimal_denoiser.h"

#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "scalar_types.h"

namespace msd {
namespace {

template <int kWidth>
struct Vectors {
  typedef double Double __attribute__((vector_size(kWidth * sizeof(double))));
  typedef uint64_t Bits __attribute__((vector_size(kWidth * sizeof(double))));
};

MSD_INLINE double to_double(uint8_t value) { return value; }
MSD_INLINE double to_double(double value) { return value; }
template <class T>
MSD_INLINE double to_double(T value) {
  return to_float(value);
}

// Any number of elements up to the width of V; the lanes beyond them hold `rest`.
template <class V>
MSD_INLINE void load(const double* p, int64_t count, double rest, V* v) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(double);
  if (count >= kWidth) {
    __builtin_memcpy(v, p, sizeof(V));
  } else {
    for (int64_t i = 0; i < kWidth; ++i) (*v)[i] = i < count ? p[i] : rest;
  }
}
template <class V>
MSD_INLINE void store(const V& v, int64_t count, double* p) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(double);
  if (count >= kWidth) {
    __builtin_memcpy(p, &v, sizeof(V));
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
}
template <class V>
MSD_INLINE double sum(const V& v) {
  double total = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) total += v[i];
  return total;
}

// exp(v) for v <= 0, to one or two units in the last place; 0 below -708; a NaN stays one.
// exp(v) = 2^n exp(r), |r| <= ln(2)/2, n found by adding 1.5 2^52, whose last bit is 1: n then
// stands in the low bits of the sum. ln(2) is split so that n times its first part is exact.
template <int kWidth, class V = typename Vectors<kWidth>::Double>
MSD_INLINE void exp_negative(V* v) {
  using Bits = typename Vectors<kWidth>::Bits;
  constexpr double kInverseFactorials[] = {1.0 / 479001600,
                                           1.0 / 39916800,
                                           1.0 / 3628800,
                                           1.0 / 362880,
                                           1.0 / 40320,
                                           1.0 / 5040,
                                           1.0 / 720,
                                           1.0 / 120,
                                           1.0 / 24,
                                           1.0 / 6,
                                           1.0 / 2,
                                           1.0,
                                           1.0};
  const V lowest = V{} - 708.0;
  const V bounded = *v < lowest ? lowest : *v;
  const V shifted = bounded * 0x1.71547652b82fep+0 + 0x1.8p52;
  const V n = shifted - 0x1.8p52;
  const V r = (bounded - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  V power = V{} + kInverseFactorials[0];
  for (int i = 1; i < 13; ++i) power = power * r + kInverseFactorials[i];
  // Casts between vectors of one size keep the bits.
  const Bits scaled = (Bits)power + ((Bits)shifted << 52);
  *v = *v >= lowest ? (V)scaled : *v < lowest ? V{} : *v;
}

template <int kWidth, class T>
MSD_INLINE void centre_row(const CentreJob& job, int64_t row) {
  using V = typename Vectors<kWidth>::Double;
  const T* data = static_cast<const T*>(job.data) + row * job.dim;
  double* centred = job.centred + row * job.dim;
  for (int64_t j = 0; j < job.dim; ++j) centred[j] = job.step * to_double(data[j]) + job.shift[j];
  V squares[2] = {};
  for (int64_t j = 0; j < job.dim; j += 2 * kWidth) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = j + half * kWidth;
      V v;
      load(centred + first, job.dim - first, 0.0, &v);
      squares[half] += v * v;
    }
  }
  job.half_norms[row] = 0.5 * sum(squares[0] + squares[1]);
}

template <int kWidth>
MSD_INLINE void centre_row(const CentreJob& job, int64_t row) {
  switch (job.type) {
    case DataType::kUint8:
      return centre_row<kWidth, uint8_t>(job, row);
    case DataType::kFloat:
      return centre_row<kWidth, float>(job, row);
    case DataType::kBFloat16:
      return centre_row<kWidth, BFloat16>(job, row);
    case DataType::kHalf:
      return centre_row<kWidth, Half>(job, row);
    case DataType::kDouble:
      return centre_row<kWidth, double>(job, row);
  }
}

template <int kWidth>
MSD_INLINE void update_query(const SoftmaxJob& job, int64_t query) {
  using V = typename Vectors<kWidth>::Double;
  double* const products = job.products + query * job.rows;
  const double precision = job.precision[query];
  const double old_peak = job.peak[query];
  V peaks = V{} + old_peak;
  for (int64_t i = 0; i < job.rows; i += kWidth) {
    V score, half_norm;
    load(products + i, job.rows - i, -INFINITY, &score);
    load(job.half_norms + i, job.rows - i, 0.0, &half_norm);
    score = (score - half_norm) * precision;
    peaks = score > peaks ? score : peaks;
    store(score, job.rows - i, products + i);
  }
  double peak = old_peak;
  for (int lane = 0; lane < kWidth; ++lane) peak = std::max<double>(peak, peaks[lane]);
  V total{}, squares{};
  for (int64_t i = 0; i < job.rows; i += kWidth) {
    V weight;
    load(products + i, job.rows - i, -INFINITY, &weight);
    weight -= peak;
    exp_negative<kWidth>(&weight);
    total += weight;
    squares += weight * weight;
    store(weight, job.rows - i, products + i);
  }
  const double rescale = std::exp(old_peak - peak);
  job.sums[query] = job.sums[query] * rescale + sum(total);
  job.sums[job.batch + query] = job.sums[job.batch + query] * rescale * rescale + sum(squares);
  job.peak[query] = peak;
  job.rescale[query] = rescale;
}

// One row or one query with the vectors of each instruction set.
struct Kernels {
  void (*centre_row)(const CentreJob&, int64_t);
  void (*update_query)(const SoftmaxJob&, int64_t);
};

void centre_row_portable(const CentreJob& job, int64_t row) { centre_row<2>(job, row); }
void update_query_portable(const SoftmaxJob& job, int64_t query) { update_query<2>(job, query); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void centre_row_avx2(const CentreJob& job, int64_t row) {
  centre_row<4>(job, row);
}
__attribute__((target("avx2,fma"))) void update_query_avx2(const SoftmaxJob& job, int64_t query) {
  update_query<4>(job, query);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void centre_row_avx512(
    const CentreJob& job, int64_t row) {
  centre_row<8>(job, row);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void update_query_avx512(
    const SoftmaxJob& job, int64_t query) {
  update_query<8>(job, query);
}
#endif

Kernels kernels() {
#if defined(__x86_64__)
  const Isa isa = cpu_isa();
  if (isa >= Isa::kAvx512) return {centre_row_avx512, update_query_avx512};
  if (isa == Isa::kAvx2) return {centre_row_avx2, update_query_avx2};
#endif
  return {centre_row_portable, update_query_portable};
}

}  // namespace

void optimal_denoiser_centre(const CentreJob& job) {
  const auto centre_row = kernels().centre_row;
  for_each_dynamic(job.rows, useful_threads(job.rows * job.dim),
                   [&](int64_t row) { centre_row(job, row); });
}

void optimal_denoiser_update_softmax(const SoftmaxJob& job) {
  const auto update_query = kernels().update_query;
  for_each_dynamic(job.batch, useful_threads(job.batch * job.rows),
                   [&](int64_t query) { update_query(job, query); });
}

}  // namespace msd

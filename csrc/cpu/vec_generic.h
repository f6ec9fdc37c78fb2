// What the instruction sets without masked accesses and `scalef` share.
#pragma once

#include "scalar_types.h"

namespace msd::MSD_ISA {

typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

// 1 / (1 + exp(-z)), with exp(-z) = 2^n exp(r), n an integer found by adding 1.5 2^23, whose last
// mantissa bit is 1, and |r| <= log(2)/2. Above z = 87 the value no longer changes, below -87 it is
// 0, so that z times it vanishes, too.
MSD_INLINE Vec sigmoid(Vec z) {
  const Vec limit = broadcast(87.0f);
  const Vec bounded = z < limit ? z : limit;
  const Vec magic = broadcast(0x1.8p23f);
  const Vec shifted = fma(bounded, broadcast(-0x1.715476p0f), magic);
  const Vec n = shifted - magic;
  const Vec coarse = fma(n, broadcast(-0x1.62e4p-1f), -bounded);
  const Vec r = fma(n, broadcast(-0x1.7f7d1cp-20f), coarse);
  Vec series = fma(broadcast(0x1.6c16c2p-10f), r, broadcast(0x1.111112p-7f));
  series = fma(series, r, broadcast(0x1.555556p-5f));
  series = fma(series, r, broadcast(0x1.555556p-3f));
  series = fma(series, r, broadcast(0.5f));
  series = fma(series, r, broadcast(1.0f));
  series = fma(series, r, broadcast(1.0f));
  const Vec exponential = (Vec)((Bits)series + ((Bits)shifted << 23));
  const Vec value = broadcast(1.0f) / (broadcast(1.0f) + exponential);
  return z < -limit ? broadcast(0.0f) : value;
}

// SiLU takes z kSiluScale. Its precision does not depend on the type here.
constexpr float kSiluScale = 1.0f;

template <class>
MSD_INLINE Vec silu(Vec z) {
  return z * sigmoid(z);
}

// dy s (1 + z (1 - s)) with s = sigmoid(z)
template <class>
MSD_INLINE Vec silu_gradient(Vec dy, Vec z) {
  const Vec s = sigmoid(z);
  return dy * fma(z * s, broadcast(1.0f) - s, s);
}

template <class T>
MSD_INLINE Pair load_pair(const T* p, int64_t n) {
  T elements[kPair] = {};
  __builtin_memcpy(elements, p, n * sizeof(T));
  return load_pair(elements);
}
template <class T>
MSD_INLINE void store_pair(T* p, Pair v, int64_t n) {
  T elements[kPair];
  store_pair(elements, v);
  __builtin_memcpy(p, elements, n * sizeof(T));
}

}  // namespace msd::MSD_ISA

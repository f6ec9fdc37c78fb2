#pragma once

#include "scalar_types.h"

namespace msd::MSD_ISA {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kTile = 1;
constexpr int kWideTile = 1;

MSD_INLINE Vec broadcast(float value) { return Vec{value, value, value, value}; }
MSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
MSD_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
MSD_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
MSD_INLINE float sum_of_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// Zero for a negative number; a NaN stays one.
MSD_INLINE Vec clamp_negative(Vec v) { return v < 0.0f ? broadcast(0.0f) : v; }

// Two vectors of neighbouring elements, in natural order.
struct Pair {
  Vec lo, hi;
};
constexpr int kPair = 2 * kWidth;

MSD_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kWidth)}; }
MSD_INLINE void store_pair(float* p, Pair v) {
  store(p, v.lo);
  store(p + kWidth, v.hi);
}
template <class T>
MSD_INLINE Pair load_pair(const T* p) {
  Pair v;
  for (int i = 0; i < kWidth; ++i) {
    v.lo[i] = to_float(p[i]);
    v.hi[i] = to_float(p[i + kWidth]);
  }
  return v;
}
template <class T>
MSD_INLINE void store_pair(T* p, Pair v) {
  for (int i = 0; i < kWidth; ++i) {
    from_float(v.lo[i], p + i);
    from_float(v.hi[i], p + i + kWidth);
  }
}
template <class T>
MSD_INLINE Pair load_lanes(const float* p) {
  return load_pair(p);
}
template <class T>
MSD_INLINE void store_lanes(float* p, Pair v) {
  store_pair(p, v);
}

}  // namespace msd::MSD_ISA

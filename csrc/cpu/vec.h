// The vectors of the instruction set that the including file is compiled for. All of it lives in
// namespace msd::MSD_ISA, a name of that file's own, so that one program can hold several.
#pragma once

#if defined(__AVX512F__)
#include "vec_avx512.h"
#else
#if defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif
#include "vec_generic.h"
#endif

namespace msd::MSD_ISA {

MSD_INLINE Pair broadcast_pair(float value) { return {broadcast(value), broadcast(value)}; }
MSD_INLINE Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
MSD_INLINE Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
MSD_INLINE Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
MSD_INLINE Pair fma(Pair a, Pair b, Pair c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class T>
MSD_INLINE Pair silu(Pair t) {
  return {silu<T>(t.lo), silu<T>(t.hi)};
}
template <class T>
MSD_INLINE Pair silu_gradient(Pair dy, Pair t) {
  return {silu_gradient<T>(dy.lo, t.lo), silu_gradient<T>(dy.hi, t.hi)};
}
MSD_INLINE Pair clamp_negative(Pair v) { return {clamp_negative(v.lo), clamp_negative(v.hi)}; }

template <int n>
struct Count {
  static constexpr int value = n;
};

// Asks for the cache lines of a pair.
template <class T>
MSD_INLINE void prefetch_pair(const T* p) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kPair; i += kLine) __builtin_prefetch(p + i);
}

// Access to the whole pair at an address.
struct WholePair {
  template <class T>
  __attribute__((always_inline)) Pair load(const T* p) const {
    return load_pair(p);
  }
  template <class T>
  __attribute__((always_inline)) void store(T* p, Pair v) const {
    store_pair(p, v);
  }
};

// Access to the first `count` elements of a pair only; the other lanes are zero.
struct PartialPair {
  int64_t count;
  template <class T>
  __attribute__((always_inline)) Pair load(const T* p) const {
    return load_pair(p, count);
  }
  template <class T>
  __attribute__((always_inline)) void store(T* p, Pair v) const {
    store_pair(p, v, count);
  }
};

// Calls f(column, pairs, access) for tiles of kTile pairs of columns, then for the single pairs
// left, then for what remains of the last one. `pairs` is a compile-time constant.
template <int kTile, class F>
MSD_INLINE void for_column_tiles(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + kTile * kPair <= columns; column += kTile * kPair) {
    f(column, Count<kTile>(), WholePair());
  }
  for (; column + kPair <= columns; column += kPair) {
    f(column, Count<1>(), WholePair());
  }
  if (column < columns) f(column, Count<1>(), PartialPair{columns - column});
}

}  // namespace msd::MSD_ISA

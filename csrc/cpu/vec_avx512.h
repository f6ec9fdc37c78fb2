#pragma once

#include <immintrin.h>

#include <type_traits>

#include "scalar_types.h"

namespace msd::MSD_ISA {

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kTile = 2;
constexpr int kWideTile = 2;

MSD_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
MSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MSD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MSD_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MSD_INLINE float sum_of_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
// Zero for a negative number; a NaN stays one.
MSD_INLINE Vec clamp_negative(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

// SiLU takes t = z kSiluScale, so that exp(-z) = 2^t. It overflows where |z| > 2.3e38, and then
// SiLU is no finite number.
constexpr float kSiluScale = -0x1.715476p0f;
constexpr float kInverseSiluScale = -0x1.62e43p-1f;

// The polynomial of 2^r for 0 <= r < 1 of the least relative error: 7.5e-5, 2.6e-6, 7.5e-8.
template <int kDegree>
constexpr float kPowerSeries[kDegree + 1] = {};
template <>
constexpr float kPowerSeries<3>[4] = {0.99992522f, 0.69583354f, 0.22606716f, 0.07802452f};
template <>
constexpr float kPowerSeries<4>[5] = {1.00000259f, 0.69300383f, 0.24144276f, 0.05201146f,
                                      0.01353417f};
template <>
constexpr float kPowerSeries<5>[6] = {0.99999993f, 0.69315307f, 0.24015362f,
                                      0.05582632f, 0.00898934f, 0.00187758f};

// factor 2^t, where _mm512_reduce_ps leaves of t what _mm512_scalef_ps does not apply.
template <int kDegree>
MSD_INLINE Vec power(Vec t, float factor) {
  const Vec r = _mm512_reduce_ps(t, 0x09);
  Vec sum = broadcast(kPowerSeries<kDegree>[kDegree] * factor);
  MSD_UNROLL
  for (int i = kDegree - 1; i >= 0; --i) {
    sum = fma(sum, r, broadcast(kPowerSeries<kDegree>[i] * factor));
  }
  return _mm512_scalef_ps(sum, t);
}

// 1 / d to a few roundings, for finite d.
MSD_INLINE Vec reciprocal(Vec d) {
  const Vec guess = _mm512_rcp14_ps(d);
  return fma(_mm512_fnmadd_ps(d, guess, broadcast(1.0f)), guess, guess);
}

// Beyond this 1 + 2^t may be infinite; a NaN stays one.
MSD_INLINE Vec bounded_exponent(Vec t) { return _mm512_min_ps(broadcast(126.0f), t); }

// 1 / d for d = 1 + 2^bounded_exponent(t) or a multiple of it, but 0 beyond t = 150, where t / d
// would grow again; a NaN stays one.
MSD_INLINE Vec sigmoid_reciprocal(Vec d, Vec t) {
  const __mmask16 counts = _mm512_cmp_ps_mask(t, broadcast(150.0f), _CMP_NGT_UQ);
  return _mm512_maskz_mov_ps(counts, reciprocal(d));
}

// z sigmoid(z) = t / (kSiluScale (1 + 2^t)). The relative error for BFloat16 is at most 1.4e-4, a
// fourteenth of half a unit in the last place of what is stored.
template <class T>
MSD_INLINE Vec silu(Vec t) {
  const Vec scale = broadcast(kSiluScale);
  if (std::is_same_v<T, BFloat16>) return t * _mm512_rcp14_ps(scale + power<3>(t, kSiluScale));
  return t * sigmoid_reciprocal(scale + power<5>(bounded_exponent(t), kSiluScale), t);
}

// dy s (1 + z (1 - s)) with s = sigmoid(z) = 1 / (1 + 2^t)
template <class T>
MSD_INLINE Vec silu_gradient(Vec dy, Vec t) {
  constexpr int kDegree = std::is_same_v<T, BFloat16> ? 4 : 5;
  const Vec s = sigmoid_reciprocal(broadcast(1.0f) + power<kDegree>(bounded_exponent(t), 1.0f), t);
  const Vec rest = fma(s, broadcast(-kInverseSiluScale), broadcast(kInverseSiluScale));
  return dy * fma(t * s, rest, s);
}

// Two vectors of neighbouring elements. The order of the lanes is the one in which `load_pair` of
// the element type finds them: natural, but even and odd elements apart for BFloat16.
struct Pair {
  Vec lo, hi;
};
constexpr int kPair = 2 * kWidth;

MSD_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}
MSD_INLINE __mmask32 first_halves(int64_t n) {
  return n >= 32 ? 0xffffffffu : static_cast<__mmask32>((1u << n) - 1);
}

MSD_INLINE Pair split_even_odd(__m512i v) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))};
}
// Both round to the nearest, ties to even, and keep a NaN one.
#if defined(__AVX512BF16__)
MSD_INLINE __m512i join_even_odd(Pair v) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(v.hi, v.lo));
}
#else
MSD_INLINE __m512i round_to_upper_half(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_add_epi32(bits, half);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
}
MSD_INLINE __m512i join_even_odd(Pair v) {
  const __m512i even = _mm512_srli_epi32(round_to_upper_half(v.lo), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_upper_half(v.hi));
}
#endif

MSD_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kWidth)}; }
MSD_INLINE Pair load_pair(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p),
          _mm512_maskz_loadu_ps(first_lanes(n - kWidth), p + kWidth)};
}
MSD_INLINE Pair load_pair(const BFloat16* p) { return split_even_odd(_mm512_loadu_si512(p)); }
MSD_INLINE Pair load_pair(const BFloat16* p, int64_t n) {
  return split_even_odd(_mm512_maskz_loadu_epi16(first_halves(n), p));
}
MSD_INLINE Pair widen_halves(__m512i v) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
}
MSD_INLINE Pair load_pair(const Half* p) { return widen_halves(_mm512_loadu_si512(p)); }
MSD_INLINE Pair load_pair(const Half* p, int64_t n) {
  return widen_halves(_mm512_maskz_loadu_epi16(first_halves(n), p));
}

MSD_INLINE void store_pair(float* p, Pair v) {
  store(p, v.lo);
  store(p + kWidth, v.hi);
}
MSD_INLINE void store_pair(float* p, Pair v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v.lo);
  _mm512_mask_storeu_ps(p + kWidth, first_lanes(n - kWidth), v.hi);
}
MSD_INLINE void store_pair(BFloat16* p, Pair v) { _mm512_storeu_si512(p, join_even_odd(v)); }
MSD_INLINE void store_pair(BFloat16* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, first_halves(n), join_even_odd(v));
}
MSD_INLINE __m512i narrow_to_halves(Pair v) {
  const __m256i lo = _mm512_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT);
  const __m256i hi = _mm512_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
MSD_INLINE void store_pair(Half* p, Pair v) { _mm512_storeu_si512(p, narrow_to_halves(v)); }
MSD_INLINE void store_pair(Half* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, first_halves(n), narrow_to_halves(v));
}

// From and to float32 elements in natural order, for lanes in the order of another element type.
template <class T>
MSD_INLINE Pair load_lanes(const float* p) {
  return load_pair(p);
}
template <>
inline __attribute__((always_inline)) Pair load_lanes<BFloat16>(const float* p) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const Pair v = load_pair(p);
  return {_mm512_permutex2var_ps(v.lo, even, v.hi), _mm512_permutex2var_ps(v.lo, odd, v.hi)};
}
template <class T>
MSD_INLINE void store_lanes(float* p, Pair v) {
  store_pair(p, v);
}
template <>
inline __attribute__((always_inline)) void store_lanes<BFloat16>(float* p, Pair v) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store_pair(
      p, {_mm512_permutex2var_ps(v.lo, first, v.hi), _mm512_permutex2var_ps(v.lo, second, v.hi)});
}

}  // namespace msd::MSD_ISA

#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace msd::MSD_ISA {

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kTile = 1;
constexpr int kWideTile = 2;

MSD_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
MSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MSD_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
MSD_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MSD_INLINE float sum_of_lanes(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Zero for a negative number; a NaN stays one.
MSD_INLINE Vec clamp_negative(Vec v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }

// Two vectors of neighbouring elements. The order of the lanes is the one in which `load_pair` of
// the element type finds them: natural, but even and odd elements apart for BFloat16.
struct Pair {
  Vec lo, hi;
};
constexpr int kPair = 2 * kWidth;

MSD_INLINE __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MSD_INLINE void store_bits(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Rounded to the nearest, ties to even, in the upper half of each lane; a NaN stays one.
MSD_INLINE __m256i round_to_bfloat16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_add_epi32(bits, half);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

MSD_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kWidth)}; }
MSD_INLINE Pair load_pair(const BFloat16* p) {
  const __m256i v = load_bits(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000)))};
}
MSD_INLINE Pair load_pair(const Half* p) {
  const __m256i v = load_bits(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
}

MSD_INLINE void store_pair(float* p, Pair v) {
  store(p, v.lo);
  store(p + kWidth, v.hi);
}
MSD_INLINE void store_pair(BFloat16* p, Pair v) {
  const __m256i even = _mm256_srli_epi32(round_to_bfloat16(v.lo), 16);
  const __m256i odd = round_to_bfloat16(v.hi);
  store_bits(p, _mm256_blend_epi16(even, odd, 0xaa));
}
MSD_INLINE void store_pair(Half* p, Pair v) {
  const __m128i lo = _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT);
  const __m128i hi = _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT);
  store_bits(p, _mm256_set_m128i(hi, lo));
}

// From and to float32 elements in natural order, for lanes in the order of another element type.
template <class T>
MSD_INLINE Pair load_lanes(const float* p) {
  return load_pair(p);
}
template <>
inline __attribute__((always_inline)) Pair load_lanes<BFloat16>(const float* p) {
  const Pair v = load_pair(p);
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(v.lo, v.hi, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(v.lo, v.hi, 0xdd));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)),
          _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
}
template <class T>
MSD_INLINE void store_lanes(float* p, Pair v) {
  store_pair(p, v);
}
template <>
inline __attribute__((always_inline)) void store_lanes<BFloat16>(float* p, Pair v) {
  const Vec inner = _mm256_unpacklo_ps(v.lo, v.hi);
  const Vec outer = _mm256_unpackhi_ps(v.lo, v.hi);
  store_pair(
      p, {_mm256_permute2f128_ps(inner, outer, 0x20), _mm256_permute2f128_ps(inner, outer, 0x31)});
}

}  // namespace msd::MSD_ISA

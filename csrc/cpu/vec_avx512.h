#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace msd::MSD_ISA {

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kTile = 2;
constexpr int kWideTile = 4;

MSD_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
MSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MSD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MSD_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MSD_INLINE float sum_of_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
// Zero for a negative number; a NaN stays one.
MSD_INLINE Vec clamp_negative(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

// 2^(j/16)
alignas(64) constexpr float kSixteenthPowers[16] = {
    0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f,
    0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
    0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};

// 1 / (1 + exp(-z)), with exp(-z) = 2^n 2^f, n a multiple of 1/16 found by adding 1.5 2^19, whose
// last mantissa bit is 1/16, and |f| <= 1/32. Beyond |z| = 87 the value no longer changes. kCoarse
// leaves a relative error of 6e-5, which BFloat16 does not show.
template <bool kCoarse>
MSD_INLINE Vec sigmoid(Vec z) {
  const Vec magic = broadcast(0x1.8p19f);
  const Vec one = broadcast(1.0f);
  const Vec bounded = _mm512_range_ps(z, broadcast(87.0f), 0x2);
  const Vec shifted = fma(bounded, broadcast(-0x1.715476p0f), magic);
  const Vec n = shifted - magic;
  const Vec rest = _mm512_fmsub_ps(bounded, broadcast(-0x1.715476p0f), n);
  const Vec f = kCoarse ? rest : fma(bounded, broadcast(-0x1.4ae0cp-26f), rest);
  const Vec square = broadcast(0x1.ebfbep-3f);
  const Vec slope = kCoarse ? square : fma(f, broadcast(0x1.c6b08ep-5f), square);
  const Vec growth = f * fma(f, slope, broadcast(0x1.62e43p-1f));
  const Vec power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), load(kSixteenthPowers));
  const Vec denominator = one + _mm512_scalef_ps(fma(power, growth, power), n);
  const Vec guess = _mm512_rcp14_ps(denominator);
  return kCoarse ? guess : fma(_mm512_fnmadd_ps(denominator, guess, one), guess, guess);
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

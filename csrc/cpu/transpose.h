// Blocked transposition of matrices with elements of 2 or 4 bytes.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <initializer_list>

#include "scalar_types.h"

namespace msd {

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};

// The side of the square that fills 16-byte vectors.
template <class T>
constexpr int64_t kTransposeSide = 16 / sizeof(T);

// y[j][i] = x[i][j] for rows x columns, element by element.
template <class T>
MSD_INLINE void transpose_elements(const T* x, int64_t x_stride, T* y, int64_t y_stride,
                                   int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) y[j * y_stride + i] = x[i * x_stride + j];
}

#ifdef __SSE2__
MSD_INLINE __m128i load_line(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

// The last two steps, shared by both sizes: four vectors of two 64-bit halves each.
template <class T>
MSD_INLINE void store_halves(__m128i a, __m128i b, T* y, int64_t stride) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_unpacklo_epi64(a, b));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y + stride), _mm_unpackhi_epi64(a, b));
}

MSD_INLINE void transpose_square(const uint32_t* x, int64_t x_stride, uint32_t* y,
                                 int64_t y_stride) {
  const __m128i r0 = load_line(x), r1 = load_line(x + x_stride);
  const __m128i r2 = load_line(x + 2 * x_stride), r3 = load_line(x + 3 * x_stride);
  store_halves(_mm_unpacklo_epi32(r0, r1), _mm_unpacklo_epi32(r2, r3), y, y_stride);
  store_halves(_mm_unpackhi_epi32(r0, r1), _mm_unpackhi_epi32(r2, r3), y + 2 * y_stride, y_stride);
}

MSD_INLINE void transpose_square(const uint16_t* x, int64_t x_stride, uint16_t* y,
                                 int64_t y_stride) {
  __m128i low[4], high[4];
  for (int k = 0; k < 4; ++k) {
    const __m128i even = load_line(x + 2 * k * x_stride);
    const __m128i odd = load_line(x + (2 * k + 1) * x_stride);
    low[k] = _mm_unpacklo_epi16(even, odd);
    high[k] = _mm_unpackhi_epi16(even, odd);
  }
  for (const __m128i* half : {low, high}) {
    store_halves(_mm_unpacklo_epi32(half[0], half[1]), _mm_unpacklo_epi32(half[2], half[3]), y,
                 y_stride);
    store_halves(_mm_unpackhi_epi32(half[0], half[1]), _mm_unpackhi_epi32(half[2], half[3]),
                 y + 2 * y_stride, y_stride);
    y += 4 * y_stride;
  }
}
#else
template <class T>
MSD_INLINE void transpose_square(const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  transpose_elements(x, x_stride, y, y_stride, kTransposeSide<T>, kTransposeSide<T>);
}
#endif

// Pixels `[0, pixels)` of `channels` planes, `plane_stride` elements apart, as dense pixels of
// `channels` elements. Each block of channels reads a cache line or two of every plane.
template <class T>
MSD_INLINE void interleave_planes(const T* planes, int64_t plane_stride, int64_t channels,
                                  int64_t pixels, T* out) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  constexpr int64_t kSide = kTransposeSide<Bits>;
  constexpr int64_t kPixels = 128 / sizeof(T);
  const Bits* x = reinterpret_cast<const Bits*>(planes);
  Bits* y = reinterpret_cast<Bits*>(out);
  const int64_t whole_pixels = pixels / kSide * kSide;
  const int64_t whole_channels = channels / kSide * kSide;
  for (int64_t first = 0; first < whole_pixels; first += kPixels) {
    const int64_t end = first + kPixels < whole_pixels ? first + kPixels : whole_pixels;
    for (int64_t c = 0; c < whole_channels; c += kSide) {
      for (int64_t p = first; p < end; p += kSide)
        transpose_square(x + c * plane_stride + p, plane_stride, y + p * channels + c, channels);
    }
  }
  transpose_elements(x + whole_channels * plane_stride, plane_stride, y + whole_channels, channels,
                     channels - whole_channels, whole_pixels);
  transpose_elements(x + whole_pixels, plane_stride, y + whole_pixels * channels, channels,
                     channels, pixels - whole_pixels);
}

}  // namespace msd

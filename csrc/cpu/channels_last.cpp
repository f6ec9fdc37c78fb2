#include "channels_last.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>

#include "parallel.h"

namespace msd {
namespace {

// The side of the square that fills 16-byte vectors.
template <class T>
constexpr int64_t kSide = 16 / sizeof(T);

// Pixels of a unit of work: a cache line of each channel.
template <class T>
constexpr int64_t kPixels = 64 / sizeof(T);

// y[j][i] = x[i][j] for rows x columns.
template <class T>
void transpose(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
               int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) y[j * y_stride + i] = x[i * x_stride + j];
}

#ifdef __SSE2__
__m128i load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
void store(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

// The last two steps, shared by both sizes: four vectors of two 64-bit halves each.
template <class T>
void store_halves(__m128i a, __m128i b, T* y, int64_t stride) {
  store(y, _mm_unpacklo_epi64(a, b));
  store(y + stride, _mm_unpackhi_epi64(a, b));
}

void transpose_square(const uint32_t* x, int64_t x_stride, uint32_t* y, int64_t y_stride) {
  const __m128i r0 = load(x), r1 = load(x + x_stride);
  const __m128i r2 = load(x + 2 * x_stride), r3 = load(x + 3 * x_stride);
  store_halves(_mm_unpacklo_epi32(r0, r1), _mm_unpacklo_epi32(r2, r3), y, y_stride);
  store_halves(_mm_unpackhi_epi32(r0, r1), _mm_unpackhi_epi32(r2, r3), y + 2 * y_stride, y_stride);
}

void transpose_square(const uint16_t* x, int64_t x_stride, uint16_t* y, int64_t y_stride) {
  __m128i low[4], high[4];
  for (int k = 0; k < 4; ++k) {
    const __m128i even = load(x + 2 * k * x_stride), odd = load(x + (2 * k + 1) * x_stride);
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
void transpose_square(const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  transpose(x, x_stride, y, y_stride, kSide<T>, kSide<T>);
}
#endif

// All channels of a few pixels: reads a cache line of every channel, writes whole pixels.
template <class T>
void transpose_pixels(const T* x, int64_t channels, int64_t pixels, int64_t count, T* y) {
  const int64_t whole = channels / kSide<T> * kSide<T>;
  int64_t p = 0;
  for (; p + kSide<T> <= count; p += kSide<T>) {
    for (int64_t c = 0; c < whole; c += kSide<T>)
      transpose_square(x + c * pixels + p, pixels, y + p * channels + c, channels);
    transpose(x + whole * pixels + p, pixels, y + p * channels + whole, channels, channels - whole,
              kSide<T>);
  }
  transpose(x + p, pixels, y + p * channels, channels, channels, count - p);
}

template <class T>
void run(const T* x, T* y, int64_t samples, int64_t channels, int64_t pixels) {
  const int64_t blocks = (pixels + kPixels<T> - 1) / kPixels<T>;
  for_each_dynamic(
      samples * blocks, useful_threads(samples * channels * pixels), [&](int64_t unit) {
        const int64_t first = unit % blocks * kPixels<T>;
        const int64_t sample = unit / blocks * channels * pixels;
        transpose_pixels(x + sample + first, channels, pixels, std::min(kPixels<T>, pixels - first),
                         y + sample + first * channels);
      });
}

}  // namespace

void to_channels_last(const void* x, void* y, int64_t element_size, int64_t samples,
                      int64_t channels, int64_t pixels) {
  if (element_size == 2)
    run(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), samples, channels, pixels);
  else
    run(static_cast<const uint32_t*>(x), static_cast<uint32_t*>(y), samples, channels, pixels);
}

}  // namespace msd

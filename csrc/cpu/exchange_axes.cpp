#include "exchange_axes.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "transpose.h"

namespace msd {

namespace {

// A thread's rows of a matrix: several cache lines of every row of the result.
constexpr int64_t kLines = 4;

// A square whose rows are cache lines, transposed in the first level's cache: rows of both matrices
// may lie a multiple of its way apart, so that each line is read and written once, as a whole.
template <class T>
void exchange_square(const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  constexpr int64_t kSide = 64 / sizeof(T), kStep = kTransposeSide<T>;
  alignas(64) T square[kSide * kSide];
  for (int64_t i = 0; i < kSide; i += kStep) {
    for (int64_t j = 0; j < kSide; j += kStep) {
      transpose_square(x + i * x_stride + j, x_stride, square + j * kSide + i, kSide);
    }
  }
  for (int64_t j = 0; j < kSide; ++j) {
    std::memcpy(y + j * y_stride, square + j * kSide, kSide * sizeof(T));
  }
}

template <class T>
void exchange_rows(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                   int64_t columns) {
  constexpr int64_t kSide = 64 / sizeof(T);
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t j = 0; j < whole_columns; j += kSide) {
    for (int64_t i = 0; i < whole_rows; i += kSide) {
      exchange_square(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
    }
  }
  transpose_elements(x + whole_columns, x_stride, y + whole_columns * y_stride, y_stride,
                     whole_rows, columns - whole_columns);
  transpose_elements(x + whole_rows * x_stride, x_stride, y + whole_rows, y_stride,
                     rows - whole_rows, columns);
}

template <class T>
void exchange(const Matrices& shape, const T* x, T* y) {
  const int64_t share = kLines * 64 / sizeof(T);
  const int64_t parts = (shape.rows + share - 1) / share, size = shape.rows * shape.columns;
  for_each_dynamic(shape.count * parts, useful_threads(shape.count * size), [&](int64_t i) {
    const int64_t offset = i / parts * size, first = i % parts * share;
    exchange_rows(x + offset + first * shape.columns, shape.columns, y + offset + first, shape.rows,
                  std::min(share, shape.rows - first), shape.columns);
  });
}

}  // namespace

void exchange_axes(const Matrices& shape, ElementType type, const void* x, void* y) {
  if (type == ElementType::kFloat) {
    exchange(shape, static_cast<const uint32_t*>(x), static_cast<uint32_t*>(y));
  } else {
    exchange(shape, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
  }
}

}  // namespace msd

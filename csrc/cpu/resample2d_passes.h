// FIR resampling, one output row at a time: the rows that it is made of are summed to a line of
// float32, which stays in the first-level cache, and the line's columns to the output's.
#pragma once

#include "resample2d_unit.h"
#include "vec.h"

namespace msd::MSD_ISA {

constexpr int64_t kLineFloats = 1 << 14;
// Channels of an NHWC pixel that are worked on together.
constexpr int64_t kBlockChannels = 1024;

struct Span {
  int64_t begin, end;
};

// The inputs of one output position that exist, and their weights.
struct Window {
  int64_t first, count;
  const float* weights;
};

MSD_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MSD_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

MSD_INLINE int64_t padded_to_pairs(int64_t count) { return (count + kPair - 1) / kPair * kPair; }

MSD_INLINE Window window_at(const ResampleAxis& axis, int64_t position) {
  const int64_t shifted = position + axis.shift;
  const int64_t phase = shifted & (axis.phases - 1);
  const int64_t first = (shifted >> (axis.phases - 1)) * axis.step - axis.back[phase];
  const int64_t skipped = max_of(0, -first);
  const int64_t end = min_of(axis.taps[phase], axis.in - first);
  return {first + skipped, max_of(0, end - skipped), axis.weights[phase] + skipped};
}

// Calls f(row of x, row of y, window of rows) for every row of the unit.
template <class T, class F>
MSD_INLINE void for_each_row(const ResampleJob& job, const ResampleUnit& unit, const F& f) {
  const int64_t in_stride = job.columns.in * unit.channels;
  const int64_t out_stride = job.columns.out * unit.channels;
  int64_t row = unit.first % job.rows.out;
  const T* image =
      static_cast<const T*>(job.x) + unit.x + unit.first / job.rows.out * job.rows.in * in_stride;
  T* y = static_cast<T*>(job.y) + unit.y + unit.first * out_stride;
  for (int64_t i = 0; i < unit.rows; ++i) {
    const Window window = window_at(job.rows, row);
    f(image + window.first * in_stride, y + i * out_stride, window);
    if (++row < job.rows.out) continue;
    row = 0;
    image += job.rows.in * in_stride;
  }
}

// Adds to a tile the weighted sum of `window.count` tiles at x, `stride` elements apart.
template <class T, int n, class Access>
MSD_INLINE void add_tiles(const T* x, int64_t stride, Window window, Access access,
                          Pair (&sum)[n]) {
  for (int64_t r = 0; r < window.count; ++r) {
    const Pair weight = broadcast_pair(window.weights[r]);
    MSD_UNROLL
    for (int i = 0; i < n; ++i) {
      sum[i] = fma(access.load(x + r * stride + i * kPair), weight, sum[i]);
    }
  }
}

// One output row of the channels [0, channels) of NHWC images.
template <class T>
void resample_block(const ResampleJob& job, const ResampleUnit& unit, const T* x, T* y,
                    int64_t channels, Window rows, Span outputs, float* line) {
  const ResampleAxis& axis = job.columns;
  const int64_t stride = padded_to_pairs(channels);
  const int64_t in_stride = axis.in * unit.channels;
  const Window last = window_at(axis, outputs.end - 1);
  const int64_t begin = window_at(axis, outputs.begin).first;
  const int64_t end = min_of(last.first + last.count, axis.in);
  for (int64_t column = begin; column < end; ++column) {
    const T* source = x + column * unit.channels;
    float* target = line + (column - begin) * stride;
    for_column_tiles<kWideTile>(channels, [=](int64_t channel, auto pairs, auto access) {
      constexpr int n = decltype(pairs)::value;
      Pair sum[n] = {};
      add_tiles(source + channel, in_stride, rows, access, sum);
      MSD_UNROLL
      for (int i = 0; i < n; ++i) store_pair(target + channel + i * kPair, sum[i]);
    });
  }
  for (int64_t column = outputs.begin; column < outputs.end; ++column) {
    const Window columns = window_at(axis, column);
    const float* source = line + (columns.first - begin) * stride;
    T* target = y + column * unit.channels;
    for_column_tiles<kWideTile>(channels, [=](int64_t channel, auto pairs, auto access) {
      constexpr int n = decltype(pairs)::value;
      Pair sum[n] = {};
      add_tiles(source + channel, stride, columns, WholePair(), sum);
      MSD_UNROLL
      for (int i = 0; i < n; ++i) access.store(target + channel + i * kPair, sum[i]);
    });
  }
}

// Outputs that can be made from a line of so many columns.
MSD_INLINE int64_t outputs_of(const ResampleAxis& axis, int64_t columns) {
  return max_of(1, (columns - axis.taps[0]) / axis.step * axis.phases);
}

template <class T>
void resample_wide(const ResampleJob& job, const ResampleUnit& unit) {
  alignas(64) float line[kLineFloats];
  for (int64_t channel = 0; channel < unit.channels; channel += kBlockChannels) {
    const int64_t channels = min_of(kBlockChannels, unit.channels - channel);
    const int64_t chunk = outputs_of(job.columns, kLineFloats / padded_to_pairs(channels));
    for_each_row<T>(job, unit, [&](const T* x, T* y, Window rows) {
      for (int64_t column = 0; column < job.columns.out; column += chunk) {
        const Span outputs = {column, min_of(column + chunk, job.columns.out)};
        resample_block(job, unit, x + channel, y + channel, channels, rows, outputs, line);
      }
    });
  }
}

// Some neighbouring columns of the output. Position m phases + f of an output row is made of the
// columns from m step + reach - back[f] on of a line of input columns.
struct NarrowSpan {
  Span outputs;
  Span inputs;      // those columns of the line that exist
  int64_t reach;    // the largest `back`
  int64_t padding;  // columns of the line before them
  int64_t pitch;    // columns of the line, a multiple of the step
  int64_t skipped;  // output positions of the line before outputs.begin
};

MSD_INLINE NarrowSpan narrow_span(const ResampleAxis& axis, Span outputs) {
  NarrowSpan span;
  span.outputs = outputs;
  span.reach = max_of(axis.back[0], axis.back[axis.phases - 1]);
  int64_t taps = 0;
  for (int64_t f = 0; f < axis.phases; ++f) {
    taps = max_of(taps, span.reach - axis.back[f] + axis.taps[f]);
  }
  const int64_t begin = (outputs.begin + axis.shift) / axis.phases;
  const int64_t last = (outputs.end - 1 + axis.shift) / axis.phases;
  const int64_t columns = (last - begin) * axis.step + taps;
  const int64_t first = begin * axis.step - span.reach;
  span.inputs.begin = min_of(max_of(0, first), axis.in);
  span.inputs.end = max_of(span.inputs.begin, min_of(axis.in, first + columns));
  span.padding = span.inputs.begin - first;
  span.pitch = (columns + axis.step - 1) / axis.step * axis.step;
  span.skipped = outputs.begin + axis.shift - begin * axis.phases;
  return span;
}

// Lines of several output rows, one after the other, on their way through the filter. Vectors may
// run over the last one's end.
struct NarrowBuffers {
  enum : int64_t { kFloats = 2048, kSlack = 2 * kPair * kMaxTaps };
  alignas(64) float line[kFloats + kSlack];
  alignas(64) float parts[kMaxStride][kFloats + kSlack];
  alignas(64) float outputs[kMaxStride * (kFloats + kSlack)];
};

// The weighted sum of the rows at x, `stride` elements apart; behind its end there may be zeros.
template <class T>
MSD_INLINE void sum_rows(const T* x, int64_t stride, int64_t count, Window rows, float* sums) {
  for_column_tiles<kWideTile>(count, [=](int64_t i, auto pairs, auto access) {
    constexpr int n = decltype(pairs)::value;
    Pair sum[n] = {};
    add_tiles(x + i, stride, rows, access, sum);
    MSD_UNROLL
    for (int j = 0; j < n; ++j) store_lanes<T>(sums + i + j * kPair, sum[j]);
  });
}

// Every second pixel to one part, the others to the other part.
MSD_INLINE void split_pixels(const float* __restrict line, int64_t channels, int64_t pixels,
                             float* __restrict even, float* __restrict odd) {
  if (channels == 1) {
    for (int64_t i = 0; i < pixels / 2; ++i) even[i] = line[2 * i];
    for (int64_t i = 0; i < pixels / 2; ++i) odd[i] = line[2 * i + 1];
    return;
  }
  for (int64_t i = 0; i < pixels / 2 * channels; i += channels, line += 2 * channels) {
    for (int64_t c = 0; c < channels; ++c) even[i + c] = line[c];
    for (int64_t c = 0; c < channels; ++c) odd[i + c] = line[channels + c];
  }
}

// The reverse of split_pixels.
MSD_INLINE void join_pixels(const float* __restrict even, const float* __restrict odd,
                            int64_t channels, int64_t pixels, float* __restrict line) {
  if (channels == 1) {
    for (int64_t i = 0; i < pixels / 2; ++i) {
      line[2 * i] = even[i];
      line[2 * i + 1] = odd[i];
    }
    return;
  }
  for (int64_t i = 0; i < pixels / 2 * channels; i += channels, line += 2 * channels) {
    for (int64_t c = 0; c < channels; ++c) line[c] = even[i + c];
    for (int64_t c = 0; c < channels; ++c) line[channels + c] = odd[i + c];
  }
}

// Adds to a tile that begins at float i of the result its taps from one part of the line, which has
// every step-th pixel from pixel `first` on.
template <int n>
MSD_INLINE void add_part(const float* part, const ResampleAxis& axis, int64_t phase, int64_t first,
                         int64_t channels, Pair (&sum)[n]) {
  for (int64_t k = first; k < axis.taps[phase]; k += axis.step, part += channels) {
    const Pair weight = broadcast_pair(axis.weights[phase][k]);
    MSD_UNROLL
    for (int i = 0; i < n; ++i) sum[i] = fma(load_pair(part + i * kPair), weight, sum[i]);
  }
}

// One phase of the outputs of `pixels` pixels of lines.
MSD_INLINE void filter_phase(const NarrowBuffers& buffers, const ResampleAxis& axis,
                             int64_t channels, const NarrowSpan& span, int64_t phase,
                             int64_t pixels, float* target) {
  const int64_t offset = (span.reach - axis.back[phase]) * channels;
  const int64_t floats = padded_to_pairs(pixels / axis.step * channels);
  for_column_tiles<kWideTile>(floats, [&](int64_t i, auto pairs, auto) {
    constexpr int n = decltype(pairs)::value;
    Pair sum[n] = {};
    if (axis.step == 1) {
      add_part(buffers.line + offset + i, axis, phase, 0, channels, sum);
    } else {
      add_part(buffers.parts[0] + i, axis, phase, 0, channels, sum);
      add_part(buffers.parts[1] + i, axis, phase, 1, channels, sum);
    }
    MSD_UNROLL
    for (int j = 0; j < n; ++j) store_pair(target + i + j * kPair, sum[j]);
  });
}

// From lines of `pixels` pixels together to their outputs.
MSD_INLINE void filter_lines(NarrowBuffers& buffers, const ResampleAxis& axis, int64_t channels,
                             const NarrowSpan& span, int64_t pixels) {
  auto& [line, parts, outputs] = buffers;
  if (axis.step == 2) split_pixels(line, channels, pixels, parts[0], parts[1]);
  if (axis.phases == 1) {
    filter_phase(buffers, axis, channels, span, 0, pixels, outputs);
    return;
  }
  for (int64_t f = 0; f < 2; ++f) {
    filter_phase(buffers, axis, channels, span, f, pixels, parts[f]);
  }
  join_pixels(parts[0], parts[1], channels, 2 * pixels, outputs);
}

template <class T>
MSD_INLINE void store_row(const float* values, int64_t count, T* y) {
  for_column_tiles<kWideTile>(count, [=](int64_t column, auto pairs, auto access) {
    constexpr int n = decltype(pairs)::value;
    MSD_UNROLL
    for (int i = 0; i < n; ++i) {
      access.store(y + column + i * kPair, load_lanes<T>(values + column + i * kPair));
    }
  });
}

// Pixels narrower than a pair, one channel in NCHW: a vector holds several pixels, and as many rows
// are filtered at a time as the buffers hold. The lines' padding stays zero.
template <class T>
void resample_narrow(const ResampleJob& job, const ResampleUnit& unit) {
  NarrowBuffers buffers;
  T* rows_of_y[NarrowBuffers::kFloats];
  const ResampleAxis& axis = job.columns;
  const int64_t channels = unit.channels;
  const int64_t most_pixels = NarrowBuffers::kFloats / channels;
  const int64_t chunk = outputs_of(axis, most_pixels);
  for (int64_t column = 0; column < axis.out; column += chunk) {
    const NarrowSpan span = narrow_span(axis, {column, min_of(column + chunk, axis.out)});
    const int64_t floats = (span.inputs.end - span.inputs.begin) * channels;
    const int64_t outputs = span.pitch / axis.step * axis.phases;
    const int64_t most_rows = most_pixels / span.pitch;
    int64_t held = 0;
    const auto finish = [&] {
      filter_lines(buffers, axis, channels, span, held * span.pitch);
      for (int64_t r = 0; r < held; ++r) {
        store_row(buffers.outputs + (r * outputs + span.skipped) * channels,
                  (span.outputs.end - column) * channels, rows_of_y[r] + column * channels);
      }
      held = 0;
    };
    __builtin_memset(buffers.line, 0, sizeof(buffers.line));
    for_each_row<T>(job, unit, [&](const T* x, T* y, Window rows) {
      float* line = buffers.line + (held * span.pitch + span.padding) * channels;
      sum_rows(x + span.inputs.begin * channels, axis.in * channels, floats, rows, line);
      rows_of_y[held++] = y;
      if (held == most_rows) finish();
    });
    if (held > 0) finish();
  }
}

template <class T>
void resample(const ResampleJob& job, const ResampleUnit& unit) {
  unit.channels < kPair ? resample_narrow<T>(job, unit) : resample_wide<T>(job, unit);
}

MSD_INLINE ResampleKernel kernel_for(ElementType type) {
  return type == ElementType::kFloat  ? resample<float>
         : type == ElementType::kHalf ? resample<Half>
                                      : resample<BFloat16>;
}

}  // namespace msd::MSD_ISA

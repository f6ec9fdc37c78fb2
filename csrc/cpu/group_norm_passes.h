// The steps of GroupNorm's passes over one unit, from column sums to channels to groups.
#pragma once

#include "group_norm_items.h"
#include "group_norm_tiles.h"
#include "transpose.h"

namespace msd::MSD_ISA {

// Scratch of a unit: `arrays` arrays of its channels for every piece, then `parameters` for the
// whole.
struct Scratch {
  float* base;
  int64_t channels, pieces, arrays;

  Scratch(const Unit& unit, float* scratch, int64_t arrays_per_piece)
      : base(scratch),
        channels(padded(unit.channels)),
        pieces(unit.piece_count),
        arrays(arrays_per_piece) {}
  float* sums(int64_t piece, int64_t array) const {
    return base + (piece * arrays + array) * channels;
  }
  float* parameters(int64_t array) const { return base + (pieces * arrays + array) * channels; }
};

template <class T>
MSD_INLINE float element(ConstArray array, int64_t i) {
  return array.is_float ? static_cast<const float*>(array.data)[i]
                        : to_float(static_cast<const T*>(array.data)[i]);
}

template <class T>
MSD_INLINE void set_element(MutableArray array, int64_t i, float value) {
  if (array.is_float) {
    static_cast<float*>(array.data)[i] = value;
  } else {
    from_float(value, static_cast<T*>(array.data) + i);
  }
}

template <class T>
MSD_INLINE void read_elements(ConstArray array, int64_t first, int64_t count, float missing,
                              float* out) {
  if (array.data == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = missing;
  } else if (array.is_float) {
    __builtin_memcpy(out, static_cast<const float*>(array.data) + first, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = element<T>(array, first + i);
  }
}

// gain = weight (1 + scale), offset = bias (1 + scale) + shift, for the unit's channels.
template <class T>
void read_affine(const Affine& affine, const Unit& unit, float* gain, float* offset) {
  const int64_t channels = unit.channels;
  read_elements<T>(affine.weight, unit.channel, channels, 1.0f, gain);
  read_elements<T>(affine.bias, unit.channel, channels, 0.0f, offset);
  if (affine.scale.data != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      const float factor = 1.0f + element<T>(affine.scale, unit.sample_channel + c);
      gain[c] *= factor;
      offset[c] *= factor;
    }
  }
  if (affine.shift.data != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      offset[c] += element<T>(affine.shift, unit.sample_channel + c);
    }
  }
}

MSD_INLINE void scale_for_silu(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= kSiluScale;
}

// Sum of f(0), ..., f(count - 1) in a fixed order that vectorises.
template <class F>
MSD_INLINE double ordered_sum(int64_t count, const F& f) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += f(i + lane);
  }
  for (; i < count; ++i) lanes[i % kLanes] += f(i);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Repeats the unit's parameters for the columns of a folded row, one buffer after another. Those of
// a plane with one channel are uniform and need no repetition.
class FoldedParameters {
 public:
  FoldedParameters(const Unit& unit, const Item& item) : unit_(unit), item_(item) {}

  const float* operator()(const float* channels) {
    const int64_t width = unit_.plane_channels;
    const float* first = channels + item_.plane * width;
    if (width == 1 || item_.columns == width) return first;
    float* out = buffers_[used_++];
    __builtin_memcpy(out, first, width * sizeof(float));
    for (int64_t filled = width; filled < item_.columns; filled *= 2) {
      __builtin_memcpy(out + filled, out, filled * sizeof(float));
    }
    return out;
  }

 private:
  const Unit& unit_;
  const Item& item_;
  int used_ = 0;
  alignas(64) float buffers_[4][kMaxFoldedColumns + kColumnPadding];
};

MSD_INLINE float sum_of_columns(const float* values, int64_t columns) {
  Vec sum = load(values);
  for (int64_t j = kWidth; j < columns; j += kWidth) sum += load(values + j);
  return sum_of_lanes(sum);
}

// The moments of all columns together, whole vectors of them, become the first one's.
MSD_INLINE void gather_moments(ColumnMoments moments, int64_t columns, int64_t rows) {
  const Vec origin = broadcast(moments.origin[0]);
  for (int64_t j = 0; j < columns; j += kWidth) {
    store(moments.mean + j, (load(moments.origin + j) - origin) + load(moments.mean + j));
  }
  const float mean = sum_of_columns(moments.mean, columns) / static_cast<float>(columns);
  Vec m2 = broadcast(0.0f);
  Vec spread = broadcast(0.0f);
  for (int64_t j = 0; j < columns; j += kWidth) {
    const Vec difference = load(moments.mean + j) - broadcast(mean);
    spread = fma(difference, difference, spread);
    m2 += load(moments.m2 + j);
  }
  moments.mean[0] = mean;
  moments.m2[0] = sum_of_lanes(fma(spread, broadcast(static_cast<float>(rows)), m2));
}

// Channel c of the result gathers the columns c, c + width, ... of a folded row.
MSD_INLINE void unfold_moments(ColumnMoments moments, int64_t columns, int64_t width,
                               int64_t rows) {
  if (width == 1 && columns % kWidth == 0) return gather_moments(moments, columns, rows);
  float weight = 0.5f * static_cast<float>(rows);
  for (int64_t half = columns / 2; half >= width; half /= 2, weight *= 2.0f) {
    for (int64_t j = 0; j < half; ++j) {
      const float difference = (moments.origin[j + half] - moments.origin[j]) +
                               (moments.mean[j + half] - moments.mean[j]);
      moments.mean[j] += 0.5f * difference;
      moments.m2[j] += moments.m2[j + half] + weight * difference * difference;
    }
  }
}

MSD_INLINE void unfold_sums(float* sums, int64_t columns, int64_t width) {
  if (width == 1 && columns % kWidth == 0) {
    sums[0] = sum_of_columns(sums, columns);
    return;
  }
  for (int64_t half = columns / 2; half >= width; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
}

template <class T>
struct ForwardPass {
  enum { kOrigin, kMean, kM2, kArrays };           // per piece
  enum { kMeans, kGains, kOffsets, kParameters };  // per unit

  static int64_t scratch_floats(const GroupNormForward&, const Unit& unit) {
    return (kArrays * unit.piece_count + kParameters) * padded(unit.channels) + kColumnPadding;
  }

  static void prepare(const GroupNormForward&, const Unit&, float*) {}

  static ColumnMoments piece_moments(const Scratch& scratch, int64_t piece, int64_t channel) {
    return {scratch.sums(piece, kOrigin) + channel, scratch.sums(piece, kMean) + channel,
            scratch.sums(piece, kM2) + channel};
  }

  static void reduce(const GroupNormForward& job, const Unit& unit, float* base, int64_t index) {
    const Item item(unit, index);
    const Scratch scratch(unit, base, kArrays);
    alignas(64) float columns[kArrays][kMaxFoldedColumns + kColumnPadding];
    const int64_t width = unit.plane_channels;
    const ColumnMoments result = piece_moments(scratch, item.piece, item.plane * width);
    if (!item.folded) {
      for_each_source(unit, item, [&](const Span& span, bool of_skip) {
        column_moments(
            source_of<T>(job.x, job.skip, span, of_skip), span.stride, item.rows, span.columns,
            {result.origin + span.column, result.mean + span.column, result.m2 + span.column});
      });
      return;
    }
    const T* x = static_cast<const T*>(job.x) + item.offset;
    const ColumnMoments folded = {columns[kOrigin], columns[kMean], columns[kM2]};
    column_moments(x, item.stride, item.rows, item.columns, folded);
    unfold_moments(folded, item.columns, width, item.rows);
    __builtin_memcpy(result.origin, folded.origin, width * sizeof(float));
    __builtin_memcpy(result.mean, folded.mean, width * sizeof(float));
    __builtin_memcpy(result.m2, folded.m2, width * sizeof(float));
  }

  // Gathers the moments of all pieces in the first one's.
  static void merge_pieces(const Unit& unit, const Scratch& scratch) {
    const ColumnMoments all = piece_moments(scratch, 0, 0);
    double seen = static_cast<double>(unit.pieces[0].rows * unit.pieces[0].fold);
    for (int64_t piece = 1; piece < unit.piece_count; ++piece) {
      const ColumnMoments next = piece_moments(scratch, piece, 0);
      const double count = static_cast<double>(unit.pieces[piece].rows * unit.pieces[piece].fold);
      const float part = static_cast<float>(count / (seen + count));
      const float weight = static_cast<float>(seen * count / (seen + count));
      for (int64_t c = 0; c < unit.channels; ++c) {
        const float difference = (next.origin[c] - all.origin[c]) + (next.mean[c] - all.mean[c]);
        all.mean[c] += part * difference;
        all.m2[c] += next.m2[c] + weight * difference * difference;
      }
      seen += count;
    }
  }

  // Mean and rstd of every group, then z = (x - mean) gain + offset for its channels. What rounding
  // takes from the group's mean goes into the offset.
  static void combine(const GroupNormForward& job, const Unit& unit, float* base) {
    const Scratch scratch(unit, base, kArrays);
    merge_pieces(unit, scratch);
    float* gain = scratch.parameters(kGains);
    float* offset = scratch.parameters(kOffsets);
    read_affine<T>(job.affine, unit, gain, offset);
    const int64_t channels = unit.group_channels;
    const double count = static_cast<double>(channels * unit.spatial);
    for (int64_t g = 0; g < unit.groups; ++g) {
      const int64_t first = g * channels;
      const ColumnMoments moments = piece_moments(scratch, 0, first);
      const float origin = moments.origin[0];
      const auto distance = [&](int64_t c) {
        return static_cast<double>(moments.origin[c] - origin) + moments.mean[c];
      };
      const double centre = ordered_sum(channels, distance) / static_cast<double>(channels);
      const double between = ordered_sum(channels, [&](int64_t c) {
        const double difference = distance(c) - centre;
        return difference * difference;
      });
      const double within = ordered_sum(channels, [&](int64_t c) { return double{moments.m2[c]}; });
      const double variance = (within + between * static_cast<double>(unit.spatial)) / count;
      // Where squares overflowed, the variance is infinite; its rstd of 0 would hide that.
      const double overflow = variance - variance;
      const float rstd =
          static_cast<float>(1.0 / __builtin_sqrt(variance + double{job.eps}) + overflow);
      const float mean = static_cast<float>(origin + centre);
      const float rest = static_cast<float>((origin - double{mean}) + centre);
      job.mean[unit.group + g] = mean;
      job.rstd[unit.group + g] = rstd;
      float* means = scratch.parameters(kMeans);
      for (int64_t c = first; c < first + channels; ++c) {
        means[c] = mean;
        gain[c] *= rstd;
        offset[c] -= rest * gain[c];
      }
    }
    if (!job.silu) return;
    scale_for_silu(gain, unit.channels);
    scale_for_silu(offset, unit.channels);
  }

  static void map(const GroupNormForward& job, const Unit& unit, float* base, int64_t index) {
    const Item item(unit, index);
    const Scratch scratch(unit, base, kArrays);
    FoldedParameters fold(unit, item);
    const ColumnParameters parameters = {unit.plane_channels == 1,
                                         fold(scratch.parameters(kMeans)),
                                         fold(scratch.parameters(kGains)),
                                         fold(scratch.parameters(kOffsets)),
                                         nullptr,
                                         nullptr};
    T* y = static_cast<T*>(job.y) + item.offset;
    const auto kernel = job.silu ? normalize<T, true> : normalize<T, false>;
    for_each_source(unit, item, [&](const Span& span, bool of_skip) {
      kernel(source_of<T>(job.x, job.skip, span, of_skip), y + span.column, span.stride,
             item.stride, item.rows, span.columns, parameters.from(span.column));
    });
  }
};

template <class T>
struct BackwardPass {
  enum { kSum, kMoment, kArrays };  // per piece
  enum {                            // per unit; the first three make z
    kMeans,
    kZGains,
    kZOffsets,
    kGains,
    kConstants,
    kSlopes,
    kAffineGains,
    kParameters
  };

  static bool wants_dx(const GroupNormBackward& job) {
    return job.dx != nullptr || job.dskip != nullptr;
  }

  static bool keeps_dz(const GroupNormBackward& job) { return job.silu && wants_dx(job); }

  static int64_t head_floats(const Unit& unit) {
    return (kArrays * unit.piece_count + kParameters) * padded(unit.channels) + kColumnPadding;
  }

  static int64_t dz_row_floats(const Unit& unit) {
    return padded(unit.pieces[0].fold * unit.plane_channels);
  }

  static int64_t dz_floats(const GroupNormBackward& job, const Unit& unit) {
    return keeps_dz(job) ? unit.planes * unit.plane_rows * dz_row_floats(unit) : 0;
  }

  // Where a planar dy is interleaved: whole cache lines.
  static int64_t dy_floats(const GroupNormBackward& job, const Unit& unit) {
    if (!job.dy_planar) return 0;
    return padded(unit.elements() * static_cast<int64_t>(sizeof(T)) / 4 + kColumnPadding);
  }

  static int64_t scratch_floats(const GroupNormBackward& job, const Unit& unit) {
    return head_floats(unit) + dz_floats(job, unit) + dy_floats(job, unit);
  }

  static float* dz_of(const GroupNormBackward& job, const Unit& unit, const Item& item,
                      float* base) {
    if (!keeps_dz(job)) return nullptr;
    return base + head_floats(unit) + item.first_row * dz_row_floats(unit);
  }

  // The item's part of dy as rows `stride` elements apart.
  struct Cotangent {
    const T* data;
    int64_t stride;
  };

  // Where a planar dy of the item comes to lie with dense pixels of the unit's channels.
  static T* interleaved_dy(const GroupNormBackward& job, const Unit& unit, const Item& item,
                           float* base) {
    T* dy = reinterpret_cast<T*>(base + head_floats(unit) + dz_floats(job, unit));
    return dy + item.pixel * unit.plane_channels;
  }

  static Cotangent cotangent_of(const GroupNormBackward& job, const Unit& unit, const Item& item,
                                float* base) {
    if (!job.dy_planar) return {static_cast<const T*>(job.dy) + item.offset, item.stride};
    return {interleaved_dy(job, unit, item, base), item.columns};
  }

  // Some rows of a planar dy, interleaved. SiLU's gradient is kept instead of them; so they take
  // each other's place, which leaves them in the first-level cache.
  static const T* interleave_rows(const GroupNormBackward& job, const Unit& unit, const Item& item,
                                  float* base, int64_t row, int64_t rows) {
    const int64_t fold = item.columns / unit.channels;
    T* out = interleaved_dy(job, unit, item, base) + (job.silu ? 0 : row * item.columns);
    interleave_planes(static_cast<const T*>(job.dy) + unit.planar_dy + item.pixel + row * fold,
                      unit.spatial, unit.channels, rows * fold, out);
    return out;
  }

  static void prepare(const GroupNormBackward& job, const Unit& unit, float* base) {
    const Scratch scratch(unit, base, kArrays);
    float* means = scratch.parameters(kMeans);
    float* gains = scratch.parameters(kGains);
    float* affine_gains = scratch.parameters(kAffineGains);
    float* offsets = scratch.parameters(kZOffsets);
    read_affine<T>(job.affine, unit, affine_gains, offsets);
    for (int64_t g = 0; g < unit.groups; ++g) {
      const float mean = job.mean[unit.group + g];
      const float rstd = job.rstd[unit.group + g];
      const int64_t first = g * unit.group_channels;
      for (int64_t c = first; c < first + unit.group_channels; ++c) {
        means[c] = mean;
        gains[c] = affine_gains[c] * rstd;
      }
    }
    float* z_gains = scratch.parameters(kZGains);
    __builtin_memcpy(z_gains, gains, unit.channels * sizeof(float));
    if (!job.silu) return;
    scale_for_silu(z_gains, unit.channels);
    scale_for_silu(offsets, unit.channels);
  }

  static void reduce(const GroupNormBackward& job, const Unit& unit, float* base, int64_t index) {
    const Item item(unit, index);
    const Scratch scratch(unit, base, kArrays);
    FoldedParameters fold(unit, item);
    const ColumnParameters parameters = {unit.plane_channels == 1,
                                         fold(scratch.parameters(kMeans)),
                                         fold(scratch.parameters(kZGains)),
                                         fold(scratch.parameters(kZOffsets)),
                                         nullptr,
                                         nullptr};
    const int64_t width = unit.plane_channels;
    alignas(64) float columns[kArrays][kMaxFoldedColumns + kColumnPadding];
    float* sums = scratch.sums(item.piece, kSum) + item.plane * width;
    float* moments = scratch.sums(item.piece, kMoment) + item.plane * width;
    if (!item.folded) {
      add_rows(job, unit, item, base, parameters, sums, moments);
      return;
    }
    add_rows(job, unit, item, base, parameters, columns[kSum], columns[kMoment]);
    unfold_sums(columns[kSum], item.columns, width);
    unfold_sums(columns[kMoment], item.columns, width);
    __builtin_memcpy(sums, columns[kSum], width * sizeof(float));
    __builtin_memcpy(moments, columns[kMoment], width * sizeof(float));
  }

  // The sums of the item's columns, chunk by chunk.
  static void add_rows(const GroupNormBackward& job, const Unit& unit, const Item& item,
                       float* base, const ColumnParameters& parameters, float* sums,
                       float* moments) {
    const auto kernel = job.silu ? add_gradient_sums<T, true> : add_gradient_sums<T, false>;
    const Cotangent dy = cotangent_of(job, unit, item, base);
    float* dz = dz_of(job, unit, item, base);
    const int64_t dz_stride = padded(item.columns);
    __builtin_memset(sums, 0, padded(item.columns) * sizeof(float));
    __builtin_memset(moments, 0, padded(item.columns) * sizeof(float));
    for (int64_t row = 0; row < item.rows; row += kChunkRows) {
      const int64_t rows = item.rows - row < kChunkRows ? item.rows - row : kChunkRows;
      const T* part = job.dy_planar ? interleave_rows(job, unit, item, base, row, rows)
                                    : dy.data + row * dy.stride;
      for_each_source(unit, item, [&](const Span& span, bool of_skip) {
        const T* x = source_of<T>(job.x, job.skip, span, of_skip) + row * span.stride;
        kernel(x, part + span.column, span.stride, dy.stride, rows, span.columns,
               parameters.from(span.column),
               dz == nullptr ? nullptr : dz + row * dz_stride + span.column, dz_stride,
               sums + span.column, moments + span.column);
      });
    }
  }

  // From the channels' sums P of dz and Q of dz xhat: dshift = P, dscale = weight Q + bias P, and
  // the group's means of dxhat and dxhat xhat, which complete dx.
  static void combine(const GroupNormBackward& job, const Unit& unit, float* base) {
    const Scratch scratch(unit, base, kArrays);
    float* sums = scratch.sums(0, kSum);
    float* moments = scratch.sums(0, kMoment);
    for (int64_t piece = 1; piece < unit.piece_count; ++piece) {
      for (int64_t c = 0; c < unit.channels; ++c) sums[c] += scratch.sums(piece, kSum)[c];
      for (int64_t c = 0; c < unit.channels; ++c) moments[c] += scratch.sums(piece, kMoment)[c];
    }
    const double count = static_cast<double>(unit.group_channels * unit.spatial);
    for (int64_t g = 0; g < unit.groups; ++g) {
      const int64_t first = g * unit.group_channels;
      const float rstd = job.rstd[unit.group + g];
      const float* gain = scratch.parameters(kAffineGains) + first;
      for (int64_t c = first; c < first + unit.group_channels; ++c) moments[c] *= rstd;
      const double mean = ordered_sum(unit.group_channels,
                                      [&](int64_t c) { return double{gain[c]} * sums[first + c]; });
      const double moment = ordered_sum(
          unit.group_channels, [&](int64_t c) { return double{gain[c]} * moments[first + c]; });
      const float constant = static_cast<float>(-rstd * mean / count);
      const float slope = static_cast<float>(-double{rstd} * rstd * moment / count);
      for (int64_t c = first; c < first + unit.group_channels; ++c) {
        scratch.parameters(kConstants)[c] = constant;
        scratch.parameters(kSlopes)[c] = slope;
      }
    }
    write_channel_gradients(job, unit, sums, moments);
  }

  static void write_channel_gradients(const GroupNormBackward& job, const Unit& unit,
                                      const float* sums, const float* moments) {
    const int64_t at = unit.sample_channel;
    const Affine& affine = job.affine;
    for (int64_t c = 0; job.dshift.data != nullptr && c < unit.channels; ++c) {
      set_element<T>(job.dshift, at + c, sums[c]);
    }
    for (int64_t c = 0; job.dscale.data != nullptr && c < unit.channels; ++c) {
      const int64_t i = unit.channel + c;
      const float weight = affine.weight.data != nullptr ? element<T>(affine.weight, i) : 1.0f;
      const float bias = affine.bias.data != nullptr ? element<T>(affine.bias, i) : 0.0f;
      set_element<T>(job.dscale, at + c, weight * moments[c] + bias * sums[c]);
    }
    const int64_t bytes = unit.channels * static_cast<int64_t>(sizeof(float));
    if (job.dz_sums != nullptr) __builtin_memcpy(job.dz_sums + at, sums, bytes);
    if (job.dz_xhat_sums != nullptr) __builtin_memcpy(job.dz_xhat_sums + at, moments, bytes);
  }

  static void map(const GroupNormBackward& job, const Unit& unit, float* base, int64_t index) {
    if (!wants_dx(job)) return;
    const Item item(unit, index);
    const Scratch scratch(unit, base, kArrays);
    FoldedParameters fold(unit, item);
    const ColumnParameters parameters = {unit.plane_channels == 1,
                                         fold(scratch.parameters(kMeans)),
                                         fold(scratch.parameters(kGains)),
                                         nullptr,
                                         fold(scratch.parameters(kConstants)),
                                         fold(scratch.parameters(kSlopes))};
    const Cotangent dy = cotangent_of(job, unit, item, base);
    const float* dz = dz_of(job, unit, item, base);
    const auto kernel = job.silu ? input_gradient<T, true> : input_gradient<T, false>;
    for_each_source(unit, item, [&](const Span& span, bool of_skip) {
      void* gradient = of_skip ? job.dskip : job.dx;
      if (gradient == nullptr) return;
      kernel(source_of<T>(job.x, job.skip, span, of_skip), dy.data + span.column,
             dz == nullptr ? nullptr : dz + span.column, static_cast<T*>(gradient) + span.offset,
             span.stride, dy.stride, padded(item.columns), item.rows, span.columns,
             parameters.from(span.column));
    });
  }
};

// gradient[channel] = sum over samples of (1 + scale) sums, in the samples' order.
template <class T>
void sum_over_samples(ConstArray scale, const float* sums, const ParameterBlock& block,
                      MutableArray gradient) {
  constexpr int64_t kBlock = 128;
  if (gradient.data == nullptr) return;
  for (int64_t first = 0; first < block.channels; first += kBlock) {
    const int64_t channels = block.channels - first < kBlock ? block.channels - first : kBlock;
    double total[kBlock] = {};
    for (int64_t sample = 0; sample < block.count; ++sample) {
      const int64_t at = block.sample_channel + sample * block.sample_stride + first;
      float factor[kBlock];
      read_elements<T>(scale, at, channels, 0.0f, factor);
      for (int64_t c = 0; c < channels; ++c) {
        total[c] += (1.0 + factor[c]) * sums[at + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      set_element<T>(gradient, block.channel + first + c, static_cast<float>(total[c]));
    }
  }
}

template <class T>
void sum_parameter_gradients(const GroupNormBackward& job, const ParameterBlock& block) {
  sum_over_samples<T>(job.affine.scale, job.dz_xhat_sums, block, job.dweight);
  sum_over_samples<T>(job.affine.scale, job.dz_sums, block, job.dbias);
}

template <template <class> class Pass, class Job, class T>
constexpr UnitPass<Job> unit_pass() {
  return {Pass<T>::scratch_floats, Pass<T>::prepare, Pass<T>::reduce, Pass<T>::combine,
          Pass<T>::map};
}

template <class T>
constexpr GroupNormKernels kernels() {
  return {unit_pass<ForwardPass, GroupNormForward, T>(),
          unit_pass<BackwardPass, GroupNormBackward, T>(), sum_parameter_gradients<T>};
}

MSD_INLINE const GroupNormKernels& kernels_for(ElementType type) {
  static constexpr GroupNormKernels kFloat = kernels<float>();
  static constexpr GroupNormKernels kBFloat16 = kernels<BFloat16>();
  static constexpr GroupNormKernels kHalf = kernels<Half>();
  return type == ElementType::kFloat ? kFloat : type == ElementType::kHalf ? kHalf : kBFloat16;
}

}  // namespace msd::MSD_ISA

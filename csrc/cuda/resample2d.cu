// FIR resampling. A thread owns 16 bytes of neighbouring channels, or one element, of one column
// (upward: of both phases of it) and walks down a strip of rows. Every input row is summed over its
// columns once, the sums stay in registers as long as an output row needs them, and each output is
// written once. What neighbouring threads read, too, comes from the cache.
#include <algorithm>
#include <vector>

#include "launch.cuh"
#include "resample2d.h"
#include "vectors.cuh"

namespace msd::cuda {
namespace {

constexpr char kOp[] = "resample2d";
constexpr int kThreads = 256;
constexpr int kMaxStages = 16;            // of one launch
constexpr int kMostPositions = 16;        // of a strip
constexpr int64_t kWantedThreads = 1024;  // per multiprocessor, before strips get longer

// One stage of a launch. Images are samples in NHWC, planes in NCHW.
struct Stage {
  int64_t x, y;   // first elements
  int64_t pixel;  // elements of a pixel: the channels in NHWC, 1 in NCHW
  int64_t images;
  uint32_t vectors;  // threads per pixel
  int32_t first_block;
};

// An axis (see resample2d_job.h) whose phases see one window of inputs: those at m step - reach +
// k. A weight of 0 stands for an input that a phase does not have.
struct Axis {
  int64_t in, out;
  int32_t step, shift, reach;
  int32_t first, positions;  // the values of m
  int32_t taps;              // inputs of the window
  float weights[kMaxStride][kMaxTaps];
};

struct Arguments {
  Stage stages[kMaxStages];
  int32_t count;
  uint32_t strips;  // per column
  int32_t strip;    // positions of a strip
  Axis rows, columns;
  const void* x;
  void* y;
};

// Neighbouring elements as they lie in memory: 16 bytes, or a single one.
template <class T, bool kVector>
struct Elements {
  static constexpr int kCount = 16 / sizeof(T);
  uint4 words;

  __device__ void load(const T* address) { words = *reinterpret_cast<const uint4*>(address); }
  __device__ void unpack_to(float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Four four = unpack<T>(part(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = four[j];
    }
  }
  __device__ static void store(const float (&values)[kCount], T* address) {
    auto* to = reinterpret_cast<uint4*>(address);
#if defined(__CUDA_ARCH__)
    __stwb(to, packed(values));  // the compiler takes an assignment apart
#else
    *to = packed(values);
#endif
  }

 private:
  __device__ static uint4 packed(const float (&values)[kCount]) {
    const Words<T> first = pack<T>({values[0], values[1], values[2], values[3]});
    if constexpr (sizeof(T) == 4) {
      return first;
    } else {
      const Words<T> second = pack<T>({values[4], values[5], values[6], values[7]});
      return {first.x, first.y, second.x, second.y};
    }
  }
  __device__ Words<T> part(int first) const {
    if constexpr (sizeof(T) == 4) {
      return words;
    } else {
      return first == 0 ? Words<T>{words.x, words.y} : Words<T>{words.z, words.w};
    }
  }
};

template <class T>
struct Elements<T, false> {
  static constexpr int kCount = 1;
  T element;

  __device__ void load(const T* address) { element = *address; }
  __device__ void unpack_to(float (&values)[1]) const { values[0] = to_float(element); }
  __device__ static void store(const float (&values)[1], T* address) {
    from_float(values[0], address);
  }
};

// What a thread owns.
struct Place {
  const Stage* stage;
  uint32_t vector, column, strip, image;

  __device__ explicit Place(const Arguments& arguments) : stage(arguments.stages) {
    const int block = static_cast<int>(blockIdx.x);
    for (int s = 1; s < arguments.count; ++s) {
      if (block >= arguments.stages[s].first_block) stage = &arguments.stages[s];
    }
    uint32_t thread = static_cast<uint32_t>(block - stage->first_block) * kThreads + threadIdx.x;
    const auto split = [&](uint32_t size) {
      const uint32_t whole = thread / size, rest = thread - whole * size;
      thread = whole;
      return rest;
    };
    vector = split(stage->vectors);
    column = split(static_cast<uint32_t>(arguments.columns.positions));
    strip = split(arguments.strips);
    image = thread;
  }
};

// The columns of a thread: the window of inputs at one position of the columns.
template <class T, int kWindow, int kPhases, bool kVector>
struct Columns {
  using Input = Elements<T, kVector>;
  static constexpr int kCount = Input::kCount;

  // What the window holds of an input row, zero where there is none, and its sums, one per phase.
  struct Row {
    Input inputs[kWindow];
  };
  struct Line {
    float sums[kPhases][kCount];
  };

  const Axis& axis;
  int32_t position;
  int64_t pixel;
  uint32_t present;  // a bit for every input of the window that exists

  __device__ Columns(const Axis& axis_, uint32_t column, int64_t pixel_)
      : axis(axis_),
        position(axis_.first + static_cast<int32_t>(column)),
        pixel(pixel_),
        present(0) {
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      const int64_t at = first() + k;
      if (k < axis.taps && 0 <= at && at < axis.in) present |= 1u << k;
    }
  }

  __device__ int64_t first() const {
    return static_cast<int64_t>(position) * axis.step - axis.reach;
  }

  // `source` is where the window begins in the row.
  __device__ Row load(const T* source, bool exists) const {
    const uint32_t wanted = exists ? present : 0;
    Row row = {};
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      if (wanted >> k & 1) row.inputs[k].load(source + k * pixel);
    }
    return row;
  }

  __device__ Line sum(const Row& row) const {
    Line line = {};
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      float values[kCount];
      row.inputs[k].unpack_to(values);
#pragma unroll
      for (int f = 0; f < kPhases; ++f) {
        // With one phase, the inputs without weight are those that were not loaded.
        if (kPhases > 1 && axis.weights[f][k] == 0) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          line.sums[f][i] = fmaf(axis.weights[f][k], values[i], line.sums[f][i]);
        }
      }
    }
    return line;
  }
};

// kWindow: the most inputs that an output has along an axis; kStep: from one position's first
// input to the next one's.
template <class T, int kWindow, int kStep, int kPhases, bool kVector>
__global__ void __launch_bounds__(kThreads) resample2d_kernel(const __grid_constant__ Arguments a) {
  using MyColumns = Columns<T, kWindow, kPhases, kVector>;
  constexpr int kCount = MyColumns::kCount;
  const Place place(a);
  const Stage& stage = *place.stage;
  if (place.image >= stage.images) return;
  const MyColumns columns(a.columns, place.column, stage.pixel);
  const int64_t channel = static_cast<int64_t>(place.vector) * kCount;
  const int64_t in_stride = a.columns.in * stage.pixel, out_stride = a.columns.out * stage.pixel;
  const T* x = static_cast<const T*>(a.x) + stage.x + channel +
               place.image * a.rows.in * in_stride + columns.first() * stage.pixel;
  T* y = static_cast<T*>(a.y) + stage.y + channel + place.image * a.rows.out * out_stride;
  const int64_t first = a.rows.first + static_cast<int64_t>(place.strip) * a.strip;
  const int64_t last = smaller<int64_t>(first + a.strip, a.rows.first + a.rows.positions);
  const auto load = [&](int64_t row) {
    return columns.load(x + row * in_stride, 0 <= row && row < a.rows.in);
  };
  // Writes the output at phases f of the rows and g of the columns, if there is one.
  const auto write = [&](const typename MyColumns::Line(&lines)[kWindow], int64_t position, int f,
                         int g) {
    const int64_t row = position * kPhases + f - a.rows.shift;
    const int64_t column = static_cast<int64_t>(columns.position) * kPhases + g - a.columns.shift;
    if (row < 0 || row >= a.rows.out || column < 0 || column >= a.columns.out) return;
    float sum[kCount] = {};
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      if (a.rows.weights[f][k] == 0) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum[i] = fmaf(a.rows.weights[f][k], lines[k].sums[g][i], sum[i]);
      }
    }
    MyColumns::Input::store(sum, y + row * out_stride + column * stage.pixel);
  };
  // Rows are on their way while the outputs before are computed, where the registers allow it.
  constexpr bool kAhead = kWindow <= 4;
  typename MyColumns::Line lines[kWindow];
  typename MyColumns::Row next[kStep];
  int64_t row = first * kStep - a.rows.reach;
#pragma unroll
  for (int k = 0; k < kWindow - kStep; ++k) lines[k] = columns.sum(load(row + k));
  row += kWindow - kStep;
#pragma unroll
  for (int s = 0; kAhead && s < kStep; ++s) next[s] = load(row + s);
  for (int64_t position = first; position < last; ++position, row += kStep) {
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      lines[kWindow - kStep + s] = columns.sum(kAhead ? next[s] : load(row + s));
    }
#pragma unroll
    for (int s = 0; kAhead && s < kStep; ++s) {
      next[s] = load(position + 1 < last ? row + kStep + s : -1);
    }
#pragma unroll
    for (int f = 0; f < kPhases; ++f) {
#pragma unroll
      for (int g = 0; g < kPhases; ++g) write(lines, position, f, g);
    }
#pragma unroll
    for (int k = 0; k + kStep < kWindow; ++k) lines[k] = lines[k + kStep];
  }
}

Axis make_axis(const ResampleAxis& from) {
  Axis axis = {};
  axis.in = from.in;
  axis.out = from.out;
  axis.step = static_cast<int32_t>(from.step);
  axis.shift = static_cast<int32_t>(from.shift);
  axis.reach = static_cast<int32_t>(from.back[0]);
  axis.first = static_cast<int32_t>(from.shift / from.phases);
  axis.positions = static_cast<int32_t>((from.out - 1 + from.shift) / from.phases - axis.first + 1);
  for (int64_t f = 0; f < from.phases; ++f) {
    const int64_t skipped = axis.reach - from.back[f];
    axis.taps = larger(axis.taps, static_cast<int32_t>(skipped + from.taps[f]));
    for (int64_t k = 0; k < from.taps[f]; ++k) {
      axis.weights[f][skipped + k] = from.weights[f][k];
    }
  }
  return axis;
}

bool is_aligned(const void* buffer, int64_t first, int64_t element_bytes) {
  return (reinterpret_cast<uintptr_t>(buffer) + first * element_bytes) % 16 == 0;
}

// A launch whose threads take vectors or single elements.
struct Launch {
  Arguments arguments = {};
  int64_t threads_per_row = 0;  // of all images, for one position of the rows
};

// The stages that have samples, in launches of up to kMaxStages stages each.
class Launches {
 public:
  Launches(const ResampleShape& shape, const ResampleFilter& filter, const void* x, void* y)
      : shape_(shape), x_(x), y_(y) {
    rows_ = make_axis(resample_axis(filter, shape.height, shape.out_height));
    columns_ = make_axis(resample_axis(filter, shape.width, shape.out_width));
    Stage stage = {};
    for (size_t s = 0; s < shape.counts.size(); ++s) {
      const int64_t planes = shape.counts[s] * shape.channels[s];
      if (planes > 0) add(stage, shape.counts[s], shape.channels[s]);
      stage.x += planes * shape.height * shape.width;
      stage.y += planes * shape.out_height * shape.out_width;
    }
  }

  const std::vector<Launch>& vectors() const { return vectors_; }
  const std::vector<Launch>& elements() const { return elements_; }

 private:
  void add(Stage stage, int64_t count, int64_t channels) {
    const int64_t bytes = shape_.type == ElementType::kFloat ? 4 : 2;
    const int64_t lanes = 16 / bytes;
    const bool vector = shape_.channels_last && channels % lanes == 0 &&
                        is_aligned(x_, stage.x, bytes) && is_aligned(y_, stage.y, bytes);
    stage.pixel = shape_.channels_last ? channels : 1;
    stage.images = shape_.channels_last ? count : count * channels;
    stage.vectors = static_cast<uint32_t>(vector ? channels / lanes : stage.pixel);
    std::vector<Launch>& launches = vector ? vectors_ : elements_;
    if (launches.empty() || launches.back().arguments.count == kMaxStages) {
      launches.emplace_back();
      Arguments& made = launches.back().arguments;
      made.rows = rows_;
      made.columns = columns_;
      made.x = x_;
      made.y = y_;
    }
    Launch& launch = launches.back();
    launch.arguments.stages[launch.arguments.count++] = stage;
    launch.threads_per_row += stage.images * stage.vectors * columns_.positions;
  }

  const ResampleShape& shape_;
  const void* x_;
  void* y_;
  Axis rows_, columns_;
  std::vector<Launch> vectors_, elements_;
};

// Strips as long as leave enough threads for the device: the fewer there are, the fewer rows two
// of them read.
void cut_strips(Launch& launch, const Device& device) {
  Arguments& arguments = launch.arguments;
  int32_t strip = kMostPositions;
  const auto strips = [&] { return ceil_div(arguments.rows.positions, strip); };
  const int64_t wanted = kWantedThreads * device.multiprocessors;
  while (strip > 1 && launch.threads_per_row * strips() < wanted) strip /= 2;
  arguments.strip = strip;
  arguments.strips = static_cast<uint32_t>(strips());
}

// Numbers the blocks of the stages; returns how many there are.
int64_t number_blocks(Arguments& arguments) {
  int64_t blocks = 0;
  for (int32_t s = 0; s < arguments.count; ++s) {
    Stage& stage = arguments.stages[s];
    stage.first_block = static_cast<int32_t>(blocks);
    const int64_t threads =
        stage.images * stage.vectors * arguments.strips * arguments.columns.positions;
    if (threads > UINT32_MAX - kThreads) {
      throw std::runtime_error(
          "resample2d: stage too large for one launch: " + std::to_string(threads) + " threads");
    }
    blocks += ceil_div<int64_t>(threads, kThreads);
  }
  return blocks;
}

template <class T, int kWindow, int kStep, int kPhases>
void run(const Launches& launches, const Device& device, cudaStream_t stream) {
  const auto start = [&](Launch each, void (*kernel)(Arguments)) {
    cut_strips(each, device);
    const int64_t blocks = number_blocks(each.arguments);
    const Grid grid{blocks, kThreads, 0, 1, true};
    launch(kOp, kernel, grid, stream, each.arguments);
  };
  for (const Launch& each : launches.vectors()) {
    start(each, resample2d_kernel<T, kWindow, kStep, kPhases, true>);
  }
  for (const Launch& each : launches.elements()) {
    start(each, resample2d_kernel<T, kWindow, kStep, kPhases, false>);
  }
}

template <class T>
void run_for(const ResampleFilter& filter, const Launches& launches, const Device& device,
             cudaStream_t stream) {
  const size_t taps = filter.taps.size();
  if (filter.stride == 1) return run<T, 8, 1, 1>(launches, device, stream);
  if (filter.upward) {
    return taps <= 4 ? run<T, 2, 1, 2>(launches, device, stream)
                     : run<T, 4, 1, 2>(launches, device, stream);
  }
  return taps <= 2   ? run<T, 2, 2, 1>(launches, device, stream)
         : taps <= 4 ? run<T, 4, 2, 1>(launches, device, stream)
                     : run<T, 8, 2, 1>(launches, device, stream);
}

}  // namespace

void resample2d(const ResampleShape& shape, const ResampleFilter& filter, const void* x, void* y,
                int device, void* stream) {
  use_device(kOp, device);
  const Device facts =
      current_device(kOp, reinterpret_cast<const void*>(resample2d_kernel<float, 2, 2, 1, true>));
  const Launches launches(shape, filter, x, y);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (shape.type) {
    case ElementType::kFloat:
      return run_for<float>(filter, launches, facts, on);
    case ElementType::kBFloat16:
      return run_for<BFloat16>(filter, launches, facts, on);
    case ElementType::kHalf:
      return run_for<Half>(filter, launches, facts, on);
  }
}

}  // namespace msd::cuda

// A block's share of a unit: where it lies, how it comes into shared memory, and how the threads
// walk over it.
#pragma once

#include <new>

#include "group_norm_plan.h"
#include "vectors.cuh"

namespace msd::cuda {

struct Unit {
  Stage stage;
  int64_t sample;
  int group, groups;      // the first group in its sample, and how many
  int channel, channels;  // likewise
  bool exists;

  __device__ Unit(const Stage& s, int number) : stage(s), sample(number / s.blocks) {
    exists = sample < stage.samples;
    group = (number - static_cast<int>(sample) * stage.blocks) * stage.block_groups;
    groups = smaller(stage.block_groups, stage.groups - group);
    channel = group * group_channels();
    channels = groups * group_channels();
  }

  __device__ int group_channels() const { return static_cast<int>(stage.group_channels.value); }

  __device__ int group_of(int unit_channel) const {
    return quotient(unit_channel, stage.group_channels);
  }
  // The place of a channel of the unit in weight and bias, in scale and shift; of a group in mean
  // and rstd.
  __device__ int64_t per_channel(int c) const { return stage.per_channel + channel + c; }
  __device__ int64_t per_sample(int c) const {
    return stage.per_sample + sample * stage.channels + channel + c;
  }
  __device__ int64_t per_group(int g) const {
    return stage.stats + sample * stage.groups + group + g;
  }
};

// The last stage that begins at or before a block or unit; stages without any begin where the next
// one does.
__device__ inline const Stage& stage_of(const Stages& stages, int32_t Stage::* first, int number) {
  int s = 0;
  while (s + 1 < stages.count && stages.stage[s + 1].*first <= number) ++s;
  return stages.stage[s];
}

struct Share {
  Unit unit;
  int part;
  int64_t total_pixels, first_pixel;
  int pixels;

  __device__ explicit Share(const Stages& stages)
      : Share(stage_of(stages, &Stage::first_block, blockIdx.x), stages.pixels) {}

  // The pixels of another share of the unit.
  __device__ int pixels_of(int other) const {
    const int64_t rest = total_pixels - static_cast<int64_t>(other) * unit.stage.part_pixels;
    return static_cast<int>(smaller<int64_t>(larger<int64_t>(rest, 0), unit.stage.part_pixels));
  }

 private:
  __device__ Share(const Stage& stage, int64_t all_pixels)
      : Share(stage, all_pixels, (blockIdx.x - stage.first_block) / stage.parts) {}

  __device__ Share(const Stage& stage, int64_t all_pixels, int number)
      : unit(stage, number),
        part(blockIdx.x - stage.first_block - number * stage.parts),
        total_pixels(all_pixels),
        first_pixel(static_cast<int64_t>(part) * stage.part_pixels),
        pixels(pixels_of(part)) {}
};

// A share as a matrix in device memory, in elements.
struct Tile {
  int rows, columns;
  int64_t first, stride;

  template <bool kChannelsLast>
  __device__ static Tile of(const Share& share) {
    const Unit& unit = share.unit;
    const Stage& stage = unit.stage;
    if (kChannelsLast) {
      const int64_t pixel = unit.sample * share.total_pixels + share.first_pixel;
      return {share.pixels, unit.channels, stage.x + pixel * stage.channels + unit.channel,
              stage.channels};
    }
    const int64_t plane = unit.sample * stage.channels + unit.channel;
    return {unit.channels, share.pixels, stage.x + plane * share.total_pixels + share.first_pixel,
            share.total_pixels};
  }
};

// What a thread takes of a tile in one go: `count` vectors, all of a channel's row (NCHW) or of
// some channels' columns (NHWC), the i-th one at row + i row_step, vector + i vector_step.
struct Walk {
  int row, vector, row_step, vector_step, count;
  int channel;  // of the first element
  int part;     // of the partial sums that the thread contributes to; -1: none

  // Elements of the i-th vector that are inside of the tile.
  __device__ int valid(int i, const Tile& tile) const {
    return tile.columns - (vector + i * vector_step) * kLanes;
  }
};

// The vectors of a walk over a slab.
template <class T>
class SlabCursor {
 public:
  __device__ SlabCursor(const char* slab, int pitch, const Walk& walk)
      : at_(slab + walk.row * pitch + walk.vector * kVectorBytes<T>),
        step_(walk.row_step * pitch + walk.vector_step * kVectorBytes<T>) {}

  __device__ Words<T> load(int i) const {
    return *reinterpret_cast<const Words<T>*>(at_ + i * step_);
  }
  __device__ void advance(int vectors) { at_ += vectors * step_; }

 private:
  const char* at_;
  int step_;
};

// How many vectors a thread loads ahead of each of some buffers: device memory answers later than
// shared memory.
template <class T, bool kStaged, int kBuffers>
constexpr int kBatch = kStaged ? 16 / kVectorBytes<T> : 4 / kBuffers;

// The vectors of a walk over device memory.
template <class T>
class Cursor {
 public:
  __device__ Cursor(T* buffer, const Tile& tile, int width, const Walk& walk)
      : at_(buffer + tile.first + walk.row * tile.stride + walk.vector * kLanes),
        step_(walk.row_step * tile.stride + walk.vector_step * kLanes),
        width_(width),
        valid_(walk.valid(0, tile)),
        valid_step_(walk.vector_step * kLanes) {}

  __device__ Words<T> load(int i) const {
    return load_vector(at_ + i * step_, width_, valid_ - i * valid_step_);
  }
  __device__ void store(const Four& values) const { store_vector(at_, values, width_, valid_); }
  __device__ void advance(int vectors) {
    at_ += vectors * step_;
    valid_ -= vectors * valid_step_;
  }

 private:
  T* at_;
  int64_t step_;
  int width_, valid_, valid_step_;
};

// A thread's items of a tile that is copied, dealt to all threads in turn. Offsets in bytes.
template <int kBytes>
struct CopyItems {
  int rows, per_row, row_step, item_step;
  int row, item;
  // A carry moves from behind the end of a row to the next one.
  int shared, shared_step, shared_carry;
  int64_t global, global_step, global_carry;

  __device__ CopyItems(const Tile& tile, int pitch, int element_bytes)
      : rows(tile.rows), per_row(tile.columns * element_bytes / kBytes) {
    const int64_t stride = tile.stride * element_bytes;
    row = static_cast<int>(threadIdx.x / static_cast<unsigned>(per_row));
    item = static_cast<int>(threadIdx.x) - row * per_row;
    row_step = static_cast<int>(static_cast<unsigned>(kThreads) / per_row);
    item_step = kThreads - row_step * per_row;
    shared = row * pitch + item * kBytes;
    shared_step = row_step * pitch + item_step * kBytes;
    shared_carry = pitch - per_row * kBytes;
    global = row * stride + item * kBytes;
    global_step = row_step * stride + item_step * kBytes;
    global_carry = stride - per_row * kBytes;
  }

  __device__ bool more() const { return row < rows; }
  __device__ void next() {
    row += row_step;
    item += item_step;
    shared += shared_step;
    global += global_step;
    if (item >= per_row) {
      item -= per_row;
      ++row;
      shared += shared_carry;
      global += global_carry;
    }
  }
};

// The copy of a tile of each of some buffers to a slab of its own, one `slab` bytes behind the
// other.
template <int kBuffers>
struct TileCopy {
  char* slabs;
  int slab;
  const char* buffers[kBuffers];  // where the tile begins

  template <int kBytes>
  __device__ void start(CopyItems<kBytes> items) const {
    for (; items.more(); items.next()) {
#pragma unroll
      for (int b = 0; b < kBuffers; ++b) {
        copy_async<kBytes>(slabs + b * slab + items.shared, buffers[b] + items.global);
      }
    }
  }

  // There is no asynchronous copy of 2 bytes; some loads at a time hide each other's latency.
  __device__ void start(CopyItems<2> items) const {
    constexpr int kAhead = 8;
    while (items.more()) {
      uint16_t values[kAhead][kBuffers];
      int to[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        to[i] = -1;
        if (!items.more()) continue;
        to[i] = items.shared;
#pragma unroll
        for (int b = 0; b < kBuffers; ++b) {
          values[i][b] = *reinterpret_cast<const uint16_t*>(buffers[b] + items.global);
        }
        items.next();
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (to[i] < 0) continue;
#pragma unroll
        for (int b = 0; b < kBuffers; ++b) {
          *reinterpret_cast<uint16_t*>(slabs + b * slab + to[i]) = values[i][b];
        }
      }
    }
  }
};

// The pixels of a channel that each of its partial sums counts.
template <bool kChannelsLast>
struct PartPixels {
  int each, rest;

  __device__ PartPixels(const Geometry& g, const Tile& tile)
      : each(kChannelsLast ? tile.rows / g.teams : g.vectors_per_segment * kLanes),
        rest(kChannelsLast ? tile.rows - each * g.teams : tile.columns) {}

  __device__ int operator()(int part) const {
    if (kChannelsLast) return each + (part < rest ? 1 : 0);
    return larger(smaller(rest - part * each, each), 0);
  }
};

// What all threads of a block know: its share and its shared memory, at the head of which this lies
// itself. There it takes no registers while the threads are busy with a tile.
template <class T, bool kChannelsLast>
struct Block {
  Share share;
  Tile tile;
  PartPixels<kChannelsLast> part_pixels;

  __device__ explicit Block(const Stages& stages)
      : share(stages), tile(Tile::of<kChannelsLast>(share)), part_pixels(geometry(), tile) {}

  // The block's own, in its shared memory. All threads must call.
  __device__ static const Block& make(const Stages& stages) {
    static_assert(sizeof(Block) <= SharedLayout::kHeader);
    auto* block = reinterpret_cast<Block*>(shared_memory());
    if (threadIdx.x == 0) new (block) Block(stages);
    __syncthreads();
    return *block;
  }

  __device__ const Unit& unit() const { return share.unit; }
  __device__ const Stage& stage() const { return share.unit.stage; }
  __device__ const Geometry& geometry() const { return stage().geometry; }

  __device__ char* slab(int i) const {
    return shared_memory() + SharedLayout::kHeader + i * stage().layout.slab;
  }
  // Starts to copy the tile of each buffer to a slab. Columns beyond the last one of a row stay
  // undefined.
  template <class... Buffers>
  __device__ void start_copies(const Buffers*... buffers) const {
    if (tile.rows == 0 || tile.columns == 0) return;
    const TileCopy<sizeof...(Buffers)> copy = {
        slab(0), stage().layout.slab, {reinterpret_cast<const char*>(buffers + tile.first)...}};
    constexpr int kElement = sizeof(T);
    const int pitch = stage().layout.pitch;
    switch (stage().width) {
      case 16:
        return copy.start(CopyItems<16>(tile, pitch, kElement));
      case 8:
        return copy.start(CopyItems<8>(tile, pitch, kElement));
      case 4:
        return copy.start(CopyItems<4>(tile, pitch, kElement));
      default:
        return copy.start(CopyItems<2>(tile, pitch, kElement));
    }
  }
  __device__ float* partials(int i) const {
    return floats(stage().layout.partials) + i * geometry().parts * geometry().padded;
  }
  __device__ float* channels(int i) const {
    return floats(stage().layout.channels) + i * geometry().padded;
  }
  __device__ float* groups(int i) const {
    return floats(stage().layout.groups) + i * stage().layout.padded_groups;
  }
  __device__ float2* channel_pairs(int i) const { return reinterpret_cast<float2*>(channels(i)); }
  __device__ float2* group_pairs(int i) const { return reinterpret_cast<float2*>(groups(i)); }

  // A walk's vectors of a buffer, or of its copy in slab i.
  template <bool kStaged>
  __device__ auto cursor(int i, const T* buffer, const Walk& walk) const {
    if constexpr (kStaged) {
      return SlabCursor<T>(slab(i), stage().layout.pitch, walk);
    } else {
      return Cursor<const T>(buffer, tile, stage().width, walk);
    }
  }
  __device__ Cursor<T> output(T* buffer, const Walk& walk) const {
    return {buffer, tile, stage().width, walk};
  }

 private:
  __device__ float* floats(int32_t offset) const {
    return reinterpret_cast<float*>(shared_memory() + offset);
  }
};

// The threads of a block as teams.
template <class T, bool kChannelsLast>
class Team {
 public:
  __device__ explicit Team(const Block<T, kChannelsLast>& block)
      : block_(block),
        team_(quotient(threadIdx.x, block.geometry().by_lanes)),
        lane_(threadIdx.x - team_ * block.geometry().lanes) {}

  __device__ bool is_first_lane() const { return lane_ == 0; }

  // The same for all threads, so that they may meet inside of the loop.
  __device__ int walks() const { return block_.geometry().walks; }

  __device__ Walk walk(int number) const {
    const Geometry& g = block_.geometry();
    const Tile& tile = block_.tile;
    if (kChannelsLast) {
      const int vector = lane_ + number * g.lanes;
      const bool inside = team_ < g.teams && vector * kLanes < tile.columns;
      const int count = inside ? block_.part_pixels(team_) : 0;
      return {team_, vector, g.teams, 0, count, vector * kLanes, inside ? team_ : -1};
    }
    const int segment = number * g.teams + team_;
    const int row = quotient(segment, g.by_segments);
    const int part = segment - row * g.segments;
    const int begin = part * g.vectors_per_segment;
    const int end = smaller(begin + g.vectors_per_segment, ceil_div(tile.columns, kLanes));
    const bool inside = row < tile.rows;
    // Lanes are a power of two.
    const int rest = larger(end - begin - lane_, 0) + g.lanes - 1;
    const int count = inside ? rest >> (31 - __clz(g.lanes)) : 0;
    return {row, begin + lane_, 0, g.lanes, count, row, inside ? part : -1};
  }

 private:
  const Block<T, kChannelsLast>& block_;
  int team_, lane_;
};

// The values of the channels of a walk's vectors.
template <bool kChannelsLast>
__device__ __forceinline__ Four of_channels(const float* channels, const Walk& walk) {
  if constexpr (kChannelsLast) {
    const float4 four = *reinterpret_cast<const float4*>(channels + walk.channel);
    return {four.x, four.y, four.z, four.w};
  } else {
    const float value = channels[walk.channel];
    return {value, value, value, value};
  }
}

template <class T>
__device__ float element(const ConstArray& array, int64_t i, float missing) {
  if (array.data == nullptr) return missing;
  return array.is_float ? static_cast<const float*>(array.data)[i]
                        : to_float(static_cast<const T*>(array.data)[i]);
}

template <class T>
__device__ void set_element(const MutableArray& array, int64_t i, float value) {
  if (array.data == nullptr) return;
  if (array.is_float) {
    static_cast<float*>(array.data)[i] = value;
  } else {
    from_float(value, static_cast<T*>(array.data) + i);
  }
}

// z = (xhat weight + bias) gain + shift of one channel of one sample, gain = 1 + scale.
struct ChannelAffine {
  float weight, bias, gain, shift;

  template <class T>
  __device__ static ChannelAffine of(const Affine& affine, const Unit& unit, int c) {
    return {element<T>(affine.weight, unit.per_channel(c), 1.0f),
            element<T>(affine.bias, unit.per_channel(c), 0.0f),
            1.0f + element<T>(affine.scale, unit.per_sample(c), 0.0f),
            element<T>(affine.shift, unit.per_sample(c), 0.0f)};
  }
  __device__ float slope() const { return weight * gain; }
  __device__ float offset() const { return bias * gain + shift; }
};

}  // namespace msd::cuda

// 3x3 convolutions, stride 1, padding 1, of the samples of all stages, on maps with the channels
// innermost, by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308). Sums are float32.
//
// Every sum over channels runs in the order of the channels: a sample's result depends neither on
// its neighbours nor on the threads. A value of a map is spread over its tile and subtracted again,
// so that one beyond kLargestOrdinary, an infinity or a NaN would harm what it should not reach:
// samples that have or meet one are reported, and their results are to be computed otherwise.
#pragma once

#include <cstdint>
#include <vector>

#include "../group_norm_job.h"

namespace msd {

constexpr float kLargestOrdinary = 0x1p32f;

// The convolved grid's pixels in the sources' maps: those of the same size; of a map half as high
// and wide, each for 2x2 pixels of the grid; the means of 2x2 pixels of one twice as high and wide.
enum class Sampling { kSame, kHalf, kMean };

// [samples, height, width, channels]; no data: absent.
struct SourceMap {
  const void* data = nullptr;
  int64_t channels = 0;
};
struct TargetMap {
  void* data = nullptr;
  int64_t channels = 0;
};

struct ConvSize {
  ElementType type = ElementType::kFloat;
  int64_t height = 0, width = 0;  // of the grid
  Sampling sampling = Sampling::kSame;
};

// The channels of the second map stand behind those of the first.
struct ConvStage {
  int64_t samples = 0;
  SourceMap in[2];
  TargetMap out[2];
  const void* weight = nullptr;  // [O, I, 3, 3], or [O, 3, 3, I] with the channels innermost
  bool channels_innermost = false;
  // Of the forward alone: [O], [samples, O] and like the output, or null.
  const void *bias = nullptr, *sample_bias = nullptr, *residual = nullptr;
  uint8_t* outliers = nullptr;  // [samples], becomes 1 where a result is to be computed otherwise
};

// Forward: out = scale (conv(sampled in) + bias + sample_bias + residual), in has I channels, out
// O. Input gradient: in has O channels, out I; out lies as the forward's sources do.
struct ConvJob {
  ConvSize size;
  bool input_gradient = false;
  float scale = 1.0f;
  std::vector<ConvStage> stages;
};

void winograd_conv(const ConvJob& job);

struct WeightGradientStage {
  int64_t samples = 0;
  SourceMap in[2];
  SourceMap cotangent;
  float* gradient = nullptr;  // [O, I, 3, 3], or [O, 3, 3, I] with the channels innermost
  bool channels_innermost = false;
  uint8_t* outliers = nullptr;
};

struct WeightGradientJob {
  ConvSize size;
  std::vector<WeightGradientStage> stages;
};

void winograd_weight_gradient(const WeightGradientJob& job);

}  // namespace msd

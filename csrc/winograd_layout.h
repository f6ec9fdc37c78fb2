// A convolution's layout and addresses as jobs of Winograd's convolutions.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/winograd.h"

namespace msd {

// A layout as the kernels take it, with the type of the features, in which the weights come, too.
// Their gradients are float32. Tensors per stage hold an address for every stage; weights, and
// their gradients, lie as [O, I, 3, 3] or, in the stages of a list, as [O, 3, 3, I].
class WinogradLayout {
 public:
  using Stages = std::vector<Address>;

  WinogradLayout(Sizes counts, Sizes channels, Sizes skip_channels, Sizes out_channels,
                 int64_t height, int64_t width, int64_t kernel, const std::string& resample,
                 const Types<1>& types)
      : counts_(std::move(counts)),
        channels_(std::move(channels)),
        skip_channels_(std::move(skip_channels)),
        out_channels_(std::move(out_channels)) {
    const bool up = resample == "up", down = resample == "down";
    require(kernel == 3 && (up || down || resample == "none"), "winograd: no such convolution");
    require(height >= 1 && width >= 1 && !(down && (height % 2 != 0 || width % 2 != 0)),
            "winograd: no such sizes");
    size_ = {element_type(types[0]), up ? 2 * height : height / (down ? 2 : 1),
             up ? 2 * width : width / (down ? 2 : 1),
             up     ? Sampling::kHalf
             : down ? Sampling::kMean
                    : Sampling::kSame};
    const size_t stages = counts_.size();
    require(channels_.size() == stages && skip_channels_.size() == stages &&
                out_channels_.size() == stages,
            "winograd: needs sizes of every stage");
    for (size_t s = 0; s < stages; ++s) {
      require(
          counts_[s] >= 0 && channels_[s] >= 1 && skip_channels_[s] >= 0 && out_channels_[s] >= 1,
          "winograd: needs channels");
      offsets_.push_back(total_);
      total_.samples += counts_[s];
      total_.x += counts_[s] * channels_[s] * height * width;
      total_.skip += counts_[s] * skip_channels_[s] * height * width;
      total_.out += counts_[s] * out_channels_[s] * size_.height * size_.width;
      total_.sample_channels += counts_[s] * out_channels_[s];
    }
  }

  // Inputs: x, skip, sample_bias, residual. Outputs: y, outliers.
  ConvJob forward(const Sizes& stages, const Addresses<4>& inputs, const Stages& weight,
                  const Sizes& innermost, const Stages& bias, double scale,
                  const Addresses<2>& outputs) const {
    require(weight.size() == counts_.size() && bias.size() == counts_.size(),
            "winograd: needs a weight and a bias per stage");
    ConvJob job;
    job.size = size_;
    job.scale = static_cast<float>(scale);
    for (const int64_t s : stages) {
      ConvStage stage = of_stage<ConvStage>(s, outputs[1]);
      set_sources(stage, inputs[0], inputs[1], s);
      stage.out[0] = target(output(outputs[0], s));
      stage.weight = at(weight[s]);
      stage.channels_innermost = contains(innermost, s);
      stage.bias = at(bias[s]);
      stage.sample_bias = part(inputs[2], offsets_[s].sample_channels);
      stage.residual = output(inputs[3], s).data;
      job.stages.push_back(stage);
    }
    return job;
  }

  // Outputs: dx, dskip, outliers.
  ConvJob input_gradient(const Sizes& stages, Address dy, const Stages& weight,
                         const Sizes& innermost, const Addresses<3>& outputs) const {
    require(weight.size() == counts_.size(), "winograd: needs a weight per stage");
    ConvJob job;
    job.size = size_;
    job.input_gradient = true;
    for (const int64_t s : stages) {
      ConvStage stage = of_stage<ConvStage>(s, outputs[2]);
      stage.in[0] = output(dy, s);
      stage.out[0] = target({part(outputs[0], offsets_[s].x), channels_[s]});
      stage.out[1] = target({part(outputs[1], offsets_[s].skip), skip_channels_[s]});
      stage.weight = at(weight[s]);
      stage.channels_innermost = contains(innermost, s);
      job.stages.push_back(stage);
    }
    return job;
  }

  // Inputs: dy, x, skip.
  WeightGradientJob weight_gradient(const Sizes& stages, const Addresses<3>& inputs,
                                    const Stages& gradients, const Sizes& innermost,
                                    Address outliers) const {
    require(gradients.size() == counts_.size(), "winograd: needs a gradient per stage");
    WeightGradientJob job;
    job.size = size_;
    for (const int64_t s : stages) {
      WeightGradientStage stage = of_stage<WeightGradientStage>(s, outliers);
      set_sources(stage, inputs[1], inputs[2], s);
      stage.cotangent = output(inputs[0], s);
      stage.gradient = at<float>(gradients[s]);
      stage.channels_innermost = contains(innermost, s);
      job.stages.push_back(stage);
    }
    return job;
  }

 private:
  struct Offsets {
    int64_t samples = 0, x = 0, skip = 0, out = 0, sample_channels = 0;
  };

  template <class Stage>
  Stage of_stage(int64_t s, Address outliers) const {
    require(s >= 0 && s < static_cast<int64_t>(counts_.size()), "winograd: no such stage");
    Stage stage;
    stage.samples = counts_[s];
    stage.outliers = at<uint8_t>(outliers) + offsets_[s].samples;
    return stage;
  }

  template <class Stage>
  void set_sources(Stage& stage, Address x, Address skip, int64_t s) const {
    require(skip_channels_[s] == 0 || skip != 0, "winograd: skip is missing");
    stage.in[0] = {part(x, offsets_[s].x), channels_[s]};
    if (skip_channels_[s] != 0) stage.in[1] = {part(skip, offsets_[s].skip), skip_channels_[s]};
  }

  SourceMap output(Address tensor, int64_t s) const {
    return {part(tensor, offsets_[s].out), out_channels_[s]};
  }

  static bool contains(const Sizes& stages, int64_t s) {
    return std::find(stages.begin(), stages.end(), s) != stages.end();
  }

  static TargetMap target(const SourceMap& map) {
    return {const_cast<void*>(map.data), map.channels};
  }

  // A stage's part of a tensor, null of none.
  const void* part(Address tensor, int64_t elements) const {
    return tensor == 0 ? nullptr
                       : at<char>(tensor) + elements * (size_.type == ElementType::kFloat ? 4 : 2);
  }

  Sizes counts_, channels_, skip_channels_, out_channels_;
  ConvSize size_;
  Offsets total_;
  std::vector<Offsets> offsets_;
};

}  // namespace msd

// The arguments of the registered ops of Winograd's convolutions as jobs. The fields of a layout
// come as msd_kernels/layouts.py has them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpu/winograd.h"
#include "op_arguments.h"

namespace msd {

struct WinogradLayout {
  std::vector<int64_t> counts, channels, skip_channels, out_channels;
  int64_t height = 0, width = 0, kernel = 0;
  std::string resample;
};

// Checks a call's tensors against its layout, and finds each stage's part of them.
class WinogradCall {
 public:
  WinogradCall(const WinogradLayout& layout, const std::vector<int64_t>& stages, const Tensor& x)
      : layout_(layout), stages_(stages), x_(x), type_(x.scalar_type()) {
    const size_t count = layout.counts.size();
    STD_TORCH_CHECK(layout.channels.size() == count && layout.skip_channels.size() == count &&
                        layout.out_channels.size() == count,
                    kOp, ": counts and channels need one entry per stage");
    STD_TORCH_CHECK(layout.kernel == 3, kOp, ": kernel must be 3, got ", layout.kernel);
    STD_TORCH_CHECK(layout.height >= 1 && layout.width >= 1, kOp, ": sizes must be positive, got ",
                    layout.height, " x ", layout.width);
    set_sizes();
    for (size_t s = 0; s < count; ++s) add(s);
    for (const int64_t s : stages) {
      STD_TORCH_CHECK(s >= 0 && s < static_cast<int64_t>(count), kOp, ": no stage ", s);
    }
  }

  // Of a tensor of the sources' or the output's size.
  const char* source(const char* name, const Tensor& tensor, bool skip) const {
    check(name, tensor, skip ? sizes_.skip : sizes_.x);
    return static_cast<const char*>(tensor.const_data_ptr());
  }
  const char* output(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.out);
    return static_cast<const char*>(tensor.const_data_ptr());
  }
  const char* per_sample(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.sample_channels);
    return static_cast<const char*>(tensor.const_data_ptr());
  }
  uint8_t* outliers(const Tensor& tensor) const {
    check_contents(kOp, "outliers", tensor, sizes_.samples, ScalarType::Byte);
    check_same_device(kOp, "outliers", tensor, x_);
    return static_cast<uint8_t*>(const_cast<void*>(tensor.const_data_ptr()));
  }
  const void* weight(const std::vector<Tensor>& weights, int64_t stage, ScalarType type) const {
    require_stages("weight", weights);
    check_contents(kOp, "weight", weights[stage], weight_elements_[stage], type);
    return weights[stage].const_data_ptr();
  }
  // Null where there are none.
  const void* bias(const std::vector<Tensor>& biases, int64_t stage) const {
    if (biases.empty()) return nullptr;
    require_stages("bias", biases);
    check_contents(kOp, "bias", biases[stage], layout_.out_channels[stage], type_);
    return biases[stage].const_data_ptr();
  }

  ConvSize size() const { return {element_type(kOp, x_), out_height_, out_width_, sampling_}; }
  ScalarType type() const { return type_; }
  const std::vector<int64_t>& stages() const { return stages_; }
  int64_t samples(int64_t stage) const { return layout_.counts[stage]; }
  // A stage's part of a tensor, null of null.
  SourceMap source_part(const char* data, int64_t stage, bool skip) const {
    const int64_t channels = (skip ? layout_.skip_channels : layout_.channels)[stage];
    if (channels == 0 && skip) return {};
    return {part(data, (skip ? offsets_[stage].skip : offsets_[stage].x)), channels};
  }
  SourceMap output_part(const char* data, int64_t stage) const {
    return {part(data, offsets_[stage].out), layout_.out_channels[stage]};
  }
  const void* sample_part(const char* data, int64_t stage) const {
    return part(data, offsets_[stage].sample_channels);
  }
  uint8_t* outlier_part(uint8_t* data, int64_t stage) const {
    return data + offsets_[stage].samples;
  }

 private:
  static constexpr const char* kOp = "grouped_conv2d";

  struct Sizes {
    int64_t x = 0, skip = 0, out = 0, sample_channels = 0, samples = 0;
  };

  void set_sizes() {
    const bool up = layout_.resample == "up", down = layout_.resample == "down";
    STD_TORCH_CHECK(up || down || layout_.resample == "none", kOp,
                    ": resample must be none, up or down, got ", layout_.resample);
    STD_TORCH_CHECK(!down || (layout_.height % 2 == 0 && layout_.width % 2 == 0), kOp,
                    ": down needs even height and width, got ", layout_.height, " x ",
                    layout_.width);
    sampling_ = up ? Sampling::kHalf : down ? Sampling::kMean : Sampling::kSame;
    out_height_ = up ? checked_product(2, layout_.height) : layout_.height / (down ? 2 : 1);
    out_width_ = up ? checked_product(2, layout_.width) : layout_.width / (down ? 2 : 1);
  }

  void add(size_t s) {
    const int64_t count = layout_.counts[s], channels = layout_.channels[s],
                  skip = layout_.skip_channels[s], out = layout_.out_channels[s];
    STD_TORCH_CHECK(count >= 0 && channels >= 1 && skip >= 0 && out >= 1, kOp, ": counts=", count,
                    ", channels=", channels, ", skip_channels=", skip, " or out_channels=", out,
                    " of stage ", s, " is too small");
    offsets_.push_back(sizes_);
    const int64_t pixels = checked_product(layout_.height, layout_.width);
    const int64_t in = checked_sum(channels, skip);
    weight_elements_.push_back(checked_product(9, checked_product(in, out)));
    checked_product(checked_product(count, in), pixels);
    const int64_t out_pixels = checked_product(out_height_, out_width_);
    sizes_.x = checked_sum(sizes_.x, checked_product(checked_product(count, channels), pixels));
    sizes_.skip = checked_sum(sizes_.skip, checked_product(checked_product(count, skip), pixels));
    sizes_.out = checked_sum(sizes_.out, checked_product(checked_product(count, out), out_pixels));
    sizes_.sample_channels = checked_sum(sizes_.sample_channels, checked_product(count, out));
    sizes_.samples = checked_sum(sizes_.samples, count);
  }

  void check(const char* name, const Tensor& tensor, int64_t elements) const {
    check_contents(kOp, name, tensor, elements, type_);
    check_same_device(kOp, name, tensor, x_);
  }

  void require_stages(const char* name, const std::vector<Tensor>& tensors) const {
    STD_TORCH_CHECK(tensors.size() == layout_.counts.size(), kOp, ": ", name,
                    " must hold one tensor per stage, got ", tensors.size());
  }

  const char* part(const char* data, int64_t offset) const {
    return data == nullptr ? nullptr : data + offset * (type_ == ScalarType::Float ? 4 : 2);
  }

  const WinogradLayout& layout_;
  const std::vector<int64_t>& stages_;
  const Tensor& x_;
  const ScalarType type_;
  Sampling sampling_ = Sampling::kSame;
  int64_t out_height_ = 0, out_width_ = 0;
  Sizes sizes_;
  std::vector<Sizes> offsets_;
  std::vector<int64_t> weight_elements_;
};

inline TargetMap writable(SourceMap map) { return {const_cast<void*>(map.data), map.channels}; }

inline ConvJob winograd_forward_job(const WinogradCall& call, const Tensor& x,
                                    const OptionalTensor& skip, const OptionalTensor& sample_bias,
                                    const OptionalTensor& residual,
                                    const std::vector<Tensor>& weight,
                                    const std::vector<Tensor>& bias, double scale, const Tensor& y,
                                    const Tensor& outliers) {
  const char* from_x = call.source("x", x, false);
  const char* from_skip = skip.has_value() ? call.source("skip", *skip, true) : nullptr;
  const char* samples =
      sample_bias.has_value() ? call.per_sample("sample_bias", *sample_bias) : nullptr;
  const char* from_residual = residual.has_value() ? call.output("residual", *residual) : nullptr;
  const char* to = call.output("y", y);
  uint8_t* reported = call.outliers(outliers);
  ConvJob job;
  job.size = call.size();
  job.scale = static_cast<float>(scale);
  for (const int64_t s : call.stages()) {
    ConvStage stage;
    stage.samples = call.samples(s);
    stage.in[0] = call.source_part(from_x, s, false);
    stage.in[1] = call.source_part(from_skip, s, true);
    STD_TORCH_CHECK(stage.in[1].channels == 0 || from_skip != nullptr,
                    "grouped_conv2d: skip is missing");
    stage.out[0] = writable(call.output_part(to, s));
    stage.weight = call.weight(weight, s, call.type());
    stage.bias = call.bias(bias, s);
    stage.sample_bias = call.sample_part(samples, s);
    stage.residual = call.output_part(from_residual, s).data;
    stage.outliers = call.outlier_part(reported, s);
    job.stages.push_back(stage);
  }
  return job;
}

inline ConvJob winograd_input_gradient_job(const WinogradCall& call, const Tensor& dy,
                                           const std::vector<Tensor>& weight,
                                           const OptionalTensor& dx, const OptionalTensor& dskip,
                                           const Tensor& outliers) {
  const char* from = call.output("dy", dy);
  const char* to_x = dx.has_value() ? call.source("dx", *dx, false) : nullptr;
  const char* to_skip = dskip.has_value() ? call.source("dskip", *dskip, true) : nullptr;
  uint8_t* reported = call.outliers(outliers);
  ConvJob job;
  job.size = call.size();
  job.input_gradient = true;
  for (const int64_t s : call.stages()) {
    ConvStage stage;
    stage.samples = call.samples(s);
    stage.in[0] = call.output_part(from, s);
    stage.out[0] = writable(call.source_part(to_x, s, false));
    stage.out[1] = writable(call.source_part(to_skip, s, true));
    stage.weight = call.weight(weight, s, call.type());
    stage.outliers = call.outlier_part(reported, s);
    job.stages.push_back(stage);
  }
  return job;
}

// The gradients are float32, one per entry of `stages`.
inline WeightGradientJob winograd_weight_gradient_job(const WinogradCall& call, const Tensor& dy,
                                                      const Tensor& x, const OptionalTensor& skip,
                                                      const std::vector<Tensor>& dweight,
                                                      const Tensor& outliers) {
  const char* cotangent = call.output("dy", dy);
  const char* from_x = call.source("x", x, false);
  const char* from_skip = skip.has_value() ? call.source("skip", *skip, true) : nullptr;
  uint8_t* reported = call.outliers(outliers);
  WeightGradientJob job;
  job.size = call.size();
  for (const int64_t s : call.stages()) {
    WeightGradientStage stage;
    stage.samples = call.samples(s);
    stage.in[0] = call.source_part(from_x, s, false);
    stage.in[1] = call.source_part(from_skip, s, true);
    STD_TORCH_CHECK(stage.in[1].channels == 0 || from_skip != nullptr,
                    "grouped_conv2d: skip is missing");
    stage.cotangent = call.output_part(cotangent, s);
    stage.gradient =
        static_cast<float*>(const_cast<void*>(call.weight(dweight, s, ScalarType::Float)));
    stage.outliers = call.outlier_part(reported, s);
    job.stages.push_back(stage);
  }
  return job;
}

}  // namespace msd

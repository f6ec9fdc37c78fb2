// The arguments of the registered ops of GroupNorm as jobs, the same for the CPU and for CUDA.
#pragma once

#include <vector>

#include "op_arguments.h"

namespace msd {

// The number of elements of each kind of buffer of a packed stage batch.
struct GroupNormSizes {
  int64_t elements = 0, channels = 0, sample_channels = 0, sample_groups = 0;

  explicit GroupNormSizes(const GroupNormShape& shape) {
    const size_t stages = shape.counts.size();
    STD_TORCH_CHECK(shape.channels.size() == stages && shape.groups.size() == stages,
                    "group_norm: counts, channels and groups need one entry per stage, got ",
                    stages, ", ", shape.channels.size(), " and ", shape.groups.size());
    STD_TORCH_CHECK(shape.spatial >= 1, "group_norm: spatial=", shape.spatial, " must be positive");
    for (size_t s = 0; s < stages; ++s) add(s, shape);
  }

 private:
  void add(size_t s, const GroupNormShape& shape) {
    const int64_t count = shape.counts[s];
    const int64_t width = shape.channels[s];
    const int64_t groups = shape.groups[s];
    STD_TORCH_CHECK(count >= 0, "group_norm: counts=", count, " of stage ", s, " is negative");
    STD_TORCH_CHECK(width >= 1 && groups >= 1 && width % groups == 0,
                    "group_norm: num_groups=", groups, " does not divide channels=", width,
                    " of stage ", s);
    // An empty stage, too, must have a sample's size that fits.
    const int64_t sample = checked_product(width, shape.spatial);
    elements = checked_sum(elements, checked_product(count, sample));
    channels = checked_sum(channels, width);
    sample_channels = checked_sum(sample_channels, checked_product(count, width));
    sample_groups = checked_sum(sample_groups, checked_product(count, groups));
  }
};

// Buffers whose sizes, types and devices are checked against those of x.
class GroupNormBuffers {
 public:
  GroupNormBuffers(const Tensor& x, const GroupNormShape& shape)
      : x_(x), type_(x.scalar_type()), sizes_(shape), channels_last_(shape.channels_last) {}

  const GroupNormSizes& sizes() const { return sizes_; }
  const void* input(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.elements, type_, channels_last_);
    return tensor.const_data_ptr();
  }
  // A tensor of x's size in NCHW order whatever the order of x.
  const void* planar_input(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.elements, type_);
    return tensor.const_data_ptr();
  }
  void* output(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.elements, type_, channels_last_);
    return tensor.mutable_data_ptr();
  }
  const float* statistics(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.sample_groups, ScalarType::Float);
    return static_cast<const float*>(tensor.const_data_ptr());
  }
  float* mutable_statistics(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.sample_groups, ScalarType::Float);
    return static_cast<float*>(tensor.mutable_data_ptr());
  }
  Affine affine(const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& scale, const OptionalTensor& shift) const {
    return {parameter("weight", weight, sizes_.channels), parameter("bias", bias, sizes_.channels),
            parameter("scale", scale, sizes_.sample_channels),
            parameter("shift", shift, sizes_.sample_channels)};
  }
  MutableArray channel_gradient(const char* name, const OptionalTensor& tensor) const {
    return gradient(name, tensor, sizes_.channels);
  }
  MutableArray sample_gradient(const char* name, const OptionalTensor& tensor) const {
    return gradient(name, tensor, sizes_.sample_channels);
  }

 private:
  ConstArray parameter(const char* name, const OptionalTensor& tensor, int64_t elements) const {
    if (!tensor.has_value()) return {};
    const bool is_float = check_parameter(name, *tensor, elements);
    return {tensor->const_data_ptr(), is_float};
  }
  MutableArray gradient(const char* name, const OptionalTensor& tensor, int64_t elements) const {
    if (!tensor.has_value()) return {};
    const bool is_float = check_parameter(name, *tensor, elements);
    return {tensor->mutable_data_ptr(), is_float};
  }
  bool check_parameter(const char* name, const Tensor& tensor, int64_t elements) const {
    const bool is_float = tensor.scalar_type() == ScalarType::Float;
    check(name, tensor, elements, is_float ? ScalarType::Float : type_);
    return is_float;
  }
  void check(const char* name, const Tensor& tensor, int64_t elements, ScalarType type,
             bool channels_last = false) const {
    check_same_device("group_norm", name, tensor, x_);
    check_contents("group_norm", name, tensor, elements, type, channels_last);
  }

  const Tensor& x_;
  ScalarType type_;
  GroupNormSizes sizes_;
  bool channels_last_;
};

inline GroupNormShape group_norm_shape(const Tensor& x, const std::vector<int64_t>& counts,
                                       const std::vector<int64_t>& channels,
                                       const std::vector<int64_t>& groups, int64_t spatial,
                                       bool channels_last) {
  return {counts, channels, groups, spatial, channels_last, element_type("group_norm", x)};
}

inline GroupNormForward group_norm_forward_job(
    const GroupNormShape& shape, const Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
    double eps, bool silu, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const GroupNormBuffers buffers(x, shape);
  GroupNormForward job;
  job.x = buffers.input("x", x);
  job.affine = buffers.affine(weight, bias, scale, shift);
  job.eps = static_cast<float>(eps);
  job.silu = silu;
  job.y = buffers.output("y", y);
  job.mean = buffers.mutable_statistics("mean", mean);
  job.rstd = buffers.mutable_statistics("rstd", rstd);
  return job;
}

inline GroupNormBackward group_norm_backward_job(
    const GroupNormShape& shape, const Tensor& dy, bool dy_planar, const Tensor& x,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
    const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
    const OptionalTensor& dscale, const OptionalTensor& dshift) {
  const GroupNormBuffers buffers(x, shape);
  GroupNormBackward job;
  job.dy = dy_planar ? buffers.planar_input("dy", dy) : buffers.input("dy", dy);
  job.dy_planar = dy_planar;
  job.x = buffers.input("x", x);
  job.mean = buffers.statistics("mean", mean);
  job.rstd = buffers.statistics("rstd", rstd);
  job.affine = buffers.affine(weight, bias, scale, shift);
  job.silu = silu;
  if (dx.has_value()) job.dx = buffers.output("dx", *dx);
  job.dweight = buffers.channel_gradient("dweight", dweight);
  job.dbias = buffers.channel_gradient("dbias", dbias);
  job.dscale = buffers.sample_gradient("dscale", dscale);
  job.dshift = buffers.sample_gradient("dshift", dshift);
  return job;
}

}  // namespace msd

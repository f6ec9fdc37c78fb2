// Every schema and registration of the extension. Outputs are allocated by the caller; what would
// lead to an access out of bounds is checked here once more.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/channels_last.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/optimal_denoiser.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The number of elements of each kind of buffer of a packed stage batch.
struct Sizes {
  int64_t elements = 0, channels = 0, sample_channels = 0, sample_groups = 0;
};

int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "msd_kernels: size ", a, " x ", b,
                  " does not fit 64 bits");
  return product;
}

Sizes checked_sizes(const msd::GroupNormShape& shape) {
  const size_t stages = shape.counts.size();
  STD_TORCH_CHECK(shape.channels.size() == stages && shape.groups.size() == stages,
                  "group_norm: counts, channels and groups need one entry per stage, got ", stages,
                  ", ", shape.channels.size(), " and ", shape.groups.size());
  STD_TORCH_CHECK(shape.spatial >= 1, "group_norm: spatial=", shape.spatial, " must be positive");
  Sizes sizes;
  for (size_t s = 0; s < stages; ++s) {
    const int64_t count = shape.counts[s];
    const int64_t channels = shape.channels[s];
    const int64_t groups = shape.groups[s];
    STD_TORCH_CHECK(count >= 0, "group_norm: counts=", count, " of stage ", s, " is negative");
    STD_TORCH_CHECK(channels >= 1 && groups >= 1 && channels % groups == 0,
                    "group_norm: num_groups=", groups, " does not divide channels=", channels,
                    " of stage ", s);
    const int64_t sample_channels = checked_product(count, channels);
    sizes.elements += checked_product(sample_channels, shape.spatial);
    sizes.channels += channels;
    sizes.sample_channels += sample_channels;
    sizes.sample_groups += count * groups;
  }
  return sizes;
}

void check_buffer(const char* op, const char* name, const Tensor& tensor, int64_t elements,
                  ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == elements, op, ": ", name, " has ", tensor.numel(),
                  " elements, expected ", elements);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

msd::ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return msd::ElementType::kFloat;
    case ScalarType::BFloat16:
      return msd::ElementType::kBFloat16;
    case ScalarType::Half:
      return msd::ElementType::kHalf;
    default:
      STD_TORCH_CHECK(false, "group_norm: x must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// Buffers whose sizes and types are checked against those of x.
class Buffers {
 public:
  Buffers(const Tensor& x, const msd::GroupNormShape& shape)
      : type_(x.scalar_type()), sizes_(checked_sizes(shape)) {}

  const Sizes& sizes() const { return sizes_; }

  const void* input(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.elements, type_);
    return tensor.const_data_ptr();
  }
  void* output(const char* name, const Tensor& tensor) const {
    check(name, tensor, sizes_.elements, type_);
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
  msd::ConstArray parameter(const char* name, const OptionalTensor& tensor,
                            int64_t elements) const {
    if (!tensor.has_value()) return {};
    const bool is_float = check_parameter(name, *tensor, elements);
    return {tensor->const_data_ptr(), is_float};
  }
  msd::MutableArray gradient(const char* name, const OptionalTensor& tensor,
                             int64_t elements) const {
    if (!tensor.has_value()) return {};
    const bool is_float = check_parameter(name, *tensor, elements);
    return {tensor->mutable_data_ptr(), is_float};
  }
  msd::Affine affine(const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& scale, const OptionalTensor& shift) const {
    return {parameter("weight", weight, sizes_.channels), parameter("bias", bias, sizes_.channels),
            parameter("scale", scale, sizes_.sample_channels),
            parameter("shift", shift, sizes_.sample_channels)};
  }

 private:
  static void check(const char* name, const Tensor& tensor, int64_t elements, ScalarType type) {
    check_buffer("group_norm", name, tensor, elements, type);
  }
  bool check_parameter(const char* name, const Tensor& tensor, int64_t elements) const {
    const bool is_float = tensor.scalar_type() == ScalarType::Float;
    check(name, tensor, elements, is_float ? ScalarType::Float : type_);
    return is_float;
  }

  ScalarType type_;
  Sizes sizes_;
};

void group_norm_forward(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale,
                        OptionalTensor shift, std::vector<int64_t> counts,
                        std::vector<int64_t> channels, std::vector<int64_t> groups, int64_t spatial,
                        bool channels_last, double eps, bool silu, Tensor y, Tensor mean,
                        Tensor rstd) {
  const msd::GroupNormShape shape{counts,  channels,      groups,
                                  spatial, channels_last, element_type(x)};
  const Buffers buffers(x, shape);
  msd::GroupNormForward job;
  job.x = buffers.input("x", x);
  job.affine = buffers.affine(weight, bias, scale, shift);
  job.eps = static_cast<float>(eps);
  job.silu = silu;
  job.y = buffers.output("y", y);
  job.mean = buffers.mutable_statistics("mean", mean);
  job.rstd = buffers.mutable_statistics("rstd", rstd);
  msd::group_norm_forward(shape, job);
}

void group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight,
                         OptionalTensor bias, OptionalTensor scale, OptionalTensor shift,
                         std::vector<int64_t> counts, std::vector<int64_t> channels,
                         std::vector<int64_t> groups, int64_t spatial, bool channels_last,
                         bool silu, OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias,
                         OptionalTensor dscale, OptionalTensor dshift) {
  const msd::GroupNormShape shape{counts,  channels,      groups,
                                  spatial, channels_last, element_type(x)};
  const Buffers buffers(x, shape);
  const Sizes& sizes = buffers.sizes();
  msd::GroupNormBackward job;
  job.dy = buffers.input("dy", dy);
  job.x = buffers.input("x", x);
  job.mean = buffers.statistics("mean", mean);
  job.rstd = buffers.statistics("rstd", rstd);
  job.affine = buffers.affine(weight, bias, scale, shift);
  job.silu = silu;
  if (dx.has_value()) job.dx = buffers.output("dx", *dx);
  job.dweight = buffers.gradient("dweight", dweight, sizes.channels);
  job.dbias = buffers.gradient("dbias", dbias, sizes.channels);
  job.dscale = buffers.gradient("dscale", dscale, sizes.sample_channels);
  job.dshift = buffers.gradient("dshift", dshift, sizes.sample_channels);
  msd::group_norm_backward(shape, job);
}

msd::DataType data_type(const Tensor& data) {
  switch (data.scalar_type()) {
    case ScalarType::Byte:
      return msd::DataType::kUint8;
    case ScalarType::Float:
      return msd::DataType::kFloat;
    case ScalarType::BFloat16:
      return msd::DataType::kBFloat16;
    case ScalarType::Half:
      return msd::DataType::kHalf;
    case ScalarType::Double:
      return msd::DataType::kDouble;
    default:
      STD_TORCH_CHECK(false, "optimal_denoiser: data must be uint8 or floating point, got ",
                      torch::headeronly::toString(data.scalar_type()));
  }
}

const double* doubles(const char* name, const Tensor& tensor, int64_t elements) {
  check_buffer("optimal_denoiser", name, tensor, elements, ScalarType::Double);
  return static_cast<const double*>(tensor.const_data_ptr());
}

double* mutable_doubles(const char* name, const Tensor& tensor, int64_t elements) {
  return const_cast<double*>(doubles(name, tensor, elements));
}

void optimal_denoiser_centre(Tensor data, Tensor shift, double step, Tensor centred,
                             Tensor half_norms) {
  STD_TORCH_CHECK(data.dim() == 2, "optimal_denoiser: data must be [rows, dim]");
  msd::CentreJob job;
  job.rows = data.size(0);
  job.dim = data.size(1);
  check_buffer("optimal_denoiser", "data", data, job.rows * job.dim, data.scalar_type());
  job.data = data.const_data_ptr();
  job.type = data_type(data);
  job.shift = doubles("shift", shift, job.dim);
  job.step = step;
  job.centred = mutable_doubles("centred", centred, job.rows * job.dim);
  job.half_norms = mutable_doubles("half_norms", half_norms, job.rows);
  msd::optimal_denoiser_centre(job);
}

void optimal_denoiser_update_softmax(Tensor products, Tensor half_norms, Tensor precision,
                                     Tensor peak, Tensor sums, Tensor rescale) {
  msd::SoftmaxJob job;
  job.batch = precision.numel();
  job.rows = half_norms.numel();
  job.products = mutable_doubles("products", products, job.batch * job.rows);
  job.half_norms = doubles("half_norms", half_norms, job.rows);
  job.precision = doubles("precision", precision, job.batch);
  job.peak = mutable_doubles("peak", peak, job.batch);
  job.sums = mutable_doubles("sums", sums, 2 * job.batch);
  job.rescale = mutable_doubles("rescale", rescale, job.batch);
  msd::optimal_denoiser_update_softmax(job);
}

void to_channels_last(Tensor x, int64_t samples, int64_t channels, int64_t pixels, Tensor y) {
  const char* op = "to_channels_last";
  const int64_t size = x.element_size();
  STD_TORCH_CHECK(size == 2 || size == 4, op, ": elements must have 2 or 4 bytes, got ", size);
  STD_TORCH_CHECK(samples >= 0 && channels >= 0 && pixels >= 0, op, ": sizes must not be negative");
  const int64_t elements = checked_product(checked_product(samples, channels), pixels);
  check_buffer(op, "x", x, elements, x.scalar_type());
  check_buffer(op, "y", y, elements, x.scalar_type());
  msd::to_channels_last(x.const_data_ptr(), y.mutable_data_ptr(), size, samples, channels, pixels);
}

std::string cpu_isa() { return msd::name(msd::cpu_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(msd_kernels_native, m) {
  m.def("cpu_isa() -> str");
  m.def(
      "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "int[] counts, int[] channels, int[] groups, int spatial, bool channels_last, float eps, "
      "bool silu, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, int[] counts, int[] channels, int[] groups, "
      "int spatial, bool channels_last, bool silu, Tensor(a!)? dx, Tensor(b!)? dweight, "
      "Tensor(c!)? dbias, Tensor(d!)? dscale, Tensor(e!)? dshift) -> ()");
  m.def("to_channels_last(Tensor x, int samples, int channels, int pixels, Tensor(a!) y) -> ()");
  m.def(
      "optimal_denoiser_centre(Tensor data, Tensor shift, float step, Tensor(a!) centred, "
      "Tensor(b!) half_norms) -> ()");
  m.def(
      "optimal_denoiser_update_softmax(Tensor(a!) products, Tensor half_norms, Tensor precision, "
      "Tensor(b!) peak, Tensor(c!) sums, Tensor(d!) rescale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_native, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("to_channels_last", TORCH_BOX(&to_channels_last));
  m.impl("optimal_denoiser_centre", TORCH_BOX(&optimal_denoiser_centre));
  m.impl("optimal_denoiser_update_softmax", TORCH_BOX(&optimal_denoiser_update_softmax));
}

// Every schema and registration of the extension. Outputs are allocated by the caller; what would
// lead to an access out of bounds is checked here once more.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/optimal_denoiser.h"
#include "cpu/resample2d.h"
#include "cpu/winograd.h"
#include "group_norm_arguments.h"
#include "resample2d_arguments.h"
#include "winograd_arguments.h"

namespace {

using msd::checked_product;
using msd::element_type;
using msd::OptionalTensor;
using msd::ScalarType;
using msd::Tensor;

void check_buffer(const char* op, const char* name, const Tensor& tensor, int64_t elements,
                  ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  msd::check_contents(op, name, tensor, elements, type);
}

// Uninitialised, on the CPU.
Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t type) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

int32_t type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

Tensor allocate_like(const Tensor& like) {
  return allocate(like.sizes(), like.strides(), type_of(like));
}

Tensor allocate_flat(int64_t elements, int32_t type) {
  const int64_t stride = 1;
  return allocate({&elements, 1}, {&stride, 1}, type);
}

// x and its likes in their own shapes, dense in the order that `channels_last` names, or flat.
std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale,
    OptionalTensor shift, std::vector<int64_t> counts, std::vector<int64_t> channels,
    std::vector<int64_t> groups, int64_t spatial, bool channels_last, double eps, bool silu) {
  const auto shape = msd::group_norm_shape(x, counts, channels, groups, spatial, channels_last);
  // Lying counts are refused before memory is taken for them.
  const msd::GroupNormBuffers buffers(x, shape);
  buffers.input("x", x);
  const int64_t statistics = buffers.sizes().sample_groups;
  Tensor y = allocate_like(x);
  Tensor mean = allocate_flat(statistics, aoti_torch_dtype_float32());
  Tensor rstd = allocate_flat(statistics, aoti_torch_dtype_float32());
  msd::group_norm_forward(shape, msd::group_norm_forward_job(shape, x, weight, bias, scale, shift,
                                                             eps, silu, y, mean, rstd));
  return {y, mean, rstd};
}

// Which gradients `group_norm_backward` computes: bits of `wanted`.
enum WantedGradient { kX, kWeight, kBias, kScale, kShift };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    Tensor dy, bool dy_planar, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor scale, OptionalTensor shift, std::vector<int64_t> counts,
    std::vector<int64_t> channels, std::vector<int64_t> groups, int64_t spatial, bool channels_last,
    bool silu, int64_t wanted) {
  const auto shape = msd::group_norm_shape(x, counts, channels, groups, spatial, channels_last);
  STD_TORCH_CHECK(!dy_planar || (channels_last && counts.size() == 1),
                  "group_norm: a planar dy goes with an NHWC x of one stage");
  const auto gradient = [&](WantedGradient which, const OptionalTensor& of) -> OptionalTensor {
    const bool compute = (wanted >> which & 1) != 0 && of.has_value();
    return compute ? OptionalTensor(allocate_like(*of)) : std::nullopt;
  };
  const OptionalTensor dx = gradient(kX, x), dweight = gradient(kWeight, weight),
                       dbias = gradient(kBias, bias), dscale = gradient(kScale, scale),
                       dshift = gradient(kShift, shift);
  msd::group_norm_backward(
      shape, msd::group_norm_backward_job(shape, dy, dy_planar, x, mean, rstd, weight, bias, scale,
                                          shift, silu, dx, dweight, dbias, dscale, dshift));
  const auto or_empty = [&](const OptionalTensor& found) {
    return found.has_value() ? *found : allocate_flat(0, type_of(x));
  };
  return {or_empty(dx), or_empty(dweight), or_empty(dbias), or_empty(dscale), or_empty(dshift)};
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
  check_buffer("optimal_denoiser", "data", data, checked_product(job.rows, job.dim),
               data.scalar_type());
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
  job.products = mutable_doubles("products", products, checked_product(job.batch, job.rows));
  job.half_norms = doubles("half_norms", half_norms, job.rows);
  job.precision = doubles("precision", precision, job.batch);
  job.peak = mutable_doubles("peak", peak, job.batch);
  job.sums = mutable_doubles("sums", sums, 2 * job.batch);
  job.rescale = mutable_doubles("rescale", rescale, job.batch);
  msd::optimal_denoiser_update_softmax(job);
}

void resample2d(Tensor x, std::vector<double> taps, bool upward, int64_t stride,
                std::vector<int64_t> counts, std::vector<int64_t> channels, int64_t height,
                int64_t width, int64_t out_height, int64_t out_width, bool channels_last,
                Tensor y) {
  const auto filter = msd::resample_filter(taps, upward, stride);
  const auto shape = msd::resample_shape(x, filter, counts, channels, height, width, out_height,
                                         out_width, channels_last, y);
  msd::resample2d(shape, filter, x.const_data_ptr(), y.mutable_data_ptr());
}

void winograd_forward(Tensor x, OptionalTensor skip, OptionalTensor sample_bias,
                      OptionalTensor residual, std::vector<Tensor> weight, std::vector<Tensor> bias,
                      std::vector<int64_t> counts, std::vector<int64_t> channels,
                      std::vector<int64_t> skip_channels, std::vector<int64_t> out_channels,
                      int64_t height, int64_t width, int64_t kernel, std::string resample,
                      double scale, std::vector<int64_t> stages, Tensor y, Tensor outliers) {
  const msd::WinogradLayout layout = {counts, channels, skip_channels, out_channels,
                                      height, width,    kernel,        resample};
  const msd::WinogradCall call(layout, stages, x);
  msd::winograd_conv(msd::winograd_forward_job(call, x, skip, sample_bias, residual, weight, bias,
                                               scale, y, outliers));
}

void winograd_input_gradient(Tensor dy, std::vector<Tensor> weight, std::vector<int64_t> counts,
                             std::vector<int64_t> channels, std::vector<int64_t> skip_channels,
                             std::vector<int64_t> out_channels, int64_t height, int64_t width,
                             int64_t kernel, std::string resample, std::vector<int64_t> stages,
                             OptionalTensor dx, OptionalTensor dskip, Tensor outliers) {
  const msd::WinogradLayout layout = {counts, channels, skip_channels, out_channels,
                                      height, width,    kernel,        resample};
  const msd::WinogradCall call(layout, stages, dy);
  msd::winograd_conv(msd::winograd_input_gradient_job(call, dy, weight, dx, dskip, outliers));
}

void winograd_weight_gradient(Tensor dy, Tensor x, OptionalTensor skip, std::vector<int64_t> counts,
                              std::vector<int64_t> channels, std::vector<int64_t> skip_channels,
                              std::vector<int64_t> out_channels, int64_t height, int64_t width,
                              int64_t kernel, std::string resample, std::vector<int64_t> stages,
                              std::vector<Tensor> dweight, Tensor outliers) {
  const msd::WinogradLayout layout = {counts, channels, skip_channels, out_channels,
                                      height, width,    kernel,        resample};
  const msd::WinogradCall call(layout, stages, x);
  msd::winograd_weight_gradient(
      msd::winograd_weight_gradient_job(call, dy, x, skip, dweight, outliers));
}

std::string cpu_isa() { return msd::name(msd::cpu_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(msd_kernels_native, m) {
  m.def("cpu_isa() -> str");
  m.def(
      "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "int[] counts, int[] channels, int[] groups, int spatial, bool channels_last, float eps, "
      "bool silu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor dy, bool dy_planar, Tensor x, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] counts, int[] channels, "
      "int[] groups, int spatial, bool channels_last, bool silu, int wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "optimal_denoiser_centre(Tensor data, Tensor shift, float step, Tensor(a!) centred, "
      "Tensor(b!) half_norms) -> ()");
  m.def(
      "optimal_denoiser_update_softmax(Tensor(a!) products, Tensor half_norms, Tensor precision, "
      "Tensor(b!) peak, Tensor(c!) sums, Tensor(d!) rescale) -> ()");
  m.def(
      "resample2d(Tensor x, float[] taps, bool upward, int stride, int[] counts, int[] channels, "
      "int height, int width, int out_height, int out_width, bool channels_last, Tensor(a!) y) -> "
      "()");
  m.def(
      "winograd_forward(Tensor x, Tensor? skip, Tensor? sample_bias, Tensor? residual, "
      "Tensor[] weight, Tensor[] bias, int[] counts, int[] channels, int[] skip_channels, "
      "int[] out_channels, int height, int width, int kernel, str resample, float scale, "
      "int[] stages, Tensor(a!) y, Tensor(b!) outliers) -> ()");
  m.def(
      "winograd_input_gradient(Tensor dy, Tensor[] weight, int[] counts, int[] channels, "
      "int[] skip_channels, int[] out_channels, int height, int width, int kernel, str resample, "
      "int[] stages, Tensor(a!)? dx, Tensor(b!)? dskip, Tensor(c!) outliers) -> ()");
  m.def(
      "winograd_weight_gradient(Tensor dy, Tensor x, Tensor? skip, int[] counts, int[] channels, "
      "int[] skip_channels, int[] out_channels, int height, int width, int kernel, str resample, "
      "int[] stages, Tensor(a!)[] dweight, Tensor(b!) outliers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_native, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("optimal_denoiser_centre", TORCH_BOX(&optimal_denoiser_centre));
  m.impl("optimal_denoiser_update_softmax", TORCH_BOX(&optimal_denoiser_update_softmax));
  m.impl("resample2d", TORCH_BOX(&resample2d));
  m.impl("winograd_forward", TORCH_BOX(&winograd_forward));
  m.impl("winograd_input_gradient", TORCH_BOX(&winograd_input_gradient));
  m.impl("winograd_weight_gradient", TORCH_BOX(&winograd_weight_gradient));
}

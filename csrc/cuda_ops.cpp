// Every schema and registration of the CUDA extension. It needs neither a CUDA build of PyTorch nor
// CUDA's headers: kernels are started by functions that take pointers, a device and a stream.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/group_norm.h"
#include "cuda/resample2d.h"
#include "group_norm_arguments.h"
#include "resample2d_arguments.h"

namespace {

using msd::OptionalTensor;
using msd::ScalarType;
using msd::Tensor;

// A cudaStream_t as PyTorch's Python interface has it.
void* stream_of(int64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

// Uninitialised floats that live until the tensor goes; the allocator keeps them for the stream's
// work.
Tensor make_workspace(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {floats}, ScalarType::Float);
}

// (groups of a unit, shares of a unit or 0 for two passes) of every stage, to measure them.
using Cut = std::optional<std::vector<int64_t>>;

msd::cuda::ForcedCut forced_cut(const Cut& cut) {
  if (!cut.has_value()) return {};
  STD_TORCH_CHECK(cut->size() == 2 && cut->at(0) >= 1 && cut->at(1) >= 0,
                  "group_norm: cut must be (groups of a unit, parts)");
  return {cut->at(0), cut->at(1)};
}

template <class Job, class Launch>
void run_group_norm(const Tensor& x, const msd::GroupNormShape& shape, const Job& job,
                    bool backward, const Cut& cut, int64_t stream, const Launch& launch) {
  const int device = x.get_device_index();
  const auto plan = msd::cuda::group_norm_plan(shape, backward, device, forced_cut(cut));
  const int64_t floats = msd::cuda::group_norm_workspace(*plan, job);
  Tensor workspace;
  float* data = nullptr;
  if (floats > 0) {
    workspace = make_workspace(x, floats);
    data = static_cast<float*>(workspace.mutable_data_ptr());
  }
  launch(shape, *plan, job, data, device, stream_of(stream));
}

void group_norm_forward(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale,
                        OptionalTensor shift, std::vector<int64_t> counts,
                        std::vector<int64_t> channels, std::vector<int64_t> groups, int64_t spatial,
                        bool channels_last, double eps, bool silu, Tensor y, Tensor mean,
                        Tensor rstd, Cut cut, int64_t stream) {
  const auto shape = msd::group_norm_shape(x, counts, channels, groups, spatial, channels_last);
  const auto job =
      msd::group_norm_forward_job(shape, x, weight, bias, scale, shift, eps, silu, y, mean, rstd);
  run_group_norm(x, shape, job, false, cut, stream, msd::cuda::group_norm_forward);
}

void group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight,
                         OptionalTensor bias, OptionalTensor scale, OptionalTensor shift,
                         std::vector<int64_t> counts, std::vector<int64_t> channels,
                         std::vector<int64_t> groups, int64_t spatial, bool channels_last,
                         bool silu, OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias,
                         OptionalTensor dscale, OptionalTensor dshift, Cut cut, int64_t stream) {
  const auto shape = msd::group_norm_shape(x, counts, channels, groups, spatial, channels_last);
  const auto job =
      msd::group_norm_backward_job(shape, dy, false, x, mean, rstd, weight, bias, scale, shift,
                                   silu, dx, dweight, dbias, dscale, dshift);
  run_group_norm(x, shape, job, true, cut, stream, msd::cuda::group_norm_backward);
}

// How a device with `device` = (multiprocessors, shared memory per block, per multiprocessor,
// reserved, clusters) would cut every stage: (one pass, groups of a unit, parts, pixels of a part,
// bytes of shared memory) one after the other.
std::vector<int64_t> group_norm_cuts(std::vector<int64_t> counts, std::vector<int64_t> channels,
                                     std::vector<int64_t> groups, int64_t spatial,
                                     bool channels_last, int64_t element_bytes, bool backward,
                                     std::vector<int64_t> device) {
  STD_TORCH_CHECK(element_bytes == 2 || element_bytes == 4,
                  "group_norm: element_bytes must be 2 or 4, got ", element_bytes);
  STD_TORCH_CHECK(device.size() == 5, "group_norm: device must hold 5 numbers, got ",
                  device.size());
  const auto type = element_bytes == 4 ? msd::ElementType::kFloat : msd::ElementType::kBFloat16;
  const msd::GroupNormShape shape{counts, channels, groups, spatial, channels_last, type};
  const msd::GroupNormSizes sizes(shape);
  msd::cuda::Device facts;
  facts.multiprocessors = device[0];
  facts.shared_per_block = device[1];
  facts.shared_per_multiprocessor = device[2];
  facts.reserved_per_block = device[3];
  facts.clusters = device[4] != 0;
  std::vector<int64_t> numbers;
  for (size_t stage = 0; stage < counts.size(); ++stage) {
    STD_TORCH_CHECK(counts[stage] >= 1, "group_norm: stage ", stage, " has no samples to cut");
    const msd::cuda::StageCut cut = msd::cuda::cut_stage(shape, stage, backward, facts);
    for (const int64_t number : {static_cast<int64_t>(cut.one_pass), cut.block_groups, cut.parts,
                                 cut.part_pixels, cut.layout.total}) {
      numbers.push_back(number);
    }
  }
  return numbers;
}

void resample2d(Tensor x, std::vector<double> taps, bool upward, int64_t stride,
                std::vector<int64_t> counts, std::vector<int64_t> channels, int64_t height,
                int64_t width, int64_t out_height, int64_t out_width, bool channels_last, Tensor y,
                int64_t stream) {
  const auto filter = msd::resample_filter(taps, upward, stride);
  const auto shape = msd::resample_shape(x, filter, counts, channels, height, width, out_height,
                                         out_width, channels_last, y);
  msd::cuda::resample2d(shape, filter, x.const_data_ptr(), y.mutable_data_ptr(),
                        x.get_device_index(), stream_of(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(msd_kernels_cuda, m) {
  m.def(
      "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "int[] counts, int[] channels, int[] groups, int spatial, bool channels_last, float eps, "
      "bool silu, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, int[]? cut, int stream) -> ()");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, int[] counts, int[] channels, int[] groups, "
      "int spatial, bool channels_last, bool silu, Tensor(a!)? dx, Tensor(b!)? dweight, "
      "Tensor(c!)? dbias, Tensor(d!)? dscale, Tensor(e!)? dshift, int[]? cut, int stream) -> ()");
  m.def(
      "group_norm_cuts(int[] counts, int[] channels, int[] groups, int spatial, "
      "bool channels_last, int element_bytes, bool backward, int[] device) -> int[]");
  m.def(
      "resample2d(Tensor x, float[] taps, bool upward, int stride, int[] counts, int[] channels, "
      "int height, int width, int out_height, int out_width, bool channels_last, Tensor(a!) y, "
      "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("group_norm_cuts", TORCH_BOX(&group_norm_cuts));
}

STABLE_TORCH_LIBRARY_IMPL(msd_kernels_cuda, CUDA, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("resample2d", TORCH_BOX(&resample2d));
}

#include "group_norm_backward.cuh"
#include "group_norm_launch.cuh"

namespace msd::cuda {
namespace {

bool wants_parameters(const GroupNormBackward& job) {
  return job.dweight.data != nullptr || job.dbias.data != nullptr;
}

template <class T>
void sum_over_samples(const GroupNormPlan& plan, const GroupNormBackward& job,
                      cudaStream_t stream) {
  constexpr int64_t kShared = kParameterThreads * sizeof(float2);
  for (const Stages& stages : plan.parameters) {
    const Stage& last = stages.stage[stages.count - 1];
    const Grid grid{last.first_block + last.blocks, kParameterThreads, kShared};
    launch(kOp, group_norm_parameters_kernel<T>, grid, stream, ParametersArguments{stages, job});
  }
}

}  // namespace

void group_norm_backward(const GroupNormShape& shape, const GroupNormPlan& plan,
                         const GroupNormBackward& job, float* workspace, int device, void* stream) {
  use_device(kOp, device);
  const auto on = static_cast<cudaStream_t>(stream);
  auto* partials = reinterpret_cast<float2*>(workspace);
  float2* lines = partials + plan.partials;
  GroupNormBackward with_sums = job;
  float* sums = reinterpret_cast<float*>(lines + plan.lines());
  if (job.dbias.data != nullptr) with_sums.dz_sums = sums;
  if (job.dweight.data != nullptr) with_sums.dz_xhat_sums = sums + plan.sample_channels;
  for (const GroupNormLaunch& part : plan.launches) {
    const BackwardArguments arguments{with_widths(shape, part, {job.x, job.dy, job.dx}), with_sums,
                                      partials, part.partials, lines};
    const Grid grid = grid_of(part);
    for_type_and_layout(shape, [&](auto element, auto channels_last) {
      using T = decltype(element);
      constexpr bool kChannelsLast = decltype(channels_last)::value;
      if (part.one_pass) {
        launch(kOp, group_norm_backward_kernel<T, kChannelsLast>, grid, on, arguments);
        return;
      }
      launch(kOp, group_norm_backward_sums_kernel<T, kChannelsLast>, grid, on, arguments);
      launch(kOp, group_norm_backward_finish_kernel<T>,
             {part.units, kThreads, backward_finish_bytes(part.partials)}, on, arguments);
      if (job.dx == nullptr) return;
      launch(kOp, group_norm_backward_map_kernel<T, kChannelsLast>, grid, on, arguments);
    });
  }
  if (!wants_parameters(job)) return;
  for_type(shape.type,
           [&](auto element) { sum_over_samples<decltype(element)>(plan, with_sums, on); });
}

}  // namespace msd::cuda

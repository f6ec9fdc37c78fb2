// The plans of GroupNorm and its forward pass; group_norm_backward.cu is compiled beside it.
#include <map>
#include <mutex>
#include <tuple>

#include "group_norm_forward.cuh"
#include "group_norm_launch.cuh"

namespace msd::cuda {
namespace {

// Training draws new counts at every step, so plans come and go.
constexpr size_t kMostPlans = 4096;

using PlanKey = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                           int64_t, bool, ElementType, bool, Device, int64_t, int64_t>;

}  // namespace

std::shared_ptr<const GroupNormPlan> group_norm_plan(const GroupNormShape& shape, bool backward,
                                                     int device, const ForcedCut& forced) {
  static std::mutex mutex;
  static std::map<PlanKey, std::shared_ptr<const GroupNormPlan>> plans;
  use_device(kOp, device);
  const Device facts =
      current_device(kOp, reinterpret_cast<const void*>(group_norm_forward_kernel<float, true>));
  const PlanKey key(shape.counts, shape.channels, shape.groups, shape.spatial, shape.channels_last,
                    shape.type, backward, facts, forced.block_groups, forced.parts);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] =
             std::make_shared<GroupNormPlan>(plan_group_norm(shape, backward, facts, forced));
}

void group_norm_forward(const GroupNormShape& shape, const GroupNormPlan& plan,
                        const GroupNormForward& job, float* workspace, int device, void* stream) {
  use_device(kOp, device);
  const auto on = static_cast<cudaStream_t>(stream);
  for (const GroupNormLaunch& part : plan.launches) {
    const ForwardArguments arguments{with_widths(shape, part, {job.x, job.y}), job,
                                     reinterpret_cast<float2*>(workspace), part.partials};
    const Grid grid = grid_of(part);
    for_type_and_layout(shape, [&](auto element, auto channels_last) {
      using T = decltype(element);
      constexpr bool kChannelsLast = decltype(channels_last)::value;
      if (part.one_pass) {
        launch(kOp, group_norm_forward_kernel<T, kChannelsLast>, grid, on, arguments);
        return;
      }
      launch(kOp, group_norm_forward_sums_kernel<T, kChannelsLast>, grid, on, arguments);
      launch(kOp, group_norm_forward_finish_kernel<T, kChannelsLast>, {part.units, kThreads}, on,
             arguments);
      launch(kOp, group_norm_forward_map_kernel<T, kChannelsLast>, grid, on, arguments);
    });
  }
}

}  // namespace msd::cuda

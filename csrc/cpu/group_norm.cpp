#include "group_norm.h"

#include <memory>
#include <new>

#include "group_norm_plan.h"
#include "isa.h"
#include "parallel.h"

namespace msd {
namespace {

const GroupNormKernels& kernels_for(ElementType type) {
  return MSD_FOR_THIS_CPU(group_norm_kernels)(type);
}

// Uninitialised floats, aligned for the widest vectors.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : floats_(floats),
        data_(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))) {}
  float* data() const { return data_.get(); }
  int64_t size() const { return floats_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  int64_t floats_;
  std::unique_ptr<float, Free> data_;
};

// Scratch of the calling thread. It is kept for the next call, unless it is large.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t floats) {
    if (kept_ == nullptr || kept_->size() < floats) kept_ = std::make_unique<Buffer>(floats);
  }
  ~ThreadScratch() {
    if (kept_->size() > kMostKept) kept_.reset();
  }
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  float* data() const { return kept_->data(); }

 private:
  static constexpr int64_t kMostKept = 1 << 20;
  static thread_local std::unique_ptr<Buffer> kept_;
};

thread_local std::unique_ptr<Buffer> ThreadScratch::kept_;

// One thread takes a unit through all steps, which leaves the unit in that core's cache.
template <class Job>
void run_units(const UnitPass<Job>& pass, const Job& job, const GroupNormPlan& plan,
               int64_t threads) {
  for_each_dynamic(plan.units, threads, [&](int64_t index) {
    const Unit unit = plan.unit(index);
    const ThreadScratch scratch(pass.scratch_floats(job, unit));
    pass.prepare(job, unit, scratch.data());
    for (int64_t i = 0; i < unit.items(); ++i) pass.reduce(job, unit, scratch.data(), i);
    pass.combine(job, unit, scratch.data());
    for (int64_t i = 0; i < unit.items(); ++i) pass.map(job, unit, scratch.data(), i);
  });
}

// All threads share the items of one unit after the other. Same sums, same results as run_units.
template <class Job>
void run_items(const UnitPass<Job>& pass, const Job& job, const GroupNormPlan& plan,
               int64_t threads) {
  for (int64_t index = 0; index < plan.units; ++index) {
    const Unit unit = plan.unit(index);
    const Buffer scratch(pass.scratch_floats(job, unit));
    const auto for_each_item = [&](auto step) {
      for_each_dynamic(unit.items(), threads,
                       [&](int64_t i) { step(job, unit, scratch.data(), i); });
    };
    pass.prepare(job, unit, scratch.data());
    for_each_item(pass.reduce);
    pass.combine(job, unit, scratch.data());
    for_each_item(pass.map);
  }
}

template <class Job>
void run(const UnitPass<Job>& pass, const Job& job, const GroupNormPlan& plan) {
  const int64_t threads = useful_threads(plan.elements);
  const bool equal_shares =
      plan.units * plan.largest_unit == plan.elements && plan.units % threads == 0;
  const bool many_units = plan.elements >= 4 * threads * plan.largest_unit;
  if (threads == 1 || equal_shares || many_units) {
    run_units(pass, job, plan, threads);
  } else {
    run_items(pass, job, plan, threads);
  }
}

// Every channel of a stage by one thread, which adds its samples in order.
void sum_parameter_gradients(const GroupNormKernels& kernels, const GroupNormBackward& job,
                             const GroupNormPlan& plan) {
  constexpr int64_t kChannels = 128;
  std::vector<ParameterBlock> blocks;
  int64_t elements = 0;
  for (const StagePlan& stage : plan.stages) {
    elements += stage.count * stage.channels;
    for (int64_t first = 0; first < stage.channels; first += kChannels) {
      blocks.push_back({stage.count, std::min(kChannels, stage.channels - first), stage.channels,
                        stage.channel + first, stage.sample_channel + first});
    }
  }
  for_each_dynamic(static_cast<int64_t>(blocks.size()), useful_threads(elements),
                   [&](int64_t i) { kernels.sum_parameter_gradients(job, blocks[i]); });
}

int64_t size_of(ElementType type) { return type == ElementType::kFloat ? 4 : 2; }

}  // namespace

void group_norm_forward(const GroupNormShape& shape, const GroupNormForward& job) {
  const GroupNormPlan plan(shape, 2 * size_of(shape.type));
  run(kernels_for(shape.type).forward, job, plan);
}

void group_norm_backward(const GroupNormShape& shape, const GroupNormBackward& job) {
  // The plan leaves a planar dy out: the sums' order, and so their bits, must not depend on it.
  const GroupNormPlan plan(shape, 3 * size_of(shape.type) + (job.silu ? sizeof(float) : 0));
  const GroupNormKernels& kernels = kernels_for(shape.type);
  GroupNormBackward with_sums = job;
  const bool parameters = job.dweight.data != nullptr || job.dbias.data != nullptr;
  int64_t sums = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) {
    sums += shape.counts[s] * (shape.channels[s] + shape.skip_channels[s]);
  }
  const Buffer buffer(parameters ? 2 * sums : 0);
  if (parameters) {
    with_sums.dz_sums = buffer.data();
    with_sums.dz_xhat_sums = buffer.data() + sums;
  }
  run(kernels.backward, with_sums, plan);
  if (parameters) sum_parameter_gradients(kernels, with_sums, plan);
}

}  // namespace msd

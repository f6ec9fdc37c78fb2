#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace msd {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

struct Kept {
  std::mutex mutex;
  float* data = nullptr;
  size_t bytes = 0;
};

Kept& kept() {
  static Kept* const buffer = new Kept;  // outlives every other static object
  return *buffer;
}

}  // namespace

Workspace::Workspace(int64_t floats)
    : data_(nullptr), bytes_((floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage) {
  {
    Kept& buffer = kept();
    const std::lock_guard<std::mutex> lock(buffer.mutex);
    if (buffer.bytes >= bytes_) {
      data_ = std::exchange(buffer.data, nullptr);
      bytes_ = std::exchange(buffer.bytes, 0);
    }
  }
  if (data_ != nullptr) return;
  data_ = static_cast<float*>(std::aligned_alloc(kHugePage, bytes_));
  if (data_ == nullptr) throw std::bad_alloc();
  madvise(data_, bytes_, MADV_HUGEPAGE);  // no matter if it fails
}

Workspace::~Workspace() {
  {
    Kept& buffer = kept();
    const std::lock_guard<std::mutex> lock(buffer.mutex);
    if (bytes_ > buffer.bytes) {
      std::swap(data_, buffer.data);
      std::swap(bytes_, buffer.bytes);
    }
  }
  std::free(data_);
}

}  // namespace msd

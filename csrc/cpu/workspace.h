// Memory for what a kernel keeps between its steps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msd {

// Uninitialised floats, aligned to huge pages. The largest buffer that was given back is kept for
// the next one who asks, whatever the thread: fresh memory costs a page fault per 4 KiB.
class Workspace {
 public:
  explicit Workspace(int64_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
  size_t bytes_;
};

}  // namespace msd

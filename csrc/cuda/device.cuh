// What the launches share: pointer tables, the device in use, errors.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "scalar.h"

namespace pat::cuda {

// Blocks that a multiprocessor holds at once, which bounds their registers: more of them hide the latency of memory,
// fewer leave no room for what a thread has under way. Measured on an H100.
constexpr int kReduceBlocks = 5, kUpdateBlocks = 6, kMoveBlocks = 6;

// Throws std::runtime_error naming `what` unless `status` is success.
void check(cudaError_t status, const char* what);

// The addresses of a call's tensors as its kernels see them: few in their parameters, which a graph captures by value
// and no block has to wait for; many in memory.
struct Lists {
  uintptr_t few[kFew];
  const uintptr_t* many;
  int tensors;

  template <class T>
  __device__ T* at(int list, int64_t tensor) const {
    const int64_t i = list * tensors + tensor;
    return reinterpret_cast<T*>(many == nullptr ? few[i] : many[i]);
  }
};

// Makes the call's device current, and its addresses known to it.
class Running {
 public:
  explicit Running(const Call& call);
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  cudaStream_t stream() const { return stream_; }
  const Lists& lists() const { return lists_; }

 private:
  const Call& call_;
  cudaStream_t stream_;
  Lists lists_;
  int before_ = 0;
};

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace pat::cuda

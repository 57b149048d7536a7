// What the launches share: pointer tables, the device in use, errors.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "scalar.h"

namespace pat::cuda {

// Throws std::runtime_error naming `what` unless `status` is success.
void check(cudaError_t status, const char* what);

// Makes the call's device current, and fills its table of pointers.
class Running {
 public:
  explicit Running(const Call& call);
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  cudaStream_t stream() const { return stream_; }
  template <class T>
  T* const* list(int number) const {
    return reinterpret_cast<T* const*>(call_.table + number * call_.tensors);
  }

 private:
  const Call& call_;
  cudaStream_t stream_;
  int before_ = 0;
};

}  // namespace pat::cuda

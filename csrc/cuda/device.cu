#include <algorithm>
#include <stdexcept>

#include "device.cuh"

namespace pat::cuda {
namespace {

// Pointers travel as kernel parameters: captured by value in a graph, no host memory to keep, no copy to
// wait for. Kernel parameters may take 4 KB, or 32 KB since CUDA 12.1.
template <int kMost>
struct Pointers {
  uintptr_t of[kMost];
};
constexpr int kFew = 480, kMany = 4000;

template <int kMost>
__global__ void upload(const __grid_constant__ Pointers<kMost> pointers, int n, uintptr_t* table) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) table[i] = pointers.of[i];
}

template <int kMost>
void upload_all(const Call& call, cudaStream_t stream) {
  const int64_t n = static_cast<int64_t>(call.pointers.size());
  for (int64_t at = 0; at < n; at += kMost) {
    Pointers<kMost> pointers;
    const int here = static_cast<int>(std::min<int64_t>(kMost, n - at));
    std::copy_n(call.pointers.begin() + at, here, pointers.of);
    upload<<<1, 256, 0, stream>>>(pointers, here, call.table + at);
  }
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (CUDA error " +
                             std::to_string(status) + ")");
}

Running::Running(const Call& call) : call_(call), stream_(static_cast<cudaStream_t>(call.stream)) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != call.device) check(cudaSetDevice(call.device), "cudaSetDevice");
  if (call.pointers.size() <= kFew || CUDART_VERSION < 12010) upload_all<kFew>(call, stream_);
  else upload_all<kMany>(call, stream_);
}

Running::~Running() {
  if (before_ != call_.device) cudaSetDevice(before_);
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int runtime_version() { return CUDART_VERSION; }

std::string archs() { return PAT_CUDA_ARCHS; }

}  // namespace pat::cuda

#include <algorithm>
#include <stdexcept>

#include "device.cuh"

namespace pat::cuda {
namespace {

// Addresses that are too many for the parameters of a kernel come as those of kernels before it: captured by value in
// a graph, no host memory to keep, no copy to wait for. Since CUDA 12.1 parameters may take 32 KB.
constexpr int kMany = CUDART_VERSION < 12010 ? kFew : 4000;

struct Pointers {
  uintptr_t of[kMany];
};

__global__ void upload(const __grid_constant__ Pointers pointers, int n, uintptr_t* table) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) table[i] = pointers.of[i];
}

void upload_all(const Call& call, cudaStream_t stream) {
  const int64_t n = static_cast<int64_t>(call.pointers.size());
  for (int64_t at = 0; at < n; at += kMany) {
    Pointers pointers;
    const int here = static_cast<int>(std::min<int64_t>(kMany, n - at));
    std::copy_n(call.pointers.begin() + at, here, pointers.of);
    upload<<<1, kThreads, 0, stream>>>(pointers, here, call.table + at);
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
  lists_.tensors = static_cast<int>(call.tensors);
  lists_.many = nullptr;
  if (call.pointers.size() <= kFew) {
    std::copy(call.pointers.begin(), call.pointers.end(), lists_.few);
  } else {
    upload_all(call, stream_);
    lists_.many = call.table;
  }
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

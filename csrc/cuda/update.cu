#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    axpy_kernel(const __grid_constant__ Lists lists, const Work* __restrict__ works,
                const accumulator_t<T>* __restrict__ coef) {
  const Work w = works[blockIdx.x];
  T* y = lists.at<T>(1, w.tensor);
  if (y == nullptr) return;
  axpy_block(w, y + w.offset, lists.at<const T>(0, w.tensor) + w.offset, coef, static_cast<int>(threadIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    scale_kernel(const __grid_constant__ Lists lists, const Work* __restrict__ works,
                 const accumulator_t<T>* __restrict__ scale) {
  const Work w = works[blockIdx.x];
  scale_block(w, lists.at<T>(0, w.tensor) + w.offset, scale, static_cast<int>(threadIdx.x));
}

}  // namespace

void axpy(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* coef) {
  if (n_works == 0) return;
  const Running running(call);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    axpy_kernel<T><<<static_cast<unsigned>(n_works), kThreads, 0, running.stream()>>>(
        running.lists(), works, static_cast<const accumulator_t<T>*>(coef));
  });
  check(cudaGetLastError(), "channel_axpy_");
}

void scale(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* scale) {
  if (n_works == 0) return;
  const Running running(call);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    scale_kernel<T><<<static_cast<unsigned>(n_works), kThreads, 0, running.stream()>>>(
        running.lists(), works, static_cast<const accumulator_t<T>*>(scale));
  });
  check(cudaGetLastError(), "channel_scale_");
}

}  // namespace pat::cuda

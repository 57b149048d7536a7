#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    axpy_kernel(const Work* __restrict__ works, T* const* __restrict__ ys, const T* const* __restrict__ xs,
                const accumulator_t<T>* __restrict__ coef) {
  const Work w = works[blockIdx.x];
  axpy_block(w, ys[w.tensor] + w.offset, xs[w.tensor] + w.offset, coef, static_cast<int>(threadIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const Work* __restrict__ works, T* const* __restrict__ xs,
                                                         const accumulator_t<T>* __restrict__ scale) {
  const Work w = works[blockIdx.x];
  scale_block(w, xs[w.tensor] + w.offset, scale, static_cast<int>(threadIdx.x));
}

}  // namespace

void axpy(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* coef) {
  if (n_works == 0) return;
  const Running running(call);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    axpy_kernel<T><<<static_cast<unsigned>(n_works), kThreads, 0, running.stream()>>>(
        works, running.list<T>(0), running.list<const T>(1), static_cast<const accumulator_t<T>*>(coef));
  });
  check(cudaGetLastError(), "channel_axpy_");
}

void scale(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* scale) {
  if (n_works == 0) return;
  const Running running(call);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    scale_kernel<T><<<static_cast<unsigned>(n_works), kThreads, 0, running.stream()>>>(
        works, running.list<T>(0), static_cast<const accumulator_t<T>*>(scale));
  });
  check(cudaGetLastError(), "channel_scale_");
}

}  // namespace pat::cuda

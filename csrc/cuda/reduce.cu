#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

// Adds up the threads of a warp that share a row; the first of them keeps the sums.
template <class A>
struct WarpSum {
  A* row_sums;
  int rows, across;

  template <int n>
  __device__ void operator()(int first, int step, A (&sums)[n]) const {
    const int width = across < kWarp ? across : kWarp, thread = threadIdx.x;
    if (width == kWarp) {  // one after the other in steps: the shuffles of several rows are under way at once
#pragma unroll
      for (int o = kWarp / 2; o > 0; o /= 2) add(sums, o);
    } else {
      for (int o = width / 2; o > 0; o /= 2) add(sums, o);
    }
    if ((thread & (width - 1)) != 0) return;
    A* to = row_sums + (thread & (across - 1)) / kWarp * rows;
#pragma unroll
    for (int b = 0; b < n; ++b)
      if (first + b * step < rows) to[first + b * step] = sums[b];
  }

  template <int n>
  __device__ static void add(A (&sums)[n], int apart) {
#pragma unroll
    for (int b = 0; b < n; ++b) sums[b] += __shfl_xor_sync(0xffffffffu, sums[b], apart);
  }
};

template <Kind kKind, class T>
__global__ void __launch_bounds__(kThreads, kReduceBlocks)
    reduce_kernel(const __grid_constant__ Lists lists, const Work* __restrict__ works, Func f, accumulator_t<T> p,
                  accumulator_t<T>* __restrict__ out, accumulator_t<T>* __restrict__ workspace) {
  using A = accumulator_t<T>;
  __shared__ A row_sums[kRowSums];
  __shared__ A col_sums[kThreads * kPositionsOf<T>];
  const Work w = works[blockIdx.x];
  if (w.row_to == kNowhere && w.col_to == kNowhere) return;
  const T* x = lists.at<const T>(0, w.tensor) + w.offset;
  const T* y = kKind == kProducts ? lists.at<const T>(1, w.tensor) + w.offset : nullptr;
  const int thread = threadIdx.x;
  const WarpSum<A> emit{row_sums, static_cast<int>(w.rows), w.row.across};
  if (is_whole(w, x, y)) first_pass<kKind, true>(w, x, y, f, p, thread, col_sums, emit);
  else first_pass<kKind, false>(w, x, y, f, p, thread, col_sums, emit);
  __syncthreads();
  finish<T>(w, thread, row_sums, col_sums, out, workspace);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Gather* __restrict__ gathers, const A* __restrict__ workspace, A* __restrict__ out) {
  __shared__ A parts[kThreads];
  const Gather g = gathers[blockIdx.x];
  const int slot = threadIdx.x % kGatherSlots;
  parts[threadIdx.x] = gather_part(g, workspace, slot, static_cast<int>(threadIdx.x) / kGatherSlots);
  __syncthreads();
  if (threadIdx.x < kGatherSlots) gather_finish(g, parts, slot, out);
}

}  // namespace

void reduce(const Call& call, const Work* works, int64_t n_works, const Gather* gathers, int64_t n_gathers, DType dtype,
            Func f, double p, void* out, void* workspace) {
  if (n_works == 0) return;
  const Running running(call);
  const unsigned blocks = static_cast<unsigned>(n_works);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    A *sums = static_cast<A*>(out), *partial = static_cast<A*>(workspace);
    with_kind(kind_of(f), [&](auto kind) {
      reduce_kernel<kind.value, T>
          <<<blocks, kThreads, 0, running.stream()>>>(running.lists(), works, f, static_cast<A>(p), sums, partial);
    });
    if (n_gathers > 0)
      gather_kernel<A><<<static_cast<unsigned>(n_gathers), kThreads, 0, running.stream()>>>(gathers, partial, sums);
  });
  check(cudaGetLastError(), "channel_reduce");
}

}  // namespace pat::cuda

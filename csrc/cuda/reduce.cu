#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

// Adds up the threads of a warp that share a row; the first of them keeps the sum.
template <class A>
struct WarpSum {
  A* row_sums;
  int64_t rows;
  int across;

  __device__ void operator()(int64_t r, A sum) const {
    const int width = across < kWarp ? across : kWarp, thread = threadIdx.x;
    for (int o = width / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if ((thread & (width - 1)) == 0 && r < rows) row_sums[(thread & (across - 1)) / kWarp * rows + r] = sum;
  }
};

template <Kind kKind, class T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const Work* __restrict__ works, const T* const* __restrict__ xs, const T* const* __restrict__ ys,
                  Func f, accumulator_t<T> p, accumulator_t<T>* __restrict__ out,
                  accumulator_t<T>* __restrict__ workspace) {
  using A = accumulator_t<T>;
  __shared__ A row_sums[kRowSums];
  __shared__ A col_sums[kThreads * kPositionsOf<T>];
  const Work w = works[blockIdx.x];
  if (w.row_to == kNowhere && w.col_to == kNowhere) return;
  const T* x = xs[w.tensor] + w.offset;
  const T* y = kKind == kProducts ? ys[w.tensor] + w.offset : nullptr;
  const int thread = threadIdx.x;
  const WarpSum<A> emit{row_sums, w.rows, w.row.across};
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
    const auto launch = [&](auto kernel) {
      kernel<<<blocks, kThreads, 0, running.stream()>>>(works, running.list<const T>(0), running.list<const T>(1), f,
                                                        static_cast<A>(p), sums, partial);
    };
    if (kind_of(f) == kPlain) launch(reduce_kernel<kPlain, T>);
    else if (kind_of(f) == kPowers) launch(reduce_kernel<kPowers, T>);
    else launch(reduce_kernel<kProducts, T>);
    if (n_gathers > 0)
      gather_kernel<A><<<static_cast<unsigned>(n_gathers), kThreads, 0, running.stream()>>>(gathers, partial, sums);
  });
  check(cudaGetLastError(), "channel_reduce");
}

}  // namespace pat::cuda

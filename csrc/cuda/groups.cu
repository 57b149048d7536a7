#include <limits>

#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const Groups g, const A* __restrict__ slots, A* __restrict__ totals) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel < g.channels) totals[channel] = channel_total(g, slots, channel);
}

// What all threads of a group's block found out, in a fixed order.
template <class A>
__device__ Extent<A> extent_of(const Groups& g, const A* totals) {
  __shared__ Extent<A> parts[kThreads];
  const int thread = threadIdx.x;
  parts[thread] = Extent<A>(g, blockIdx.x, totals, thread);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) parts[thread].merge(parts[thread + half]);
  }
  __syncthreads();
  return parts[0];
}

template <class A>
__global__ void __launch_bounds__(kThreads) divide_kernel(const Groups g, A least, A* totals) {
  divide(g, blockIdx.x, extent_of(g, totals), least, totals, static_cast<int>(threadIdx.x));
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const Groups g, A least, A exponent, A strength, const uint8_t* __restrict__ where, A* values) {
  weigh(g, blockIdx.x, extent_of(g, values), least, exponent, strength, where, values, static_cast<int>(threadIdx.x));
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(const Groups g, const A* __restrict__ values, A* __restrict__ slots) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < g.n_slots) slots[slot] = g.channel[slot] < 0 ? A(0) : values[g.channel[slot]];
}

template <class Body>
void with_accumulator(DType dtype, const Body& body) {
  if (dtype == kF64) body(double{});
  else body(float{});
}

}  // namespace

void totals(const Call& call, const Groups& groups, DType dtype, const void* slots, bool divided, void* totals) {
  if (groups.channels == 0) return;
  const Running running(call);
  with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    A* to = static_cast<A*>(totals);
    totals_kernel<<<blocks_for(groups.channels), kThreads, 0, running.stream()>>>(groups, static_cast<const A*>(slots),
                                                                                  to);
    if (divided)
      divide_kernel<<<static_cast<unsigned>(groups.groups), kThreads, 0, running.stream()>>>(
          groups, std::numeric_limits<A>::min(), to);
  });
  check(cudaGetLastError(), "channel_totals");
}

void weigh(const Call& call, const Groups& groups, DType dtype, void* values, double alpha, double strength,
           const uint8_t* where, void* slots) {
  if (groups.channels == 0) return;
  const Running running(call);
  with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    A* of = static_cast<A*>(values);
    weigh_kernel<<<static_cast<unsigned>(groups.groups), kThreads, 0, running.stream()>>>(
        groups, std::numeric_limits<A>::min(), static_cast<A>(std::log2(alpha)), static_cast<A>(strength), where, of);
    spread_kernel<<<blocks_for(groups.n_slots), kThreads, 0, running.stream()>>>(groups, static_cast<const A*>(of),
                                                                                 static_cast<A*>(slots));
  });
  check(cudaGetLastError(), "group_push");
}

}  // namespace pat::cuda

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>

#include "plan.h"

namespace pat {

constexpr int64_t kSerialBytes = 64 * 1024;
// A thread takes the next of so many shares, for each thread, of what is left: large ones at first, so that memory is
// read in order, small ones at last, since others wait for the end of those.
constexpr int64_t kShares = 4;

// Calls work(i, thread) for i in [0, n), on at most `threads` threads; `before` is called once by the first of them.
template <class Work, class Before>
void parallel_for(int64_t n, int64_t bytes, int threads, const Work& work, const Before& before) {
#ifdef _OPENMP
  if (threads > 1 && n > 1 && bytes > kSerialBytes && !forked()) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      if (thread == 0) before();
      for (int64_t i = next.load(std::memory_order_relaxed), end; i < n;) {
        end = i + std::max<int64_t>(1, (n - i) / (kShares * threads));
        if (!next.compare_exchange_weak(i, end, std::memory_order_relaxed)) continue;
        for (; i < end; ++i) work(i, thread);
        i = next.load(std::memory_order_relaxed);
      }
    }
    return;
  }
#endif
  before();
  for (int64_t i = 0; i < n; ++i) work(i, 0);
}

template <class Work>
void parallel_for(int64_t n, int64_t bytes, int threads, const Work& work) {
  parallel_for(n, bytes, threads, work, [] {});
}

// Calls work(segment, thread) for every segment, a chunk at a time, once its tensors have arrived; false: stopped.
template <class Work>
bool for_segments(const Plan& plan, int threads, const Work& work, const Meanwhile& meanwhile = {}) {
  Arrived arrived;
  if (!meanwhile) arrived.all();
  const auto of_chunk = [&](int64_t chunk, int thread) {
    for (int64_t s = plan.chunks[chunk]; s < plan.chunks[chunk + 1]; ++s) {
      if (!arrived.wait(plan.segments[s].tensors)) return;
      work(plan.segments[s], thread);
    }
  };
  parallel_for(static_cast<int64_t>(plan.chunks.size()) - 1, plan.bytes, threads, of_chunk, [&] {
    if (meanwhile) meanwhile(arrived);
  });
  return arrived.wait(0);
}

// The same with the last chunk first: what was read last may still be in the caches.
template <class Work>
void for_segments_backwards(const Plan& plan, int threads, const Work& work) {
  const int64_t n = static_cast<int64_t>(plan.chunks.size()) - 1;
  parallel_for(n, plan.bytes, threads, [&](int64_t i, int thread) {
    for (int64_t s = plan.chunks[n - 1 - i]; s < plan.chunks[n - i]; ++s) work(plan.segments[s], thread);
  });
}

}  // namespace pat

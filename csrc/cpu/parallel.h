#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "plan.h"

namespace pat {

constexpr int64_t kSerialBytes = 64 * 1024;

// Calls work(i, thread) for i in [0, n), on at most `threads` threads.
template <class Work>
void parallel_for(int64_t n, int64_t bytes, int threads, const Work& work, const Meanwhile& meanwhile = {}) {
#ifdef _OPENMP
  if (threads > 1 && n > 1 && bytes > kSerialBytes && !forked()) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      if (thread == 0 && meanwhile) meanwhile();
      // Neighbours go to one thread, which so reads memory in order; few enough to even out the load.
      const int64_t grain = std::max<int64_t>(1, n / (64 * threads));
#pragma omp for schedule(dynamic, grain) nowait
      for (int64_t i = 0; i < n; ++i) work(i, thread);
    }
    return;
  }
#endif
  if (meanwhile) meanwhile();
  for (int64_t i = 0; i < n; ++i) work(i, 0);
}

// Calls work(segment, thread) for every segment, a chunk at a time.
template <class Work>
void for_segments(const Plan& plan, int threads, const Work& work, const Meanwhile& meanwhile = {}) {
  const auto of_chunk = [&](int64_t chunk, int thread) {
    for (int64_t s = plan.chunks[chunk]; s < plan.chunks[chunk + 1]; ++s) work(plan.segments[s], thread);
  };
  parallel_for(static_cast<int64_t>(plan.chunks.size()) - 1, plan.bytes, threads, of_chunk, meanwhile);
}

}  // namespace pat

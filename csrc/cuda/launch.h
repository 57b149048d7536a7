// The four ops on a stream. Arguments are trusted; everything but `Call::pointers` is device memory.
// Nothing here allocates or waits, so a call can be captured in a CUDA graph.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace pat::cuda {

// `table` has room for `pointers`, the addresses of the tensors: `tensors` of each list, list after list.
struct Call {
  const std::vector<uintptr_t>& pointers;
  uintptr_t* table;
  int64_t tensors;
  int device;
  void* stream;
};

// `out` keeps what it holds in slots that no tile names. Lists: xs, then ys unless `f` is of x alone.
void reduce(const Call& call, const Work* works, int64_t n_works, const Gather* gathers, int64_t n_gathers, DType dtype,
            Func f, double p, void* out, void* workspace);
// Lists: ys, xs.
void axpy(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* coef);
void scale(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* scale);
// Lists: outs, xs; each of its own length, so `tensors` is that of outs.
void compact(const Call& call, const Move* moves, int64_t n_moves, int64_t element_bytes, const int32_t* index);

int device_count();     // 0 where there is no driver or no device
int runtime_version();  // 1000 * major + 10 * minor
std::string archs();    // compiled for

}  // namespace pat::cuda

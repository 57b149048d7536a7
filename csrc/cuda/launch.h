// The four ops on a stream, and what goes on between two of them for whole groups. Arguments are trusted; everything
// but `Call::pointers` is device memory. Nothing here allocates or waits, so a call can be captured in a CUDA graph.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace pat::cuda {

// Addresses that travel with a launch. Kernel parameters may take 4 KB.
constexpr int kFew = 480;

// The addresses of the tensors: `tensors` of each list, list after list. `table` has room for them if they are more
// than `kFew`.
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
// Lists: xs, ys. Where the address of y is 0, nothing is done.
void axpy(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* coef);
void scale(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* scale);
// Lists: outs, xs; each of its own length, so `tensors` is that of outs.
void compact(const Call& call, const Move* moves, int64_t n_moves, int64_t element_bytes, const int32_t* index);

// Vectors are double for kF64, else float. totals: [channels], the sums over the slots of each channel, divided by
// their mean over the group if `divided`.
void totals(const Call& call, const Groups& groups, DType dtype, const void* slots, bool divided, void* totals);
// values: [channels], the totals n_c^2 before and gamma_c afterwards:
//   gamma_c = strength * alpha ** ((n_max - n_c) / (n_max - n_min)), 0 in a group with a norm that is not finite.
// `where` is null, or [channels]: 0 for channels of gamma 0. slots: gamma at each slot, 0 at those of no channel.
void weigh(const Call& call, const Groups& groups, DType dtype, void* values, double alpha, double strength,
           const uint8_t* where, void* slots);

int device_count();     // 0 where there is no driver or no device
int runtime_version();  // 1000 * major + 10 * minor
std::string archs();    // compiled for

}  // namespace pat::cuda

// The four ops over tables of tiles. Arguments are trusted: the Python wrappers checked them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"

namespace pat {

// One row of a table, as pat_fast/ops/tiles.py lays it out.
struct Tile {
  int64_t tensor, offset, r, c, k, sr, sc, sk, row, col;
};

using Addresses = std::vector<void*>;

// How many of a call's tensors, the first ones, have their addresses already.
class Arrived {
 public:
  void tensors(int64_t n) { n_.store(n, std::memory_order_release); }
  void all() { tensors(INT64_MAX); }
  // No more will come, and what is done of the work does not matter.
  void stop() { tensors(-1); }
  // Waits until there are `n`; false: stopped.
  bool wait(int64_t n) const;

 private:
  std::atomic<int64_t> n_{0};
};

// What the calling thread does before it helps the others with a call's work, which they begin meanwhile: it brings the
// addresses of the tensors, and may do more. It runs exactly once, before that work where there are no others, and
// throws nothing. Empty: all addresses are there.
using Meanwhile = std::function<void(Arrived&)>;

// out: [slots] in the accumulator type of `dtype`; overwritten. `ys` is empty for functions of x alone.
void channel_reduce(const Addresses& xs, const Addresses& ys, const Tile* tiles, int64_t n_tiles, DType dtype,
                    Func func, double p, void* out, int64_t slots, int threads);
void channel_axpy(const Addresses& ys, const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype,
                  const void* coef, int threads);
void channel_scale(const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype, const void* scale,
                   int threads);
void channel_compact(const Addresses& outs, const Addresses& xs, const Tile* tiles, const Tile* out_tiles,
                     int64_t n_tiles, int64_t element_bytes, const int32_t* index, int threads,
                     const Meanwhile& meanwhile = {});

// For tests: bytes that a compaction must write to do so past the caches; below 0 what it takes otherwise.
void set_stream_bytes(int64_t bytes);

std::vector<std::string> isas();        // that this machine can run, best last
const std::string& isa();               // in use
bool set_isa(const std::string& name);  // false: unknown or unsupported here
bool has_openmp();
const Kernels& kernels();

}  // namespace pat

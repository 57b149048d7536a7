#include "engine.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "plan.h"
#include "scratch.h"

namespace pat {
namespace {

constexpr int64_t kElementBytes[kDTypes] = {4, 8, 2, 2};
// Rows summed into one accumulator before it is folded: bounds the length of a chain of additions.
constexpr int64_t kFoldRows = 512;

char* at(void* base, int64_t elements, int64_t element_bytes) {
  return static_cast<char*>(base) + elements * element_bytes;
}

int64_t offset_of(const Canonical& t, int64_t row, int64_t col) { return t.offset + row * t.rows.stride + col * t.sc; }

Rows rows_of(const Canonical& t, int64_t n, int64_t cols) {
  Rows rows = t.rows;
  rows.n = n;
  if (t.flat()) rows.inner = cols * t.k;
  return rows;
}

// Elements from one thread's part of the scratch to the next, in whole cache lines.
int64_t padded(int64_t elements) { return (elements + 31) / 16 * 16; }

// A kernel size known to the compiler is summed twice as fast; 3x3 is most of most networks.
template <int64_t kKernel, class A>
void fold_fixed(const A* acc, int64_t cols, A* out) {
  for (int64_t c = 0; c < cols; ++c) {
    A even = 0, odd = 0;
    for (int64_t k = 0; k + 1 < kKernel; k += 2) even += acc[c * kKernel + k], odd += acc[c * kKernel + k + 1];
    if (kKernel % 2 != 0) even += acc[(c + 1) * kKernel - 1];
    out[c] += even + odd;
  }
}

// Sums a vector over the elements of a row, [cols * k], over the kernel: [cols].
template <class A>
void fold(const Canonical& t, const A* acc, int64_t cols, A* out) {
  if (!t.k_inner) {
    for (int64_t k = 0; k < t.k; ++k)
      for (int64_t c = 0; c < cols; ++c) out[c] += acc[k * cols + c];
    return;
  }
  if (t.k == 1) return fold_fixed<1>(acc, cols, out);
  if (t.k == 9) return fold_fixed<9>(acc, cols, out);
  for (int64_t c = 0; c < cols; ++c) {
    A sum = 0;
    for (int64_t k = 0; k < t.k; ++k) sum += acc[c * t.k + k];
    out[c] += sum;
  }
}

// Spreads a vector over columns, [cols], over the kernel: [cols * k].
template <class A>
void expand(const Canonical& t, const A* values, int64_t cols, A* out) {
  if (!t.k_inner) {
    for (int64_t k = 0; k < t.k; ++k) std::copy(values, values + cols, out + k * cols);
    return;
  }
  for (int64_t c = 0; c < cols; ++c) std::fill(out + c * t.k, out + (c + 1) * t.k, values[c]);
}

template <class A>
struct Reduction {
  const Addresses& xs;
  const Addresses& ys;
  const Plan& plan;
  DType dtype;
  Func func;
  double p;
  A* out;
  A* partials;

  void run(const Segment& s, A* acc) const {
    const Canonical& t = plan.tiles[s.tile];
    if (t.row < 0 && t.col < 0) return;
    A* sums = nullptr;
    if (t.col >= 0) {
      sums = s.scratch >= 0 ? partials + s.scratch : out + t.col;
      if (s.scratch >= 0) std::fill(sums, sums + t.c, A(0));
    }
    for (int64_t c = s.c0; c < s.c1; c += t.block())
      for (int64_t r = s.r0; r < s.r1; r += kFoldRows)
        block(t, r, std::min(s.r1 - r, kFoldRows), c, std::min(s.c1 - c, t.block()), sums, acc);
  }

  void block(const Canonical& t, int64_t r, int64_t n, int64_t c, int64_t cols, A* sums, A* acc) const {
    const int64_t bytes = kElementBytes[dtype];
    const Rows rows = rows_of(t, n, cols);
    if (sums != nullptr) std::fill(acc, acc + cols * t.k, A(0));
    const void* x = at(xs[t.tensor], offset_of(t, r, c), bytes);
    const void* y = ys.empty() ? nullptr : at(ys[t.tensor], offset_of(t, r, c), bytes);
    kernels().reduce[dtype][func](x, y, &rows, p, t.row >= 0 ? out + t.row + r : nullptr,
                                  sums != nullptr ? acc : nullptr);
    if (sums != nullptr) fold(t, acc, cols, sums + c);
  }

  // Adds up the column sums of a tile's segments, in their order.
  void combine(int64_t tile) const {
    const Canonical& t = plan.tiles[tile];
    for (int64_t s = plan.first[tile]; s < plan.first[tile + 1]; ++s) {
      const int64_t scratch = plan.segments[s].scratch;
      if (scratch < 0) continue;
      for (int64_t c = 0; c < t.c; ++c) out[t.col + c] += partials[scratch + c];
    }
  }
};

template <class A>
void reduce(const Addresses& xs, const Addresses& ys, const Plan& plan, DType dtype, Func func, double p, A* out,
            int64_t slots, int threads) {
  std::fill(out, out + slots, A(0));
  const int64_t each = padded(plan.widest);
  const Scratch scratch((plan.scratch + each * threads + 16) * sizeof(A));
  A* accs = scratch.as<A>();
  const Reduction<A> work{xs, ys, plan, dtype, func, p, out, accs + each * threads};
  for_segments(plan, threads, [&](const Segment& s, int thread) { work.run(s, accs + each * thread); });
  if (plan.scratch > 0)
    parallel_for(static_cast<int64_t>(plan.tiles.size()), plan.scratch * static_cast<int64_t>(sizeof(A)), threads,
                 [&](int64_t tile, int) { work.combine(tile); });
}

// Runs body(tile, first row, first column, rows, values over rows, values over the elements of a row)
// for every block of every segment; the values come from the vector over slots, null where it has none.
template <class A, class Body>
void for_blocks(const Plan& plan, const A* slots, A neutral, int threads, const Body& body) {
  const int64_t each = padded(plan.widest);
  const Scratch scratch((each * threads + 16) * sizeof(A));
  for_segments(plan, threads, [&](const Segment& s, int thread) {
    const Canonical& t = plan.tiles[s.tile];
    A* expanded = scratch.as<A>() + each * thread;
    for (int64_t c = s.c0; c < s.c1; c += t.block()) {
      const int64_t cols = std::min(s.c1 - c, t.block());
      const A* values = t.col >= 0 ? slots + t.col + c : nullptr;
      if (values != nullptr && std::all_of(values, values + cols, [&](A v) { return v == neutral; })) values = nullptr;
      if (values != nullptr && t.k > 1) {
        expand(t, values, cols, expanded);
        values = expanded;
      }
      const Rows rows = rows_of(t, s.r1 - s.r0, cols);
      body(t, s.r0, c, rows, t.row >= 0 ? slots + t.row + s.r0 : nullptr, values);
    }
  });
}

template <class A>
void axpy(const Addresses& ys, const Addresses& xs, const Plan& plan, DType dtype, const A* coef, int threads) {
  const int64_t bytes = kElementBytes[dtype];
  for_blocks(plan, coef, A(0), threads,
             [&](const Canonical& t, int64_t r, int64_t c, const Rows& rows, const A* row, const A* col) {
               const int64_t offset = offset_of(t, r, c);
               kernels().axpy[dtype](at(ys[t.tensor], offset, bytes), at(xs[t.tensor], offset, bytes), &rows, row, col);
             });
}

template <class A>
void scale(const Addresses& xs, const Plan& plan, DType dtype, const A* values, int threads) {
  for_blocks(plan, values, A(1), threads,
             [&](const Canonical& t, int64_t r, int64_t c, const Rows& rows, const A* row, const A* col) {
               kernels().scale[dtype](at(xs[t.tensor], offset_of(t, r, c), kElementBytes[dtype]), &rows, row, col);
             });
}

}  // namespace

void channel_reduce(const Addresses& xs, const Addresses& ys, const Tile* tiles, int64_t n_tiles, DType dtype,
                    Func func, double p, void* out, int64_t slots, int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) reduce(xs, ys, plan, dtype, func, p, static_cast<double*>(out), slots, threads);
  else reduce(xs, ys, plan, dtype, func, p, static_cast<float*>(out), slots, threads);
}

void channel_axpy(const Addresses& ys, const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype,
                  const void* coef, int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) axpy(ys, xs, plan, dtype, static_cast<const double*>(coef), threads);
  else axpy(ys, xs, plan, dtype, static_cast<const float*>(coef), threads);
}

void channel_scale(const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype, const void* values,
                   int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) scale(xs, plan, dtype, static_cast<const double*>(values), threads);
  else scale(xs, plan, dtype, static_cast<const float*>(values), threads);
}

}  // namespace pat

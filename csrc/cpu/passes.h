// What a pass over tiles is made of: one segment of a reduction, one segment of an update.
#pragma once

#include <algorithm>

#include "engine.h"
#include "parallel.h"
#include "plan.h"

namespace pat {

constexpr int64_t kElementBytes[kDTypes] = {4, 8, 2, 2};
// Rows summed into one accumulator before it is folded: bounds the length of a chain of additions.
constexpr int64_t kFoldRows = 512;

inline char* at(void* base, int64_t elements, int64_t element_bytes) {
  return static_cast<char*>(base) + elements * element_bytes;
}

inline int64_t offset_of(const Canonical& t, int64_t row, int64_t col) {
  return t.offset + row * t.rows.stride + col * t.sc;
}

inline Rows rows_of(const Canonical& t, int64_t n, int64_t cols) {
  Rows rows = t.rows;
  rows.n = n;
  if (t.flat()) rows.inner = cols * t.k;
  return rows;
}

// Elements from one thread's part of the scratch to the next, in whole cache lines.
inline int64_t padded(int64_t elements) { return (elements + 31) / 16 * 16; }

// A kernel size known to the compiler is summed twice as fast; 3x3 is most of most networks.
template <int64_t kKernel, class A>
void fold_fixed(const A* acc, int64_t cols, A* out, bool first) {
  for (int64_t c = 0; c < cols; ++c) {
    A even = 0, odd = 0;
    for (int64_t k = 0; k + 1 < kKernel; k += 2) even += acc[c * kKernel + k], odd += acc[c * kKernel + k + 1];
    if (kKernel % 2 != 0) even += acc[(c + 1) * kKernel - 1];
    out[c] = (first ? A(0) : out[c]) + (even + odd);
  }
}

// Sums a vector over the elements of a row, [cols * k], over the kernel: [cols]. Adds it to `out` unless it is the
// first.
template <class A>
void fold(const Canonical& t, const A* acc, int64_t cols, A* out, bool first) {
  if (!t.k_inner) {
    if (first) std::fill(out, out + cols, A(0));
    for (int64_t k = 0; k < t.k; ++k)
      for (int64_t c = 0; c < cols; ++c) out[c] += acc[k * cols + c];
    return;
  }
  if (t.k == 1) return fold_fixed<1>(acc, cols, out, first);
  if (t.k == 9) return fold_fixed<9>(acc, cols, out, first);
  for (int64_t c = 0; c < cols; ++c) {
    A sum = 0;
    for (int64_t k = 0; k < t.k; ++k) sum += acc[c * t.k + k];
    out[c] = (first ? A(0) : out[c]) + sum;
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
    if (t.row >= 0) std::fill(out + t.row + s.r0, out + t.row + s.r1, A(0));
    A* sums = t.col < 0 ? nullptr : s.scratch >= 0 ? partials + s.scratch : out + t.col;
    for (int64_t c = s.c0; c < s.c1; c += t.block())
      for (int64_t r = s.r0; r < s.r1; r += kFoldRows)
        block(t, r, std::min(s.r1 - r, kFoldRows), c, std::min(s.c1 - c, t.block()), sums, acc, r == s.r0);
  }

  void block(const Canonical& t, int64_t r, int64_t n, int64_t c, int64_t cols, A* sums, A* acc, bool first) const {
    const int64_t bytes = kElementBytes[dtype];
    const Rows rows = rows_of(t, n, cols);
    // Elements of a vector are sums by themselves.
    const bool folds = sums != nullptr && (t.rows.n > 1 || t.k > 1);
    if (sums != nullptr && !folds) acc = sums + c;
    if (sums != nullptr) std::fill(acc, acc + cols * t.k, A(0));
    const void* x = at(xs[t.tensor], offset_of(t, r, c), bytes);
    const void* y = ys.empty() ? nullptr : at(ys[t.tensor], offset_of(t, r, c), bytes);
    kernels().reduce[dtype][func](x, y, &rows, p, t.row >= 0 ? out + t.row + r : nullptr,
                                  sums != nullptr ? acc : nullptr);
    if (folds) fold(t, acc, cols, sums + c, first);
  }

  // Adds up the column sums of a tile's segments, in their order.
  void combine(int64_t tile) const {
    const Canonical& t = plan.tiles[tile];
    const int64_t first = plan.first[tile], end = plan.first[tile + 1];
    if (first == end || plan.segments[first].scratch < 0) return;
    std::fill(out + t.col, out + t.col + t.c, A(0));
    for (int64_t s = first; s < end; ++s)
      for (int64_t c = 0; c < t.c; ++c) out[t.col + c] += partials[plan.segments[s].scratch + c];
  }
};

// The vectors that update a tile: over its rows and over its columns, null where there is none.
template <class A>
struct Sides {
  const A *row, *col;
};

// Runs body(first row, first column, rows, values over rows, values over the elements of a row) for every block of a
// segment; `expanded` has room for plan.widest elements.
template <class A, class Body>
void update_segment(const Canonical& t, const Segment& s, const Sides<A>& sides, A neutral, A* expanded,
                    const Body& body) {
  for (int64_t c = s.c0; c < s.c1; c += t.block()) {
    const int64_t cols = std::min(s.c1 - c, t.block());
    const A* values = sides.col != nullptr ? sides.col + c : nullptr;
    if (values != nullptr && std::all_of(values, values + cols, [&](A v) { return v == neutral; })) values = nullptr;
    if (values != nullptr && t.k > 1) {
      expand(t, values, cols, expanded);
      values = expanded;
    }
    body(s.r0, c, rows_of(t, s.r1 - s.r0, cols), sides.row != nullptr ? sides.row + s.r0 : nullptr, values);
  }
}

// Elements that the passes need beside their vectors.
inline int64_t room_for(const Plan& plan, int threads) { return plan.scratch + padded(plan.widest) * threads + 16; }

// out: [slots], overwritten. False: stopped.
template <class A>
bool reduce(const Addresses& xs, const Addresses& ys, const Plan& plan, DType dtype, Func func, double p, A* out,
            int64_t slots, A* room, int threads, const Meanwhile& meanwhile = {}) {
  if (plan.slots < slots) std::fill(out, out + slots, A(0));
  const int64_t each = padded(plan.widest);
  const Reduction<A> work{xs, ys, plan, dtype, func, p, out, room + each * threads};
  const auto run = [&](const Segment& s, int thread) { work.run(s, room + each * thread); };
  if (!for_segments(plan, threads, run, meanwhile)) return false;
  if (plan.scratch > 0)
    parallel_for(static_cast<int64_t>(plan.tiles.size()), plan.scratch * static_cast<int64_t>(sizeof(A)), threads,
                 [&](int64_t tile, int) { work.combine(tile); });
  return true;
}

// Adds to y; `sides(tile)` are the coefficients. Tensors whose y is null are left alone. The last first: for a penalty
// all were read before.
template <class A, class Of>
void axpy(const Addresses& ys, const Addresses& xs, const Plan& plan, DType dtype, const Of& sides, A* room,
          int threads) {
  const int64_t bytes = kElementBytes[dtype], each = padded(plan.widest);
  for_segments_backwards(plan, threads, [&](const Segment& s, int thread) {
    const Canonical& t = plan.tiles[s.tile];
    void* y = ys[t.tensor];
    if (y == nullptr) return;
    const Sides<A> of = sides(t);
    update_segment(t, s, of, A(0), room + each * thread,
                   [&](int64_t r, int64_t c, const Rows& rows, const A* row, const A* col) {
                     const int64_t offset = offset_of(t, r, c);
                     kernels().axpy[dtype](at(y, offset, bytes), at(xs[t.tensor], offset, bytes), &rows, row, col);
                   });
  });
}

}  // namespace pat

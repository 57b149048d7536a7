#include "engine.h"

#include <thread>

#include "passes.h"
#include "plan.h"
#include "scratch.h"

namespace pat {
namespace {

// A vector over slots, at a tile.
template <class A>
Sides<A> at_slots(const Canonical& t, const A* slots) {
  return {t.row >= 0 ? slots + t.row : nullptr, t.col >= 0 ? slots + t.col : nullptr};
}

template <class A>
void scale(const Addresses& xs, const Plan& plan, DType dtype, const A* values, A* room, int threads) {
  const int64_t each = padded(plan.widest);
  for_segments(plan, threads, [&](const Segment& s, int thread) {
    const Canonical& t = plan.tiles[s.tile];
    update_segment(t, s, at_slots(t, values), A(1), room + each * thread,
                   [&](int64_t r, int64_t c, const Rows& rows, const A* row, const A* col) {
                     kernels().scale[dtype](at(xs[t.tensor], offset_of(t, r, c), kElementBytes[dtype]), &rows, row,
                                            col);
                   });
  });
}

// Calls pass(room) with working memory for a plan.
template <class A, class Pass>
void with_room(const Plan& plan, int threads, const Pass& pass) {
  const Scratch scratch(room_for(plan, threads) * sizeof(A));
  pass(scratch.as<A>());
}

template <class A>
void reduce_all(const Addresses& xs, const Addresses& ys, const Plan& plan, DType dtype, Func func, double p, void* out,
                int64_t slots, int threads) {
  with_room<A>(plan, threads,
               [&](A* room) { reduce(xs, ys, plan, dtype, func, p, static_cast<A*>(out), slots, room, threads); });
}

template <class A>
void axpy_all(const Addresses& ys, const Addresses& xs, const Plan& plan, DType dtype, const void* coef, int threads) {
  const A* slots = static_cast<const A*>(coef);
  with_room<A>(plan, threads, [&](A* room) {
    axpy<A>(ys, xs, plan, dtype, [&](const Canonical& t) { return at_slots(t, slots); }, room, threads);
  });
}

template <class A>
void scale_all(const Addresses& xs, const Plan& plan, DType dtype, const void* values, int threads) {
  with_room<A>(plan, threads, [&](A* room) { scale(xs, plan, dtype, static_cast<const A*>(values), room, threads); });
}

}  // namespace

bool Arrived::wait(int64_t n) const {
  constexpr int kPatience = 64;
  for (int looks = 0;; ++looks) {
    const int64_t there = n_.load(std::memory_order_acquire);
    if (there < 0 || there >= n) return there >= 0;
    if (looks > kPatience) std::this_thread::yield();  // the thread that brings them may need this processor
  }
}

void channel_reduce(const Addresses& xs, const Addresses& ys, const Tile* tiles, int64_t n_tiles, DType dtype,
                    Func func, double p, void* out, int64_t slots, int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) reduce_all<double>(xs, ys, plan, dtype, func, p, out, slots, threads);
  else reduce_all<float>(xs, ys, plan, dtype, func, p, out, slots, threads);
}

void channel_axpy(const Addresses& ys, const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype,
                  const void* coef, int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) axpy_all<double>(ys, xs, plan, dtype, coef, threads);
  else axpy_all<float>(ys, xs, plan, dtype, coef, threads);
}

void channel_scale(const Addresses& xs, const Tile* tiles, int64_t n_tiles, DType dtype, const void* values,
                   int threads) {
  const Plan plan = make_plan(tiles, n_tiles, kElementBytes[dtype]);
  if (dtype == kF64) scale_all<double>(xs, plan, dtype, values, threads);
  else scale_all<float>(xs, plan, dtype, values, threads);
}

}  // namespace pat

// The launches of pat_fast._CUDA on the host: blocks one after another, their threads in phases between the
// barriers, a warp's shuffles after the fact. Memory is the host's.
#include <limits>

#include "../../csrc/cuda/body.h"
#include "../../csrc/cuda/launch.h"

namespace pat::cuda {
namespace {

template <class T>
T* at(const Call& call, int list, int64_t tensor) {
  return reinterpret_cast<T*>(call.pointers[list * call.tensors + tensor]);
}

// What every thread emitted for each row that a block visits.
template <class A>
struct Emitted {
  A* sums;  // [rows, threads]
  int thread;
  int64_t rows;

  template <int n>
  void operator()(int first, int step, const A (&of)[n]) const {
    for (int b = 0; b < n; ++b)
      if (first + b * step < rows) sums[(first + b * step) * kThreads + thread] = of[b];
  }
};

// Adds up lanes in the order of the shuffles.
template <class A>
A warp_sum(const A* lanes, int width) {
  std::vector<A> sums(lanes, lanes + width), next(width);
  for (int o = width / 2; o > 0; o /= 2) {
    for (int i = 0; i < width; ++i) next[i] = sums[i] + sums[i ^ o];
    sums.swap(next);
  }
  return sums[0];
}

template <Kind kKind, class T, class A = accumulator_t<T>>
void reduce_block(const Work& w, const T* x, const T* y, Func f, A p, A* out, A* workspace) {
  std::vector<A> emitted(w.rows * kThreads), row_sums(kRowSums, NAN), col_sums(kThreads * kPositionsOf<T>, NAN);
  for (int thread = 0; thread < kThreads; ++thread) {
    const Emitted<A> emit{emitted.data(), thread, w.rows};
    if (is_whole(w, x, y)) first_pass<kKind, true>(w, x, y, f, p, thread, col_sums.data(), emit);
    else first_pass<kKind, false>(w, x, y, f, p, thread, col_sums.data(), emit);
  }
  const int across = w.row.across, width = across < kWarp ? across : kWarp;
  for (int64_t r = 0; r < w.rows && w.row_to != kNowhere; ++r) {
    const int64_t first = r % (kThreads / across) * across;
    for (int g = 0; g * width < across; ++g)
      row_sums.at(g * w.rows + r) = warp_sum(&emitted[r * kThreads + first + g * width], width);
  }
  for (int thread = 0; thread < kThreads; ++thread)
    finish<T>(w, thread, row_sums.data(), col_sums.data(), out, workspace);
}

template <class A>
void gather_block(const Gather& g, const A* workspace, A* out) {
  std::vector<A> parts(kThreads);
  for (int thread = 0; thread < kThreads; ++thread)
    parts[thread] = gather_part(g, workspace, thread % kGatherSlots, thread / kGatherSlots);
  for (int slot = 0; slot < kGatherSlots; ++slot) gather_finish(g, parts.data(), slot, out);
}

template <class T>
void move_all(const Call& call, const Move* moves, int64_t n_moves, const int32_t* index) {
  for (const Move* m = moves; m < moves + n_moves; ++m)
    for (int thread = 0; thread < kThreads; ++thread)
      move_block(*m, at<const T>(call, 1, m->from_tensor) + m->from_offset, at<T>(call, 0, m->to_tensor) + m->to_offset,
                 index, thread);
}

}  // namespace

void reduce(const Call& call, const Work* works, int64_t n_works, const Gather* gathers, int64_t n_gathers, DType dtype,
            Func f, double p, void* out, void* workspace) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    A *sums = static_cast<A*>(out), *partial = static_cast<A*>(workspace);
    for (const Work* w = works; w < works + n_works; ++w) {
      if (w->row_to == kNowhere && w->col_to == kNowhere) continue;
      const T* x = at<const T>(call, 0, w->tensor) + w->offset;
      const T* y = kind_of(f) == kProducts ? at<const T>(call, 1, w->tensor) + w->offset : nullptr;
      with_kind(kind_of(f),
                [&](auto kind) { reduce_block<kind.value>(*w, x, y, f, static_cast<A>(p), sums, partial); });
    }
    for (const Gather* g = gathers; g < gathers + n_gathers; ++g) gather_block(*g, partial, sums);
  });
}

void axpy(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* coef) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (const Work* w = works; w < works + n_works; ++w)
      for (int thread = 0; thread < kThreads && at<T>(call, 1, w->tensor) != nullptr; ++thread)
        axpy_block(*w, at<T>(call, 1, w->tensor) + w->offset, at<const T>(call, 0, w->tensor) + w->offset,
                   static_cast<const accumulator_t<T>*>(coef), thread);
  });
}

void scale(const Call& call, const Work* works, int64_t n_works, DType dtype, const void* scale) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (const Work* w = works; w < works + n_works; ++w)
      for (int thread = 0; thread < kThreads; ++thread)
        scale_block(*w, at<T>(call, 0, w->tensor) + w->offset, static_cast<const accumulator_t<T>*>(scale), thread);
  });
}

void compact(const Call& call, const Move* moves, int64_t n_moves, int64_t element_bytes, const int32_t* index) {
  if (element_bytes == 1) move_all<uint8_t>(call, moves, n_moves, index);
  else if (element_bytes == 2) move_all<uint16_t>(call, moves, n_moves, index);
  else if (element_bytes == 4) move_all<uint32_t>(call, moves, n_moves, index);
  else move_all<uint64_t>(call, moves, n_moves, index);
}

namespace {

template <class Body>
void for_groups(const Groups& groups, DType dtype, void* values, const Body& body) {
  const auto run = [&](auto* of) {
    using A = std::remove_pointer_t<decltype(of)>;
    for (int64_t group = 0; group < groups.groups; ++group) {
      std::vector<Extent<A>> parts;
      for (int thread = 0; thread < kThreads; ++thread) parts.emplace_back(groups, group, of, thread);
      for (int half = kThreads / 2; half > 0; half /= 2)
        for (int thread = 0; thread < half; ++thread) parts[thread].merge(parts[thread + half]);
      for (int thread = 0; thread < kThreads; ++thread)
        body(group, parts[0], std::numeric_limits<A>::min(), of, thread);
    }
  };
  if (dtype == kF64) run(static_cast<double*>(values));
  else run(static_cast<float*>(values));
}

}  // namespace

void totals(const Call&, const Groups& groups, DType dtype, const void* slots, bool divided, void* totals) {
  for (int64_t c = 0; c < groups.channels; ++c) {
    if (dtype == kF64) static_cast<double*>(totals)[c] = channel_total(groups, static_cast<const double*>(slots), c);
    else static_cast<float*>(totals)[c] = channel_total(groups, static_cast<const float*>(slots), c);
  }
  if (!divided) return;
  for_groups(groups, dtype, totals, [&](int64_t group, const auto& all, auto least, auto* of, int thread) {
    divide(groups, group, all, least, of, thread);
  });
}

void weigh(const Call&, const Groups& groups, DType dtype, void* values, double alpha, double strength,
           const uint8_t* where, void* slots) {
  for_groups(groups, dtype, values, [&](int64_t group, const auto& all, auto least, auto* of, int thread) {
    using A = decltype(least);
    weigh(groups, group, all, least, static_cast<A>(std::log2(alpha)), static_cast<A>(strength), where, of, thread);
  });
  const auto spread = [&](const auto* of, auto* to) {
    for (int64_t s = 0; s < groups.n_slots; ++s) to[s] = groups.channel[s] < 0 ? 0 : of[groups.channel[s]];
  };
  if (dtype == kF64) spread(static_cast<const double*>(values), static_cast<double*>(slots));
  else spread(static_cast<const float*>(values), static_cast<float*>(slots));
}

int device_count() { return 0; }
int runtime_version() { return 0; }
std::string archs() { return "host"; }

}  // namespace pat::cuda

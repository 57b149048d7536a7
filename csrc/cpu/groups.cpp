#include "groups.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "passes.h"
#include "plan.h"
#include "scratch.h"

namespace pat {
namespace {

// Runs that are asked for ahead: other threads may have written what is added up, and each begins somewhere else.
constexpr int64_t kAhead = 4;

template <class A>
void expect(const A* slots, const Run& run) {
  const auto* at = reinterpret_cast<const char*>(slots + run.slot);
  for (int64_t i = 0; i < run.length * static_cast<int64_t>(sizeof(A)); i += 64) __builtin_prefetch(at + i);
}

// Sums over all that belongs to a channel, in the order of the slots: totals [channels]. Then each(channel, channels)
// with the range of every group.
template <class A, class Each>
void sum_groups(const A* of_slots, const Grouping& g, A* totals, int threads, const Each& each) {
  // What is done to a channel takes as long as reading some hundred bytes.
  const int64_t bytes = g.slots * static_cast<int64_t>(sizeof(A)) + g.channels * 128;
  parallel_for(static_cast<int64_t>(g.parts.size()) - 1, bytes, threads, [&](int64_t i, int) {
    const Grouping::Part &part = g.parts[i], &next = g.parts[i + 1];
    const Run *run = g.by_part.data() + part.run, *end = g.by_part.data() + next.run;
    for (const Run* first = run; first < std::min(end, run + kAhead); ++first) expect(of_slots, *first);
    std::fill(totals + part.channel, totals + next.channel, A(0));
    for (; run != end; ++run) {
      if (end - run > kAhead) expect(of_slots, run[kAhead]);
      const A* slots = of_slots + run->slot;
      A* to = totals + run->channel;
      for (int64_t j = 0; j < run->length; ++j) to[j] += slots[j];
    }
    int64_t channel = part.channel;
    for (int64_t group = part.group; group < next.group; channel += g.sizes[group++]) each(channel, g.sizes[group]);
  });
}

template <class A>
void divide_by_mean(A* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  const A mean = static_cast<A>(sum / static_cast<double>(n)), least = std::numeric_limits<A>::min();
  const A by = mean < least ? least : mean;  // NaN stays
  for (int64_t i = 0; i < n; ++i) values[i] /= by;
}

double power_of_2(double x) { return std::exp2(x); }

// A polynomial, which becomes vector instructions; good to the last bit or two for 0 <= x <= 126.
float power_of_2(float x) {
  const float half = 12582912.0f, moved = x + half;  // 1.5 * 2^23: the whole part of x is in the last bits
  const float f = x - (moved - half);
  float power = 1.540353e-4f;
  for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = power * f + factor;
  int32_t whole, zero, bits;
  std::memcpy(&whole, &moved, 4);
  std::memcpy(&zero, &half, 4);
  std::memcpy(&bits, &power, 4);
  bits += (whole - zero) * (1 << 23);
  std::memcpy(&power, &bits, 4);
  return power;
}

// strength * alpha ** ((n_max - n) / (n_max - n_min)) with n the roots of a group's totals.
template <class A>
void weigh(const A* totals, A* gamma, int64_t n, double alpha, double strength) {
  A low = std::numeric_limits<A>::infinity(), high = 0, nothing = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : nothing)
  for (int64_t i = 0; i < n; ++i) {
    const A root = std::sqrt(totals[i]);
    nothing += root - root;  // NaN where it is not finite
    low = std::min(low, root), high = std::max(high, root);
    gamma[i] = root;
  }
  if (nothing != 0) return std::fill(gamma, gamma + n, A(0));
  const A per_span = A(1) / std::max(high - low, std::numeric_limits<A>::min()), by = static_cast<A>(strength);
  const A exponent = static_cast<A>(std::log2(alpha));
  for (int64_t i = 0; i < n; ++i) gamma[i] = by * power_of_2(exponent * std::min((high - gamma[i]) * per_span, A(1)));
}

// Spreads the values of channels over the slots of a side.
template <class A>
void spread(const Grouping& g, int64_t slot, int64_t length, const A* values, A* slots) {
  const Run* end = g.runs + g.n_runs;
  std::fill(slots + slot, slots + slot + length, A(0));
  for (const Run* run = g.run_from(slot); run != end && run->slot < slot + length; ++run)
    std::copy_n(values + run->channel, run->length, slots + run->slot);
}

Func norm(double p) { return p == 1 ? kAbs : p == 2 ? kSquare : kPower; }

template <class A>
void totals_of(const Addresses& xs, const Plan& plan, DType dtype, double p, const Grouping& g, bool divided,
               void* const& to, int threads, const Meanwhile& meanwhile) {
  const int64_t each = padded(g.slots);
  const Scratch scratch((each + room_for(plan, threads)) * sizeof(A));
  A* slots = scratch.as<A>();
  if (!reduce(xs, {}, plan, dtype, norm(p), p, slots, g.slots, slots + each, threads, meanwhile)) return;
  A* totals = static_cast<A*>(to);
  sum_groups(slots, g, totals, threads, [&](int64_t at, int64_t n) {
    if (divided) divide_by_mean(totals + at, n);
  });
}

template <class A>
void push(const Addresses& ys, const Addresses& xs, const Plan& plan, DType dtype, double p, const Grouping& g,
          double alpha, double strength, const uint8_t* where, int threads, const Meanwhile& meanwhile) {
  const int64_t each = padded(g.channels);
  const Scratch scratch((2 * each + padded(g.slots) + room_for(plan, threads)) * sizeof(A));
  A *totals = scratch.as<A>(), *gamma = totals + each, *slots = gamma + each;
  A* room = slots + padded(g.slots);
  if (!reduce(xs, {}, plan, dtype, norm(p), p, slots, g.slots, room, threads, meanwhile)) return;
  sum_groups(slots, g, totals, threads, [&](int64_t at, int64_t n) {
    weigh(totals + at, gamma + at, n, alpha, strength);
    for (int64_t i = at; where != nullptr && i < at + n; ++i) gamma[i] = where[i] ? gamma[i] : A(0);
  });
  parallel_for(g.n_tiles, g.slots * static_cast<int64_t>(sizeof(A)), threads, [&](int64_t i, int) {
    const Tile& t = g.tiles[i];
    if (t.row >= 0 && g.sides[i].row == Grouping::kScattered) spread(g, t.row, t.r, gamma, slots);
    if (t.col >= 0 && g.sides[i].col == Grouping::kScattered) spread(g, t.col, t.c, gamma, slots);
  });
  const auto side = [&](int64_t slot, int64_t channel) -> const A* {
    return slot < 0 ? nullptr : channel == Grouping::kScattered ? slots + slot : gamma + channel;
  };
  const auto sides = [&](const Canonical& t) {
    const Grouping::Sides& of = g.sides[&t - plan.tiles.data()];
    return Sides<A>{side(t.row, t.swapped ? of.col : of.row), side(t.col, t.swapped ? of.row : of.col)};
  };
  axpy<A>(ys, xs, plan, dtype, sides, room, threads);
}

}  // namespace

Grouping::Grouping(const Tile* tiles, int64_t n_tiles, const Run* runs, int64_t n_runs, int64_t slots,
                   const int64_t* sizes, int64_t n_groups, int64_t channels)
    : tiles(tiles),
      n_tiles(n_tiles),
      runs(runs),
      n_runs(n_runs),
      slots(slots),
      sizes(sizes),
      n_groups(n_groups),
      channels(channels),
      n_tensors(tensors_of(tiles, n_tiles)) {
  for (int64_t i = 0; i < n_tiles; ++i)
    sides.push_back({channel_of_side(tiles[i].row, tiles[i].r), channel_of_side(tiles[i].col, tiles[i].c)});

  std::vector<int64_t> part_of(channels);
  int64_t channel = 0;
  for (int64_t group = 0; group < n_groups; ++group) {
    if (parts.empty() || channel - parts.back().channel >= kPart) parts.push_back({0, group, channel});
    const auto part = static_cast<int64_t>(parts.size()) - 1;
    std::fill_n(part_of.begin() + channel, sizes[group], part);
    channel += sizes[group];
  }
  parts.push_back({0, n_groups, channels});

  std::vector<std::vector<Run>> of_parts(parts.size());
  for (const Run* run = runs; run != runs + n_runs; ++run)
    for (int64_t at = 0, length; at < run->length; at += length) {
      const int64_t first = run->channel + at, part = part_of[first];
      length = std::min(run->length - at, parts[part + 1].channel - first);
      of_parts[part].push_back({run->slot + at, first, length});
    }
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i].run = static_cast<int64_t>(by_part.size());
    by_part.insert(by_part.end(), of_parts[i].begin(), of_parts[i].end());
  }
}

const Run* Grouping::run_from(int64_t slot) const {
  const auto before = [](const Run& run, int64_t at) { return run.slot < at; };
  return std::lower_bound(runs, runs + n_runs, slot, before);
}

int64_t Grouping::channel_of_side(int64_t slot, int64_t length) const {
  const Run* run = run_from(slot);
  return run != runs + n_runs && run->slot == slot && run->length == length ? run->channel : kScattered;
}

const Plan& Grouping::plan(DType dtype) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<const Plan>& known = plans_[dtype];
  if (known == nullptr) known = std::make_unique<const Plan>(make_plan(tiles, n_tiles, kElementBytes[dtype]));
  return *known;
}

void channel_totals(const Addresses& xs, DType dtype, double p, const Grouping& g, bool divided, void* const& totals,
                    int threads, const Meanwhile& meanwhile) {
  const Plan& plan = g.plan(dtype);
  if (dtype == kF64) totals_of<double>(xs, plan, dtype, p, g, divided, totals, threads, meanwhile);
  else totals_of<float>(xs, plan, dtype, p, g, divided, totals, threads, meanwhile);
}

void group_push(const Addresses& ys, const Addresses& xs, DType dtype, double p, const Grouping& g, double alpha,
                double strength, const uint8_t* where, int threads, const Meanwhile& meanwhile) {
  const Plan& plan = g.plan(dtype);
  if (dtype == kF64) push<double>(ys, xs, plan, dtype, p, g, alpha, strength, where, threads, meanwhile);
  else push<float>(ys, xs, plan, dtype, p, g, alpha, strength, where, threads, meanwhile);
}

}  // namespace pat

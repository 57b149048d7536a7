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

// Sums over all that belongs to a channel, in the order of the slots: [channels].
template <class A>
void sum_channels(const A* of_slots, const Grouping& g, A* totals, int threads) {
  const int64_t bytes = (g.slots + g.channels) * static_cast<int64_t>(sizeof(A));
  parallel_for(static_cast<int64_t>(g.starts.size()) - 1, bytes, threads, [&](int64_t part, int) {
    const Run *run = g.by_part.data() + g.starts[part], *end = g.by_part.data() + g.starts[part + 1];
    const int64_t first = part * Grouping::kPart, last = std::min(g.channels, first + Grouping::kPart);
    std::fill(totals + first, totals + last, A(0));
    for (const Run* next = run; next < std::min(end, run + kAhead); ++next) expect(of_slots, *next);
    for (; run != end; ++run) {
      if (end - run > kAhead) expect(of_slots, run[kAhead]);
      const A* slots = of_slots + run->slot;
      A* to = totals + run->channel;
      for (int64_t i = 0; i < run->length; ++i) to[i] += slots[i];
    }
  });
}

// Calls work(channel, channels) with the range of each group.
template <class Work>
void for_groups(const Grouping& g, int threads, const Work& work) {
  std::vector<int64_t> starts(g.n_groups + 1, 0);
  for (int64_t i = 0; i < g.n_groups; ++i) starts[i + 1] = starts[i] + g.sizes[i];
  // What is done to a channel takes as long as reading some hundred bytes.
  parallel_for(g.n_groups, g.channels * 128, threads, [&](int64_t i, int) { work(starts[i], g.sizes[i]); });
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
  A low = std::numeric_limits<A>::infinity(), high = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(totals[i]);
    gamma[i] = std::sqrt(totals[i]);
    low = std::min(low, gamma[i]), high = std::max(high, gamma[i]);
  }
  if (!finite) return std::fill(gamma, gamma + n, A(0));
  const A per_span = A(1) / std::max(high - low, std::numeric_limits<A>::min()), by = static_cast<A>(strength);
  const A exponent = static_cast<A>(std::log2(alpha));
  for (int64_t i = 0; i < n; ++i) gamma[i] = by * power_of_2(exponent * std::min((high - gamma[i]) * per_span, A(1)));
}

// The values of channels at the slots of a side: where they lie side by side, or copied to the slots.
template <class A>
const A* at_side(const Grouping& g, int64_t slot, int64_t length, const A* values, A* slots) {
  if (slot < 0) return nullptr;
  const auto before = [](const Run& run, int64_t at) { return run.slot < at; };
  const Run* end = g.runs + g.n_runs;
  const Run* run = std::lower_bound(g.runs, end, slot, before);
  if (run != end && run->slot == slot && run->length == length) return values + run->channel;
  std::fill(slots + slot, slots + slot + length, A(0));
  for (; run != end && run->slot < slot + length; ++run)
    std::copy_n(values + run->channel, run->length, slots + run->slot);
  return slots + slot;
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
  sum_channels(slots, g, totals, threads);
  if (divided) for_groups(g, threads, [&](int64_t at, int64_t n) { divide_by_mean(totals + at, n); });
}

template <class A>
void push(const Addresses& ys, const Addresses& xs, const Plan& plan, DType dtype, double p, const Grouping& g,
          double alpha, double strength, const uint8_t* where, int threads, const Meanwhile& meanwhile) {
  const int64_t each = padded(g.channels);
  const Scratch scratch((2 * each + padded(g.slots) + room_for(plan, threads)) * sizeof(A));
  A *totals = scratch.as<A>(), *gamma = totals + each, *slots = gamma + each;
  A* room = slots + padded(g.slots);
  if (!reduce(xs, {}, plan, dtype, norm(p), p, slots, g.slots, room, threads, meanwhile)) return;
  sum_channels(slots, g, totals, threads);
  for_groups(g, threads, [&](int64_t at, int64_t n) {
    weigh(totals + at, gamma + at, n, alpha, strength);
    for (int64_t i = at; where != nullptr && i < at + n; ++i) gamma[i] = where[i] ? gamma[i] : A(0);
  });
  const auto n_tiles = static_cast<int64_t>(plan.tiles.size());
  std::vector<Sides<A>> sides(n_tiles);
  parallel_for(n_tiles, g.slots * static_cast<int64_t>(sizeof(A)), threads, [&](int64_t i, int) {
    const Canonical& t = plan.tiles[i];
    sides[i] = {at_side(g, t.row, t.rows.n, gamma, slots), at_side(g, t.col, t.c, gamma, slots)};
  });
  axpy<A>(ys, xs, plan, dtype, [&](const Canonical& t) { return sides[&t - plan.tiles.data()]; }, room, threads);
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
  std::vector<std::vector<Run>> parts((channels + kPart - 1) / kPart);
  for (const Run* run = runs; run != runs + n_runs; ++run)
    for (int64_t at = 0, length; at < run->length; at += length) {
      const int64_t channel = run->channel + at, part = channel / kPart;
      length = std::min(run->length - at, (part + 1) * kPart - channel);
      parts[part].push_back({run->slot + at, channel, length});
    }
  for (const std::vector<Run>& part : parts) {
    starts.push_back(static_cast<int64_t>(by_part.size()));
    by_part.insert(by_part.end(), part.begin(), part.end());
  }
  starts.push_back(static_cast<int64_t>(by_part.size()));
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

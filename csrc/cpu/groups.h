// What slots have in common: several make up a channel, and neighbouring channels a group.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "engine.h"
#include "plan.h"

namespace pat {

// Neighbouring slots that belong to neighbouring channels, in the order of the slots; of one side of one tile.
struct Run {
  int64_t slot, channel, length;
};

// A table, its slots by channels, and these by groups. What it points at stays with the caller.
class Grouping {
 public:
  // sizes: channels of each group, one group after the other.
  Grouping(const Tile* tiles, int64_t n_tiles, const Run* runs, int64_t n_runs, int64_t slots, const int64_t* sizes,
           int64_t n_groups, int64_t channels);

  // The first run at a slot or behind it; the end if there is none.
  const Run* run_from(int64_t slot) const;

  // How work on the table is cut; found out once.
  const Plan& plan(DType dtype) const;

  const Tile* tiles;
  const int64_t n_tiles;
  const Run* runs;
  const int64_t n_runs, slots;
  const int64_t* sizes;
  const int64_t n_groups, channels;
  const int64_t n_tensors;  // that the table names

  // Whole groups, side by side, of at least kPart channels together: what the first run of `by_part`, the first group
  // and the first channel of each is. One more is the end.
  struct Part {
    int64_t run, group, channel;
  };
  static constexpr int64_t kPart = 512;
  std::vector<Part> parts;
  std::vector<Run> by_part;  // cut where parts end

  // Sides of tiles: the channel of its first slot, if all its slots are one run; else kScattered. One without slots has
  // none.
  static constexpr int64_t kScattered = -1;
  struct Sides {
    int64_t row, col;
  };
  std::vector<Sides> sides;

 private:
  int64_t channel_of_side(int64_t slot, int64_t length) const;

  mutable std::mutex mutex_;
  mutable std::unique_ptr<const Plan> plans_[kDTypes];
};

// totals: [channels] in the accumulator type; the sums of |x|^p over all that belongs to a channel, divided by their
// mean over the group if `divided` (which is added up in double precision). Its address is needed when `meanwhile` has
// ended.
void channel_totals(const Addresses& xs, DType dtype, double p, const Grouping& grouping, bool divided,
                    void* const& totals, int threads, const Meanwhile& meanwhile = {});

// The penalty of a group's norms, n_c = sqrt(total_c), in one call:
//   gamma_c = strength * alpha ** ((n_max - n_c) / (n_max - n_min)), 0 in a group with a norm that is not finite;
//   y += (gamma[row] + gamma[col]) * x for tensors with a y.
// `where` is null, or [channels]: 0 for channels of gamma 0. The ys are needed when `meanwhile` has ended, and stay as
// they are where it stopped the call.
void group_push(const Addresses& ys, const Addresses& xs, DType dtype, double p, const Grouping& grouping, double alpha,
                double strength, const uint8_t* where, int threads, const Meanwhile& meanwhile = {});

}  // namespace pat

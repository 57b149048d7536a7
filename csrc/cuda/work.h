// How the work of one call is cut into equal blocks, on the host, once per table.
//
// A tile becomes a matrix: its rows are the farther apart of the two channel axes, and a row's
// elements, columns and kernel together, are numbered by their *position* in memory order. Each block
// takes a rectangle of rows and positions, and its description holds all that the block needs. Cuts
// depend on shapes alone, so results do not depend on the device or on how its blocks are scheduled.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/engine.h"

namespace pat::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
// Row sums that a block keeps in shared memory.
constexpr int kRowSums = 1024;
// Slots that one block of the second pass of a reduction adds up.
constexpr int kGatherSlots = 32;
constexpr int64_t kNowhere = INT64_MIN;

// Positions of one thread: 16 bytes' worth, at most 8.
constexpr int positions_per_thread(int64_t element_bytes) {
  return element_bytes >= 2 ? static_cast<int>(16 / element_bytes) : 8;
}

// A row's elements: position j is column j / kernel when `k_inner`, else j % columns.
struct Row {
  int64_t first, positions;  // of the block's part
  int64_t columns, kernel;
  int32_t k_inner;
  int32_t across;  // threads along the row, a power of two; the others take further rows
  int32_t packed;  // positions are neighbours in memory
  int32_t unused;
};

// A rectangle of a tile, for reduce, axpy and scale. Where sums go: n >= 0 is slot n of the result,
// n < 0 entry ~n of the workspace.
struct Work {
  Row row;
  int64_t tensor, offset;    // of the first row's position 0
  int64_t rows, row_stride;  // 0 for a lone row
  int64_t inner, inner_stride, outer_stride;
  int64_t row_slot, col_slot;  // of the first row and of column 0; negative: none
  int64_t row_to, col_to;      // of the first row and of position 0
};

// The second pass of a reduction: `slots` neighbouring slots, each a sum over chunks and kernel.
struct Gather {
  int64_t from, to, slots, slot_step;
  int64_t chunks, chunk_step;
  int64_t kernel, kernel_step;
};

// A rectangle of a destination tile, for compact. A list is an offset into the index, -1 for all.
struct Move {
  Row row;
  int64_t from_tensor, from_offset, from_row, from_col, from_kernel;
  int64_t to_tensor, to_offset, to_row, to_col, to_kernel;
  int64_t first_row, rows;
  int64_t row_list, col_list;
};

// Which slots make up a channel, and which channels a group; in device memory.
struct Groups {
  const int32_t* starts;   // [channels + 1]: where in `slots` a channel's begin
  const int32_t* slots;    // of one channel after the other, ascending
  const int32_t* firsts;   // [groups + 1]: the first channel of each group
  const int32_t* channel;  // [n_slots]: of each slot; negative: none
  int64_t channels, groups, n_slots;
};

struct Plan {
  std::vector<Work> works;
  std::vector<Gather> gathers;
  int64_t workspace = 0;  // sums kept between the passes
};

Plan make_plan(const Tile* tiles, int64_t n_tiles, int64_t element_bytes);
std::vector<Move> make_moves(const Tile* tiles, const Tile* out_tiles, int64_t n_tiles, int64_t element_bytes);

}  // namespace pat::cuda

// How the work of one call is cut: tiles in canonical form, cut into segments, batched into chunks.
//
// All cuts depend on shapes alone, never on the number of threads, and partial sums are combined in
// the order of the segments: so results are bitwise equal for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"

namespace pat {

// A tile whose rows are the farther apart of the two channel axes, so that a row is as contiguous as
// the layout allows. `rows.n` counts all rows; flat index j of a row is c * k + kk when `k_inner`,
// else kk * c_count + c.
struct Canonical {
  int64_t tensor, offset;
  Rows rows;
  int64_t c, k, sc, sk;
  int64_t row, col;
  bool swapped;  // rows are the tile's columns
  bool k_inner;

  // Whether a range of columns is one run of elements.
  bool flat() const { return k_inner && rows.outer == 1; }
  // Columns to work on at once.
  int64_t block() const;
};

// Rows [r0, r1) and columns [c0, c1) of a tile, which needs the first `tensors` of the call. `scratch` is where its
// column sums go, -1: straight out.
struct Segment {
  int64_t tile, tensors, r0, r1, c0, c1, scratch;
};

struct Plan {
  std::vector<Canonical> tiles;
  std::vector<Segment> segments;
  std::vector<int64_t> chunks;  // first segment of each chunk, and the end
  std::vector<int64_t> first;   // first segment of each tile, and the end
  int64_t scratch = 0;          // elements for column sums of tiles in several segments
  int64_t widest = 0;           // elements in the widest block of columns
  int64_t bytes = 0;
  int64_t slots = 0;  // that segments make sums for, if each slot is named once

  // Puts a segment into the open chunk, or into a new one when that holds `target` bytes.
  void add(const Segment& segment, int64_t segment_bytes, int64_t target);
  void close();

 private:
  int64_t open_bytes_ = 0;
};

// How many chunks a call is cut into, where they are not too small or too large then. Where one begins memory is slow,
// and the last ones are what threads wait for: few where memory is read from end to end, more where rows are left out.
constexpr int64_t kFewChunks = 64, kManyChunks = 256;

int64_t chunk_bytes(const Plan& plan, int64_t chunks);

// How many tensors a table names.
int64_t tensors_of(const Tile* tiles, int64_t n_tiles);

Canonical canonical(const Tile& tile);
Plan make_plan(const Tile* tiles, int64_t n_tiles, int64_t element_bytes);

// Whether this process was forked off: OpenMP's pool does not survive that, and using it would hang.
bool forked();

}  // namespace pat

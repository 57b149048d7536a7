#include "work.h"

#include <algorithm>

namespace pat::cuda {
namespace {

constexpr int64_t kTargetBlocks = 4096;
constexpr int64_t kMinBlockBytes = 32 * 1024;
constexpr int64_t kMaxBlockBytes = 128 * 1024;
// A lone column with a short kernel is a vector: read along the rows, not across.
constexpr int64_t kShortKernel = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t block_bytes(int64_t bytes) { return std::clamp(bytes / kTargetBlocks, kMinBlockBytes, kMaxBlockBytes); }

bool rows_are_nearer(const Tile& t) {
  if (t.r == 1 || t.c == 1) return t.c == 1 && t.r > 1 && t.k < kShortKernel;
  return t.sr < t.sc;
}

void swap_axes(Tile& t) {
  std::swap(t.r, t.c);
  std::swap(t.sr, t.sc);
  std::swap(t.row, t.col);
}

// Strides of lone entries mean nothing; give them those that let runs merge.
void normalise(Tile& t) {
  if (t.r == 1) t.sr = 0;
  if (t.k == 1) t.sk = t.c == 1 ? 1 : t.sc;
  if (t.c == 1) t.sc = t.k * t.sk;
}

bool kernel_is_inner(const Tile& t) { return t.k == 1 || t.c == 1 || t.sk < t.sc; }

struct Run {
  int64_t inner, inner_stride, outer_stride;
};

Run run_of(const Tile& t, bool k_inner) {
  Run run{k_inner ? t.k : t.c, k_inner ? t.sk : t.sc, k_inner ? t.sc : t.sk};
  if (run.inner == 1) run.inner_stride = run.outer_stride;
  if (run.inner == 1 || run.outer_stride == run.inner * run.inner_stride) run.inner = t.c * t.k;
  return run;
}

bool is_packed(const Tile& t, const Run& run) { return run.inner == t.c * t.k && run.inner_stride == 1; }

struct Cut {
  Row row;
  int64_t width, height;  // positions and rows of one block
};

// `bytes` is what a block should move of this operand.
Cut cut_of(const Tile& t, bool k_inner, bool packed, int64_t element_bytes, int64_t bytes) {
  const int64_t each = positions_per_thread(element_bytes), positions = t.c * t.k;
  int64_t across = 1;
  while (across < kThreads && across * each < positions) across *= 2;
  while (across > kWarp && kThreads / across < t.r) across /= 2;
  const int64_t width = across * each, step = kThreads / across;
  int64_t height = std::max<int64_t>(1, bytes / (std::min(width, positions) * element_bytes));
  height = std::min(height, kRowSums / std::max<int64_t>(1, across / kWarp));
  // Even blocks, in whole steps of the threads.
  height = ceil_div(ceil_div(t.r, ceil_div(t.r, height)), step) * step;
  return {{0, 0, t.c, t.k, k_inner, static_cast<int32_t>(across), packed, 0}, width, height};
}

void add_gathers(Plan& plan, Gather all) {
  for (int64_t at = 0; at < all.slots; at += kGatherSlots) {
    Gather part = all;
    part.from += at * all.slot_step;
    part.to += at;
    part.slots = std::min<int64_t>(kGatherSlots, all.slots - at);
    plan.gathers.push_back(part);
  }
}

void add_tile(Plan& plan, Tile t, int64_t element_bytes, int64_t bytes) {
  if (rows_are_nearer(t)) swap_axes(t);
  normalise(t);
  const bool k_inner = kernel_is_inner(t);
  const Run run = run_of(t, k_inner);
  const Cut cut = cut_of(t, k_inner, is_packed(t, run), element_bytes, bytes);
  const int64_t positions = t.c * t.k;
  const int64_t windows = ceil_div(positions, cut.width), chunks = ceil_div(t.r, cut.height);
  const bool rows_direct = windows == 1, cols_direct = chunks == 1 && t.k == 1;
  int64_t row_base = plan.workspace;
  if (t.row >= 0 && !rows_direct) plan.workspace += windows * t.r;
  int64_t col_base = plan.workspace;
  if (t.col >= 0 && !cols_direct) plan.workspace += chunks * positions;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t r = chunk * cut.height;
    for (int64_t window = 0; window < windows; ++window) {
      Work w{cut.row, t.tensor, t.offset + r * t.sr, std::min(cut.height, t.r - r), t.sr, 0, 0, 0, -1, -1, 0, 0};
      w.row.first = window * cut.width;
      w.row.positions = std::min(cut.width, positions - w.row.first);
      w.inner = run.inner, w.inner_stride = run.inner_stride, w.outer_stride = run.outer_stride;
      w.row_slot = t.row >= 0 ? t.row + r : -1;
      w.col_slot = t.col;
      w.row_to = t.row < 0 ? kNowhere : rows_direct ? w.row_slot : ~(row_base + window * t.r + r);
      w.col_to = t.col < 0 ? kNowhere : cols_direct ? t.col : ~(col_base + chunk * positions);
      plan.works.push_back(w);
    }
  }
  if (t.row >= 0 && !rows_direct) add_gathers(plan, {row_base, t.row, t.r, 1, windows, t.r, 1, 0});
  if (t.col >= 0 && !cols_direct)
    add_gathers(plan, {col_base, t.col, t.c, k_inner ? t.k : 1, chunks, positions, t.k, k_inner ? int64_t{1} : t.c});
}

void add_moves(std::vector<Move>& moves, Tile source, Tile target, int64_t element_bytes, int64_t bytes) {
  if (rows_are_nearer(source)) swap_axes(source), swap_axes(target);
  normalise(source);
  normalise(target);
  const bool k_inner = kernel_is_inner(source);
  const bool packed =
      target.col < 0 && is_packed(source, run_of(source, k_inner)) && is_packed(target, run_of(target, k_inner));
  const Cut cut = cut_of(target, k_inner, packed, element_bytes, bytes);
  const int64_t positions = target.c * target.k;
  for (int64_t r = 0; r < target.r; r += cut.height) {
    for (int64_t first = 0; first < positions; first += cut.width) {
      Move m{cut.row,   source.tensor, source.offset, source.sr, source.sc, source.sk,  target.tensor, target.offset,
             target.sr, target.sc,     target.sk,     r,         0,         target.row, target.col};
      m.row.first = first;
      m.row.positions = std::min(cut.width, positions - first);
      m.rows = std::min(cut.height, target.r - r);
      moves.push_back(m);
    }
  }
}

template <class Tiles>
int64_t total_bytes(const Tiles* tiles, int64_t n_tiles, int64_t element_bytes) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < n_tiles; ++i) bytes += tiles[i].r * tiles[i].c * tiles[i].k * element_bytes;
  return bytes;
}

}  // namespace

Plan make_plan(const Tile* tiles, int64_t n_tiles, int64_t element_bytes) {
  Plan plan;
  const int64_t bytes = block_bytes(total_bytes(tiles, n_tiles, element_bytes));
  for (int64_t i = 0; i < n_tiles; ++i)
    if (tiles[i].r * tiles[i].c * tiles[i].k > 0) add_tile(plan, tiles[i], element_bytes, bytes);
  return plan;
}

std::vector<Move> make_moves(const Tile* tiles, const Tile* out_tiles, int64_t n_tiles, int64_t element_bytes) {
  std::vector<Move> moves;
  const int64_t bytes = block_bytes(total_bytes(out_tiles, n_tiles, element_bytes));
  for (int64_t i = 0; i < n_tiles; ++i)
    if (out_tiles[i].r * out_tiles[i].c * out_tiles[i].k > 0)
      add_moves(moves, tiles[i], out_tiles[i], element_bytes, bytes);
  return moves;
}

}  // namespace pat::cuda

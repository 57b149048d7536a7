#include "plan.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace pat {
namespace {

constexpr int64_t kMinChunkBytes = 128 * 1024, kMaxChunkBytes = 4 * 1024 * 1024;
// What a segment costs beside its rows is about as much as reading four: clearing, folding and combining its sums. So
// it has some rows more than its bytes ask for, but not so many that other threads wait for it long.
constexpr int64_t kFewRows = 64, kEnoughRows = 128, kMoreBytes = 4;
// A lone column with a short kernel is a vector: read along the rows, not across.
constexpr int64_t kShortKernel = 64;
// Elements of a row worked on at once: their accumulators stay in the second-level cache.
constexpr int64_t kBlock = 32768;

std::atomic<bool> g_forked{false};
const int g_registered = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

bool rows_are_nearer(const Tile& t) {
  if (t.r == 1 || t.c == 1) return t.c == 1 && t.r > 1 && t.k < kShortKernel;
  return t.sr < t.sc;
}

void cut_tile(Plan& plan, int64_t index, int64_t element_bytes, int64_t target) {
  const Canonical& t = plan.tiles[index];
  if (t.rows.n * t.c * t.k == 0) return;
  plan.slots += (t.row >= 0 ? t.rows.n : 0) + (t.col >= 0 ? t.c : 0);
  plan.widest = std::max(plan.widest, t.block() * t.k);
  const int64_t col_bytes = t.k * element_bytes, row_bytes = t.c * col_bytes;
  if (t.rows.n == 1 && t.row < 0 && t.flat()) {
    // The columns of a single row are independent of one another.
    const int64_t step = std::max<int64_t>(1, target / col_bytes);
    for (int64_t c = 0; c < t.c; c += step) {
      const int64_t end = std::min(t.c, c + step);
      plan.add({index, t.tensor + 1, 0, 1, c, end, -1}, (end - c) * col_bytes, target);
    }
    return;
  }
  const int64_t rows = target / row_bytes, step = std::max(rows, std::clamp(kMoreBytes * rows, kFewRows, kEnoughRows));
  const bool partial = t.col >= 0 && t.rows.n > step;
  for (int64_t r = 0; r < t.rows.n; r += step) {
    const int64_t end = std::min(t.rows.n, r + step);
    plan.add({index, t.tensor + 1, r, end, 0, t.c, partial ? plan.scratch : -1}, (end - r) * row_bytes, target);
    if (partial) plan.scratch += t.c;
  }
}

}  // namespace

bool forked() { return g_forked; }

int64_t Canonical::block() const { return flat() ? std::min(c, std::max<int64_t>(1, kBlock / k)) : c; }

int64_t chunk_bytes(const Plan& plan, int64_t chunks) {
  return std::clamp(plan.bytes / chunks, kMinChunkBytes, kMaxChunkBytes);
}

void Plan::add(const Segment& segment, int64_t segment_bytes, int64_t target) {
  if (chunks.empty() || open_bytes_ >= target) {
    chunks.push_back(static_cast<int64_t>(segments.size()));
    open_bytes_ = 0;
  }
  segments.push_back(segment);
  open_bytes_ += segment_bytes;
}

void Plan::close() { chunks.push_back(static_cast<int64_t>(segments.size())); }

int64_t tensors_of(const Tile* tiles, int64_t n_tiles) {
  int64_t n = 0;
  for (int64_t i = 0; i < n_tiles; ++i) n = std::max(n, tiles[i].tensor + 1);
  return n;
}

Canonical canonical(const Tile& tile) {
  Tile t = tile;
  const bool swapped = rows_are_nearer(t);
  if (swapped) {
    std::swap(t.r, t.c);
    std::swap(t.sr, t.sc);
    std::swap(t.row, t.col);
  }
  // The stride of a lone entry means nothing; give it the one that lets runs merge.
  const bool k_inner = t.k == 1 || t.c == 1 || t.sk < t.sc;
  if (t.k == 1) t.sk = t.c == 1 ? 1 : t.sc;
  if (t.c == 1) t.sc = t.k * t.sk;
  Canonical v{t.tensor, t.offset, {}, t.c, t.k, t.sc, t.sk, t.row, t.col, swapped, k_inner};
  v.rows.n = t.r;
  v.rows.stride = t.sr;
  v.rows.inner = k_inner ? t.k : t.c;
  v.rows.inner_stride = k_inner ? t.sk : t.sc;
  v.rows.outer = k_inner ? t.c : t.k;
  v.rows.outer_stride = k_inner ? t.sc : t.sk;
  if (v.rows.inner == 1 || v.rows.outer_stride == v.rows.inner * v.rows.inner_stride) {
    if (v.rows.inner == 1) v.rows.inner_stride = v.rows.outer_stride;
    v.rows.inner *= v.rows.outer;
    v.rows.outer = 1;
  }
  return v;
}

Plan make_plan(const Tile* tiles, int64_t n_tiles, int64_t element_bytes) {
  Plan plan;
  plan.tiles.reserve(n_tiles);
  for (int64_t i = 0; i < n_tiles; ++i) {
    plan.tiles.push_back(canonical(tiles[i]));
    plan.bytes += tiles[i].r * tiles[i].c * tiles[i].k * element_bytes;
  }
  const int64_t target = chunk_bytes(plan, kFewChunks);
  for (int64_t i = 0; i < n_tiles; ++i) {
    plan.first.push_back(static_cast<int64_t>(plan.segments.size()));
    cut_tile(plan, i, element_bytes, target);
  }
  plan.first.push_back(static_cast<int64_t>(plan.segments.size()));
  plan.close();
  return plan;
}

}  // namespace pat

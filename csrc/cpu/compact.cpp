// channel_compact: gathers kept rows and columns. Moves bits, so it knows element sizes, not dtypes.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <tuple>

#include "engine.h"
#include "parallel.h"
#include "plan.h"
#include "stream.h"

namespace pat {
namespace {

// Runs of neighbouring kept columns shorter than this many bytes are cheaper to move one by one.
constexpr int64_t kRunBytes = 32;
// Runs that are this long are copied faster than compressed, and columns of which fewer than one in so many stay are
// faster picked out.
// Of fewer rows they are picked out, too: to make masks for these takes longer.
constexpr int64_t kLongBytes = 256, kFew = 6, kFewRows = 4;
// What is fetched ahead of what is copied, at least, in whole rows: the processor cannot know which rows are kept.
constexpr int64_t kAheadBytes = 8192;
// Calls that write at least so much write past the caches, which could not hold it anyway; but not the smallest
// tensors: to wait until all is written takes as long as to copy these.
constexpr int64_t kStreamBytes = 32 << 20, kStreamSegment = 4096;

std::atomic<int64_t> g_stream_bytes{kStreamBytes};

// One tile and its destination: n rows, c columns, k; the axis that is far apart in the source is rows.
struct Move {
  int64_t out, offset;  // the destination's tensor, and how far in it begins
  Canonical src;
  int64_t n, c, k, stride, sc, sk;
  const int32_t *rows, *cols;  // kept; null: all
  const uint16_t* masks;       // the same columns as bits of words of 4 bytes; null: not to be compressed

  bool k_packed() const { return k == 1 || (src.sk == 1 && sk == 1); }
  int64_t unit() const { return k_packed() ? k : 1; }  // elements that stay together
  bool packed() const { return src.sc == unit() && (sc == unit() || c == 1); }
};

Move make_move(const Tile& source, Tile target, const int32_t* index) {
  Move m{};
  m.src = canonical(source);
  if (m.src.swapped) {
    std::swap(target.r, target.c);
    std::swap(target.sr, target.sc);
    std::swap(target.row, target.col);
  }
  m.n = target.r, m.stride = target.sr;
  m.c = target.c, m.sc = target.sc;
  m.k = target.k, m.sk = target.sk;
  m.out = target.tensor, m.offset = target.offset;
  m.rows = target.row >= 0 ? index + target.row : nullptr;
  m.cols = target.col >= 0 ? index + target.col : nullptr;
  return m;
}

// Kept columns as runs of neighbours, in units of `unit` elements.
struct Run {
  int64_t from, to, length;
};

int64_t count_runs(const int32_t* cols, int64_t n) {
  int64_t runs = n > 0;
  for (int64_t c = 1; c < n; ++c) runs += cols[c] != cols[c - 1] + 1;
  return runs;
}

std::vector<Run> runs_of(const int32_t* cols, int64_t n) {
  std::vector<Run> runs;
  if (cols == nullptr) runs.push_back({0, 0, n});
  for (int64_t c = 0; cols != nullptr && c < n; ++c) {
    if (!runs.empty() && cols[c] == cols[c - 1] + 1) ++runs.back().length;
    else runs.push_back({cols[c], c, 1});
  }
  return runs;
}

template <class T>
void move_one_by_one(const Move& m, const T* from, T* to) {
  for (int64_t c = 0; c < m.c; ++c) {
    const T* x = from + (m.cols ? m.cols[c] : c) * m.src.sc;
    T* y = to + c * m.sc;
    for (int64_t k = 0; k < m.k; ++k) y[k * m.sk] = x[k * m.src.sk];
  }
}

template <class T>
void gather(const int32_t* cols, int64_t n, const T* from, T* to) {
  for (int64_t c = 0; c < n; ++c) to[c] = from[cols[c]];
}

// Columns as bits, made once for all tiles that keep the same ones.
class Masks {
 public:
  const uint16_t* of(const Move& m, int64_t element_bytes) {
    const int64_t words = m.unit() * element_bytes / 4;
    if (!m.cols || m.n < kFewRows || m.c * kFew < m.src.c || m.c == 0) return nullptr;
    if (!m.packed() || m.unit() * element_bytes % 4 != 0 || words * 4 >= kLongBytes) return nullptr;
    const auto [found, is_new] = made_.try_emplace({m.cols, m.c, m.src.c, words});
    std::vector<uint16_t>& bits = found->second;
    if (is_new) make(m, words, bits);
    return bits.empty() ? nullptr : bits.data();
  }

 private:
  // Leaves no bits where runs are so long that they are copied faster.
  static void make(const Move& m, int64_t words, std::vector<uint16_t>& bits) {
    if (m.c * words * 4 >= kLongBytes * count_runs(m.cols, m.c)) return;
    bits.resize((m.src.c * words + 63) / 64 * 4);
    // 64 bits are put together before they are written.
    const uint64_t unit = (uint64_t{1} << words) - 1;
    uint16_t* const to = bits.data();
    uint64_t open = 0, at = 0;
    for (int64_t c = 0; c < m.c; ++c) {
      const uint64_t from = static_cast<uint64_t>(m.cols[c] * words), place = from % 64;
      if (from / 64 != at) {
        std::memcpy(to + 4 * at, &open, 8);
        open = 0, at = from / 64;
      }
      open |= unit << place;
      if (place + static_cast<uint64_t>(words) > 64) {
        std::memcpy(to + 4 * at, &open, 8);
        open = unit >> (64 - place), ++at;
      }
    }
    std::memcpy(to + 4 * at, &open, 8);
  }

  std::map<std::tuple<const int32_t*, int64_t, int64_t, int64_t>, std::vector<uint16_t>> made_;
};

// How rows of a tile are moved.
template <class T>
struct Mover {
  Mover(const Move& move, const void* x, void* out)
      : m(move),
        from(static_cast<const T*>(x) + m.src.offset),
        to(static_cast<T*>(out) + m.offset),
        unit_bytes(m.unit() * static_cast<int64_t>(sizeof(T))) {
    ahead = kAheadBytes / std::max<int64_t>(1, m.src.c * m.src.k * static_cast<int64_t>(sizeof(T))) + 1;
    if (!m.packed() || m.masks) return;
    long_runs = m.cols == nullptr || m.unit() > 1 || m.c * unit_bytes >= kRunBytes * count_runs(m.cols, m.c);
    if (long_runs) runs = runs_of(m.cols, m.c);
  }

  const T* row(int64_t r) const { return from + (m.rows ? m.rows[r] : r) * m.src.rows.stride; }
  const T* later(int64_t r) const { return row(std::min(r + ahead, m.n - 1)); }
  T* target(int64_t r) const { return to + r * m.stride; }
  int64_t words() const { return m.src.c * unit_bytes / 4; }

  const Move& m;
  const T* from;
  T* to;
  int64_t unit_bytes, ahead;
  std::vector<Run> runs;
  bool long_runs = false;  // whether columns are copied by runs; else they are picked out
};

template <class T>
void move_rows(const Mover<T>& mover, int64_t r0, int64_t r1) {
  const Move& m = mover.m;
  for (int64_t r = r0; r < r1; ++r) {
    const T *from = mover.row(r), *later = mover.later(r);
    T* to = mover.target(r);
    if (!m.packed()) {
      move_one_by_one(m, from, to);
      continue;
    }
    for (int64_t k = 0; k < (m.k_packed() ? 1 : m.k); ++k) {
      const T* x = from + k * m.src.sk;
      T* y = to + k * m.sk;
      if (m.masks)
        kernels().compress(reinterpret_cast<uint32_t*>(y), m.c * mover.unit_bytes / 4,
                           reinterpret_cast<const uint32_t*>(x), mover.words(), m.masks,
                           reinterpret_cast<const uint32_t*>(later + k * m.src.sk));
      else if (mover.long_runs)
        for (const Run& run : mover.runs)
          std::memcpy(reinterpret_cast<char*>(y) + run.to * mover.unit_bytes,
                      reinterpret_cast<const char*>(x) + run.from * mover.unit_bytes, run.length * mover.unit_bytes);
      else gather(m.cols, m.c, x, y);
    }
  }
}

// The same of rows that are packed, into rows that lie one behind the other, past the caches.
template <class T>
void stream_rows(const Mover<T>& mover, int64_t r0, int64_t r1) {
  const Move& m = mover.m;
  Stream out(reinterpret_cast<char*>(mover.target(r0)));
  for (int64_t r = r0; r < r1; ++r) {
    const T* from = mover.row(r);
    if (m.masks) {
      const auto *x = reinterpret_cast<const uint32_t*>(from),
                 *later = reinterpret_cast<const uint32_t*>(mover.later(r));
      constexpr int64_t kWords = Stream::kPiece / 4;
      for (int64_t w = 0; w < mover.words(); w += kWords)
        out.wrote(4 * kernels().compress(reinterpret_cast<uint32_t*>(out.room()), kWords + 16, x + w,
                                         std::min(kWords, mover.words() - w), m.masks + w / 16, later + w));
    } else if (mover.long_runs) {
      for (const Run& run : mover.runs)
        out.copy(reinterpret_cast<const char*>(from) + run.from * mover.unit_bytes, run.length * mover.unit_bytes);
    } else {
      constexpr int64_t kMost = Stream::kPiece / sizeof(T);
      for (int64_t c = 0; c < m.c; c += kMost) {
        const int64_t n = std::min(kMost, m.c - c);
        gather(m.cols + c, n, from, reinterpret_cast<T*>(out.room()));
        out.wrote(n * static_cast<int64_t>(sizeof(T)));
      }
    }
  }
}

template <class T>
void move_segment(const Mover<T>& mover, const Segment& s, int64_t stream_from) {
  const Move& m = mover.m;
  const bool dense = m.packed() && m.k_packed() && (m.n == 1 || m.stride == m.c * m.unit());
  const int64_t elements = (s.r1 - s.r0) * m.c * m.k, bytes = elements * static_cast<int64_t>(sizeof(T));
  if (dense && bytes >= stream_from && !is_fresh(mover.target(s.r0) + elements / 2)) stream_rows(mover, s.r0, s.r1);
  else move_rows(mover, s.r0, s.r1);
}

}  // namespace

void set_stream_bytes(int64_t bytes) { g_stream_bytes = bytes < 0 ? kStreamBytes : bytes; }

void channel_compact(const Addresses& outs, const Addresses& xs, const Tile* tiles, const Tile* out_tiles,
                     int64_t n_tiles, int64_t element_bytes, const int32_t* index, int threads,
                     const Meanwhile& meanwhile) {
  std::vector<Move> moves;
  Masks masks;
  Plan plan;
  moves.reserve(n_tiles);
  for (int64_t i = 0; i < n_tiles; ++i) {
    moves.push_back(make_move(tiles[i], out_tiles[i], index));
    if (kernels().compress) moves[i].masks = masks.of(moves[i], element_bytes);
    plan.bytes += moves[i].n * moves[i].c * moves[i].k * element_bytes;
  }
  const int64_t target = chunk_bytes(plan);
  for (int64_t i = 0; i < n_tiles; ++i) {
    const Move& m = moves[i];
    const int64_t row_bytes = m.c * m.k * element_bytes;
    const int64_t step = std::max<int64_t>(1, target / std::max<int64_t>(1, row_bytes));
    for (int64_t r = 0; r < m.n && row_bytes > 0; r += step) {
      const int64_t end = std::min(m.n, r + step);
      plan.add({i, std::max(m.src.tensor, m.out) + 1, r, end, 0, m.c, -1}, (end - r) * row_bytes, target);
    }
  }
  plan.close();
  const int64_t least = g_stream_bytes;
  const bool streams = kernels().stream && plan.bytes >= least;
  const int64_t stream_from = streams ? std::min(least, kStreamSegment) : INT64_MAX;
  const auto move = [&](const Segment& s, int) {
    const Move& m = moves[s.tile];
    const void* x = xs[m.src.tensor];
    void* out = outs[m.out];
    if (element_bytes == 1) move_segment(Mover<uint8_t>(m, x, out), s, stream_from);
    else if (element_bytes == 2) move_segment(Mover<uint16_t>(m, x, out), s, stream_from);
    else if (element_bytes == 4) move_segment(Mover<uint32_t>(m, x, out), s, stream_from);
    else move_segment(Mover<uint64_t>(m, x, out), s, stream_from);
  };
  for_segments(plan, threads, move, meanwhile);
}

}  // namespace pat

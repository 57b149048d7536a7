// channel_compact: gathers kept rows and columns. Moves bits, so it knows element sizes, not dtypes.
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
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
// Calls that write at least so much write past the caches, which could not hold it anyway; but not the smallest
// tensors: to wait until all is written takes as long as to copy these.
constexpr int64_t kStreamBytes = 32 << 20, kStreamSegment = 4096;

std::atomic<int64_t> g_stream_bytes{kStreamBytes};

struct Lines {
  static void stream(char* to, const char* from, int64_t bytes) { kernels().stream(to, from, bytes); }
  static void fence() { kernels().fence(); }
};

// Whether no page is there yet: the system will clear it when it is first written, and leave it in the caches. To ask
// takes as long as to copy 10 KB: a thread that has found pages a few times in a row asks now and then.
bool is_fresh([[maybe_unused]] const void* at) {
#ifdef __linux__
  constexpr int kFew = 4, kSeldom = 16;
  static thread_local int found = 0, passed = 0;
  if (found >= kFew && ++passed < kSeldom) return false;
  passed = 0;
  static const uintptr_t kPage = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char state = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(at) / kPage * kPage), 1, &state);
  found = state & 1 ? std::min(found + 1, kFew) : 0;
  return found == 0;
#else
  return false;
#endif
}

// Of the words that a unit's bits are compressed by.
int64_t word_bytes(int64_t unit_bytes) { return unit_bytes % 4 == 0 ? 4 : 2; }

class Mask;

// One tile and its destination: n rows, c columns, k; the axis that is far apart in the source is rows.
struct Move {
  int64_t out, offset;  // the destination's tensor, and how far in it begins
  Canonical src;
  int64_t n, c, k, stride, sc, sk;
  const int32_t *rows, *cols;  // kept; null: all
  Mask* mask;                  // the same columns as bits of words; null: not to be compressed

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

// Columns as bits: made for all tiles that keep the same ones, by the thread that first needs them.
class Mask {
 public:
  // Null where runs are so long that they are copied faster. `m`, `unit_bytes`: of any of these tiles.
  const uint16_t* bits(const Move& m, int64_t unit_bytes) {
    std::call_once(made_, [&] { make(m.cols, m.c, m.src.c, unit_bytes); });
    return bits_.empty() ? nullptr : bits_.data();
  }

 private:
  void make(const int32_t* cols, int64_t n, int64_t of, int64_t unit_bytes) {
    if (n * unit_bytes >= kLongBytes * count_runs(cols, n)) return;
    const int64_t words = unit_bytes / word_bytes(unit_bytes);
    bits_.resize((of * words + 63) / 64 * 4);
    // 64 bits are put together before they are written.
    const uint64_t unit = (uint64_t{1} << words) - 1;
    uint16_t* const to = bits_.data();
    uint64_t open = 0, at = 0;
    for (int64_t c = 0; c < n; ++c) {
      const uint64_t from = static_cast<uint64_t>(cols[c] * words), place = from % 64;
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

  std::once_flag made_;
  std::vector<uint16_t> bits_;
};

class Masks {
 public:
  Mask* of(const Move& m, int64_t element_bytes) {
    const int64_t unit_bytes = m.unit() * element_bytes;
    if (!m.cols || m.n < kFewRows || m.c * kFew < m.src.c || m.c == 0) return nullptr;
    if (!m.packed() || unit_bytes % 2 != 0 || unit_bytes >= kMost * word_bytes(unit_bytes)) return nullptr;
    return &all_[{m.cols, m.c, m.src.c, unit_bytes}];
  }

 private:
  static constexpr int64_t kMost = 64;  // words of a unit, whose bits are put into one integer

  std::map<std::tuple<const int32_t*, int64_t, int64_t, int64_t>, Mask> all_;
};

// How rows of a tile are moved.
template <class T>
struct Mover {
  Mover(const Move& move, const void* x, void* out)
      : m(move),
        from(static_cast<const T*>(x) + m.src.offset),
        to(static_cast<T*>(out) + m.offset),
        unit_bytes(m.unit() * static_cast<int64_t>(sizeof(T))) {
    if (m.mask) masks = m.mask->bits(m, unit_bytes);
    far = kFarBytes / std::max<int64_t>(1, m.src.c * m.src.k * static_cast<int64_t>(sizeof(T))) + 1;
    if (!m.packed() || masks) return;
    long_runs = m.cols == nullptr || m.unit() > 1 || m.c * unit_bytes >= kRunBytes * count_runs(m.cols, m.c);
    if (long_runs) runs = runs_of(m.cols, m.c);
  }

  const T* row(int64_t r) const { return from + (m.rows ? m.rows[r] : r) * m.src.rows.stride; }
  T* target(int64_t r) const { return to + r * m.stride; }
  const char* later(int64_t r) const { return reinterpret_cast<const char*>(row(std::min(r + far, m.n - 1))); }
  Words words() const {
    const int64_t each = static_cast<int64_t>(sizeof(T)), size = word_bytes(unit_bytes);
    return {reinterpret_cast<const char*>(from),
            m.src.rows.stride * each,
            m.src.c * m.src.k * each,
            size,
            m.rows,
            m.n,
            m.src.c * unit_bytes / size,
            m.c * unit_bytes / size,
            masks};
  }

  const Move& m;
  const T* from;
  T* to;
  int64_t unit_bytes, far = 0;
  std::vector<Run> runs;
  const uint16_t* masks = nullptr;
  bool long_runs = false;  // whether columns are copied by runs; else they are picked out
};

template <class T>
void compress_rows(const Mover<T>& mover, int64_t r0, int64_t r1) {
  const Move& m = mover.m;
  const int64_t stride = m.stride * static_cast<int64_t>(sizeof(T));
  Words x = mover.words();
  if (m.k_packed()) return kernels().compress(&x, r0, r1, reinterpret_cast<char*>(mover.target(r0)), stride);
  for (int64_t r = r0; r < r1; ++r) {
    for (int64_t k = 0; k < m.k; ++k) {
      x.from = reinterpret_cast<const char*>(mover.from + k * m.src.sk);
      kernels().compress(&x, r, r + 1, reinterpret_cast<char*>(mover.target(r) + k * m.sk), stride);
    }
  }
}

template <class T>
void move_rows(const Mover<T>& mover, int64_t r0, int64_t r1) {
  const Move& m = mover.m;
  if (mover.masks) return compress_rows(mover, r0, r1);
  for (int64_t r = r0; r < r1; ++r) {
    const T* from = mover.row(r);
    T* to = mover.target(r);
    expect_row(mover.later(r));
    if (!m.packed()) {
      move_one_by_one(m, from, to);
      continue;
    }
    for (int64_t k = 0; k < (m.k_packed() ? 1 : m.k); ++k) {
      const T* x = from + k * m.src.sk;
      T* y = to + k * m.sk;
      if (mover.long_runs)
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
  char* const to = reinterpret_cast<char*>(mover.target(r0));
  if (mover.masks) {
    const Words x = mover.words();
    return kernels().compress_past(&x, r0, r1, to);
  }
  Stream<Lines> out(to);
  for (int64_t r = r0; r < r1; ++r) {
    const T* from = mover.row(r);
    expect_row(mover.later(r));
    if (mover.long_runs) {
      for (const Run& run : mover.runs)
        out.copy(reinterpret_cast<const char*>(from) + run.from * mover.unit_bytes, run.length * mover.unit_bytes);
    } else {
      constexpr int64_t kMost = Stream<Lines>::kPiece / sizeof(T);
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
    if (kernels().compress) moves[i].mask = masks.of(moves[i], element_bytes);
    plan.bytes += moves[i].n * moves[i].c * moves[i].k * element_bytes;
  }
  const int64_t target = chunk_bytes(plan, kManyChunks);
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

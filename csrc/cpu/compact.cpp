// channel_compact: gathers kept rows and columns. Moves bits, so it knows element sizes, not dtypes.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "engine.h"
#include "parallel.h"
#include "plan.h"

namespace pat {
namespace {

// Runs of neighbouring kept columns shorter than this many bytes are cheaper to move one by one.
constexpr int64_t kRunBytes = 32;
// Runs that are this long are copied faster than compressed, and columns of which fewer than one in so many stay are
// faster picked out.
constexpr int64_t kLongBytes = 256, kFew = 6;
// What is fetched ahead of what is copied, at least, in whole rows: the processor cannot know which rows are kept.
constexpr int64_t kAheadBytes = 8192;

// One tile and its destination: n rows, c columns, k; the axis that is far apart in the source is rows.
struct Move {
  const char* from;
  char* to;
  Canonical src;
  int64_t n, c, k, stride, sc, sk;
  const int32_t *rows, *cols;  // kept; null: all
  const uint16_t* masks;       // the same columns as bits of words of 4 bytes; null: not to be compressed

  bool k_packed() const { return k == 1 || (src.sk == 1 && sk == 1); }
  int64_t unit() const { return k_packed() ? k : 1; }  // elements that stay together
  bool packed() const { return src.sc == unit() && (sc == unit() || c == 1); }
};

Move make_move(const Addresses& outs, const Addresses& xs, const Tile& source, Tile target, int64_t element_bytes,
               const int32_t* index) {
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
  m.from = static_cast<const char*>(xs[source.tensor]) + source.offset * element_bytes;
  m.to = static_cast<char*>(outs[target.tensor]) + target.offset * element_bytes;
  m.rows = target.row >= 0 ? index + target.row : nullptr;
  m.cols = target.col >= 0 ? index + target.col : nullptr;
  return m;
}

// Kept columns as runs of neighbours, in units of `unit` elements.
struct Run {
  int64_t from, to, length;
};

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

void move_runs(const std::vector<Run>& runs, int64_t unit, const char* from, char* to) {
  for (const Run& run : runs) std::memcpy(to + run.to * unit, from + run.from * unit, run.length * unit);
}

// Columns as bits, made once for all tiles that keep the same ones.
class Masks {
 public:
  const uint16_t* of(const Move& m, int64_t element_bytes) {
    const int64_t words = m.unit() * element_bytes / 4, length = m.src.c * words;
    if (!m.cols || !m.packed() || m.unit() * element_bytes % 4 != 0 || m.c * kFew < m.src.c) return nullptr;
    std::vector<uint16_t>& bits = made_[{m.cols, m.c, m.src.c, words}];
    if (bits.empty()) {
      bits.resize((length + 15) / 16);
      int64_t runs = 0;
      for (int64_t c = 0; c < m.c; ++c) {
        runs += c == 0 || m.cols[c] != m.cols[c - 1] + 1;
        for (int64_t w = m.cols[c] * words; w < (m.cols[c] + 1) * words; ++w)
          bits[w / 16] = static_cast<uint16_t>(bits[w / 16] | 1u << (w % 16));
      }
      if (m.c * words * 4 >= kLongBytes * runs) bits.assign(1, 0);
    }
    return static_cast<int64_t>(bits.size()) * 16 < length ? nullptr : bits.data();
  }

 private:
  std::map<std::tuple<const int32_t*, int64_t, int64_t, int64_t>, std::vector<uint16_t>> made_;
};

template <class T>
void move_rows(const Move& m, int64_t r0, int64_t r1) {
  const bool k_packed = m.k_packed(), packed = m.packed();
  const int64_t unit = m.unit();
  const std::vector<Run> runs = packed && !m.masks ? runs_of(m.cols, m.c) : std::vector<Run>();
  const int64_t unit_bytes = unit * static_cast<int64_t>(sizeof(T));
  const bool long_runs =
      m.cols == nullptr || unit > 1 || m.c * unit_bytes >= kRunBytes * static_cast<int64_t>(runs.size());
  const int64_t ahead = kAheadBytes / std::max<int64_t>(1, m.src.c * m.src.k * static_cast<int64_t>(sizeof(T))) + 1;
  const auto row = [&](int64_t r) {
    return reinterpret_cast<const T*>(m.from) + (m.rows ? m.rows[r] : r) * m.src.rows.stride;
  };
  for (int64_t r = r0; r < r1; ++r) {
    const T *from = row(r), *later = row(std::min(r + ahead, m.n - 1));
    T* to = reinterpret_cast<T*>(m.to) + r * m.stride;
    if (!packed) {
      move_one_by_one(m, from, to);
      continue;
    }
    for (int64_t k = 0; k < (k_packed ? 1 : m.k); ++k) {
      const T* x = from + k * m.src.sk;
      T* y = to + k * m.sk;
      if (m.masks)
        kernels().compress(reinterpret_cast<uint32_t*>(y), m.c * unit_bytes / 4, reinterpret_cast<const uint32_t*>(x),
                           m.src.c * unit_bytes / 4, m.masks, reinterpret_cast<const uint32_t*>(later + k * m.src.sk));
      else if (long_runs) move_runs(runs, unit_bytes, reinterpret_cast<const char*>(x), reinterpret_cast<char*>(y));
      else gather(m.cols, m.c, x, y);
    }
  }
}

}  // namespace

void channel_compact(const Addresses& outs, const Addresses& xs, const Tile* tiles, const Tile* out_tiles,
                     int64_t n_tiles, int64_t element_bytes, const int32_t* index, int threads,
                     const Meanwhile& meanwhile) {
  std::vector<Move> moves;
  Masks masks;
  Plan plan;
  moves.reserve(n_tiles);
  for (int64_t i = 0; i < n_tiles; ++i) {
    moves.push_back(make_move(outs, xs, tiles[i], out_tiles[i], element_bytes, index));
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
      plan.add({i, r, end, 0, m.c, -1}, (end - r) * row_bytes, target);
    }
  }
  plan.close();
  const auto move = [&](const Segment& s, int) {
    const Move& m = moves[s.tile];
    if (element_bytes == 1) move_rows<uint8_t>(m, s.r0, s.r1);
    else if (element_bytes == 2) move_rows<uint16_t>(m, s.r0, s.r1);
    else if (element_bytes == 4) move_rows<uint32_t>(m, s.r0, s.r1);
    else move_rows<uint64_t>(m, s.r0, s.r1);
  };
  for_segments(plan, threads, move, meanwhile);
}

}  // namespace pat

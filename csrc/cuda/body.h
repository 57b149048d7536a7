// What the threads of a block do. The kernels call it on the device; an emulation calls it on the host,
// thread after thread, so that a machine without a GPU tests the same arithmetic.
#pragma once

#include "scalar.h"
#include "work.h"

namespace pat::cuda {

// 64-bit division is slow, and sizes that need it are rare.
PAT_BOTH int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

PAT_BOTH int64_t column_of(const Row& row, int64_t j) {
  if (row.kernel == 1) return j;
  return row.k_inner ? quotient(j, row.kernel) : j - quotient(j, row.columns) * row.columns;
}

PAT_BOTH int64_t kernel_of(const Row& row, int64_t j) {
  if (row.kernel == 1) return 0;
  return row.k_inner ? j - quotient(j, row.kernel) * row.kernel : quotient(j, row.columns);
}

// Elements from the first of a row to position j.
PAT_BOTH int64_t place_of(const Work& w, int64_t j) {
  if (j < w.inner) return j * w.inner_stride;
  const int64_t outer = quotient(j, w.inner);
  return outer * w.outer_stride + (j - outer * w.inner) * w.inner_stride;
}

template <class T>
constexpr int kPositionsOf = positions_per_thread(sizeof(T));

// Unsigned bits of so many bytes.
template <int kBytes>
struct bits;
#ifdef __CUDA_ARCH__
template <>
struct bits<16> {
  using type = uint4;
};
template <>
struct bits<8> {
  using type = unsigned long long;
};
template <>
struct bits<4> {
  using type = unsigned int;
};
template <>
struct bits<2> {
  using type = unsigned short;
};
template <>
struct bits<1> {
  using type = unsigned char;
};
#endif

// Reads and writes of tensors say that these are global memory: their addresses come as numbers, which tells the
// compiler nothing, and access to what may be anywhere takes longer.
template <class V>
PAT_BOTH V fetch(const V* from) {
#ifdef __CUDA_ARCH__
  const auto found = __ldca(reinterpret_cast<const typename bits<sizeof(V)>::type*>(from));
  V value;
  memcpy(&value, &found, sizeof(V));
  return value;
#else
  return *from;
#endif
}

template <class V>
PAT_BOTH void put_at(V* to, const V& value) {
#ifdef __CUDA_ARCH__
  typename bits<sizeof(V)>::type found;
  memcpy(&found, &value, sizeof(V));
  __stwb(reinterpret_cast<decltype(found)*>(to), found);
#else
  *to = value;
#endif
}

// The positions of one thread: neighbours that are moved as one word when `kWhole`, else as many,
// `across` apart, so that a warp's loads are neighbours.
template <class T, bool kWhole>
struct Lane {
  static constexpr int kPositions = kPositionsOf<T>;
  // Rows that a thread loads before it uses the first, which hides the memory's latency.
  static constexpr int kBatch = kWhole ? 4 : 1;
  struct alignas(sizeof(T) * kPositions) Word {
    T v[kPositions];
  };

  int first, step, count;
  int y, rows_at_once;

  PAT_BOTH Lane(const Row& row, int thread) {
    const int x = thread & (row.across - 1);
    y = thread / row.across;
    rows_at_once = kThreads / row.across;
    step = kWhole ? 1 : row.across;
    first = kWhole ? x * kPositions : x;
    const int left = static_cast<int>(row.positions) - first;
    count = left <= 0 ? 0 : (left + step - 1) / step;
  }

  PAT_BOTH int at(int i) const { return first + i * step; }
  PAT_BOTH bool has(int i) const { return kWhole ? count > 0 : i < count; }

  // The word at `row`, or the elements at row + place[i].
  PAT_BOTH void read(const T* row, const int64_t* place, Word& to) const {
    if constexpr (kWhole) {
      if (count > 0) to = fetch(reinterpret_cast<const Word*>(row + place[0]));
    } else {
#pragma unroll
      for (int i = 0; i < kPositions; ++i)
        if (i < count) to.v[i] = fetch(row + place[i]);
    }
  }

  PAT_BOTH void write(T* row, const int64_t* place, const Word& from) const {
    if constexpr (kWhole) {
      if (count > 0) put_at(reinterpret_cast<Word*>(row + place[0]), from);
    } else {
#pragma unroll
      for (int i = 0; i < kPositions; ++i)
        if (i < count) put_at(row + place[i], from.v[i]);
    }
  }
};

// Whether rows can be moved word by word: `bits` has set what addresses and row strides have set, in bytes.
template <class T>
PAT_BOTH bool is_whole(const Row& row, int64_t bits) {
  constexpr int n = kPositionsOf<T>, bytes = n * sizeof(T);
  const int64_t start = row.first * static_cast<int64_t>(sizeof(T));
  return row.packed && row.positions % n == 0 && ((bits | start) & (bytes - 1)) == 0;
}

template <class T>
PAT_BOTH bool is_whole(const Work& w, const T* x, const T* y) {
  return is_whole<T>(w.row, reinterpret_cast<int64_t>(x) | reinterpret_cast<int64_t>(y) |
                                w.row_stride * static_cast<int64_t>(sizeof(T)));
}

// A thread's positions of a `Work`, and where they are.
template <class T, bool kWhole>
struct Positions : Lane<T, kWhole> {
  int64_t place[kWhole ? 1 : Lane<T, kWhole>::kPositions];

  PAT_BOTH Positions(const Work& w, int thread) : Lane<T, kWhole>(w.row, thread) {
    if constexpr (kWhole) {
      place[0] = w.row.first + this->first;
    } else {
#pragma unroll
      for (int i = 0; i < this->kPositions; ++i)
        place[i] = i < this->count ? place_of(w, w.row.first + this->at(i)) : 0;
    }
  }
};

// Sums of one thread. Those over rows stay in `sums`; those over positions go, for a batch of rows, to
// emit(first row, rows between, sums), which all threads of a block call equally often, past the end of the rows too.
template <Kind kKind, class T, bool kWhole, class Emit>
PAT_BOTH void accumulate(const Work& w, const Positions<T, kWhole>& at, const T* x, const T* y, Func f,
                         accumulator_t<T> p, accumulator_t<T>* sums, const Emit& emit) {
  using A = accumulator_t<T>;
  // `pow` inlined once for each of several rows would make the code several times as long.
  constexpr int batch = kKind == kPowers ? 1 : at.kBatch;
  const int rows = static_cast<int>(w.rows), step = at.rows_at_once;
  const int64_t apart = step * w.row_stride;
  for (int start = at.y; start < rows + at.y; start += batch * step) {
    // What is not read stays 0 and adds nothing, but to powers: 0^0 is 1.
    typename Lane<T, kWhole>::Word xs[batch] = {}, ys[batch] = {};
    const int64_t first = start * w.row_stride;
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (start + b * step >= rows) continue;
      at.read(x + first + b * apart, at.place, xs[b]);
      if (kKind == kProducts) at.read(y + first + b * apart, at.place, ys[b]);
    }
    A row_sums[batch] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int i = 0; i < at.kPositions; ++i) {
        if (kKind == kPowers && (!at.has(i) || start + b * step >= rows)) continue;
        const A term = value<kKind, A>(f, load(xs[b].v[i]), load(ys[b].v[i]), p);
        sums[i] += term;
        row_sums[b] += term;
      }
    }
    if (w.row_to != kNowhere) emit(start, step, row_sums);
  }
}

// The first pass of a reduction, up to the barrier. col_sums: [rows at once, positions].
template <Kind kKind, bool kWhole, class T, class Emit>
PAT_BOTH void first_pass(const Work& w, const T* x, const T* y, Func f, accumulator_t<T> p, int thread,
                         accumulator_t<T>* col_sums, const Emit& emit) {
  const Positions<T, kWhole> at(w, thread);
  accumulator_t<T> sums[at.kPositions] = {};
  accumulate<kKind>(w, at, x, y, f, p, sums, emit);
  if (w.col_to == kNowhere) return;
  const int width = w.row.across * at.kPositions;
#pragma unroll
  for (int i = 0; i < at.kPositions; ++i)
    if (at.has(i)) col_sums[at.y * width + at.at(i)] = sums[i];
}

template <class A>
PAT_BOTH void put(A* out, A* workspace, int64_t to, int64_t i, A value) {
  if (to >= 0) out[to + i] = value;
  else workspace[~to + i] = value;
}

// After the barrier: adds up what threads and warps left, in a fixed order. row_sums: [warps across, rows].
template <class T, class A>
PAT_BOTH void finish(const Work& w, int thread, const A* row_sums, const A* col_sums, A* out, A* workspace) {
  if (w.row_to != kNowhere) {
    for (int64_t r = thread; r < w.rows; r += kThreads) {
      A sum = 0;
      for (int64_t g = r; g < w.rows * (w.row.across > kWarp ? w.row.across / kWarp : 1); g += w.rows)
        sum += row_sums[g];
      put(out, workspace, w.row_to, r, sum);
    }
  }
  if (w.col_to == kNowhere) return;
  const int width = w.row.across * kPositionsOf<T>, rows_at_once = kThreads / w.row.across;
  for (int64_t j = thread; j < w.row.positions; j += kThreads) {
    A sum = 0;
    for (int y = 0; y < rows_at_once && y < w.rows; ++y) sum += col_sums[y * width + j];
    put(out, workspace, w.col_to, w.row.first + j, sum);
  }
}

// The second pass: one thread's part of a slot's sum. A warp's threads take neighbouring slots.
template <class A>
PAT_BOTH A gather_part(const Gather& g, const A* workspace, int slot, int part) {
  A sum = 0;
  if (slot >= g.slots) return sum;
  const A* from = workspace + g.from + slot * g.slot_step;
  for (int64_t c = part; c < g.chunks; c += kThreads / kGatherSlots)
    for (int64_t k = 0; k < g.kernel; ++k) sum += from[c * g.chunk_step + k * g.kernel_step];
  return sum;
}

template <class A>
PAT_BOTH void gather_finish(const Gather& g, const A* parts, int slot, A* out) {
  if (slot >= g.slots) return;
  A sum = 0;
  for (int part = 0; part < kThreads / kGatherSlots; ++part) sum += parts[part * kGatherSlots + slot];
  out[g.to + slot] = sum;
}

// The sum over the slots of a channel, in their order.
template <class A>
PAT_BOTH A channel_total(const Groups& g, const A* slots, int64_t channel) {
  A sum = 0;
  const int32_t last = g.starts[channel + 1];
#pragma unroll 4
  for (int32_t i = g.starts[channel]; i < last; ++i) sum += slots[g.slots[i]];
  return sum;
}

// What the threads of a group's block find out about its totals: their sum, and the extremes of their roots.
template <class A>
struct Extent {
  double sum;
  A low, high;

  PAT_BOTH Extent(const Groups& g, int64_t group, const A* totals, int thread) : sum(0), low(INFINITY), high(0) {
    for (int64_t c = g.firsts[group] + thread; c < g.firsts[group + 1]; c += kThreads) {
      const A root = std::sqrt(totals[c]);
      sum += totals[c];
      low = root < low ? root : low;
      high = root > high ? root : high;
    }
  }
  PAT_BOTH Extent() {}

  PAT_BOTH void merge(const Extent& other) {
    sum += other.sum;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

template <class A>
PAT_BOTH void divide(const Groups& g, int64_t group, const Extent<A>& all, A least, A* totals, int thread) {
  const int64_t first = g.firsts[group], last = g.firsts[group + 1];
  const A mean = static_cast<A>(all.sum / static_cast<double>(last - first));
  const A by = mean < least ? least : mean;  // NaN stays
  for (int64_t c = first + thread; c < last; c += kThreads) totals[c] /= by;
}

template <class A>
PAT_BOTH void weigh(const Groups& g, int64_t group, const Extent<A>& all, A least, A exponent, A strength,
                    const uint8_t* where, A* values, int thread) {
  // Totals are not negative: a NaN among them is one in the sum, an infinity the highest.
  const bool finite = all.sum == all.sum && all.high < A(INFINITY);
  const A span = all.high - all.low, per_span = A(1) / (span < least ? least : span);
  for (int64_t c = g.firsts[group] + thread; c < g.firsts[group + 1]; c += kThreads) {
    const A place = (all.high - std::sqrt(values[c])) * per_span;
    const A gamma = strength * std::exp2(exponent * (place < A(1) ? place : A(1)));
    values[c] = finite && (where == nullptr || where[c] != 0) ? gamma : A(0);
  }
}

// A thread's entries of a vector over slots: for its columns, and for rows as they come.
template <class T, bool kWhole>
struct Slots {
  using A = accumulator_t<T>;
  const A* rows;
  A neutral;
  A cols[Lane<T, kWhole>::kPositions];

  PAT_BOTH Slots(const Work& w, const Positions<T, kWhole>& at, const A* slots, A missing)
      : rows(w.row_slot >= 0 ? slots + w.row_slot : nullptr), neutral(missing) {
#pragma unroll
    for (int i = 0; i < at.kPositions; ++i) {
      const bool named = w.col_slot >= 0 && at.has(i);
      cols[i] = named ? slots[w.col_slot + column_of(w.row, w.row.first + at.at(i))] : neutral;
    }
  }

  PAT_BOTH A row(int64_t r) const { return rows != nullptr ? rows[r] : neutral; }
};

template <bool kWhole, class T>
PAT_BOTH void axpy_rows(const Work& w, T* y, const T* x, const accumulator_t<T>* coef, int thread) {
  using A = accumulator_t<T>;
  const Positions<T, kWhole> at(w, thread);
  const Slots<T, kWhole> slots(w, at, coef, A(0));
  for (int64_t start = at.y; start < w.rows; start += at.kBatch * at.rows_at_once) {
    typename Lane<T, kWhole>::Word xs[at.kBatch], ys[at.kBatch];
#pragma unroll
    for (int b = 0; b < at.kBatch; ++b) {
      const int64_t r = start + b * at.rows_at_once;
      if (r >= w.rows) continue;
      at.read(x + r * w.row_stride, at.place, xs[b]);
      at.read(y + r * w.row_stride, at.place, ys[b]);
    }
#pragma unroll
    for (int b = 0; b < at.kBatch; ++b) {
      const int64_t r = start + b * at.rows_at_once;
      if (r >= w.rows) continue;
      const A row = slots.row(r);
#pragma unroll
      for (int i = 0; i < at.kPositions; ++i)
        if (at.has(i)) store(ys[b].v[i], load(ys[b].v[i]) + (row + slots.cols[i]) * load(xs[b].v[i]));
      at.write(y + r * w.row_stride, at.place, ys[b]);
    }
  }
}

template <bool kWhole, class T>
PAT_BOTH void scale_rows(const Work& w, T* x, const accumulator_t<T>* scale, int thread) {
  using A = accumulator_t<T>;
  const Positions<T, kWhole> at(w, thread);
  const Slots<T, kWhole> slots(w, at, scale, A(1));
  bool cols_keep = true, cols_clear = true, cols_finite = true;
#pragma unroll
  for (int i = 0; i < at.kPositions; ++i) {
    if (!at.has(i)) continue;
    cols_keep = cols_keep && slots.cols[i] == A(1);
    cols_clear = cols_clear && slots.cols[i] == A(0);
    cols_finite = cols_finite && slots.cols[i] - slots.cols[i] == A(0);
  }
  for (int64_t start = at.y; start < w.rows; start += at.kBatch * at.rows_at_once) {
    typename Lane<T, kWhole>::Word xs[at.kBatch] = {};
    A rows[at.kBatch];
#pragma unroll
    for (int b = 0; b < at.kBatch; ++b) {
      const int64_t r = start + b * at.rows_at_once;
      rows[b] = r < w.rows ? slots.row(r) : A(1);
      // Most rows of a masked model are kept or cleared: neither needs to be read.
      const bool kept = rows[b] == A(1) && cols_keep;
      const bool cleared = (rows[b] == A(0) && cols_finite) || (cols_clear && rows[b] - rows[b] == A(0));
      if (r < w.rows && !kept && !cleared) at.read(x + r * w.row_stride, at.place, xs[b]);
    }
#pragma unroll
    for (int b = 0; b < at.kBatch; ++b) {
      const int64_t r = start + b * at.rows_at_once;
      if (r >= w.rows || (rows[b] == A(1) && cols_keep)) continue;
#pragma unroll
      for (int i = 0; i < at.kPositions; ++i) {
        const A product = rows[b] * slots.cols[i];
        if (at.has(i)) store(xs[b].v[i], product == A(0) ? A(0) : load(xs[b].v[i]) * product);
      }
      at.write(x + r * w.row_stride, at.place, xs[b]);
    }
  }
}

template <bool kWhole, class T>
PAT_BOTH void move_rows(const Move& m, const T* from, T* to, const int32_t* index, int thread) {
  const Lane<T, kWhole> at(m.row, thread);
  // Elements one by one are short loads: more of them must be under way at once.
  constexpr int n = kWhole ? 1 : at.kPositions, batch = kWhole ? 4 : 2;
  int64_t source[n], target[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const int64_t j = i < at.count ? m.row.first + at.at(i) : 0;
    const int64_t c = column_of(m.row, j), k = kernel_of(m.row, j);
    source[i] = (m.col_list >= 0 ? index[m.col_list + c] : c) * m.from_col + k * m.from_kernel;
    target[i] = c * m.to_col + k * m.to_kernel;
  }
  for (int64_t start = at.y; start < m.rows; start += batch * at.rows_at_once) {
    typename Lane<T, kWhole>::Word words[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int64_t r = m.first_row + start + b * at.rows_at_once;
      if (r >= m.first_row + m.rows) continue;
      at.read(from + (m.row_list >= 0 ? index[m.row_list + r] : r) * m.from_row, source, words[b]);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int64_t r = m.first_row + start + b * at.rows_at_once;
      if (r < m.first_row + m.rows) at.write(to + r * m.to_row, target, words[b]);
    }
  }
}

template <class T>
PAT_BOTH void axpy_block(const Work& w, T* y, const T* x, const accumulator_t<T>* coef, int thread) {
  if (is_whole(w, x, y)) axpy_rows<true>(w, y, x, coef, thread);
  else axpy_rows<false>(w, y, x, coef, thread);
}

template <class T>
PAT_BOTH void scale_block(const Work& w, T* x, const accumulator_t<T>* scale, int thread) {
  if (is_whole<T>(w, x, nullptr)) scale_rows<true>(w, x, scale, thread);
  else scale_rows<false>(w, x, scale, thread);
}

template <class T>
PAT_BOTH void move_block(const Move& m, const T* from, T* to, const int32_t* index, int thread) {
  const int64_t bits = reinterpret_cast<int64_t>(from) | reinterpret_cast<int64_t>(to) |
                       (m.from_row | m.to_row) * static_cast<int64_t>(sizeof(T));
  if (is_whole<T>(m.row, bits)) move_rows<true>(m, from, to, index, thread);
  else move_rows<false>(m, from, to, index, thread);
}

}  // namespace pat::cuda

// Memory that is written in order and past the caches: lines that are written whole need not be read first. Compiled
// with several instruction sets: no std header is included, and `Lines`, and all of this with it, has internal linkage.
#pragma once

#include <stdint.h>

namespace pat {

// What comes is gathered in a buffer that stays in the first-level cache, and written a line of memory at a time. Lines
// that belong to others in part, the first and the last, are written as ever. Lines::stream and Lines::fence are those
// of the kernels.
template <class Lines>
class Stream {
 public:
  static constexpr int64_t kPiece = 4096;  // bytes that may come at once

  explicit Stream(char* to) : fill_(reinterpret_cast<uintptr_t>(to) % kLine), skip_(fill_), to_(to - fill_) {}
  ~Stream() {
    drain();
    __builtin_memcpy(to_ + skip_, buffer_ + skip_, fill_ - skip_);
    Lines::fence();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Where to put what comes next: kPiece bytes, and a line that may be changed behind them.
  char* room() {
    if (fill_ >= kDrain) drain();
    return buffer_ + fill_;
  }
  // So many bytes have been put there.
  void wrote(int64_t bytes) { fill_ += bytes; }

  void copy(const char* from, int64_t bytes) {
    if (bytes >= kLong) {
      put(from, bytes, (kLine - fill_ % kLine) % kLine);
      drain();
      const int64_t whole = bytes / kLine * kLine;
      Lines::stream(to_, from, whole);
      to_ += whole, from += whole, bytes -= whole;
    }
    put(from, bytes, bytes);
  }

 private:
  // Less than kLong is not worth a call.
  static constexpr int64_t kLine = 64, kDrain = 2048, kLong = 512;

  void put(const char*& from, int64_t& left, int64_t bytes) {
    __builtin_memcpy(room(), from, bytes);
    fill_ += bytes, from += bytes, left -= bytes;
  }

  void drain() {
    const int64_t whole = fill_ / kLine * kLine;
    if (whole == 0) return;
    const int64_t first = skip_ > 0 ? kLine : 0;
    if (first > 0) __builtin_memcpy(to_ + skip_, buffer_ + skip_, first - skip_);
    Lines::stream(to_ + first, buffer_ + first, whole - first);
    __builtin_memcpy(buffer_, buffer_ + whole, kLine);
    to_ += whole, fill_ -= whole, skip_ = 0;
  }

  int64_t fill_, skip_;  // bytes in the buffer; of these the first are others'
  char* to_;             // where the buffer's begin
  alignas(kLine) char buffer_[kDrain + kPiece + 2 * kLine];
};

}  // namespace pat

// Working memory that outlives a call: fresh pages would cost more than the sums kept in them.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

namespace pat {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : own_(!taken().test_and_set(std::memory_order_acquire)) {
    static void* kept = nullptr;
    static size_t size = 0;
    if (own_ && bytes > size) {
      std::free(kept);
      size = 0;
      kept = allocate(bytes);
      size = kept != nullptr ? bytes : 0;
    }
    // Not its own: an op is under way, another Python thread's, or the one that this was called beside.
    data_ = own_ ? kept : allocate(bytes);
    if (data_ != nullptr) return;
    if (own_) taken().clear(std::memory_order_release);
    throw std::bad_alloc();
  }
  ~Scratch() {
    if (own_) taken().clear(std::memory_order_release);
    else std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static std::atomic_flag& taken() {
    static std::atomic_flag one = ATOMIC_FLAG_INIT;
    return one;
  }
  static void* allocate(size_t bytes) { return std::aligned_alloc(64, (bytes + 127) / 64 * 64); }

  const bool own_;
  void* data_ = nullptr;
};

}  // namespace pat

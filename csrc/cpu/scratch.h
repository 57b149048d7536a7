// Working memory that outlives a call: fresh pages would cost more than the sums kept in them.
#pragma once

#include <cstdlib>
#include <mutex>
#include <new>

namespace pat {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : lock_(mutex(), std::try_to_lock) {
    if (!lock_.owns_lock()) {  // another Python thread is inside an op
      data_ = allocate(bytes);
      return;
    }
    static void* kept = nullptr;
    static size_t size = 0;
    if (bytes > size) {
      std::free(kept);
      kept = nullptr;
      size = 0;
      kept = allocate(bytes);
      size = bytes;
    }
    data_ = kept;
  }
  ~Scratch() {
    if (!lock_.owns_lock()) std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static void* allocate(size_t bytes) {
    void* data = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }

  std::unique_lock<std::mutex> lock_;
  void* data_ = nullptr;
};

}  // namespace pat

// Chooses the instruction set once, at first use.
#include <atomic>

#include "engine.h"

namespace pat {
namespace {

struct Variant {
  std::string name;
  const Kernels* kernels;
};

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> found{{"base", kernels_base()}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back({"avx2", kernels_avx2()});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found.push_back({"avx512", kernels_avx512()});
    }
#endif
    return found;
  }();
  return all;
}

std::atomic<const Variant*>& current() {
  static std::atomic<const Variant*> chosen{&variants().back()};
  return chosen;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.push_back(variant.name);
  return names;
}

const std::string& isa() { return current().load()->name; }

bool set_isa(const std::string& name) {
  for (const Variant& variant : variants())
    if (variant.name == name) {
      current() = &variant;
      return true;
    }
  return false;
}

const Kernels& kernels() { return *current().load()->kernels; }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace pat

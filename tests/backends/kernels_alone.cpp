// The C++ kernels against scalar loops in double precision, without Python and PyTorch: for processors that are
// emulated. Says what it did; exit status 1 and a line for each difference.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "../../csrc/cpu/groups.h"

namespace {

using pat::DType;
using pat::Tile;

#if defined(__aarch64__)
typedef __fp16 half;
const char* const kMachine = "aarch64 (NEON)";
#else
typedef _Float16 half;
const char* const kMachine = "another processor";
#endif

int g_failures = 0, g_checks = 0;
const char* const kNames[] = {"float32", "float64", "bfloat16", "float16"};
const int64_t kBytes[] = {4, 8, 2, 2};
const double kRounding[] = {1e-5, 1e-12, 8e-3, 1e-3};

// One element of memory, as a double and back.
double get(const char* at, DType dtype) {
  if (dtype == pat::kF64) return *reinterpret_cast<const double*>(at);
  if (dtype == pat::kF32) return *reinterpret_cast<const float*>(at);
  if (dtype == pat::kF16) return static_cast<double>(*reinterpret_cast<const half*>(at));
  const uint32_t bits = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void put(char* at, double value, DType dtype) {
  if (dtype == pat::kF64) *reinterpret_cast<double*>(at) = value;
  if (dtype == pat::kF32) *reinterpret_cast<float*>(at) = static_cast<float>(value);
  if (dtype == pat::kF16) *reinterpret_cast<half*>(at) = static_cast<half>(value);
  if (dtype != pat::kBF16) return;
  const float wide = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Tensor {
  DType dtype;
  std::vector<char> memory;

  Tensor(DType type, int64_t elements, std::mt19937& random) : dtype(type), memory(elements * kBytes[type]) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < elements; ++i) put(at(i), normal(random), dtype);
  }
  char* at(int64_t element) { return memory.data() + element * kBytes[dtype]; }
  double operator[](int64_t element) { return get(at(element), dtype); }
};

// A vector over slots, in the accumulator type.
struct Vector {
  bool wide;
  std::vector<double> doubles;
  std::vector<float> floats;

  Vector(DType dtype, int64_t n, double value = 0)
      : wide(dtype == pat::kF64), doubles(n, value), floats(n, static_cast<float>(value)) {}
  void* data() { return wide ? static_cast<void*>(doubles.data()) : static_cast<void*>(floats.data()); }
  double operator[](int64_t i) const { return wide ? doubles[i] : static_cast<double>(floats[i]); }
  void set(int64_t i, double value) { doubles[i] = value, floats[i] = static_cast<float>(value); }
};

void expect(double got, double wanted, double within, const std::string& what) {
  ++g_checks;
  if (std::fabs(got - wanted) <= within) return;
  if (++g_failures <= 20) std::printf("%s: %.9g, expected %.9g\n", what.c_str(), got, wanted);
}

double value(pat::Func f, double x, double y, double p) {
  switch (f) {
    case pat::kAbs:
      return std::fabs(x);
    case pat::kSquare:
      return x * x;
    case pat::kPower:
      return std::pow(std::fabs(x), p);
    case pat::kMul:
      return x * y;
    case pat::kAbsMul:
      return std::fabs(x * y);
    default:
      return x * x * y;
  }
}

// Two tensors with one tile each; their rows and columns have slots of their own.
struct Case {
  int64_t r, c, k;
  std::string order;
  std::vector<Tile> tiles;
  int64_t slots = 0, elements = 0;

  Case(int64_t rows, int64_t cols, int64_t kernel, const char* axes) : r(rows), c(cols), k(kernel), order(axes) {
    for (int64_t tensor = 0; tensor < 2; ++tensor) {
      Tile t{tensor, 3, r, c, k, 0, 0, 0, slots, slots + r};
      int64_t step = 1;
      for (int i = 2; i >= 0; --i) {
        (order[i] == 'r' ? t.sr : order[i] == 'c' ? t.sc : t.sk) = step;
        step *= order[i] == 'r' ? r : order[i] == 'c' ? c : k;
      }
      tiles.push_back(t);
      slots += r + c, elements = step + 3;
    }
  }
  template <class Visit>
  void each(const Visit& visit) const {
    for (const Tile& t : tiles)
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < c; ++j)
          for (int64_t m = 0; m < k; ++m) visit(t, t.offset + i * t.sr + j * t.sc + m * t.sk, t.row + i, t.col + j);
  }
  std::string named(const char* op, DType dtype) const {
    return std::string(op) + " of " + kNames[dtype] + " [" + std::to_string(r) + ", " + std::to_string(c) + ", " +
           std::to_string(k) + "] " + order;
  }
};

struct Data {
  std::vector<Tensor> tensors;
  pat::Addresses addresses;

  Data(const Case& of, DType dtype, std::mt19937& random) {
    for (size_t i = 0; i < of.tiles.size(); ++i) tensors.emplace_back(dtype, of.elements, random);
    for (Tensor& t : tensors) addresses.push_back(t.memory.data());
  }
};

void check_reduce(const Case& of, DType dtype, pat::Func f, std::mt19937& random) {
  Data x(of, dtype, random), y(of, dtype, random);
  const double p = 3.0;
  std::vector<double> wanted(of.slots), scale(of.slots);
  of.each([&](const Tile& t, int64_t at, int64_t row, int64_t col) {
    const double v = value(f, x.tensors[t.tensor][at], y.tensors[t.tensor][at], p);
    wanted[row] += v, wanted[col] += v;
    scale[row] += std::fabs(v), scale[col] += std::fabs(v);
  });
  Vector out(dtype, of.slots, NAN);
  pat::channel_reduce(x.addresses, f >= pat::kMul ? y.addresses : pat::Addresses{}, of.tiles.data(),
                      static_cast<int64_t>(of.tiles.size()), dtype, f, p, out.data(), of.slots, 2);
  const double rounding = dtype == pat::kF64 ? 1e-12 : 1e-5;  // sums are wide, whatever is summed
  for (int64_t i = 0; i < of.slots; ++i)
    expect(out[i], wanted[i], rounding * scale[i] + 1e-30, of.named("reduce", dtype));
}

void check_updates(const Case& of, DType dtype, std::mt19937& random) {
  Data x(of, dtype, random), y(of, dtype, random);
  Data updated = y, scaled = x;
  for (Data* copy : {&updated, &scaled})
    for (size_t i = 0; i < copy->tensors.size(); ++i) copy->addresses[i] = copy->tensors[i].memory.data();
  Vector values(dtype, of.slots);
  for (int64_t i = 0; i < of.slots; ++i) values.set(i, i % 5 == 0 ? 0.0 : 0.01 * static_cast<double>(i % 97));
  const int64_t n = static_cast<int64_t>(of.tiles.size());
  pat::channel_axpy(updated.addresses, x.addresses, of.tiles.data(), n, dtype, values.data(), 2);
  pat::channel_scale(scaled.addresses, of.tiles.data(), n, dtype, values.data(), 2);
  of.each([&](const Tile& t, int64_t at, int64_t row, int64_t col) {
    const double a = values[row], b = values[col], from = x.tensors[t.tensor][at], to = y.tensors[t.tensor][at];
    const double sum = to + (a + b) * from, within = kRounding[dtype] * (std::fabs(to) + std::fabs((a + b) * from));
    expect(updated.tensors[t.tensor][at], sum, within, of.named("axpy", dtype));
    expect(scaled.tensors[t.tensor][at], a * b * from, kRounding[dtype] * std::fabs(a * b * from) + 1e-7,
           of.named("scale", dtype));
  });
}

void check_compact(const Case& of, DType dtype, std::mt19937& random) {
  Data x(of, dtype, random);
  std::vector<int32_t> index;
  for (int32_t i = 0; i < of.r; i += 1 + i % 2) index.push_back(i);
  const int64_t rows = static_cast<int64_t>(index.size());
  for (int32_t i = 0; i < of.c; i += 1 + (i % 3 == 0)) index.push_back(i);
  const int64_t cols = static_cast<int64_t>(index.size()) - rows;
  std::vector<Tile> targets;
  pat::Addresses outs;
  std::vector<std::vector<char>> memory(of.tiles.size(), std::vector<char>(rows * cols * of.k * kBytes[dtype]));
  for (size_t i = 0; i < of.tiles.size(); ++i) {
    targets.push_back({static_cast<int64_t>(i), 0, rows, cols, of.k, cols * of.k, of.k, 1, 0, rows});
    outs.push_back(memory[i].data());
  }
  pat::channel_compact(outs, x.addresses, of.tiles.data(), targets.data(), static_cast<int64_t>(targets.size()),
                       kBytes[dtype], index.data(), 2);
  for (const Tile& t : of.tiles)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        for (int64_t m = 0; m < of.k; ++m) {
          const char* got = memory[t.tensor].data() + ((i * cols + j) * of.k + m) * kBytes[dtype];
          const int64_t from = t.offset + index[i] * t.sr + index[rows + j] * t.sc + m * t.sk;
          expect(get(got, dtype), x.tensors[t.tensor][from], 0, of.named("compact", dtype));
        }
}

// Rows and columns of the first tensor are two groups, which the second one's columns and rows belong to, too.
void check_groups(const Case& of, DType dtype, std::mt19937& random) {
  if (of.r != of.c) return;
  Data x(of, dtype, random), y(of, dtype, random), updated = y;
  for (size_t i = 0; i < updated.tensors.size(); ++i) updated.addresses[i] = updated.tensors[i].memory.data();
  const int64_t n = of.r, sizes[] = {n, n};
  const pat::Run runs[] = {{0, 0, n}, {n, n, n}, {2 * n, n, n}, {3 * n, 0, n}};
  const pat::Grouping grouping(of.tiles.data(), 2, runs, 4, of.slots, sizes, 2, 2 * n);
  const auto channel = [&](int64_t slot) { return slot < 2 * n ? slot : slot < 3 * n ? slot - n : slot - 3 * n; };
  std::vector<double> totals(2 * n), gamma(2 * n);
  of.each([&](const Tile& t, int64_t at, int64_t row, int64_t col) {
    const double v = x.tensors[t.tensor][at] * x.tensors[t.tensor][at];
    totals[channel(row)] += v, totals[channel(col)] += v;
  });
  for (int64_t g = 0; g < 2; ++g) {
    double low = 1e300, high = 0;
    for (int64_t i = g * n; i < (g + 1) * n; ++i) {
      low = std::min(low, std::sqrt(totals[i])), high = std::max(high, std::sqrt(totals[i]));
    }
    for (int64_t i = g * n; i < (g + 1) * n; ++i)
      gamma[i] = high > low ? 0.1 * std::pow(16.0, (high - std::sqrt(totals[i])) / (high - low)) : 0.1;
  }
  Vector sums(dtype, 2 * n, NAN);
  pat::channel_totals(x.addresses, dtype, 2.0, grouping, false, sums.data(), 2);
  const double rounding = dtype == pat::kF64 ? 1e-11 : 1e-5;
  for (int64_t i = 0; i < 2 * n; ++i) expect(sums[i], totals[i], rounding * totals[i], of.named("totals", dtype));
  pat::group_push(updated.addresses, x.addresses, dtype, 2.0, grouping, 16.0, 0.1, nullptr, 2);
  of.each([&](const Tile& t, int64_t at, int64_t row, int64_t col) {
    const double add = (gamma[channel(row)] + gamma[channel(col)]) * x.tensors[t.tensor][at];
    const double to = y.tensors[t.tensor][at];
    // gamma is an exponential of a small range of norms, which magnifies their rounding.
    const double within = (kRounding[dtype] + (dtype == pat::kF64 ? 0 : 1e-4)) * (std::fabs(to) + std::fabs(add));
    expect(updated.tensors[t.tensor][at], to + add, within, of.named("push", dtype));
  });
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const int64_t sizes[][3] = {{1, 1, 1},  {1, 40, 1},  {5, 7, 1},   {3, 17, 9},  {33, 16, 1},
                              {64, 3, 9}, {40, 40, 1}, {9, 130, 2}, {70, 66, 2}, {150, 90, 1}};
  for (const auto& size : sizes)
    for (const char* order : {"rck", "crk", "rkc", "kcr"}) {
      const Case of(size[0], size[1], size[2], order);
      for (int type = 0; type < pat::kDTypes; ++type) {
        const DType dtype = static_cast<DType>(type);
        for (int f = 0; f < pat::kFuncs; ++f) check_reduce(of, dtype, static_cast<pat::Func>(f), random);
        check_updates(of, dtype, random);
        check_compact(of, dtype, random);
        check_groups(of, dtype, random);
      }
    }
  std::printf("%s, kernels %s: %d values checked, %d differ\n", kMachine, pat::isa().c_str(), g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}

// pat_fast._C: hands addresses to the engine. Lists hold tensors' addresses as Python ints.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "cpu/groups.h"
#include "cpu/plan.h"

namespace py = pybind11;

namespace {

pat::Addresses addresses(const py::list& list) {
  pat::Addresses found(list.size());
  for (size_t i = 0; i < found.size(); ++i) found[i] = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), i));
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void reduce(const py::list& xs, const py::list& ys, uintptr_t tiles, int64_t n_tiles, int dtype, int func, double p,
            uintptr_t out, int64_t slots, int threads) {
  const pat::Addresses x = addresses(xs), y = addresses(ys);
  const py::gil_scoped_release unlocked;
  pat::channel_reduce(x, y, pointer<pat::Tile>(tiles), n_tiles, static_cast<pat::DType>(dtype),
                      static_cast<pat::Func>(func), p, pointer<void>(out), slots, threads);
}

void axpy(const py::list& ys, const py::list& xs, uintptr_t tiles, int64_t n_tiles, int dtype, uintptr_t coef,
          int threads) {
  const pat::Addresses y = addresses(ys), x = addresses(xs);
  const py::gil_scoped_release unlocked;
  pat::channel_axpy(y, x, pointer<pat::Tile>(tiles), n_tiles, static_cast<pat::DType>(dtype), pointer<void>(coef),
                    threads);
}

void scale(const py::list& xs, uintptr_t tiles, int64_t n_tiles, int dtype, uintptr_t values, int threads) {
  const pat::Addresses x = addresses(xs);
  const py::gil_scoped_release unlocked;
  pat::channel_scale(x, pointer<pat::Tile>(tiles), n_tiles, static_cast<pat::DType>(dtype), pointer<void>(values),
                     threads);
}

// What a thread brings from Python while others work: addresses, then whatever `last` does.
class Bringing {
 public:
  // `parts` is an iterator over tuples of lists of addresses, one for each of `all`, which have their sizes already.
  Bringing(const py::object& parts, std::vector<pat::Addresses*> all, std::function<void()> last)
      : parts_(parts), last_(std::move(last)), all_(std::move(all)) {}

  // Calls `work` with what brings them; what was raised in Python stops it and is raised then.
  template <class Work>
  void beside(const Work& work) {
    {
      const py::gil_scoped_release unlocked;
      work([this](pat::Arrived& arrived) {
        const py::gil_scoped_acquire locked;
        try {
          bring(arrived);
          last_();
        } catch (...) {
          raised_ = std::current_exception();
          arrived.stop();
        }
      });
    }
    if (raised_) std::rethrow_exception(raised_);
  }

 private:
  void bring(pat::Arrived& arrived) {
    std::vector<size_t> counts(all_.size(), 0);
    for (const py::handle part : py::iter(parts_)) {
      int64_t there = INT64_MAX;
      for (size_t i = 0; i < all_.size(); ++i) {
        const pat::Addresses some = addresses(part[py::int_(i)]);
        const size_t n = std::min(some.size(), all_[i]->size() - counts[i]);
        std::copy_n(some.begin(), n, all_[i]->begin() + counts[i]);
        counts[i] += n;
        if (counts[i] < all_[i]->size()) there = std::min(there, static_cast<int64_t>(counts[i]));
      }
      arrived.tensors(there);
    }
    for (size_t i = 0; i < all_.size(); ++i)
      if (counts[i] < all_[i]->size()) throw py::value_error("fewer tensors than the table names");
    arrived.all();
  }

  const py::object& parts_;
  const std::function<void()> last_;
  const std::vector<pat::Addresses*> all_;
  std::exception_ptr raised_;
};

void compact(const py::object& parts, uintptr_t tiles, uintptr_t out_tiles, int64_t n_tiles, int64_t element_bytes,
             uintptr_t index, int threads, const py::object& then) {
  const auto *from = pointer<pat::Tile>(tiles), *to = pointer<pat::Tile>(out_tiles);
  pat::Addresses out(pat::tensors_of(to, n_tiles)), x(pat::tensors_of(from, n_tiles));
  const auto last = [&] {
    if (!then.is_none()) then();
  };
  Bringing(parts, {&out, &x}, last).beside([&](const pat::Meanwhile& meanwhile) {
    pat::channel_compact(out, x, from, to, n_tiles, element_bytes, pointer<int32_t>(index), threads, meanwhile);
  });
}

// Runs as rows of three, and the sizes of groups; these and the tiles stay with the caller.
std::unique_ptr<pat::Grouping> grouping(uintptr_t tiles, int64_t n_tiles, uintptr_t runs, int64_t n_runs, int64_t slots,
                                        uintptr_t sizes, int64_t n_groups, int64_t channels) {
  return std::make_unique<pat::Grouping>(pointer<pat::Tile>(tiles), n_tiles, pointer<pat::Run>(runs), n_runs, slots,
                                         pointer<int64_t>(sizes), n_groups, channels);
}

// `out` makes the sums' memory while the xs are read, and says where it is.
void totals(const py::object& out, const py::object& parts, int dtype, int func, double p, const pat::Grouping& of,
            bool divided, int threads) {
  pat::Addresses x(of.n_tensors);
  void* sums = nullptr;
  const auto last = [&] { sums = pointer<void>(py::cast<uintptr_t>(out())); };
  Bringing(parts, {&x}, last).beside([&](const pat::Meanwhile& meanwhile) {
    pat::channel_totals(x, static_cast<pat::DType>(dtype), static_cast<pat::Func>(func), p, of, divided, sums, threads,
                        meanwhile);
  });
}

// `ys` makes the list of their addresses while the xs are read; nothing is added if it raises.
void push(const py::object& ys, const py::object& parts, int dtype, int func, double p, const pat::Grouping& of,
          double alpha, double strength, uintptr_t where, int threads) {
  pat::Addresses y, x(of.n_tensors);
  const auto last = [&] {
    y = addresses(ys());
    if (y.size() < x.size()) throw py::value_error("fewer tensors to change than the table names");
  };
  Bringing(parts, {&x}, last).beside([&](const pat::Meanwhile& meanwhile) {
    pat::group_push(y, x, static_cast<pat::DType>(dtype), static_cast<pat::Func>(func), p, of, alpha, strength,
                    pointer<uint8_t>(where), threads, meanwhile);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of pat_fast. Arguments are trusted; call pat_fast.ops instead.";
  m.def("reduce", &reduce);
  m.def("axpy", &axpy);
  m.def("scale", &scale);
  m.def("compact", &compact);
  py::class_<pat::Grouping>(m, "Grouping").def(py::init(&grouping)).def_readonly("channels", &pat::Grouping::channels);
  m.def("totals", &totals);
  m.def("push", &push);
  m.def("isa", &pat::isa, "Instruction set in use.");
  m.def("isas", &pat::isas, "Instruction sets that this machine runs, best last.");
  m.def("set_isa", &pat::set_isa, "For tests: use another instruction set; False if it cannot run here.");
  m.def("set_stream_bytes", &pat::set_stream_bytes,
        "For tests: from how many bytes on a compaction writes past the caches; below 0 as it does otherwise.");
  m.def("has_openmp", &pat::has_openmp);
  m.attr("DTYPES") = py::make_tuple("float32", "float64", "bfloat16", "float16");
  m.attr("FUNCS") = py::make_tuple("abs", "square", "power", "mul", "absmul", "sqmul");
}

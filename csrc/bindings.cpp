// pat_fast._C: hands addresses to the engine. Lists hold tensors' addresses as Python ints.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/engine.h"
#include "cpu/groups.h"
#include "cpu/plan.h"
#include "known.h"

namespace py = pybind11;

namespace {

constexpr const char* kFewer = "fewer tensors than the table names";

pat::Addresses addresses(const py::list& list) {
  pat::Addresses found(list.size());
  for (size_t i = 0; i < found.size(); ++i) found[i] = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), i));
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// The next of them, behind those that are there.
void put(const py::list& list, pat::Addresses& to, size_t& count) {
  const pat::Addresses some = addresses(list);
  const size_t n = std::min(some.size(), to.size() - count);
  std::copy_n(some.begin(), n, to.begin() + static_cast<int64_t>(count));
  count += n;
}

// A list or a tuple of the same.
py::object fast(const py::object& sequence) {
  const auto found = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "expected a list"));
  if (!found) throw py::error_already_set();
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

// Calls work(meanwhile): what `bring` does to bring its tensors is done while others work, and is the only part of it
// that needs the GIL. What it raises stops the work, and is raised then.
template <class Bring, class Work>
void beside(const Bring& bring, const Work& work) {
  std::exception_ptr raised;
  std::unique_ptr<py::gil_scoped_release> unlocked;
  work([&](pat::Arrived& arrived) {
    try {
      bring(arrived);
    } catch (...) {
      raised = std::current_exception();
      arrived.stop();
    }
    unlocked = std::make_unique<py::gil_scoped_release>();
  });
  unlocked.reset();
  if (raised) std::rethrow_exception(raised);
}

// `parts` is an iterator over pairs of lists of addresses, some of each at a time.
void compact(const py::object& parts, uintptr_t tiles, uintptr_t out_tiles, int64_t n_tiles, int64_t element_bytes,
             uintptr_t index, int threads, const py::object& then) {
  const auto *from = pointer<pat::Tile>(tiles), *to = pointer<pat::Tile>(out_tiles);
  pat::Addresses out(pat::tensors_of(to, n_tiles)), x(pat::tensors_of(from, n_tiles));
  const auto bring = [&](pat::Arrived& arrived) {
    size_t outs = 0, xs = 0;
    for (const py::handle part : py::iter(parts)) {
      put(part[py::int_(0)], out, outs);
      put(part[py::int_(1)], x, xs);
      // All of one may be there before all of the other.
      arrived.tensors(static_cast<int64_t>(outs == out.size() ? xs : xs == x.size() ? outs : std::min(outs, xs)));
    }
    if (outs < out.size() || xs < x.size()) throw py::value_error(kFewer);
    arrived.all();
    if (!then.is_none()) then();
  };
  beside(bring, [&](const pat::Meanwhile& meanwhile) {
    pat::channel_compact(out, x, from, to, n_tiles, element_bytes, pointer<int32_t>(index), threads, meanwhile);
  });
}

// Runs as rows of three, and the sizes of groups; these and the tiles stay with the caller.
std::unique_ptr<pat::Grouping> grouping(uintptr_t tiles, int64_t n_tiles, uintptr_t runs, int64_t n_runs, int64_t slots,
                                        uintptr_t sizes, int64_t n_groups, int64_t channels) {
  return std::make_unique<pat::Grouping>(pointer<pat::Tile>(tiles), n_tiles, pointer<pat::Run>(runs), n_runs, slots,
                                         pointer<int64_t>(sizes), n_groups, channels);
}

// Tensors of which others read the first when the last are yet to be compared with their likes.
class Recognising {
 public:
  Recognising(const py::object& tensors, const pat::Known& known)
      : tensors_(fast(tensors)), known_(known), all_(known.fits(tensors_.ptr())), x_(known.size()) {}

  const pat::Addresses& addresses() const { return x_; }
  bool all() const { return all_; }
  // Whether some lie elsewhere than those that were looked at.
  bool moved() const { return x_ != known_.places(); }

  // Stops the work at the first that differs.
  void bring(pat::Arrived& arrived) {
    int64_t step = kFirst;
    for (int64_t at = 0; all_ && at < known_.size(); step = kStep) {
      const int64_t to = std::min(at + step, known_.size());
      all_ = known_.recognise(tensors_.ptr(), at, to, x_.data());
      at = to;
      if (all_) arrived.tensors(at);
    }
    if (all_) arrived.all();
    else arrived.stop();
  }

 private:
  static constexpr int64_t kFirst = 4, kStep = 16;

  const py::object tensors_;
  const pat::Known& known_;
  bool all_;
  pat::Addresses x_;
};

// `out` makes the sums' memory while the xs are read, and says where it is; it is told whether some have moved. What it
// raises comes out. False: a tensor is not as known; nothing came of it.
bool totals(const py::object& out, const py::object& xs, const pat::Known& known, double p, const pat::Grouping& of,
            bool divided, int threads) {
  const std::optional<pat::DType> dtype = known.dtype();
  if (!dtype || known.size() < of.n_tensors) return false;
  Recognising x(xs, known);
  void* sums = nullptr;
  const auto bring = [&](pat::Arrived& arrived) {
    x.bring(arrived);
    if (x.all()) sums = pointer<void>(py::cast<uintptr_t>(out(x.moved())));
  };
  beside(bring, [&](const pat::Meanwhile& meanwhile) {
    pat::channel_totals(x.addresses(), *dtype, p, of, divided, sums, threads, meanwhile);
  });
  return x.all();
}

// `ys` makes the list of their addresses while the xs are read; nothing is added if it raises. False: as above.
bool push(const py::object& ys, const py::object& xs, const pat::Known& known, double p, const pat::Grouping& of,
          double alpha, double strength, uintptr_t where, int threads) {
  const std::optional<pat::DType> dtype = known.dtype();
  if (!dtype || known.size() < of.n_tensors) return false;
  Recognising x(xs, known);
  pat::Addresses y;
  const auto bring = [&](pat::Arrived& arrived) {
    x.bring(arrived);
    if (!x.all()) return;
    y = addresses(ys());
    if (static_cast<int64_t>(y.size()) < of.n_tensors) throw py::value_error(kFewer);
  };
  beside(bring, [&](const pat::Meanwhile& meanwhile) {
    pat::group_push(y, x.addresses(), *dtype, p, of, alpha, strength, pointer<uint8_t>(where), threads, meanwhile);
  });
  return x.all();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of pat_fast. Arguments are trusted; call pat_fast.ops instead.";
  m.def("reduce", &reduce);
  m.def("axpy", &axpy);
  m.def("scale", &scale);
  m.def("compact", &compact);
  py::class_<pat::Grouping>(m, "Grouping").def(py::init(&grouping)).def_readonly("channels", &pat::Grouping::channels);
  py::class_<pat::Known>(m, "Known")
      .def(py::init<const py::capsule&, const py::sequence&, const std::vector<uintptr_t>&>())
      .def("matches",
           [](const pat::Known& known, const py::object& tensors) {
             pat::Addresses found(known.size());
             return known.recognise(fast(tensors).ptr(), found.data());
           })
      .def("are_apart",
           [](const pat::Known& known, const py::object& tensors, const pat::Known& of, const py::object& others) {
             return known.apart(fast(tensors).ptr(), of, fast(others).ptr());
           })
      .def("expect", &pat::Known::expect);
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

// pat_fast._CUDA: hands addresses to the launches. Importing it does not touch a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"

namespace py = pybind11;

namespace {

using namespace pat::cuda;
using Pointers = std::vector<uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
py::bytes bytes_of(const std::vector<T>& items) {
  return py::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

// (works, gathers, entries of workspace)
py::tuple plan(uintptr_t tiles, int64_t n_tiles, int64_t element_bytes) {
  const Plan made = make_plan(pointer<pat::Tile>(tiles), n_tiles, element_bytes);
  return py::make_tuple(bytes_of(made.works), bytes_of(made.gathers), made.workspace);
}

py::bytes plan_moves(uintptr_t tiles, uintptr_t out_tiles, int64_t n_tiles, int64_t element_bytes) {
  return bytes_of(make_moves(pointer<pat::Tile>(tiles), pointer<pat::Tile>(out_tiles), n_tiles, element_bytes));
}

struct Target {
  int64_t tensors;
  uintptr_t table;
  int device;
  uintptr_t stream;

  Call call(const Pointers& pointers) const {
    return {pointers, pointer<uintptr_t>(table), tensors, device, pointer<void>(stream)};
  }
};

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of pat_fast. Arguments are trusted; call pat_fast.ops instead.";
  py::class_<Target>(m, "Target", "Tensors in each list, room for all their addresses, device and stream.")
      .def(py::init<int64_t, uintptr_t, int, uintptr_t>());
  m.def("plan", &plan);
  m.def("plan_moves", &plan_moves);
  m.def("reduce", [](const Pointers& pointers, const Target& on, uintptr_t works, int64_t n_works, uintptr_t gathers,
                     int64_t n_gathers, int dtype, int func, double p, uintptr_t out, uintptr_t workspace) {
    reduce(on.call(pointers), pointer<Work>(works), n_works, pointer<Gather>(gathers), n_gathers,
           static_cast<pat::DType>(dtype), static_cast<pat::Func>(func), p, pointer<void>(out),
           pointer<void>(workspace));
  });
  m.def("axpy",
        [](const Pointers& pointers, const Target& on, uintptr_t works, int64_t n_works, int dtype, uintptr_t coef) {
          axpy(on.call(pointers), pointer<Work>(works), n_works, static_cast<pat::DType>(dtype), pointer<void>(coef));
        });
  m.def("scale", [](const Pointers& pointers, const Target& on, uintptr_t works, int64_t n_works, int dtype,
                    uintptr_t values) {
    scale(on.call(pointers), pointer<Work>(works), n_works, static_cast<pat::DType>(dtype), pointer<void>(values));
  });
  m.def("compact", [](const Pointers& pointers, const Target& on, uintptr_t moves, int64_t n_moves,
                      int64_t element_bytes, uintptr_t index) {
    compact(on.call(pointers), pointer<Move>(moves), n_moves, element_bytes, pointer<int32_t>(index));
  });
  m.def("device_count", &device_count, "Devices that this build can see; 0 without a driver.");
  m.def("runtime_version", &runtime_version);
  m.def("archs", &archs);
  m.attr("WORK_BYTES") = sizeof(Work);
  m.attr("GATHER_BYTES") = sizeof(Gather);
  m.attr("MOVE_BYTES") = sizeof(Move);
}

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

Groups groups(uintptr_t starts, uintptr_t slots, uintptr_t firsts, uintptr_t channel, int64_t channels,
              int64_t n_groups, int64_t n_slots) {
  return {pointer<int32_t>(starts),
          pointer<int32_t>(slots),
          pointer<int32_t>(firsts),
          pointer<int32_t>(channel),
          channels,
          n_groups,
          n_slots};
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

// The blocks of a table: where the descriptions of the first pass are, those of the second behind them, how many.
struct Blocks {
  int64_t works, gathers;

  const Work* first(uintptr_t start) const { return pointer<Work>(start); }
  const Gather* second(uintptr_t start) const { return pointer<Gather>(start + works * sizeof(Work)); }
};

void run_reduce(const Pointers& pointers, const Target& on, uintptr_t start, const Blocks& blocks, int dtype, int func,
                double p, uintptr_t out, uintptr_t workspace) {
  reduce(on.call(pointers), blocks.first(start), blocks.works, blocks.second(start), blocks.gathers,
         static_cast<pat::DType>(dtype), static_cast<pat::Func>(func), p, pointer<void>(out), pointer<void>(workspace));
}

void run_axpy(const Pointers& pointers, const Target& on, uintptr_t start, const Blocks& blocks, int dtype,
              uintptr_t coef) {
  axpy(on.call(pointers), blocks.first(start), blocks.works, static_cast<pat::DType>(dtype), pointer<void>(coef));
}

// `slots` has room for a value each, `workspace` behind it.
void run_totals(const Pointers& pointers, const Target& on, uintptr_t start, const Blocks& blocks, int dtype, int func,
                double p, const Groups& of, bool divided, uintptr_t out, uintptr_t slots) {
  const uintptr_t workspace = slots + of.n_slots * (dtype == pat::kF64 ? 8 : 4);
  run_reduce(pointers, on, start, blocks, dtype, func, p, slots, workspace);
  totals(on.call(pointers), of, static_cast<pat::DType>(dtype), pointer<void>(slots), divided, pointer<void>(out));
}

void run_push(const Pointers& pointers, const Target& on, uintptr_t start, const Blocks& blocks, int dtype, int func,
              double p, const Groups& of, double alpha, double strength, uintptr_t where, uintptr_t values,
              uintptr_t slots) {
  run_totals(pointers, on, start, blocks, dtype, func, p, of, false, values, slots);
  weigh(on.call(pointers), of, static_cast<pat::DType>(dtype), pointer<void>(values), alpha, strength,
        pointer<uint8_t>(where), pointer<void>(slots));
  run_axpy(pointers, on, start, blocks, dtype, slots);
}

}  // namespace

// Classes are local to the module: a test loads a second one, with other launches.
PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of pat_fast. Arguments are trusted; call pat_fast.ops instead.";
  py::class_<Target>(m, "Target", "Tensors in each list, room for all their addresses, device and stream.")
      .def(py::init<int64_t, uintptr_t, int, uintptr_t>());
  m.def("plan", &plan);
  m.def("plan_moves", &plan_moves);
  m.def("reduce", &run_reduce);
  m.def("axpy", &run_axpy);
  m.def("scale", [](const Pointers& pointers, const Target& on, uintptr_t start, const Blocks& blocks, int dtype,
                    uintptr_t values) {
    scale(on.call(pointers), blocks.first(start), blocks.works, static_cast<pat::DType>(dtype), pointer<void>(values));
  });
  m.def("compact", [](const Pointers& pointers, const Target& on, uintptr_t moves, int64_t n_moves,
                      int64_t element_bytes, uintptr_t index) {
    compact(on.call(pointers), pointer<Move>(moves), n_moves, element_bytes, pointer<int32_t>(index));
  });
  py::class_<Blocks>(m, "Blocks", py::module_local()).def(py::init<int64_t, int64_t>());
  py::class_<Groups>(m, "Groups", py::module_local()).def(py::init(&groups));
  m.def("totals", &run_totals);
  m.def("push", &run_push);
  m.def("device_count", &device_count, "Devices that this build can see; 0 without a driver.");
  m.def("runtime_version", &runtime_version);
  m.def("archs", &archs);
  m.attr("FEW") = kFew;
  m.attr("WORK_BYTES") = sizeof(Work);
  m.attr("GATHER_BYTES") = sizeof(Gather);
  m.attr("MOVE_BYTES") = sizeof(Move);
}

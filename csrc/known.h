// Tensors that were looked at before, recognised by what DLPack's exchange API says of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace pat {

// What of DLPack 1.x is needed here, as https://dmlc.github.io/dlpack lays it out; its functions need the GIL.
namespace dlpack {

struct Tensor {
  void* data;
  struct Device {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct DType {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;  // in elements; they stay with the tensor
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const void* older;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*from_object)(void* object, Tensor* to);  // not 0: a Python exception is set; may be null
  void* current_stream;
};

}  // namespace dlpack

// Tensors, as far as later ones must be like them: type, dtype, device, shape, strides, and that their memory is there.
// Whether one is lazily negated or conjugated DLPack does not say.
class Known {
 public:
  // exchange: the capsule that tensors' type has as __dlpack_c_exchange_api__. storages: of each tensor, where PyTorch
  // may keep what it knows of its memory; nothing is read there, or written. Throws py::type_error where the capsule is
  // another, and what PyTorch raises for a tensor that it cannot describe.
  Known(const pybind11::capsule& exchange, const pybind11::sequence& tensors, const std::vector<uintptr_t>& storages);

  // That all of them have, which are in the memory of the CPU; else none.
  std::optional<DType> dtype() const { return dtype_; }

  // Where the tensors that were looked at have their memory.
  const std::vector<void*>& places() const { return places_; }

  int64_t size() const { return static_cast<int64_t>(likes_.size()); }

  // Whether a tuple or list is as long.
  bool fits(PyObject* tensors) const { return PySequence_Fast_GET_SIZE(tensors) == size(); }

  // Whether those in [from, to) of a tuple or list that fits are like theirs, which are taken in order; `addresses` get
  // where their memory begins.
  bool recognise(PyObject* tensors, int64_t from, int64_t to, void** addresses) const;

  // Whether a tuple or list fits and all of it is so.
  bool recognise(PyObject* tensors, void** addresses) const {
    return fits(tensors) && recognise(tensors, 0, size(), addresses);
  }

  // Whether all of `tensors` are like theirs, all of `others` like those of `of`, and none reaches into another one's
  // memory. Tensors that lie in one another's gaps do.
  bool apart(PyObject* tensors, const Known& of, PyObject* others) const;

  // Asks for the ones that were recognised last, which are likely to come again.
  void expect() const;

 private:
  struct Like {
    PyTypeObject* type;
    dlpack::Tensor tensor;           // its pointers mean nothing
    int64_t extents;                 // where shape and strides begin in `extents_`
    int64_t reach;                   // bytes from its first to behind its last element; 0: has none
    uintptr_t storage;               // that of the first one
    mutable const PyObject* object;  // the last one like it
    mutable const void* data;        // where that had its memory
    mutable uintptr_t seen;          // and its shape, near all else of it
  };

  static void ask_for(const PyObject* object, const Like& like);
  bool is_known(PyObject* tensor, const Like& like, void** address) const;

  const dlpack::Exchange* exchange_;
  std::vector<Like> likes_;
  std::vector<int64_t> extents_;
  std::vector<void*> places_;
  std::optional<DType> dtype_;
};

}  // namespace pat

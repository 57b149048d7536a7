#include "known.h"

#include <algorithm>
#include <utility>

namespace pat {
namespace {

// What PyTorch has freed, or only makes up, begins at null, and a view of it so far behind. Others may lie there, too:
// they have to be looked at by who can tell.
constexpr uintptr_t kLow = uintptr_t(1) << 33;

constexpr int64_t kAhead = 16;

std::optional<DType> dtype_of(const dlpack::Tensor& t) {
  constexpr int kCpu = 1, kFloat = 2, kBfloat = 4;
  if (t.device.type != kCpu || t.dtype.lanes != 1) return {};
  if (t.dtype.code == kBfloat && t.dtype.bits == 16) return kBF16;
  if (t.dtype.code != kFloat) return {};
  switch (t.dtype.bits) {
    case 16:
      return kF16;
    case 32:
      return kF32;
    case 64:
      return kF64;
    default:
      return {};
  }
}

int64_t reach_of(const dlpack::Tensor& t) {
  int64_t last = 0;
  for (int32_t i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return 0;
    last += (t.shape[i] - 1) * t.strides[i];
  }
  return (last + 1) * ((t.dtype.bits * t.dtype.lanes + 7) / 8);
}

}  // namespace

Known::Known(const pybind11::capsule& exchange, const pybind11::sequence& tensors,
             const std::vector<uintptr_t>& storages)
    : exchange_(static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"))) {
  if (exchange_ == nullptr) throw pybind11::error_already_set();
  if (exchange_->major != 1 || exchange_->from_object == nullptr)
    throw pybind11::type_error("expected DLPack 1.x with dltensor_from_py_object_no_sync");
  for (const pybind11::handle object : tensors) {
    Like like{};
    like.type = Py_TYPE(object.ptr());
    like.extents = static_cast<int64_t>(extents_.size());
    like.object = object.ptr();
    like.storage = storages.at(likes_.size());
    dlpack::Tensor& t = like.tensor;
    if (exchange_->from_object(object.ptr(), &t) != 0) throw pybind11::error_already_set();
    like.reach = reach_of(t);
    like.data = t.data;
    like.seen = reinterpret_cast<uintptr_t>(t.shape);
    places_.push_back(t.data);
    extents_.insert(extents_.end(), t.shape, t.shape + t.ndim);
    extents_.insert(extents_.end(), t.strides, t.strides + t.ndim);
    const std::optional<DType> dtype = dtype_of(t);
    dtype_ = likes_.empty() || dtype == dtype_ ? dtype : std::nullopt;
    likes_.push_back(like);
  }
}

// In caches that others have used meanwhile a tensor takes as long as reading two kilobytes. So they are asked for
// ahead: the object, the lines around its shape, and two of its storage.
void Known::ask_for(const PyObject* object, const Like& like) {
  constexpr uintptr_t kLine = 64;
  const auto ask = [](uintptr_t line) { __builtin_prefetch(reinterpret_cast<const void*>(line)); };
  __builtin_prefetch(object);
  for (uintptr_t line = like.seen - kLine; line != like.seen + 3 * kLine; line += kLine) ask(line);
  ask(like.storage), ask(like.storage + kLine);
}

bool Known::recognise(PyObject* tensors, int64_t from, int64_t to, void** addresses) const {
  PyObject** objects = PySequence_Fast_ITEMS(tensors);
  if (from == 0)
    for (int64_t i = 0; i < std::min(kAhead, size()); ++i) ask_for(objects[i], likes_[i]);
  for (int64_t i = from; i < to; ++i) {
    if (i + kAhead < size()) ask_for(objects[i + kAhead], likes_[i + kAhead]);
    if (!is_known(objects[i], likes_[i], addresses + i)) return false;
  }
  return true;
}

bool Known::apart(PyObject* tensors, const Known& of, PyObject* others) const {
  std::vector<void*> at(size() + of.size());
  if (!recognise(tensors, at.data()) || !of.recognise(others, at.data() + size())) return false;
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;  // first byte, byte after the last
  spans.reserve(at.size());
  for (size_t i = 0; i < at.size(); ++i) {
    const Like& like = i < likes_.size() ? likes_[i] : of.likes_[i - likes_.size()];
    const auto begin = reinterpret_cast<uintptr_t>(at[i]);
    if (like.reach > 0) spans.emplace_back(begin, begin + like.reach);
  }
  std::sort(spans.begin(), spans.end());
  return std::adjacent_find(spans.begin(), spans.end(),
                            [](const auto& a, const auto& b) { return a.second > b.first; }) == spans.end();
}

void Known::expect() const {
  for (const Like& like : likes_) ask_for(like.object, like);
}

bool Known::is_known(PyObject* object, const Like& like, void** address) const {
  if (Py_TYPE(object) != like.type) return false;
  dlpack::Tensor t;
  if (exchange_->from_object(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const dlpack::Tensor& of = like.tensor;
  const int64_t* shape = extents_.data() + like.extents;
  if (t.ndim != of.ndim || !std::equal(t.shape, t.shape + t.ndim, shape) ||
      !std::equal(t.strides, t.strides + t.ndim, shape + t.ndim))
    return false;
  if (t.device.type != of.device.type || t.device.index != of.device.index || t.dtype.code != of.dtype.code ||
      t.dtype.bits != of.dtype.bits || t.dtype.lanes != of.dtype.lanes || t.byte_offset != 0)
    return false;
  if (like.reach > 0 && t.data != like.data && reinterpret_cast<uintptr_t>(t.data) < kLow) return false;
  like.object = object;
  like.data = t.data;
  like.seen = reinterpret_cast<uintptr_t>(t.shape);
  *address = t.data;
  return true;
}

}  // namespace pat

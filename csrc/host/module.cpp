// parrot_kernels._host: helpers for the host that need no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "packing.h"

namespace py = pybind11;

namespace {

// No forcecast: a float array is an error, never a rounded one.
using Lengths = py::array_t<int64_t, py::array::c_style>;

std::vector<std::vector<int64_t>> first_fit_decreasing(const Lengths& lengths, int64_t capacity) {
  if (lengths.ndim() != 1) {
    throw py::value_error("lengths must have 1 dimension, got " + std::to_string(lengths.ndim()));
  }
  const std::span<const int64_t> view(lengths.data(), static_cast<size_t>(lengths.size()));
  const py::gil_scoped_release release;
  return parrot::first_fit_decreasing(view, capacity);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Helpers for the host that need no torch.";
  m.def("first_fit_decreasing", &first_fit_decreasing, py::arg("lengths"), py::arg("capacity"),
        R"(Packs samples into bins of at most `capacity` rows: first-fit decreasing, O(n log n), deterministic.

Args:
    lengths: int64 array [n] of lengths in [0, capacity].
    capacity: rows that a bin can hold.

Returns:
    For every bin the indices of its samples, longest first; equal lengths by rising index.

Raises:
    ValueError: a length is negative or exceeds the capacity (names index, length and capacity).
)");
}

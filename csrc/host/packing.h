// Bin packing of sample lengths; no torch, no Python.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace parrot {

// First-fit decreasing: samples in order of falling length (equal lengths: the smaller index first), each into the
// first bin that still has room. O(n log n) by a segment tree over the room left in the bins. Needs at most
// 11/9 OPT + 6/9 bins (Dosa, 2007). The result depends on the arguments only.
//
// Returns for every bin the indices of its samples in the order they were placed.
// Throws std::invalid_argument naming index, length and capacity when a length is negative or exceeds `capacity`.
std::vector<std::vector<int64_t>> first_fit_decreasing(std::span<const int64_t> lengths, int64_t capacity);

}  // namespace parrot

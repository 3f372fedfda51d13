#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

namespace parrot {
namespace {

void check_lengths(std::span<const int64_t> lengths, int64_t capacity) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] >= 0 && lengths[i] <= capacity) continue;
    throw std::invalid_argument("lengths[" + std::to_string(i) + "] must be in [0, capacity=" +
                                std::to_string(capacity) + "], got " + std::to_string(lengths[i]));
  }
}

// Room left in each bin at the leaves, the largest room below it at every inner node.
class RoomTree {
 public:
  RoomTree(size_t bins, int64_t capacity) : leaves_(std::bit_ceil(std::max<size_t>(bins, 1))) {
    room_.assign(2 * leaves_, capacity);
  }

  // The first bin with room for `length`. One exists always: there are as many bins as samples.
  size_t take_first(int64_t length) {
    size_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (room_[node] < length) ++node;
    }
    room_[node] -= length;
    const size_t bin = node - leaves_;
    for (node /= 2; node >= 1; node /= 2) room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    return bin;
  }

 private:
  size_t leaves_;
  std::vector<int64_t> room_;
};

}  // namespace

std::vector<std::vector<int64_t>> first_fit_decreasing(std::span<const int64_t> lengths, int64_t capacity) {
  check_lengths(lengths, capacity);
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  RoomTree room(lengths.size(), capacity);
  std::vector<std::vector<int64_t>> bins;
  for (const int64_t index : order) {
    const size_t bin = room.take_first(lengths[index]);
    if (bin == bins.size()) bins.emplace_back();
    bins[bin].push_back(index);
  }
  return bins;
}

}  // namespace parrot

// Hopper's asynchronous machinery for device_emulator.h: barriers in shared memory, tensor copies, products of a warp
// group. What is asynchronous on the device happens as late as the program allows: copies arrive after a random while,
// products read shared memory only when they are waited for. Formats are those of the PTX ISA.
#pragma once

#include "device_emulator.h"

#define __grid_constant__

namespace parrot::cuda::device {

using Barrier = uint64_t;  // only its address counts, see emulator::Transactions

struct Planes {
  int64_t width, rows, depth, pitch;
};

struct TensorMap {
  const uint16_t* base;
  Planes planes;
  int box_rows;
};

inline emulator::Block& block() {
  return *emulator::grid->running->block;
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block().shared);
}

inline void barrier_init(Barrier* barrier, int arrivals) {
  block().transactions[barrier] = {arrivals, arrivals, 0, 0};
}

inline void fence_barrier_init() {}
inline void fence_shared_writes() {}

inline void barrier_arrive(Barrier* barrier) {
  block().transactions.at(barrier).change(1, 0);
}

inline void barrier_arrive_in_block(Barrier* barrier, int rank) {
  emulator::Block& other = *emulator::grid->blocks.at(rank);
  other.transactions.at(in_block(barrier, rank)).change(1, 0);
}

inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  block().transactions.at(barrier).change(1, static_cast<int64_t>(bytes));
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulator::wait_until([&state = block().transactions.at(barrier), parity] { return (state.phase & 1) != parity; });
}

inline void named_barrier(int name, int threads) {
  emulator::Barrier& barrier = block().named[name];
  barrier.wanted = threads;
  emulator::wait(barrier);
}

template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

// The swizzle exchanges the 16-byte parts of a 128-byte row by the row's place among eight.
inline uint32_t swizzled(uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

// What the copy engine reads or writes outside of the tensor: zeros, and nothing.
inline uint16_t* element(const TensorMap& map, int64_t x, int64_t y, int64_t z) {
  const Planes& all = map.planes;
  const bool inside = x >= 0 && x < all.width && y >= 0 && y < all.rows && z >= 0 && z < all.depth;
  return inside ? const_cast<uint16_t*>(map.base) + (z * all.rows + y) * all.pitch + x : nullptr;
}

// Shared address of a box, which must lie within the shared memory of a block.
inline uint32_t checked_box(const void* shared, const TensorMap& map) {
  const uint32_t start = shared_address(shared);
  emulator::check(start % 1024 == 0, "a box must start at a multiple of 1024 bytes");
  emulator::check(start + map.box_rows * 128 <= block().shared_bytes, "a box must end within shared memory");
  return start;
}

// To the same place in each block of the cluster whose bit is set in `blocks`, counted on its own barrier.
inline void copy_box_to_blocks(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z,
                               uint32_t blocks) {
  const uint32_t start = checked_box(shared, map), counter = shared_address(barrier);
  for (unsigned rank = 0; rank < emulator::grid->blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    emulator::Block& to = *emulator::grid->blocks[rank];
    emulator::grid->copies.push_back([=, &to] {
      emulator::check(to.running > 0, "a copy into a block that has ended");
      for (int row = 0; row < map.box_rows; ++row) {
        for (int column = 0; column < 64; ++column) {
          const uint16_t* from = element(map, x + column, y + row, z);
          const uint16_t value = from ? *from : 0;
          memcpy(to.shared + swizzled(start + row * 128 + column * 2), &value, 2);
        }
      }
      to.transactions.at(to.shared + counter).change(0, -static_cast<int64_t>(map.box_rows) * 128);
    });
  }
}

inline void copy_box(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  copy_box_to_blocks(shared, map, barrier, x, y, z, 1u << cluster_rank());
}

// As late as it may be: when it is waited for.
inline void copy_vector(void* shared, const void* address, bool exists) {
  const uint32_t start = shared_address(shared);
  emulator::check(start % 16 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0, "vectors must be aligned");
  emulator::check(start + 16 <= block().shared_bytes, "a vector must end within shared memory");
  emulator::grid->running->vectors.push_back([=] {
    if (exists) {
      memcpy(shared, address, 16);
    } else {
      memset(shared, 0, 16);
    }
  });
}

inline void vectors_commit() {
  emulator::Fiber& fiber = *emulator::grid->running;
  fiber.committed_vectors.push_back(std::move(fiber.vectors));
  fiber.vectors.clear();
}

template <int kPending>
void vectors_wait() {
  auto& committed = emulator::grid->running->committed_vectors;
  while (committed.size() > kPending) {
    for (auto& copy : committed.front()) copy();
    committed.erase(committed.begin());
  }
}

inline void store_box(const TensorMap& map, const void* shared, int x, int y, int z) {
  const uint32_t start = checked_box(shared, map);
  const unsigned char* from = block().shared + start;
  std::vector<unsigned char> before(from, from + map.box_rows * 128);
  auto write = [=, memory = block().shared] {
    for (int row = 0; row < map.box_rows; ++row) {
      for (int column = 0; column < 64; ++column) {
        uint16_t* to = element(map, x + column, y + row, z);
        if (to) memcpy(to, memory + swizzled(start + row * 128 + column * 2), 2);
      }
    }
  };
  emulator::grid->running->stores.push_back({std::move(before), from, write});
}

inline void stores_commit() {
  emulator::Fiber& fiber = *emulator::grid->running;
  fiber.committed_stores.push_back(std::move(fiber.stores));
  fiber.stores.clear();
}

// Until at most kPending committed groups of stores have not read shared memory; then their writes, too, are done.
template <int kPending>
void stores_wait_read() {
  auto& committed = emulator::grid->running->committed_stores;
  while (committed.size() > kPending) {
    for (const emulator::Store& store : committed.front()) store.finish();
    committed.erase(committed.begin());
  }
}

inline void products_begin() {}

inline void products_commit() {
  emulator::Fiber& fiber = *emulator::grid->running;
  fiber.committed.push_back(std::move(fiber.products));
  fiber.products.clear();
}

template <int kPending>
void products_wait() {
  auto& committed = emulator::grid->running->committed;
  while (committed.size() > kPending) {
    for (auto& product : committed.front()) product();
    committed.erase(committed.begin());
  }
}

template <int kCount>
void pin(float (&)[kCount]) {}

// An operand in shared memory. K-major: 8 rows of 128 bytes, then the stride. M- or N-major ("transposed"): 64 columns,
// then the leading offset; 8 rows of the reduction, then the stride.
struct Operand {
  const emulator::Block& block;
  uint64_t descriptor;
  bool transposed;

  uint16_t operator()(int index, int k) const { return at<uint16_t>(index, k); }

  template <typename Element>
  Element at(int index, int k) const {
    emulator::check(descriptor >> 62 == 1, "only the 128-byte swizzle is known");
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const uint32_t offset = transposed ? index % 64 * 2 + index / 64 * leading + k % 8 * 128 + k / 8 * stride
                                       : index % 8 * 128 + index / 8 * stride + k * sizeof(Element);
    Element value;
    memcpy(&value, block.shared + swizzled(start + offset), sizeof(Element));
    return value;
  }
};

template <int kCount, typename ToFloat>
void wgmma_any(float (&c)[kCount], uint64_t a, bool transposed_a, uint64_t b, bool transposed_b, ToFloat to_float) {
  emulator::Fiber& fiber = *emulator::grid->running;
  fiber.products.push_back([=, &fiber, out = &c[0]] {
    const Operand left{*fiber.block, a, transposed_a}, right{*fiber.block, b, transposed_b};
    const int lane = fiber.thread % 32, warp = fiber.thread / 32 % 4;
    float rows[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) rows[half][k] = to_float(left(16 * warp + lane / 4 + 8 * half, k));
    }
    for (int j = 0; j < kCount / 2; ++j) {
      const int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
      float values[16];
      for (int k = 0; k < 16; ++k) values[k] = to_float(right(column, k));
      for (int half = 0; half < 2; ++half) {
        float& sum = out[j / 2 * 4 + 2 * half + j % 2];
        for (int k = 0; k < 16; ++k) sum += rows[half][k] * values[k];
      }
    }
  });
}

template <bool kTransposedA, bool kTransposedB, int kCount>
void wgmma_bfloat16(float (&c)[kCount], uint64_t a, uint64_t b) {
  wgmma_any(c, a, kTransposedA, b, kTransposedB, bfloat_to_float);
}

template <bool kTransposedA, bool kTransposedB, int kCount>
void wgmma_float16(float (&c)[kCount], uint64_t a, uint64_t b) {
  wgmma_any(c, a, kTransposedA, b, kTransposedB, half_to_float);
}

// e4m3: three bits of mantissa, exponents from -6, no infinity.
inline float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits >> 7 ? -value : value;
}

template <bool kAdd, int kCount>
void wgmma_e4m3(float (&c)[kCount], uint64_t a, uint64_t b) {
  emulator::Fiber& fiber = *emulator::grid->running;
  fiber.products.push_back([=, &fiber, out = &c[0]] {
    const Operand left{*fiber.block, a, false}, right{*fiber.block, b, false};
    const int lane = fiber.thread % 32, warp = fiber.thread / 32 % 4;
    for (int i = 0; i < kCount; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = kAdd ? out[i] : 0.0f;
      for (int k = 0; k < 32; ++k) {
        sum += e4m3_to_float(left.at<uint8_t>(row, k)) * e4m3_to_float(right.at<uint8_t>(column, k));
      }
      out[i] = sum;
    }
  });
}

inline int make_tensor_map(TensorMap* map, const void* base, bool, const Planes& planes, int box_rows) {
  // What cuTensorMapEncodeTiled refuses.
  const bool valid = planes.width > 0 && planes.rows > 0 && planes.depth > 0 && planes.pitch % 8 == 0 &&
                     box_rows <= 256 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  *map = {static_cast<const uint16_t*>(base), planes, box_rows};
  return valid ? 0 : 1;
}

}  // namespace parrot::cuda::device

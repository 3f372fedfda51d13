// Threads of a cluster of blocks as fibers: barriers, a scheduler that shuffles, copies that finish when they like. The
// order in which fibers run between barriers is shuffled by `emulator_seed`: a missing barrier changes results from
// seed to seed. Shared memory starts full of NaN. When no fiber can go on, the run ends with an error (a deadlock).
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern "C" {
inline unsigned emulator_seed = 0;        // 0: fibers run in order
inline int emulator_multiprocessors = 2;  // of the device that is played
}

namespace emulator {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int wanted = 0, arrived = 0, generation = 0;
};

// A barrier in shared memory: a phase ends when all have arrived and all bytes have come.
struct Transactions {
  int wanted, missing;
  int64_t bytes;
  unsigned phase;

  void change(int arrivals, int64_t more_bytes) {
    bytes += more_bytes;
    missing -= arrivals;
    if (missing > 0 || bytes != 0) return;
    missing = wanted;
    ++phase;
  }
};

inline void check(bool condition, const char* message) {
  if (condition) return;
  fprintf(stderr, "emulator: %s\n", message);
  abort();
}

struct Warp {
  Barrier barrier;
  uint64_t values[32];
  float c[32][4];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  dim3 index;
  int running;  // threads that have not ended
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<int, Barrier> named;
  std::map<const void*, Transactions> transactions;
  std::vector<unsigned char> bytes;
  unsigned char* shared;
  size_t shared_bytes;
};

// A copy from shared to global memory. The device may read at any time until it is waited for.
struct Store {
  std::vector<unsigned char> before;  // shared memory when the copy was started
  const unsigned char* from;
  std::function<void()> write;

  void finish() const {
    check(!memcmp(before.data(), from, before.size()), "shared memory changed before a store from it was waited for");
    write();
  }
};

struct Fiber {
  ucontext_t start;  // only to enter the fiber: swapcontext would call the kernel each time
  jmp_buf context;
  char* stack;
  Block* block;
  unsigned thread;
  bool started = false, done = false;
  std::function<bool()> ready;                  // empty: can run
  std::vector<std::function<void()>> products;  // of this thread's warp group, not committed
  std::vector<std::vector<std::function<void()>>> committed;
  std::vector<std::function<void()>> vectors;  // copies of this thread, not committed
  std::vector<std::vector<std::function<void()>>> committed_vectors;
  std::vector<Store> stores;
  std::vector<std::vector<Store>> committed_stores;
};

struct Grid {
  dim3 size;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;  // reused from block to block
  jmp_buf scheduler;
  Fiber* running = nullptr;
  std::function<void()> body;
  std::vector<std::function<void()>> copies;  // under way
};

inline Grid* grid = nullptr;

// Lets other fibers run until `ready` holds.
template <typename Ready>
void wait_until(Ready ready) {
  if (ready()) return;
  grid->running->ready = ready;
  if (_setjmp(grid->running->context) == 0) _longjmp(grid->scheduler, 1);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.wanted) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until([&barrier, generation = barrier.generation] { return barrier.generation != generation; });
}

inline Warp& warp() {
  return grid->running->block->warps[grid->running->thread / 32];
}
inline unsigned lane() {
  return grid->running->thread % 32;
}

inline void fiber_main() {
  grid->body();
  Fiber& own = *grid->running;
  check(own.vectors.empty() && own.committed_vectors.empty(), "a thread ended before its copies had come");
  check(own.stores.empty() && own.committed_stores.empty(), "a thread ended before its stores had read shared memory");
  --own.block->running;
  own.done = true;
  _longjmp(grid->scheduler, 1);
}

inline void resume(Fiber* fiber) {
  grid->running = fiber;
  fiber->ready = nullptr;
  if (_setjmp(grid->scheduler)) return;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

inline void start_block(dim3 index, int threads, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->running = threads;
  block->barrier.wanted = threads;
  grid->cluster_barrier.wanted += threads;
  block->warps.resize(threads / 32);
  for (Warp& each : block->warps) each.barrier.wanted = 32;
  block->shared_bytes = shared_bytes;
  block->bytes.assign(shared_bytes + 1024, 0xff);
  const auto start = reinterpret_cast<uintptr_t>(block->bytes.data());
  block->shared = block->bytes.data() + (1024 - start % 1024) % 1024;
  for (int thread = 0; thread < threads; ++thread) {
    auto fiber = std::make_unique<Fiber>();
    if (grid->fibers.size() == grid->stacks.size()) grid->stacks.emplace_back(new char[kStack]);
    fiber->stack = grid->stacks[grid->fibers.size()].get();
    fiber->block = block.get();
    fiber->thread = thread;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = kStack;
    makecontext(&fiber->start, fiber_main, 0);
    grid->fibers.push_back(std::move(fiber));
  }
  grid->blocks.push_back(std::move(block));
}

// Finishes some of the copies under way, all of them with seed 0; false when there are none.
inline bool run_copies(std::mt19937& random) {
  auto copies = std::move(grid->copies);
  grid->copies.clear();
  for (auto& copy : copies) {
    if (emulator_seed && random() % 4) {
      grid->copies.push_back(std::move(copy));
    } else {
      copy();
    }
  }
  return !copies.empty();
}

// Runs the started blocks to their end; false when their threads wait forever.
inline bool run_blocks(std::mt19937& random) {
  std::vector<Fiber*> alive;
  for (auto& fiber : grid->fibers) alive.push_back(fiber.get());
  while (!alive.empty()) {
    if (emulator_seed) std::shuffle(alive.begin(), alive.end(), random);
    bool progress = run_copies(random);
    for (Fiber* fiber : alive) {
      if (fiber->ready && !fiber->ready()) continue;
      resume(fiber);
      progress = true;
    }
    if (!progress) return false;
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->done; }), alive.end());
  }
  check(grid->copies.empty(), "copies into shared memory were under way when the last thread ended");
  grid->fibers.clear();
  grid->blocks.clear();
  grid->cluster_barrier = {};
  return true;
}

}  // namespace emulator

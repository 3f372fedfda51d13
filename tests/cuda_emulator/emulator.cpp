// What the emulated library has in the place of the CUDA runtime, and the switches that tests turn.
#include "device_emulator.h"

extern "C" const char* parrot_cuda_error_string(int error) {
  using namespace parrot::cuda::device;
  if (error == kInvalidConfiguration) return "the grid is no whole number of clusters";
  return error == kDeadlock ? "deadlock: every thread waits" : "unknown error";
}

extern "C" void parrot_emulator_set(unsigned seed, int multiprocessors) {
  emulator_seed = seed;
  emulator_multiprocessors = multiprocessors;
}

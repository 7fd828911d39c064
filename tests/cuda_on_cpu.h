// Stands in for csrc/launch.h where there is no GPU: CUDA kernels compiled as C++ and run on the CPU, a block after
// the other, a block's threads as fibers that take turns at __syncthreads(). It checks what a GPU's test would check of
// indices, sums and the order of shared memory; not races within a warp, nor speed.
//
// Numbers in the environment change how, from launch to launch: OFTSR_SEED, in which order blocks come, and between two
// barriers a block's threads; OFTSR_MOST_BLOCKS, how many a grid holds; OFTSR_EDGE_BLOCKS, that of each launch only so many run at
// its beginning and at its end, for tensors that are larger than the memory.
#pragma once
#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// A fiber is made once and then runs one thread after the other. swapcontext() is for its first step only: it asks the
// system to save the signal mask, which _setjmp() and _longjmp() do not.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool made = false, done = true;
};
inline jmp_buf scheduler;
inline Fiber* running;
inline std::function<void()> body;

inline void __syncthreads() {
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    __syncthreads();  // until there is a thread to run
    body();
    running->done = true;
  }
}

inline void resume(Fiber& f) {
  running = &f;
  if (_setjmp(scheduler)) return;
  if (f.made) _longjmp(f.at, 1);
  f.made = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.data();
  f.context.uc_stack.ss_size = f.stack.size();
  makecontext(&f.context, fiber_main, 0);
  setcontext(&f.context);
}

inline int64_t setting(const char* name, int64_t otherwise) {
  const char* text = getenv(name);
  return text ? atoll(text) : otherwise;
}
inline int64_t most_blocks() { return setting("OFTSR_MOST_BLOCKS", INT32_MAX); }

inline void run_block(dim3 threads, std::mt19937* random) {
  static std::vector<Fiber> fibers(256);
  unsigned count = threads.x * threads.y, left = count;
  for (unsigned i = 0; i < count; i++) {
    if (!fibers[i].made) resume(fibers[i]);
    fibers[i].done = false;
  }
  std::vector<unsigned> order;
  for (unsigned i = count; i-- > 0;) order.push_back(i);  // the last first: a missing __syncthreads() shows
  while (left) {
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (unsigned i : order) {
      if (fibers[i].done) continue;
      threadIdx = dim3(i % threads.x, i / threads.x);
      resume(fibers[i]);
      left -= fibers[i].done;
    }
    if (left && left < count) throw std::runtime_error("some threads of a block wait at a barrier that others never reach");
  }
}

template <class... P, class... A> void launch(Cuda, void (*kernel)(P...), int64_t blocks, dim3 threads, A... args) {
  if (blocks > most_blocks()) throw std::runtime_error("a CUDA kernel needs " + std::to_string(blocks) + " blocks, more than a grid holds");
  gridDim = dim3(unsigned(blocks));
  blockDim = threads;
  body = [&] { kernel(args...); };
  int64_t edge = setting("OFTSR_EDGE_BLOCKS", blocks), seed = setting("OFTSR_SEED", -1);
  std::mt19937 random(seed);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < std::min(edge, blocks); i++) order.push_back(i);
  for (int64_t i = std::max(edge, blocks - edge); i < blocks; i++) order.push_back(i);
  if (seed >= 0) std::shuffle(order.begin(), order.end(), random);
  for (int64_t i : order) {
    blockIdx = dim3(unsigned(i));
    run_block(threads, seed >= 0 ? &random : nullptr);
  }
}

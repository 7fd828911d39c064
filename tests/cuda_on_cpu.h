// Stands in for csrc/launch.h where there is no GPU: CUDA kernels compiled as C++ and run on the CPU, a block after
// the other, a block's threads as fibers that take turns at __syncthreads(). It checks what a GPU's test would check of
// indices, sums and the order of shared memory; not races within a warp, nor speed.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <functional>
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

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> body;

inline void __syncthreads() { swapcontext(&running->context, &scheduler); }

inline void fiber_main() {
  body();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

inline void run_block(dim3 threads) {
  static std::vector<Fiber> fibers(1024);
  unsigned count = threads.x * threads.y, left = count;
  for (unsigned i = 0; i < count; i++) {
    Fiber& f = fibers[i];
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, fiber_main, 0);
  }
  while (left) {
    for (unsigned i = count; i-- > 0;) {  // the last first: a missing __syncthreads() shows
      if (fibers[i].done) continue;
      running = &fibers[i];
      threadIdx = dim3(i % threads.x, i / threads.x);
      swapcontext(&scheduler, &running->context);
      left -= fibers[i].done;
    }
  }
}

template <class... P, class... A> void launch(Cuda, void (*kernel)(P...), int64_t blocks, dim3 threads, A... args) {
  gridDim = dim3(unsigned(blocks));
  blockDim = threads;
  body = [&] { kernel(args...); };
  for (int64_t i = 0; i < blocks; i++) {
    blockIdx = dim3(unsigned(i));
    run_block(threads);
  }
}

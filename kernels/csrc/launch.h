// Starting a CUDA kernel on PyTorch's stream, with the runtime's own API.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

constexpr int64_t most_blocks() { return INT32_MAX; }  // of a grid

template <class... P, class... A> void launch(Cuda device, void (*kernel)(P...), int64_t blocks, dim3 threads, A... args) {
  if (blocks == 0) return;
  if (blocks > most_blocks()) throw std::runtime_error("a CUDA kernel needs " + std::to_string(blocks) + " blocks, more than a grid holds");
  kernel<<<dim3(unsigned(blocks)), threads, 0, static_cast<cudaStream_t>(device.stream)>>>(args...);
  if (cudaError_t error = cudaGetLastError()) throw std::runtime_error(std::string("a CUDA kernel could not start: ") + cudaGetErrorString(error));
}

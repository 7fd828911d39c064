// Starting a CUDA kernel on PyTorch's stream, with the runtime's own API.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

template <class... P, class... A> void launch(Cuda device, void (*kernel)(P...), int64_t blocks, dim3 threads, A... args) {
  if (blocks == 0) return;
  kernel<<<dim3(unsigned(std::min<int64_t>(blocks, INT32_MAX))), threads, 0, static_cast<cudaStream_t>(device.stream)>>>(args...);
  if (cudaError_t error = cudaGetLastError()) throw std::runtime_error(std::string("a CUDA kernel could not start: ") + cudaGetErrorString(error));
}

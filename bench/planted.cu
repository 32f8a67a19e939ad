// A write past the end, planted: a compute-sanitizer that does not report it reports nothing, and its
// silence about our kernels would prove nothing. Used by gpu_check.py.

#include <cstdio>

__global__ void bupo_planted_write(int* data) { data[threadIdx.x + 1] = 1; }

int main() {
  int* data = nullptr;
  if (cudaMalloc(&data, 64 * sizeof(int)) != cudaSuccess) return 3;
  bupo_planted_write<<<1, 64>>>(data);
  cudaDeviceSynchronize();
  std::puts("planted: ran");
  return 0;
}

// A write past the end and a race, planted: a compute-sanitizer that does not report these reports
// nothing, and its silence about our kernels would prove nothing. Used by gpu_check.py.

#include <cstdio>
#include <cstring>

__global__ void bupo_planted_write(int* data) { data[threadIdx.x + 1] = 1; }

__global__ void bupo_planted_race(int* data) {
  __shared__ int shared[64];
  shared[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = shared[63 - threadIdx.x];  // no barrier between the two
}

int main(int count, char** arguments) {
  int* data = nullptr;
  if (cudaMalloc(&data, 64 * sizeof(int)) != cudaSuccess) return 3;
  cudaMemset(data, 0, 64 * sizeof(int));
  if (count > 1 && std::strcmp(arguments[1], "race") == 0)
    bupo_planted_race<<<1, 64>>>(data);
  else
    bupo_planted_write<<<1, 64>>>(data);
  cudaDeviceSynchronize();
  std::puts("planted: ran");
  return 0;
}

// What one instruction set gives: products of a few rows with a matrix of weights, tile by tile.
// Every instruction set compiles kernels.cc once for itself; native.cc chooses while running.
#pragma once
#include <cstdint>

namespace octavo {

enum class WeightType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// One call, y[t, n] = sum over k of x[t, k] * w[k, n], in float32 and in the order of k for every t and n,
// whatever the number of rows: a row's result does not depend on the rows beside it.
struct Matmul {
  const float* x;  // [tokens, k]
  const void* w;   // [k, n], or [n, k] when transposed
  float* y;        // [tokens, n]
  int64_t tokens, k, n;
  WeightType type;
  bool transposed;
};

struct Kernels {
  const char* name;
  int64_t lanes;  // k and n are multiples of it
  void (*columns)(const Matmul&, int64_t begin, int64_t end);  // of y, multiples of `lanes`
};

}  // namespace octavo

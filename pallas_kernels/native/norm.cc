// Root-mean-square norms of rows, of sums of two where a residual is added before.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

// Four sums at once hide a product's latency.
template <typename T>
inline float sum_of_squares(const T* x, int64_t size) {
  Vec sums[4]{};
  const auto add = [&](int c, int64_t at) {
    const Vec number = widen(x + at);
    sums[c] += number * number;
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= size; j += 4 * kLanes)
    for (int c = 0; c < 4; ++c) add(c, j + c * kLanes);
  for (int c = 0; j < size; j += kLanes, ++c) add(c, j);
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(n.x) + i * n.size;
    const float* weight = n.weight + i % n.turns * n.size;
    T* out = static_cast<T*>(n.out) + i * n.size;
    if (n.y != nullptr) {
      const T* y = static_cast<const T*>(n.y) + i * n.size;
      T* sum = static_cast<T*>(n.sum) + i * n.size;
      for (int64_t j = 0; j < n.size; j += kLanes) put(sum + j, widen(x + j) + widen(y + j));
      x = sum;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, n.size) / static_cast<float>(n.size) + n.eps);
    for (int64_t j = 0; j < n.size; j += kLanes) put(out + j, widen(x + j) * scale * widen(weight + j));
  }
}

}  // namespace

void norm(const Norm& n, int64_t begin, int64_t end) {
  if (n.is_bfloat16) norm_rows<uint16_t>(n, begin, end);
  else norm_rows<float>(n, begin, end);
}

}  // namespace octavo::ISA
